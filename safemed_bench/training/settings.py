"""Settings of adversarial training and of AT-GRPO; parts of a stage in a training file (config.py)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from ..core import registry
from ..core.errors import did_you_mean
from ..core.types import Norm, ThreatModel
from ..suite.values import Count, Eps, Number, Text, Whole, check_scale

Inner = Literal["reply", "rollout_nll", "advantage", "answer_ce", "no_think", "feature"]
View = Literal["clean", "adversarial", "shuffled"]


class Settings(BaseModel):
    """Frozen, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)


class CurriculumSettings(Settings):
    """How eps grows to its full size. By steps, or, where answers are rewarded, by the reward under attack."""

    start: Eps = Field(default=0.0, description="First eps, on the [0, 1] pixel scale.")
    ramp: Whole = Field(default=0, description="Steps of linear growth to the full eps (1706.06083 has none: 0).")
    target: Number | None = Field(
        None,
        ge=0,
        le=1,
        description="Grow by `step` whenever the adversarial accuracy reward reaches this, not by steps.",
    )
    step: Eps = Field(default=1 / 255, description="Growth at a time, with `target`.")
    memory: Number = Field(default=0.9, ge=0, lt=1, description="Decay of the running mean of that reward.")


class AdversarySettings(Settings):
    """The inner maximisation: the benchmark's own PGD on the images of a batch, one perturbation per prompt."""

    norm: Norm = Field(default="linf", description="Norm of the ball.")
    eps: Eps = Field(description="Radius on the [0, 1] pixel scale, e.g. 4/255.")
    steps: Count = Field(
        default=1, description="Gradient steps (PGD, 1706.06083); 1 with a random start is 2001.03994."
    )
    rel_step: Number = Field(default=1.25, gt=0, description="Length of a step as a part of eps (2001.03994 has 1.25).")
    random_start: bool = Field(default=True, description="Start from a uniform point of the ball.")
    objective: Inner | None = Field(
        None,
        description="What is maximised. reply: the loss of the taught reply (default of SFT). rollout_nll: negative "
        "log-likelihood of right rollouts (default of AT-GRPO). advantage: the same weighted by advantages. answer_ce: "
        "the true letter after the model's own rationale. no_think: after an empty one. feature: distance of the last "
        "hidden states of the prompt (1803.06373).",
    )
    share: Number = Field(default=1.0, gt=0, le=1, description="Part of a batch that is attacked (SFT).")
    detect_every: Whole = Field(
        default=0,
        description="Steps between looks for catastrophic overfitting (train attack against PGD-20); 0: none.",
    )
    alarm: Number = Field(default=0.15, gt=0, description="Gap of the two robust accuracies that is warned of.")
    curriculum: CurriculumSettings | None = Field(None, description="Growth of eps; none for full size at once.")

    @field_validator("eps")
    @classmethod
    def _on_the_pixel_scale(cls, eps: float, info: ValidationInfo) -> float:
        check_scale(info.data.get("norm"), eps)
        return eps

    def threat(self, eps: float) -> ThreatModel:
        return ThreatModel(self.norm, eps)


class GRPOSettings(Settings):
    """Group relative policy optimisation (2402.03300) on clean and on attacked images (AT-GRPO, 2512.19317)."""

    group_size: Count = Field(default=8, description="Rollouts per prompt, over all images it is shown with.")
    rollouts: Literal["mixed", "adversarial", "clean"] = Field(
        "mixed", description="Half of a group on the clean image, half on the attacked one; or all on one of them."
    )
    loss: Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo"] = Field(
        "dapo", description="How the token losses are averaged (2402.03300, 2503.20783, 2503.14476, 2507.18071)."
    )
    advantage_over: Literal["group", "part"] = Field(
        "part", description="Rewards are compared within the whole group, or within its clean and attacked halves."
    )
    scale: Literal["group", "batch", "none"] = Field(
        "group", description="Advantages are divided by this standard deviation; none is Dr. GRPO (2503.20783)."
    )
    beta: Number = Field(default=0.02, ge=0, description="Weight of the KL to the start of the stage (k3 estimator).")
    unbiased_kl: bool = Field(
        default=True,
        description="The KL's tokens are weighted by the probability ratio, which makes its gradient that of the KL "
        "(2512.02556, TRL's default); false: plain k3 as in 2402.03300.",
    )
    reference_image: Literal["clean", "own"] = Field(
        "clean", description="Image the reference sees: the clean one, or the one its rollout came from."
    )
    consistency: Number = Field(
        0.0, ge=0, description="Weight of the token KL(clean || attacked) on rollouts of attacked images (1901.08573)."
    )
    clip_low: Number = Field(default=0.2, gt=0, lt=1, description="Lower clip of the probability ratio (1707.06347).")
    clip_high: Number = Field(default=0.2, gt=0, description="Upper clip; 0.28 is DAPO's clip-higher (2503.14476).")
    iterations: Count = Field(default=1, description="Optimiser steps per batch of rollouts (mu of 2402.03300).")
    micro_batch: Whole = Field(default=0, description="Prompts per backward pass, to fit a card; 0 for all at once.")
    temperature: Number = Field(
        default=1.0, gt=0, description="Of sampling, and of the probabilities that are trained."
    )
    top_p: Number = Field(default=1.0, gt=0, le=1, description="Nucleus of sampling (1904.09751).")
    max_new_tokens: Count | None = Field(None, description="Longest rollout; default the entry's own limit.")
    rewards: dict[Text, Number] = Field(
        default_factory=lambda: {"accuracy": 1.0, "format": 0.2}, description="Weight of each reward, by name."
    )
    blind_penalty: Number = Field(
        0.0,
        ge=0,
        description="Reward lost by answering rightly on another question's image: more rollouts, a half group.",
    )

    @field_validator("rewards")
    @classmethod
    def _known(cls, weights: dict[str, float]) -> dict[str, float]:
        for name in weights:
            if name not in registry.rewards:
                raise ValueError(f"unknown reward '{name}'.{did_you_mean(name, list(registry.rewards))}")
        if not any(weights.values()):
            raise ValueError("no reward has a weight: nothing could be learnt")
        return weights

    @model_validator(mode="after")
    def _even(self) -> GRPOSettings:
        if self.group_size % (2 if self.rollouts == "mixed" else 1):
            raise ValueError(f"mixed rollouts want an even group_size, not {self.group_size}")
        if self.group_size < (4 if self.rollouts == "mixed" else 2):
            raise ValueError(f"group_size {self.group_size} leaves nothing to compare; at least 2 rollouts per image")
        return self

    @property
    def views(self) -> tuple[View, ...]:
        """The images each prompt is shown with, in the order of the rollouts of its group."""
        own: dict[str, tuple[View, ...]] = {
            "mixed": ("clean", "adversarial"),
            "adversarial": ("adversarial",),
            "clean": ("clean",),
        }
        return (*own[self.rollouts], *(("shuffled",) if self.blind_penalty else ()))

    @property
    def per_view(self) -> int:
        """Rollouts per prompt and image."""
        return self.group_size // (2 if self.rollouts == "mixed" else 1)


class LoraSettings(Settings):
    """Low-rank adapters (2106.09685) instead of full fine-tuning; needs the extra `peft`. Merged when all is done."""

    rank: Count = Field(default=16, description="Rank of the update.")
    alpha: Number = Field(default=32, gt=0, description="Scale of the update is alpha / rank.")
    targets: tuple[Text, ...] = Field(default=(), description="Module names; empty for all linear layers.")


def without_default(values: dict[str, Any], key: str, default: Any = None) -> dict[str, Any]:
    """Without a late-come key that is not used, so that checkpoints from before there was one still fit."""
    return {k: v for k, v in values.items() if k != key or v not in (default, (), [])}
