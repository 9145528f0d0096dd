"""The nearest picture that is answered wrongly: FAB (Croce & Hein, 1907.02044, algorithm 1) on an objective's margin.

Unlike the other attacks it does not look for the worst picture of a ball but for the shortest way across the boundary,
so that one run tells of every eps: a record's `extra.minimal_norm` is the length of that way, in the suite's norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..core.errors import UsageError
from ..core.types import ThreatModel
from .base import Attack, Pursuit
from .climb import require_count
from .threat import project

OVERSHOOT, MOST_BIAS, BACK = 1.05, 0.1, 0.9
"""eta, alpha_max and beta of 1907.02044."""
NUDGE = 1e-3
"""How far beyond the boundary is aimed, as a part of the clean margin: on it two options tie and nothing would move."""


@dataclass(frozen=True)
class FAB(Attack):
    """Steps to the linearised boundary, each drawn a little towards the clean picture; once across, back by a tenth.

    The steps ignore the ball and keep to the box, by clipping where the paper projects. What is judged is the nearest
    picture found, drawn out or in to the edge of the ball; where the boundary was never met, the one of the highest
    loss, drawn in. `minimal_norm` is where the surrogate turns, before the 8-bit grid, of pictures inside the ball or
    not; there is none where it never turned. The paper's random restarts are left out: it starts at the clean picture.
    """

    name: ClassVar[str] = "fab"

    steps: int = 40

    def __post_init__(self) -> None:
        require_count(self.name, "steps", self.steps)

    def perturb(self, pursuit: Pursuit) -> None:
        if pursuit.threat.norm == "l1":
            raise UsageError("attack 'fab' works in linf and l2, not in l1")
        rows, threat = pursuit.rows(), pursuit.threat
        pursuit.begin(rows)
        delta, best = torch.zeros_like(pursuit.clean), torch.zeros_like(pursuit.clean)
        least = torch.full((len(rows),), torch.inf, dtype=torch.float64, device=delta.device)
        highest, beyond = torch.full_like(least, -torch.inf), torch.zeros_like(least)
        for step in range(self.steps + 1):
            reading, gradient = pursuit.read(rows, delta, gradient=step < self.steps)
            size, across, loss = _size(threat, delta), reading.suspects, reading.loss.double()
            nearer = (across & (size < least)) | (least.isinf() & (loss > highest))
            least = torch.where(across, size.minimum(least), least)
            highest = loss.maximum(highest)
            best[nearer] = delta[nearer]
            beyond = NUDGE * loss.abs() if step == 0 else beyond
            gap = torch.where(across, loss.abs(), -loss.abs() - beyond)
            moved = pursuit.clean + torch.where(_wide(across), BACK * delta, _step(threat, delta, gap, gradient))
            delta = moved.clamp(*threat.bounds) - pursuit.clean
        self._judge(pursuit, best, least)

    def _judge(self, pursuit: Pursuit, best: Tensor, least: Tensor) -> None:
        rows, threat = pursuit.rows(), pursuit.threat
        size = _size(threat, best).clamp_min(1e-300)
        edge = project(threat, (best * _wide(threat.eps / size)).to(best.dtype), pursuit.clean)
        pursuit.suspected[least > threat.eps] = -1  # a wrong answer outside the ball promised nothing inside
        reading, _ = pursuit.read(rows, edge, gradient=False)
        pursuit.keep(rows, edge, reading.loss, always=True)
        pursuit.settle(rows)
        for note, norm in zip(pursuit.notes, least.tolist(), strict=True):
            if norm < torch.inf:
                note["minimal_norm"] = round(norm, 8)


def _step(threat: ThreatModel, delta: Tensor, gap: Tensor, gradient: Tensor) -> Tensor:
    """The next perturbation: from where we are and from the clean picture to the plane where the linearised `gap` (B,)
    is 0, and between these two points the nearer to here the nearer the plane is. No move without a gradient."""
    slope, shift = gradient.double(), delta.double()
    if threat.norm == "linf":
        steepness, direction = slope.flatten(1).abs().sum(dim=1), slope.sign()
    else:
        steepness = slope.flatten(1).norm(dim=1)
        direction = slope / _wide(steepness.clamp_min(1e-300))
    here = -gap / steepness.clamp_min(1e-300)
    clean = ((slope * shift).flatten(1).sum(dim=1) - gap) / steepness.clamp_min(1e-300)
    bias = (here.abs() / (here.abs() + clean.abs()).clamp_min(1e-300)).clamp_max(MOST_BIAS)
    moved = _wide(1 - bias) * (shift + OVERSHOOT * _wide(here) * direction)
    moved = moved + _wide(bias * OVERSHOOT * clean) * direction
    return torch.where(_wide(steepness > 0), moved, shift).to(delta.dtype)


def _size(threat: ThreatModel, delta: Tensor) -> Tensor:
    """(B,) float64 norms in the threat's norm."""
    flat = delta.double().flatten(1)
    return flat.abs().amax(dim=1) if threat.norm == "linf" else flat.norm(dim=1)


def _wide(values: Tensor) -> Tensor:
    """(B,) as (B, 1, 1, 1)."""
    return values.view(-1, 1, 1, 1)
