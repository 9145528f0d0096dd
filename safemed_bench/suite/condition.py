"""One condition of a suite: what is done to the images before the questions are asked."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..attacks import attack_name
from ..core.errors import did_you_mean
from ..core.types import FROM
from ..corruptions import SEVERITIES
from .values import Count, Number, Text, Whole, check_sigma

PLAIN_KINDS = ("clean", "blank", "shuffled", "noise")
RESERVED = (*PLAIN_KINDS, "corruption", "worst")
PARAMETERS_OF = {
    "attack": ("steps", "restarts", "step_size", "rel_step"),
    "certify": ("sigma", "radii", "n", "n0", "alpha"),
}
"""Keys of a condition that are handed on by name."""

KEYS_OF = {
    "attack": ("attack", "name", "transfer", "objectives", "at", "params", *PARAMETERS_OF["attack"]),
    "certify": ("certify", "name", "per_modality", "params", *PARAMETERS_OF["certify"]),
    "corruption": ("corruption", "severities"),
}


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class ConditionSpec(Part):
    """A word (clean, blank, shuffled, noise), or a mapping with `attack`, `certify` or `corruption`."""

    unknown_key_hint: ClassVar[str] = " Further parameters of an attack or certifier stand under `params`."

    kind: Literal["clean", "blank", "shuffled", "noise", "attack", "certify", "corruption"] = Field(
        description="What is done to the image."
    )
    models: Literal["bare", "smoothed"] | tuple[Text, ...] | None = Field(
        default=None,
        description="Entries it is for: names, `bare` (all that are not smoothed) or `smoothed`; None is all.",
    )
    attack: Text | None = Field(default=None, description="Registered attack.")
    certify: Text | None = Field(default=None, description="Registered certifier.")
    name: Text | None = Field(
        default=None, description="Name in tables, by default the attack's; tells two settings apart."
    )
    transfer: Text | None = Field(
        default=None,
        description="Entry that the attack is made against; its adversarial images are shown to the other entries.",
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
    corruption: Literal["modality", "all"] | tuple[Text, ...] | None = Field(
        default=None,
        description="What happens to the image without an adversary: names; `modality`, every kind; either way only "
        "to the modalities that it happens to; or `all`, every kind to every modality, its own or not.",
    )
    severities: tuple[Whole, ...] = Field(
        default=SEVERITIES, min_length=1, description="Corruption: how bad, from 1 to 5; a cell each."
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
            found = [key for key in KEYS_OF if key in value]
            if not found:
                raise ValueError(
                    "a condition is a word, or a mapping with `attack`, `certify` or `corruption`: the name of one"
                )
            return {"kind": found[0], **value}
        return value

    @field_validator("attack")
    @classmethod
    def _one_name(cls, value: str | None) -> str | None:
        return value if value is None else attack_name(value)

    @field_validator("corruption", mode="before")
    @classmethod
    def _one_corruption(cls, value: Any) -> Any:
        return _names(value, ("modality", "all"), "a corruption")

    @field_validator("severities")
    @classmethod
    def _known_severities(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if unknown := [value for value in values if value not in SEVERITIES]:
            raise ValueError(f"a severity is one of {', '.join(map(str, SEVERITIES))}, not {unknown[0]}")
        if len(set(values)) < len(values):
            raise ValueError("the same severity stands twice")
        return values

    @field_validator("models", mode="before")
    @classmethod
    def _names_or_a_word(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in ("bare", "smoothed"):
            raise ValueError(f"must be `bare`, `smoothed` or a list of entries, not {value!r}")
        return value

    @field_validator("objectives", mode="before")
    @classmethod
    def _one_objective(cls, value: Any) -> Any:
        return _names(value, ("all", "strong"), "an objective")

    @model_validator(mode="after")
    def _fits_its_kind(self) -> ConditionSpec:
        for kind in KEYS_OF:
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

    def is_for(self, name: str, smoothed: bool = False) -> bool:
        """Whether an entry is measured under it; that whose images are shown is not."""
        if name == self.transfer:
            return False
        if isinstance(self.models, str):
            return smoothed == (self.models == "smoothed")
        return self.models is None or name in self.models

    def attacks(self, name: str) -> bool:
        """Whether the attack is made against an entry."""
        return name == self.transfer if self.transfer else self.is_for(name)

    @property
    def label(self) -> str:
        """What conditions are named by: the kind, or the attack's name, `pgd<-sft` for images made against another
        entry; a certifier's has its sigma."""
        if self.kind == "certify" and self.sigma is not None:
            return self.certificate_label(self.sigma)
        if isinstance(self.corruption, tuple):
            return f"corruption[{', '.join(self.corruption)}]"
        own = self.name or self.attack or self.kind
        return f"{own}{FROM}{self.transfer}" if self.transfer else own

    def certificate_label(self, sigma: float) -> str:
        """`certify[sigma=0.25]`; with a name of its own `certify[name sigma=0.25]`."""
        return f"certify[{f'{self.name} ' if self.name else ''}sigma={sigma:g}]"

    @property
    def parameters(self) -> dict[str, Any]:
        """Everything the attack or the certifier is built with."""
        named = {k: getattr(self, k) for k in PARAMETERS_OF.get(self.kind, ())}
        return {k: v for k, v in named.items() if v is not None} | dict(self.params)


def _names(value: Any, words: tuple[str, ...], what: str) -> Any:
    """One of `words`, or names as a tuple. Raises ValueError for anything else; `what` is one that a name is of."""
    if value in words:
        return value
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names or not all(isinstance(n, str) for n in names):
        many = what.partition(" ")[2]
        raise ValueError(f"must be {', '.join(f'`{word}`' for word in words)}, {what}, or a list of {many}s")
    return tuple(names)
