"""Models and attacks with one planted fault each, for the diagnostics to find. A plugin file, beside toy_plugin.py."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch

sys.path.insert(0, str(Path(__file__).parent))

from toy_model import ToyVLM

from safemed_bench.attacks.base import Attack, Objective, Reading
from safemed_bench.attacks.objectives import AnswerToken, Letter
from safemed_bench.attacks.pgd import PGD, Straight
from safemed_bench.core.registry import attacks, models, objectives
from safemed_bench.core.types import Answer

STD = 0.25
"""Of a processor's normalisation, for attacks that take its space for that of the pixels."""


class Fault(ToyVLM):
    """The toy that answers by letter, under the name of its fault."""

    def __init__(self, resolution, device):
        super().__init__(resolution=resolution, device=device)
        self.name = type(self).__name__.lower()
        self.draws = torch.Generator().manual_seed(0)


@models.register("quantised")
class Quantised(Fault):
    """Sees few grey levels: its gradient is zero."""

    def _features(self, pixels):
        return super()._features((pixels * 32).round() / 32)


@models.register("saturated")
class Saturated(Fault):
    """So sure that the cross-entropy has no gradient in float32."""

    def _features(self, pixels):
        return super()._features(pixels) * 1e5


@models.register("detached")
class Detached(Fault):
    """The surrogate is cut off from the image."""

    def option_logits(self, batch, pixels, text=None):
        return super().option_logits(batch, pixels.detach(), text)


@models.register("random_logits")
class RandomLogits(Fault):
    """The surrogate's scores are drowned in noise."""

    def option_logits(self, batch, pixels, text=None):
        scores = super().option_logits(batch, pixels, text)
        return scores + 20 * torch.randn(scores.shape, generator=self.draws)


@models.register("unsteady")
class Unsteady(Fault):
    """Dropout was left on, in the deployed path too."""

    def _features(self, pixels):
        features = super()._features(pixels)
        return features + 2 * features.std() * torch.randn(features.shape, generator=self.draws)


@models.register("mute")
class Mute(Fault):
    """Says nothing."""

    def __init__(self, resolution, device):
        super().__init__(resolution, device)
        self.decode = "generate"

    def answer(self, batch, pixels, *, generator=None):
        return [replace(a, index=None, status="invalid", text="") for a in super().answer(batch, pixels)]


@models.register("sightless")
class Sightless(Fault):
    """Answers from the options alone."""

    def _features(self, pixels):
        return super()._features(pixels * 0 + 0.5)


@attacks.register("normalised_eps")
@dataclass(frozen=True)
class NormalisedEps(PGD):
    """Takes eps for one of normalised values: the ball is too small by the standard deviation."""

    name: ClassVar[str] = "normalised_eps"

    def perturb(self, pursuit):
        pursuit.threat = replace(pursuit.threat, eps=pursuit.threat.eps * STD)
        super().perturb(pursuit)


@attacks.register("unscaled_eps")
@dataclass(frozen=True)
class UnscaledEps(Attack):
    """The reverse: the ball is too large, and the images do not pass through the frame."""

    name: ClassVar[str] = "unscaled_eps"

    def perturb(self, pursuit):
        levels = round(pursuit.threat.eps / STD * 255)
        pursuit.images = (pursuit.canvas.int() + levels).clamp(0, 255).to(torch.uint8)


@attacks.register("normalised_clamp")
@dataclass(frozen=True)
class NormalisedClamp(Attack):
    """Clamps normalised values to [0, 1], which moves most of them at any eps."""

    name: ClassVar[str] = "normalised_clamp"

    def perturb(self, pursuit):
        values = ((pursuit.clean - 0.5) / STD).clamp(0, 1)
        pursuit.images = ((values * STD + 0.5) * 255).round().to(torch.uint8)


class Forgetful(Straight):
    """Every step starts from the clean image."""

    def move(self, rows, delta, loss, gradient):
        return super().move(rows, torch.zeros_like(delta), loss, gradient)


@attacks.register("forgetful")
@dataclass(frozen=True)
class Lost(PGD):
    """The perturbation is lost between steps."""

    name: ClassVar[str] = "forgetful"

    def walk(self, pursuit):
        return Forgetful(pursuit, self.length(pursuit.threat.eps))


class OwnLetter(Letter):
    """Cross-entropy of whatever the model answers at the moment."""

    def __call__(self, pixels):
        scores = self.model.option_logits(self.batch, pixels, self.text).float()
        own = scores.detach().argmax(dim=1)
        loss = torch.nn.functional.cross_entropy(scores, own, reduction="none")
        return Reading(loss, torch.zeros_like(own, dtype=torch.bool))

    def select(self, rows):
        return OwnLetter(self.model, self.batch.select(rows), self.text)


@objectives.register("own_argmax")
class OwnArgmax(Objective):
    """The model's own argmax as label."""

    name: ClassVar[str] = "own_argmax"

    def prepare(self, model, batch, clean_answers: list[Answer]):
        return OwnLetter(model, batch, AnswerToken().prepare(model, batch, clean_answers).text)
