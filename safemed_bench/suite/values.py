"""The kinds of value a suite holds, each with one plain message for what is wrong."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator

DTYPES = ("auto", "fp32", "bf16", "fp16")


def parse_number(value: Any) -> float:
    """A finite number: 0.5, `1e-3` or a fraction such as `8/255`."""
    if isinstance(value, str):
        text = value.replace(" ", "")
        try:
            value = float(Fraction(text)) if "/" in text else float(text)
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(f"'{value}' is not a number or a fraction such as 8/255") from error
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"must be a number or a fraction such as 8/255, not {_what(value)}")
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"must be a finite number, not {value}")
    return float(value)


def check_scale(norm: str | None, eps: float) -> None:
    """ValueError where an eps cannot be meant on the [0, 1] pixel scale: L∞ above 1, L1 below one 8-bit level."""
    if norm == "linf" and eps > 1:
        raise ValueError(f"{eps:g} is above 1: eps is on the [0, 1] pixel scale. Did you mean {eps:g}/255?")
    if norm == "l1" and 0 < eps < 1 / 255:
        raise ValueError(f"{eps:g} allows no change at all: an L1 eps is a sum over all values of an image, such as 12")


def check_sigma(sigma: float) -> float:
    """`sigma`; ValueError where it cannot be meant on the [0, 1] pixel scale."""
    if sigma > 4:
        raise ValueError(f"{sigma:g} is far above 1: sigma is on the [0, 1] pixel scale. Did you mean {sigma:g}/255?")
    return sigma


def parse_whole(value: Any) -> int:
    """An integer; text of digits is taken, as environment variables hold nothing else."""
    if isinstance(value, str) and value.strip().lstrip("-").isdigit():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"must be a whole number, not {_what(value)}")
    return value


def _count_or(word: str) -> Any:
    def parse(value: Any) -> int | str:
        if value == word:
            return word
        try:
            number = parse_whole(value)
        except ValueError as error:
            raise ValueError(f"must be `{word}` or a whole number from 1, not {_what(value)}") from error
        if number < 1:
            raise ValueError(f"must be `{word}` or a whole number from 1, not {number}")
        return number

    return PlainValidator(parse)


def _dtype(value: Any) -> str:
    if value not in DTYPES:
        raise ValueError(f"must be {', '.join(DTYPES[:-1])} or {DTYPES[-1]}, not {value!r}")
    return str(value)


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"must be text, not {_what(value)}")
    return str(value)


def _what(value: Any) -> str:
    if value is None:
        return "nothing"
    kinds = {bool: "true/false", str: "text", int: "a number", float: "a number", dict: "a mapping", list: "a list"}
    name = kinds.get(type(value), type(value).__name__)
    return f"{name} ({value!r})" if isinstance(value, str | int | float) else name


Dtype = Annotated[str, PlainValidator(_dtype)]
Text = Annotated[str, BeforeValidator(_text)]
Number = Annotated[float, BeforeValidator(parse_number)]
Eps = Annotated[float, BeforeValidator(parse_number), Field(ge=0)]
Whole = Annotated[int, BeforeValidator(parse_whole), Field(ge=0)]
Count = Annotated[int, BeforeValidator(parse_whole), Field(ge=1)]
CountOrAll = Annotated[int | Literal["all"], _count_or("all")]
CountOrAuto = Annotated[int | Literal["auto"], _count_or("auto")]
