"""Projected gradient ascent in the L∞ and the L2 ball (Madry et al., 1706.06083), doing no work that changes
nothing.

A question leaves the batch as soon as the deployed path is seen to answer it wrongly, and restarts run on survivors
only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..core.errors import UsageError
from ..core.types import ThreatModel
from .base import Attack, Pursuit
from .threat import flat_norm, project, random_start


def ascent(threat: ThreatModel, gradient: Tensor) -> Tensor:
    """The steepest direction of unit length in the threat's norm: sign (L∞) or normalised gradient (L2)."""
    if threat.norm == "linf":
        return gradient.sign()
    # float64, since the squares of a vanishing gradient underflow in float32
    exact = gradient.double()
    return (exact / flat_norm(exact).clamp_min(1e-300)).to(gradient.dtype)


@dataclass(frozen=True)
class PGD(Attack):
    """Projected gradient descent on the negative objective.

    steps: gradient steps per restart. restarts: random starts; later ones run on what still stands. step_size:
    absolute, on the [0, 1] pixel scale; rel_step: as a fraction of eps; neither: 2.5 eps / steps, which can cross
    the ball and come back (Madry et al.). random_start: uniform in the ball, else from the clean image. keep: which
    iterate of a restart is its result, the `best` by loss or the `last`. active_set: False carries fooled questions
    along to the end, the naive loop that verdicts are tested against.
    """

    name: ClassVar[str] = "pgd"

    steps: int = 20
    restarts: int = 1
    step_size: float | None = None
    rel_step: float | None = None
    random_start: bool = True
    keep: Literal["best", "last"] = "best"
    active_set: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "restarts"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"attack '{self.name}': {name} must be a whole number above 0, not {value!r}")
        for name in ("step_size", "rel_step"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"attack '{self.name}': {name} must be above 0, not {value!r}")
        if self.step_size is not None and self.rel_step is not None:
            raise UsageError(f"attack '{self.name}': give step_size or rel_step, not both")
        if self.keep not in ("best", "last"):
            raise UsageError(f"attack '{self.name}': keep must be best or last, not {self.keep!r}")

    def length(self, eps: float) -> float:
        """Length of one step on the [0, 1] pixel scale."""
        if self.step_size is not None:
            return self.step_size
        return eps * (self.rel_step if self.rel_step is not None else 2.5 / self.steps)

    def perturb(self, pursuit: Pursuit) -> None:
        rows = pursuit.rows()
        for _ in range(self.restarts):
            if len(rows):
                self._climb(pursuit, rows)
            rows = pursuit.survivors() if self.active_set else rows

    def _climb(self, pursuit: Pursuit, rows: Tensor) -> None:
        """One restart: `steps` steps from one start, then a verdict on the best iterate of all that still stand."""
        threat, size, restarted = pursuit.threat, self.length(pursuit.threat.eps), rows
        delta = self._start(pursuit, rows)
        pursuit.begin(rows)
        for step in range(self.steps):
            reading, gradient = pursuit.read(rows, delta)
            pursuit.keep(rows, delta, reading.loss, always=self.keep == "last")
            if self._verdict_due(step, pursuit.costly):
                pursuit.verify(rows[reading.suspects], delta[reading.suspects], reading.loss[reading.suspects])
            if self.active_set:
                standing = ~pursuit.success[rows]
                rows, delta, gradient = rows[standing], delta[standing], gradient[standing]
                if not len(rows):
                    return
            delta = project(threat, delta + size * ascent(threat, gradient), pursuit.clean[rows])
        if self.keep == "last" and not pursuit.judged:  # nobody asks for its loss: the trainer saves a forward pass
            pursuit.keep(rows, delta, torch.zeros_like(pursuit.best_loss[rows]), always=True)
        else:
            reading, _ = pursuit.read(rows, delta, gradient=False)
            pursuit.keep(rows, delta, reading.loss, always=self.keep == "last")
        pursuit.settle(restarted)

    def _start(self, pursuit: Pursuit, rows: Tensor) -> Tensor:
        if not self.random_start:
            return torch.zeros_like(pursuit.clean[rows])
        generators = [pursuit.generators[i] for i in rows.tolist()]
        return random_start(pursuit.threat, pursuit.clean[rows], generators)

    def _verdict_due(self, step: int, costly: bool) -> bool:
        """Whether suspects are judged at this iterate: at each, or where a verdict is costly at 1, 2, 4, 8, ...

        Without a random start the first iterate is the clean image, whose verdict is known.
        """
        if step == 0:
            return self.random_start
        return not costly or step & (step - 1) == 0
