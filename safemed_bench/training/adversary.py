"""The inner maximisation of adversarial training: the benchmark's own PGD, on what the trainer wants maximised.

Perturbations live on the raw [0, 1] pixels, one per prompt. The model's weights, gradients and mode are as before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..attacks.base import Maximum, Prepared, Reading, frozen
from ..attacks.pgd import PGD
from ..core.seeds import derive_seed
from ..models.huggingface import HuggingFaceVLM
from .policy import Policy, evaluating
from .settings import AdversarySettings


def generators(places: Sequence[int], *parts: object) -> list[torch.Generator]:
    """One CPU generator per prompt, by its place in the whole batch: a draw does not depend on who computes it."""
    return [torch.Generator().manual_seed(derive_seed("training", *parts, place)) for place in places]


def attack_of(settings: AdversarySettings) -> PGD:
    """PGD as these settings want it; its last iterate counts, which saves the forward pass that would compare."""
    return PGD(
        steps=settings.steps, rel_step=settings.rel_step, random_start=settings.random_start, keep="last", restarts=1
    )


def perturb(
    vlm: HuggingFaceVLM,
    inner: Prepared,
    clean: Tensor,
    settings: AdversarySettings,
    eps: float,
    draws: Sequence[torch.Generator],
) -> Maximum:
    """(B, 3, H, W) perturbation of `clean` (float, [0, 1]) inside the ball of radius eps and the box; eps 0 gives 0."""
    if eps == 0 or not len(clean):
        return Maximum(torch.zeros_like(clean), torch.zeros(len(clean), dtype=torch.long))
    with frozen(vlm), evaluating(vlm.model):
        return attack_of(settings).maximise(inner, clean, settings.threat(eps), draws)


class Curriculum:
    """The eps of a stage: full at once, growing by steps, or growing when the reward under attack is high enough."""

    def __init__(self, settings: AdversarySettings) -> None:
        self.full, self.settings = settings.eps, settings.curriculum
        self.reached = min(self.settings.start, self.full) if self.settings else self.full
        self.mean: float | None = None

    def eps(self, step: int) -> float:
        """eps at step `step` (from 0) of the stage."""
        plan = self.settings
        if plan is None or plan.target is not None:
            return self.reached
        done = min(1.0, step / plan.ramp) if plan.ramp else 1.0
        return min(self.full, plan.start + done * (self.full - plan.start))

    def observe(self, reward: float) -> None:
        """The mean accuracy reward of this step's attacked rollouts."""
        plan = self.settings
        if plan is None or plan.target is None:
            return
        self.mean = reward if self.mean is None else plan.memory * self.mean + (1 - plan.memory) * reward
        if self.mean >= plan.target and self.reached < self.full:
            self.reached, self.mean = min(self.full, self.reached + plan.step), None

    def state_dict(self) -> dict[str, Any]:
        return {"reached": self.reached, "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.reached, self.mean = state["reached"], state["mean"]


def gaussian(sigmas: Sequence[float], like: Tensor, draws: Sequence[torch.Generator]) -> Tensor | None:
    """Noise for a batch, each image at one of `sigmas`; None where there is none."""
    if not sigmas:
        return None
    rows = [sigmas[int(torch.randint(len(sigmas), (), generator=g))] * torch.randn(like.shape[1:], generator=g)
            for g in draws]  # fmt: skip
    return torch.stack(rows).to(like)


@dataclass(frozen=True)
class TaughtReply(Prepared):
    """Loss of the reply that is being taught: mean negative log-likelihood per token, in nats, weighted."""

    vlm: HuggingFaceVLM
    prompts: dict[str, Tensor]
    replies: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]

    def __call__(self, pixels: Tensor) -> Reading:
        values = self.vlm.pixel_map(pixels)
        return _reading(self.vlm.reply_loss(self.prompts, values, self.replies, self.weights))

    def select(self, rows: Tensor) -> TaughtReply:
        at = rows.tolist()
        return TaughtReply(
            self.vlm,
            {k: v[rows] for k, v in self.prompts.items()},
            tuple(self.replies[i] for i in at),
            tuple(self.weights[i] for i in at),
        )


@dataclass(frozen=True)
class WeightedRollouts(Prepared):
    """Weighted mean negative log-likelihood of g rollouts per prompt.

    tokens, mask: (P, g, T), weights: (P, g). With 1 / (number of right ones) for right rollouts and 0 for wrong ones it
    is the rollout objective; with advantages the attack also pulls towards what was answered wrongly. A prompt whose
    weights are all 0 has no gradient: it keeps its random start.
    """

    policy: Policy
    prompts: dict[str, Tensor]
    tokens: Tensor
    mask: Tensor
    weights: Tensor

    def __call__(self, pixels: Tensor) -> Reading:
        count, group, width = self.tokens.shape
        values = self.policy.vlm.pixel_map(pixels)
        mask = self.mask.reshape(-1, width)
        out = self.policy(self.prompts, values, self.tokens.reshape(-1, width), mask, group)
        each = -(out.logps * mask).sum(1) / mask.sum(1).clamp(min=1)
        return _reading((each.view(count, group) * self.weights).sum(1))

    def select(self, rows: Tensor) -> WeightedRollouts:
        return WeightedRollouts(
            self.policy,
            {k: v[rows] for k, v in self.prompts.items()},
            self.tokens[rows],
            self.mask[rows],
            self.weights[rows],
        )


@dataclass(frozen=True)
class FeatureDistance(Prepared):
    """Mean squared distance of the prompt's last hidden states from those of the clean image (1803.06373)."""

    vlm: HuggingFaceVLM
    prompts: dict[str, Tensor]
    clean: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, vlm: HuggingFaceVLM, prompts: dict[str, Tensor], pixels: Tensor) -> FeatureDistance:
        """Distance from the states of `pixels` (B, 3, H, W)."""
        return cls(vlm, prompts, _hidden_states(vlm, prompts, pixels))

    def __call__(self, pixels: Tensor) -> Reading:
        states = _hidden_states(self.vlm, self.prompts, pixels)
        mask = self.prompts["attention_mask"][..., None].float()
        gap = ((states - self.clean).square() * mask).flatten(1).sum(1)
        return _reading(gap / (mask.flatten(1).sum(1) * states.shape[-1]))

    def select(self, rows: Tensor) -> FeatureDistance:
        return FeatureDistance(self.vlm, {k: v[rows] for k, v in self.prompts.items()}, self.clean[rows])


@dataclass(frozen=True)
class Noised(Prepared):
    """Another objective, seen through noise."""

    inner: Prepared
    noise: Tensor

    def __call__(self, pixels: Tensor) -> Reading:
        return self.inner(noised(pixels, self.noise))

    def select(self, rows: Tensor) -> Noised:
        return Noised(self.inner.select(rows), self.noise[rows])


def noised(pixels: Tensor, noise: Tensor | None) -> Tensor:
    """The image behind noise, which comes last, after any attack. Clamped, for a processor is given 8-bit images."""
    return pixels if noise is None else (pixels + noise).clamp(0, 1)


def _hidden_states(vlm: HuggingFaceVLM, prompts: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """(B, L, D) last hidden states of the prompts."""
    arguments = vlm.arguments(prompts, vlm.pixel_map(pixels), keep=1)
    states: Tensor = vlm.model(**arguments, output_hidden_states=True, use_cache=False).hidden_states[-1]
    return states.float()


def _reading(loss: Tensor) -> Reading:
    return Reading(loss, torch.zeros_like(loss, dtype=torch.bool))
