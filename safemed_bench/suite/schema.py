"""What a suite may say. Every field has a description with its unit; unknown keys are refused."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from ..core.errors import did_you_mean
from ..core.types import Norm, ThreatModel, format_eps
from .api import ApiSpec
from .condition import KEYS_OF, ConditionSpec, Part
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

FILTER_KEYS = ("modality", "question_type", "source")


class DataSpec(Part):
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


class ThreatSpec(Part):
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


class SmoothSpec(Part):
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


LOCAL = ("entry", "path", "revision", "adapter", "dtype", "quantize")
"""What is of weights that are loaded here."""


class ModelSpec(Part):
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
    quantize: Literal["int8", "nf4"] | None = Field(
        default=None, description="Load the weights with bitsandbytes in 8 or 4 bits; needs a CUDA GPU."
    )
    smooth: SmoothSpec | None = Field(
        default=None, description="Show the smoothed version: {sigma, n, alpha}; None is the entry as it is."
    )
    api: ApiSpec | None = Field(
        default=None, description="Asked of a server: {base_url, model, ...} (docs/api_models.md); None is run here."
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
        if self.api is not None:
            local = [key for key in LOCAL if getattr(self, key) is not None]
            if local:
                raise ValueError(f"`api` asks a server for its answers; `{local[0]}` would have no effect on it")
            if self.decode == "logprob":
                raise ValueError("`decode: logprob` needs the scores of every option; an `api` entry answers by text")
        return self

    @property
    def label(self) -> str:
        return self.name


class RunSpec(Part):
    """How the work is done. Only `seed` and `dtype` can change a record."""

    seed: Whole = Field(default=0, description="Seed of everything random: starts, noise, shuffling.")
    batch_size: CountOrAuto = Field(
        default="auto", description="Questions per forward pass; auto backs off when memory ends."
    )
    chunk: Count = Field(default=50, description="Questions per work chunk; fixed, so that workers change nothing.")
    workers: CountOrAuto = Field(default="auto", description="Processes; auto is one per GPU, or one per core.")
    device: Text = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    engine: Literal["local", "ray"] = Field(
        default="local", description="Processes of this machine, or actors of a Ray cluster (docs/cluster.md)."
    )
    address: Text | None = Field(
        default=None, description="Of a Ray cluster: auto, host:port or ray://host:port; without one, this machine."
    )
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


class GateRule(Part):
    """What must not get worse from a baseline to a run of the suite (`gate RUN --baseline B`). Changes no record."""

    metric: Literal["accuracy", "certified_accuracy", "invalid_rate", "truncated_rate"] = Field(
        default="accuracy",
        description="What is held: accuracy, that of proven answers alone, or the share of unreadable answers.",
    )
    condition: Text = Field(
        default="worst@headline",
        description="A condition as tables name it: clean, pgd@linf:4/255, worst@headline (the worst attack); for "
        "certified_accuracy certified@l2:0.25.",
    )
    model: Text = Field(default="all", description="One entry of the suite, or all.")
    slice: Text = Field(default="all", description="A modality, all questions together, or each modality by itself.")
    allowed_drop: Number = Field(
        default=5.0, ge=0, le=100, description="How much worse it may get, percentage points: the margin."
    )
    alpha: Number = Field(
        default=0.05, gt=0, lt=0.5, description="Chance of failing a model that got no worse than that."
    )
    power: Number = Field(
        default=0.8, ge=0.5, lt=1, description="Power at which the smallest detectable drop is stated."
    )


class DiagnosticsSpec(Part):
    """What is done to tell whether the numbers are to be believed; none of it changes a record of the suite."""

    level: Literal["off", "records", "probe"] = Field(
        default="records",
        description="off; records: from what was measured anyway; probe: and from a few more measurements, such as "
        "every attack at eps 0 and unbounded.",
    )
    share: Number = Field(
        default=0.05, gt=0, le=1, description="Probe: share of each modality's questions, rounded up."
    )


class Suite(Part):
    """A validated suite: what is measured, on which data, under which threat."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.=+-]*$", description="Name of the report folder; a plain word.")
    title: Text = Field(default="", description="Heading of tables and reports.")
    data: DataSpec = Field(default=DataSpec(), description="Questions and canvas.")
    threat: ThreatSpec = Field(default=ThreatSpec(), description="Threat model.")
    models: tuple[ModelSpec, ...] = Field(min_length=1, description="Entries under test.")
    conditions: tuple[ConditionSpec, ...] = Field(min_length=1, description="What is done to the images.")
    diagnostics: DiagnosticsSpec = Field(
        default=DiagnosticsSpec(), description="Whether and how the numbers are checked."
    )
    run: RunSpec = Field(default=RunSpec(), description="How the work is done.")
    gate: tuple[GateRule, ...] = Field(
        default=(), description="Rules of `gate RUN --baseline B`; without any, those that docs/ci.md names."
    )

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
        rules = [rule.model_dump(mode="json", exclude_defaults=True) for rule in self.gate]
        plain.pop("gate")
        return plain | {"conditions": conditions} | ({"gate": rules} if rules else {})


def _apart(one: Any, other: Any) -> bool:
    """Whether two attacks of one name never meet: not at the same eps, or not on the same entry."""
    ours, theirs = getattr(one, "models", None), getattr(other, "models", None)
    if isinstance(ours, str) and isinstance(theirs, str) and ours != theirs:
        return True
    if isinstance(ours, tuple) and isinstance(theirs, tuple) and not {*ours} & {*theirs}:
        return True
    return {getattr(one, "at", "all"), getattr(other, "at", "all")} == {"headline", "other"}


def _written(eps: float) -> str | float:
    """As a fraction where that reads back as the same number."""
    text = format_eps(eps)
    return text if parse_number(text) == eps else eps
