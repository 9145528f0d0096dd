"""What a suite may say. Every field has a description with its unit; unknown keys are refused."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from ..attacks import attack_name
from ..core.errors import did_you_mean
from ..core.types import Norm, ThreatModel, format_eps
from .values import (
    Count,
    CountOrAll,
    CountOrAuto,
    Dtype,
    Eps,
    Number,
    Text,
    Whole,
    check_scale,
    check_sigma,
    parse_number,
)

PLAIN_KINDS = ("clean", "blank", "shuffled", "noise")
RESERVED = (*PLAIN_KINDS, "worst")
PARAMETERS_OF = {
    "attack": ("steps", "restarts", "step_size", "rel_step"),
    "certify": ("sigma", "radii", "n", "n0", "alpha"),
}
"""Keys of a condition that are handed on by name."""

KEYS_OF = {
    "attack": ("attack", "name", "objectives", "at", "params", *PARAMETERS_OF["attack"]),
    "certify": ("certify", "name", "per_modality", "params", *PARAMETERS_OF["certify"]),
}
FILTER_KEYS = ("modality", "question_type", "source")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class DataSpec(_Part):
    """Which questions are asked, and on what canvas."""

    name: Text = Field(
        default="auto",
        description="Data set: auto, omnimedvqa, phantom, or a plugin's; auto is omnimedvqa where root is given.",
    )
    root: Text | None = Field(default=None, description="Folder of the data set; empty for none.")
    split: Literal["train", "validation", "test"] = Field(default="test", description="Which split is asked.")
    scheme: Literal["auto", "file", "record", "medr1", "image_disjoint", "rebalanced"] = Field(
        default="auto", description="How questions are split; auto takes splits.json, then the records' own split."
    )
    split_file: Text | None = Field(
        default=None, description="Lists of question ids for scheme file, below root; by default splits.json."
    )
    per_modality: CountOrAll = Field(
        default=25, description="Questions per modality, stratified by question type; `all` for the whole split."
    )
    filter: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Keep only these: modality, question_type or source, each with one name or a list of names.",
    )
    resolution: Count = Field(
        default=64, description="Side of the square canvas, pixels; the attack works at this size."
    )
    fit: Literal["pad", "stretch"] = Field(
        default="pad", description="pad keeps the aspect ratio on a black canvas; stretch does not."
    )
    phantom: dict[str, Any] = Field(
        default_factory=dict, description="Phantom only: seed, images per modality and split, difficulty."
    )

    @field_validator("root", "split_file", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return None if value == "" else value

    @field_validator("split_file")
    @classmethod
    def _fits_the_scheme(cls, value: str | None, info: ValidationInfo) -> str | None:
        scheme = info.data.get("scheme", "file")
        if value is not None and scheme not in ("auto", "file", "rebalanced"):
            raise ValueError(f"the scheme is {scheme}; a split file belongs to `scheme: file`")
        return value

    @field_validator("filter", mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for key in value:
            if key not in FILTER_KEYS:
                raise ValueError(f"unknown filter '{key}'.{did_you_mean(str(key), FILTER_KEYS)}")
        return {k: (v,) if isinstance(v, str) else v for k, v in value.items()}


class ThreatSpec(_Part):
    """What the adversary may do."""

    norm: Norm = Field(default="linf", description="Norm of the perturbation over one image's values.")
    eps: tuple[Eps, ...] = Field(
        default=(2 / 255, 4 / 255, 8 / 255), min_length=1, description="Radii, on the [0, 1] pixel scale, e.g. 8/255."
    )
    headline: Eps | None = Field(
        default=None,
        validate_default=True,
        description="The eps of the first table; one of eps, by default the middle one.",
    )

    @field_validator("eps")
    @classmethod
    def _on_the_pixel_scale(cls, values: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        for eps in values:
            check_scale(info.data.get("norm"), eps)
        if len(set(values)) < len(values):
            raise ValueError("the same eps stands twice")
        return values

    @field_validator("headline")
    @classmethod
    def _one_of_eps(cls, value: float | None, info: ValidationInfo) -> float | None:
        eps = info.data.get("eps")
        if not eps:
            return value
        if value is None:
            return eps[len(eps) // 2]
        close = [e for e in eps if abs(e - value) < 1e-9]
        if not close:
            raise ValueError(f"{format_eps(value)} is not one of eps: {', '.join(map(format_eps, eps))}")
        return close[0]

    @property
    def models(self) -> tuple[ThreatModel, ...]:
        return tuple(ThreatModel(self.norm, eps) for eps in self.eps)


class SmoothSpec(_Part):
    """An entry deployed as its smoothed version: the majority of its answers on noisy copies (Cohen, 1902.02918)."""

    sigma: Number = Field(gt=0, description="Standard deviation of the Gaussian noise, on the [0, 1] pixel scale.")
    n: Count = Field(default=100, description="Noisy copies behind each answer.")
    alpha: Number = Field(
        default=0.001, gt=0, lt=1, description="It abstains where the two leading answers could be equally likely."
    )

    @field_validator("sigma")
    @classmethod
    def _on_the_pixel_scale(cls, value: float) -> float:
        return check_sigma(value)

    @model_validator(mode="after")
    def _can_be_clear(self) -> SmoothSpec:
        least = math.ceil(1 + math.log2(1 / self.alpha) - 1e-9)
        if self.n < least:
            raise ValueError(
                f"n = {self.n} copies always abstain at alpha = {self.alpha:g}, even if all agree; "
                f"the smallest n that does not is {least}"
            )
        return self


class ModelSpec(_Part):
    """An entry under test; None is the entry's own default."""

    name: Text = Field(description="Registered entry, or the name to show where `entry` or `path` is given.")
    entry: Text | None = Field(default=None, description="Registered entry, where it is to be shown by another name.")
    path: Text | None = Field(default=None, description="Folder or Hugging Face hub id; None is the registered entry.")
    revision: Text | None = Field(default=None, description="Hub revision: branch, tag or commit.")
    prompt: Text | None = Field(default=None, description="Prompt template by name, e.g. instruct or think.")
    decode: Literal["logprob", "generate"] | None = Field(
        default=None, description="Verdict from option log-probabilities, or from generated text."
    )
    max_new_tokens: Count | None = Field(default=None, description="Generation limit, tokens.")
    dtype: Dtype | None = Field(default=None, description="Weights; None is run.dtype.")
    resolution: Count | None = Field(
        default=None, description="Side of this entry's canvas, pixels; None is data.resolution."
    )
    adapter: Text | None = Field(default=None, description="Folder of a PEFT adapter to load on top.")
    smooth: SmoothSpec | None = Field(
        default=None, description="Show the smoothed version: {sigma, n, alpha}; None is the entry as it is."
    )

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict) and "name" not in value and isinstance(value.get("path"), str):
            return {"name": value["path"].rstrip("/").rsplit("/", 1)[-1], **value}
        if not isinstance(value, dict | ModelSpec):
            raise ValueError("a model is a name, or a mapping with `name` and `path`")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> ModelSpec:
        if self.entry is not None and self.path is not None:
            raise ValueError("`entry` names a registered entry, `path` a folder; give one of them")
        return self

    @property
    def label(self) -> str:
        return self.name


class ConditionSpec(_Part):
    """A word (clean, blank, shuffled, noise), or a mapping with `attack` or `certify`."""

    unknown_key_hint: ClassVar[str] = " Further parameters of an attack or certifier stand under `params`."

    kind: Literal["clean", "blank", "shuffled", "noise", "attack", "certify"] = Field(
        description="What is done to the image."
    )
    models: tuple[Text, ...] | None = Field(default=None, description="Entries it is for, by name; None is all.")
    attack: Text | None = Field(default=None, description="Registered attack.")
    certify: Text | None = Field(default=None, description="Registered certifier.")
    name: Text | None = Field(
        default=None, description="Name in tables, by default the attack's; tells two settings apart."
    )
    objectives: Literal["all", "strong"] | tuple[Text, ...] = Field(
        default="all",
        description="What the attack maximises: names; `all` that are standard for the entry; or `strong`, those of "
        "all that are not known to overstate the robustness of an entry that reasons. Square and cascades take none.",
    )
    at: Literal["all", "headline", "other"] = Field(
        default="all", description="At every eps of the threat, at its headline alone, or at the others."
    )
    steps: Count | None = Field(default=None, description="Gradient steps.")
    restarts: Count | None = Field(default=None, description="Random starts; later ones on survivors only.")
    step_size: Number | None = Field(default=None, gt=0, description="Step length on the [0, 1] pixel scale.")
    rel_step: Number | None = Field(default=None, gt=0, description="Step length as a part of eps.")
    sigma: Number | None = Field(
        default=None,
        gt=0,
        description="Certifier: standard deviation of the noise, [0, 1] pixel scale; None is that of a smoothed entry.",
    )
    radii: tuple[Number, ...] | None = Field(
        default=None, description="Certifier: L2 radii to decide, on the [0, 1] pixel scale."
    )
    n: Count | None = Field(default=None, description="Certifier: test samples, or the most of them.")
    n0: Count | None = Field(default=None, description="Certifier: samples that select the answer to be tested.")
    alpha: Number | None = Field(
        default=None, gt=0, lt=1, description="Certifier: probability that a certificate is wrong."
    )
    per_modality: Count | None = Field(
        default=None, description="Certifier: at most so many of the questions per modality; None is all of them."
    )
    params: dict[str, Any] = Field(default_factory=dict, description="Further parameters, by name.")

    @field_validator("sigma")
    @classmethod
    def _on_the_pixel_scale(cls, value: float | None) -> float | None:
        return value if value is None else check_sigma(value)

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            if value not in PLAIN_KINDS:
                close = did_you_mean(value, PLAIN_KINDS)
                raise ValueError(f"unknown condition '{value}'.{close} Attacks are written `- attack: {value}`.")
            return {"kind": value}
        if isinstance(value, dict) and "kind" not in value:
            found = [key for key in ("attack", "certify") if key in value]
            if not found:
                raise ValueError("a condition is a word, or a mapping with `attack` or `certify`: the name of one")
            return {"kind": found[0], **value}
        return value

    @field_validator("attack")
    @classmethod
    def _one_name(cls, value: str | None) -> str | None:
        return value if value is None else attack_name(value)

    @field_validator("objectives", mode="before")
    @classmethod
    def _one_objective(cls, value: Any) -> Any:
        if value in ("all", "strong"):
            return value
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list | tuple) or not names or not all(isinstance(n, str) for n in names):
            raise ValueError("must be `all`, `strong`, an objective, or a list of objectives")
        return tuple(names)

    @model_validator(mode="after")
    def _fits_its_kind(self) -> ConditionSpec:
        for kind in ("attack", "certify"):
            if (self.kind == kind) != (getattr(self, kind) is not None):
                raise ValueError(f"`{kind}` belongs to a condition of kind {kind}, and to no other")
        allowed = {"kind", "models", *KEYS_OF.get(self.kind, ())}
        if extra := self.model_fields_set - allowed:
            raise ValueError(f"{self.kind} takes no {', '.join(sorted(extra))}")
        if self.name in RESERVED:
            raise ValueError(f"`name: {self.name}` would be taken for another row of the tables")
        if twice := set(PARAMETERS_OF.get(self.kind, ())) & set(self.params):
            raise ValueError(f"{', '.join(sorted(twice))} stands beside `{self.kind}`, not under params")
        return self

    def at_eps(self, headline: bool) -> bool:
        """Whether the attack is made at the headline eps, or at another one."""
        return self.at == "all" or (self.at == "headline") == headline

    def is_for(self, model: str) -> bool:
        """Whether the entry of this name is measured under it."""
        return self.models is None or model in self.models

    @property
    def label(self) -> str:
        """What conditions are named by: the kind, or the attack's name; a certifier's has its sigma."""
        if self.kind == "certify":
            return self.certificate_label(self.sigma or 0)
        return self.name or self.attack or self.kind

    def certificate_label(self, sigma: float) -> str:
        """`certify[sigma=0.25]`; with a name of its own `certify[name sigma=0.25]`."""
        return f"certify[{f'{self.name} ' if self.name else ''}sigma={sigma:g}]"

    @property
    def parameters(self) -> dict[str, Any]:
        """Everything the attack or the certifier is built with."""
        named = {k: getattr(self, k) for k in PARAMETERS_OF.get(self.kind, ())}
        return {k: v for k, v in named.items() if v is not None} | dict(self.params)


class RunSpec(_Part):
    """How the work is done. Only `seed` and `dtype` can change a record."""

    seed: Whole = Field(default=0, description="Seed of everything random: starts, noise, shuffling.")
    batch_size: CountOrAuto = Field(
        default="auto", description="Questions per forward pass; auto backs off when memory ends."
    )
    chunk: Count = Field(default=50, description="Questions per work chunk; fixed, so that workers change nothing.")
    workers: CountOrAuto = Field(default="auto", description="Processes; auto is one per GPU, or one per core.")
    device: Text = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    dtype: Dtype = Field(default="auto", description="auto: bf16 on a GPU, fp32 on a CPU.")
    fail_on_error: Number = Field(default=0.0, ge=0, le=1, description="Share of units that may end in an error.")
    output: Text | None = Field(default=None, description="Folder of the run; by default reports/<suite name>.")

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        kind, _, number = value.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (":" in value and (kind != "cuda" or not number.isdigit())):
            why = " Attacks need float64, which mps does not have." if kind == "mps" else ""
            raise ValueError(f"unknown device '{value}'.{why} Known: auto, cpu, cuda, cuda:N")
        return value


class Suite(_Part):
    """A validated suite: what is measured, on which data, under which threat."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.=+-]*$", description="Name of the report folder; a plain word.")
    title: Text = Field(default="", description="Heading of tables and reports.")
    data: DataSpec = Field(default=DataSpec(), description="Questions and canvas.")
    threat: ThreatSpec = Field(default=ThreatSpec(), description="Threat model.")
    models: tuple[ModelSpec, ...] = Field(min_length=1, description="Entries under test.")
    conditions: tuple[ConditionSpec, ...] = Field(min_length=1, description="What is done to the images.")
    run: RunSpec = Field(default=RunSpec(), description="How the work is done.")

    @field_validator("models", "conditions")
    @classmethod
    def _each_name_once(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        for position, value in enumerate(values):
            for other in values[:position]:
                if value.label == other.label and not _apart(value, other):
                    raise ValueError(f"'{value.label}' stands twice; give one of them another `name`")
        return values

    def to_dict(self) -> dict[str, Any]:
        """Plain YAML-able mapping that `load_suite` reads back as the same suite; eps as fractions."""
        plain = self.model_dump(mode="json", exclude_none=True)
        plain["threat"]["eps"] = [_written(eps) for eps in self.threat.eps]
        plain["threat"]["headline"] = _written(self.threat.headline or 0)
        conditions: list[Any] = []
        for spec in self.conditions:
            given = spec.model_dump(mode="json", exclude_none=True, exclude={"kind"}, exclude_defaults=True)
            conditions.append(given if spec.kind in KEYS_OF else given | {"kind": spec.kind} if given else spec.kind)
        return plain | {"conditions": conditions}


def _apart(one: Any, other: Any) -> bool:
    """Whether two attacks of one name never meet: not at the same eps, or not on the same entry."""
    ours, theirs = getattr(one, "models", None), getattr(other, "models", None)
    if ours is not None and theirs is not None and not {*ours} & {*theirs}:
        return True
    return {getattr(one, "at", "all"), getattr(other, "at", "all")} == {"headline", "other"}


def _written(eps: float) -> str | float:
    """As a fraction where that reads back as the same number."""
    text = format_eps(eps)
    return text if parse_number(text) == eps else eps
