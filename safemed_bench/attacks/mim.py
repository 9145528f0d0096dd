"""Momentum iterative method (Dong et al., 1710.06081, algorithm 1), known for images that fool other models too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import UsageError
from .base import Pursuit
from .climb import Climb, Walk
from .threat import ascent, project


class Momentum(Walk):
    """Steps of one length along a decaying sum of gradients, each first scaled to an L1 norm of 1."""

    def __init__(self, pursuit: Pursuit, length: float, decay: float) -> None:
        super().__init__(pursuit)
        self.length, self.decay = length, decay
        self.velocity = torch.zeros_like(self.clean, dtype=torch.float64)

    def move(self, rows: Tensor, delta: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        exact, clean = gradient.double(), self.clean[rows]
        unit = exact / exact.flatten(1).abs().sum(dim=1).clamp_min(1e-300).view(-1, 1, 1, 1)
        self.velocity[rows] = velocity = self.decay * self.velocity[rows] + unit
        step = ascent(self.threat, velocity.to(delta.dtype), clean + delta)
        return project(self.threat, delta + self.length * step, clean)


@dataclass(frozen=True)
class MIM(Climb):
    """Iterative ascent along accumulated gradients, from the clean image, `steps` steps of eps / steps.

    decay: what the sum keeps of itself per step, 1.0 in the paper. rel_step: length of a step as a part of eps, by
    default 1 / steps. The result is the best iterate by loss.
    """

    name: ClassVar[str] = "mim"

    random_start: bool = False
    decay: float = 1.0
    rel_step: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.decay >= 0:
            raise UsageError(f"attack '{self.name}': decay must be 0 or above, not {self.decay!r}")
        if self.rel_step is not None and not self.rel_step > 0:
            raise UsageError(f"attack '{self.name}': rel_step must be above 0, not {self.rel_step!r}")

    def walk(self, pursuit: Pursuit) -> Walk:
        part = self.rel_step if self.rel_step is not None else 1 / self.steps
        return Momentum(pursuit, pursuit.threat.eps * part, self.decay)
