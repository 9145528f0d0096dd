"""Fill the tables of the reference pages from the code: `python docs/generate.py` (with --check: only say what is old).

A page is prose with places `<!-- generated: NAME -->` ... `<!-- end -->`; what stands between is written here, from the
descriptions of the pydantic schemas and the catalogues. tests/test_reference.py holds the pages to it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as bounds
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from safemed_bench.attacks import ATTACKS, OBJECTIVES
from safemed_bench.certify import CERTIFIERS
from safemed_bench.core.types import format_eps
from safemed_bench.suite import schema, values
from safemed_bench.suite.condition import ConditionSpec
from safemed_bench.suite.loader import ENVIRONMENT
from safemed_bench.training import config, settings

HERE = Path(__file__).parent
PAGES = (HERE / "suites.md", HERE / "training_reference.md")
PLACE = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
SIGNS = {bounds.Ge: "≥ ", bounds.Gt: "> ", bounds.Le: "≤ ", bounds.Lt: "< "}
LARGEST_EPS = 16 / 255
"""Numbers up to this are written as fractions of 255 where they are one."""


def filled(text: str) -> str:
    """A page with every generated place written anew. KeyError for a place that nothing fills."""
    return PLACE.sub(lambda place: f"{place[1]}{TABLES[place[2]]()}\n{place[3]}", text)


def table(part: type[BaseModel]) -> str:
    """Every key of a section: what it holds, its default, and what it means."""
    rows = (
        (
            f"`{name}`",
            kind(field.annotation, field.metadata),
            default(field),
            (field.description or "").replace("<", "&lt;"),
        )
        for name, field in part.model_fields.items()
    )
    return markdown(("key", "value", "default", "meaning"), rows)


def kind(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """A type in the words of a suite: `whole number ≥ 1`, `clean` \\| `blank`, `list of text`."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return kind(inner[0], (*inner[1:], *metadata))
    if origin in (Union, UnionType):
        return " or ".join(kind(part, metadata) for part in inner if part is not type(None))
    if origin is Literal:
        return ", ".join(f"`{word}`" for word in inner)
    if origin is tuple:
        return f"list of {kind(inner[0])}"
    if origin is dict:
        return "mapping" if inner[1] is Any else f"mapping of text to {kind(inner[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{section(annotation)}](#{section(annotation)})"
    return plain(annotation, metadata)


def plain(annotation: Any, metadata: Sequence[Any]) -> str:
    if any(getattr(m, "func", None) is values._dtype for m in metadata):
        return ", ".join(f"`{word}`" for word in values.DTYPES)
    words = {bool: "true or false", int: "whole number", float: "number", str: "text", Path: "path"}
    flat = [part for m in metadata for part in (m.metadata if isinstance(m, FieldInfo) else (m,))]
    limits = [f"{sign}{limit(m)}" for m in flat for rule, sign in SIGNS.items() if isinstance(m, rule)]
    return f"{words[annotation]} {', '.join(dict.fromkeys(limits))}".strip()


def limit(rule: Any) -> str:
    (value,) = (getattr(rule, name) for name in ("ge", "gt", "le", "lt") if hasattr(rule, name))
    return f"{value:g}"


def section(part: type[BaseModel]) -> str:
    """The heading of a section on its page."""
    return next(name.rpartition(".")[2] for name, known in PARTS.items() if known is part)


def default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if value in (None, (), {}, "") or isinstance(value, BaseModel) else f"`{written(value)}`"


def written(value: Any) -> str:
    """A value as a suite would have it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {written(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(map(written, value)) + "]"
    if isinstance(value, float):
        return format_eps(value) if 0 < value <= LARGEST_EPS else f"{value:g}"
    return str(value)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def attacks() -> str:
    rows = ((f"`{n}`", listed(i.parameters), "yes" if i.objectives else "no", i.summary) for n, i in ATTACKS.items())
    return markdown(("attack", "parameters", "objectives", "what it is"), rows)


def objectives() -> str:
    rows = (
        (f"`{name}`", "reasoning" if info.reasoning_only else "all", *chosen(info.standard, info), info.summary)
        for name, info in OBJECTIVES.items()
    )
    return markdown(("objective", "entries", "in `all`", "in `strong`", "what is maximised"), rows)


def chosen(standard: bool, info: Any) -> tuple[str, str]:
    if not standard:
        return "no", "no"
    if info.weak_on_reasoning:
        return "yes", "no" if info.reasoning_only else "unless the entry reasons"
    return "yes", "yes"


def certifiers() -> str:
    rows = ((f"`{name}`", listed(info.parameters), info.summary) for name, info in CERTIFIERS.items())
    return markdown(("certifier", "parameters", "what it is"), rows)


def environment() -> str:
    return markdown(("variable", "key"), ((f"`{name}`", f"`{key}`") for name, key in ENVIRONMENT.items()))


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


PARTS: dict[str, type[BaseModel]] = {
    "suite": schema.Suite,
    "data": schema.DataSpec,
    "threat": schema.ThreatSpec,
    "models": schema.ModelSpec,
    "smooth": schema.SmoothSpec,
    "api": schema.ApiSpec,
    "conditions": ConditionSpec,
    "diagnostics": schema.DiagnosticsSpec,
    "run": schema.RunSpec,
    "gate": schema.GateRule,
    "train": config.TrainConfig,
    "train.data": config.DataConfig,
    "stage": config.StageConfig,
    "task": config.TaskConfig,
    "adversary": settings.AdversarySettings,
    "curriculum": settings.CurriculumSettings,
    "grpo": settings.GRPOSettings,
    "lora": settings.LoraSettings,
}
TABLES: dict[str, Callable[[], str]] = {
    **{name: lambda part=part: table(part) for name, part in PARTS.items()},  # type: ignore[misc]
    "attacks": attacks,
    "objectives": objectives,
    "certifiers": certifiers,
    "environment": environment,
}


def main() -> None:
    old = [page for page in PAGES if filled(page.read_text()) != page.read_text()]
    for page in old:
        print(f"{page.name}: {'is not what the code says' if '--check' in sys.argv else 'written'}")
        if "--check" not in sys.argv:
            page.write_text(filled(page.read_text()))
    sys.exit(1 if old and "--check" in sys.argv else 0)


if __name__ == "__main__":
    main()
