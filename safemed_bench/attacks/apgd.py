"""Auto-PGD (Croce & Hein, 2003.01690, section 3): momentum, and a step that halves where the climb has stalled.

In the L1 ball the step is sparse and it is the number of moved values that adapts (2103.01208, algorithm 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Pursuit
from .climb import Climb, Walk
from .threat import ascent, project, sparse_ascent

RISES = 0.75
"""rho: the step is halved unless this part of the steps since the last checkpoint raised the loss."""
INERTIA = 0.75
"""alpha: weight of the new move, against that of the last one repeated."""
SPARSEST, SHRINK, SMALLEST_STEP = 1.5, 1.5, 0.1
"""L1: the part of the best point's moved values that the next steps move, is 1/1.5; the step falls by 1.5 down to a
tenth of eps."""


def checkpoints(steps: int) -> tuple[int, ...]:
    """Steps after which the climb is looked at: ceil(p_j steps), p = 0, 0.22, then by max(last gap - 0.03, 0.06)."""
    parts = [0.0, 0.22]
    while parts[-1] < 1:
        parts.append(parts[-1] + max(parts[-1] - parts[-2] - 0.03, 0.06))
    # rounded, since sums such as 0.22 + 0.19 are not exact
    return tuple(dict.fromkeys(math.ceil(round(part * steps, 6)) for part in parts if part <= 1))


class _Best(Walk):
    """Holds the best point so far, the gradient there and the point before the present one."""

    def __init__(self, pursuit: Pursuit, step: float) -> None:
        super().__init__(pursuit)
        count, empty = len(self.clean), torch.zeros_like(self.clean)
        self.done = 0  # moves made
        self.step = torch.full((count,), step, dtype=torch.float64, device=self.clean.device)
        self.best_loss = torch.full((count,), -torch.inf, dtype=torch.float64, device=self.clean.device)
        self.best, self.best_gradient = empty.clone(), empty.clone()

    def _hold(self, rows: Tensor, delta: Tensor, loss: Tensor, gradient: Tensor) -> None:
        better = loss > self.best_loss[rows]
        at = rows[better]
        self.best_loss[at] = loss[better].double()
        self.best[at], self.best_gradient[at] = delta[better], gradient[better]


class Auto(_Best):
    """Algorithm 1 of 2003.01690 in the L∞ and L2 ball. `step` (B,) is the present step length, at first 2 eps."""

    def __init__(self, pursuit: Pursuit, steps: int) -> None:
        super().__init__(pursuit, 2 * pursuit.threat.eps)
        self.checkpoints = checkpoints(steps)
        self.before = torch.zeros_like(self.clean)
        self.rises = torch.zeros_like(self.step)
        self.last_loss, self.mark_loss = self.best_loss.clone(), self.best_loss.clone()
        self.halved = torch.zeros_like(self.step, dtype=torch.bool)

    def move(self, rows: Tensor, delta: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        self.rises[rows] += (loss > self.last_loss[rows]).double() if self.done else 0.0
        self._hold(rows, delta, loss, gradient)
        self.last_loss[rows] = loss.double()
        if self.done in self.checkpoints[1:]:
            back = self._halve(rows).view(-1, 1, 1, 1)
            delta = torch.where(back, self.best[rows], delta)
            gradient = torch.where(back, self.best_gradient[rows], gradient)
        elif not self.done:
            self.mark_loss[rows] = self.best_loss[rows]
        after = self._next(rows, delta, gradient)
        self.before[rows] = delta
        self.done += 1
        return after

    def _halve(self, rows: Tensor) -> Tensor:
        """Halves the step of rows that rose too seldom (condition 1), or whose best has not changed since a checkpoint
        that left the step as it was (condition 2); which rows (bool), for these go on from their best point."""
        place = self.checkpoints.index(self.done)
        gap = self.done - self.checkpoints[place - 1]
        seldom = self.rises[rows] < RISES * gap
        stuck = ~self.halved[rows] & (self.best_loss[rows] <= self.mark_loss[rows])
        back = seldom | stuck
        self.step[rows] = torch.where(back, self.step[rows] / 2, self.step[rows])
        self.last_loss[rows] = torch.where(back, self.best_loss[rows], self.last_loss[rows])
        self.rises[rows] = 0.0
        self.mark_loss[rows], self.halved[rows] = self.best_loss[rows], back
        return back

    def _next(self, rows: Tensor, delta: Tensor, gradient: Tensor) -> Tensor:
        threat, clean = self.threat, self.clean[rows]
        length = self.step[rows].to(delta.dtype).view(-1, 1, 1, 1)
        bold = project(threat, delta + length * ascent(threat, gradient, clean + delta), clean)
        if not self.done:
            return bold
        moved = delta + INERTIA * (bold - delta) + (1 - INERTIA) * (delta - self.before[rows])
        return project(threat, moved, clean)


class AutoSparse(_Best):
    """Algorithm 1 of 2103.01208 in the L1 ball: no momentum; `parts` (B,) is the part of the values that moves.

    At first a fifth of all values moves by eps in sum. At each checkpoint the part is set from the number of values in
    which the best point differs from the clean image; where that fell by 5% the climb starts again from the best point
    with the full step, elsewhere the step shrinks.
    """

    def __init__(self, pursuit: Pursuit, steps: int) -> None:
        super().__init__(pursuit, pursuit.threat.eps)
        self.every = max(int(0.04 * steps), 1)
        self.parts = torch.full_like(self.step, 0.2)
        self.moved = torch.full_like(self.step, self.clean[0].numel())

    def move(self, rows: Tensor, delta: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        self._hold(rows, delta, loss, gradient)
        if self.done and self.done % self.every == 0:
            back = self._adapt(rows).view(-1, 1, 1, 1)
            delta = torch.where(back, self.best[rows], delta)
            gradient = torch.where(back, self.best_gradient[rows], gradient)
        self.done += 1
        clean, length = self.clean[rows], self.step[rows].to(delta.dtype).view(-1, 1, 1, 1)
        direction = sparse_ascent(self.threat, gradient, clean + delta, self.parts[rows])
        return project(self.threat, delta + length * direction, clean)

    def _adapt(self, rows: Tensor) -> Tensor:
        """New part and step length; which rows (bool) start again from their best point."""
        eps = self.threat.eps
        moved = (self.best[rows].flatten(1) != 0).sum(dim=1).double()
        back = moved < 0.95 * self.moved[rows]
        self.parts[rows] = moved / self.clean[0].numel() / SPARSEST
        shorter = (self.step[rows] / SHRINK).clamp(SMALLEST_STEP * eps, eps)
        self.step[rows] = torch.where(back, eps, shorter)
        self.moved[rows] = moved
        return back


@dataclass(frozen=True)
class APGD(Climb):
    """Auto-PGD: no step size to choose, a first step of 2 eps, and the best iterate by loss as the result.

    steps: gradient steps per restart; the schedule is a function of it. restarts: random starts; later ones run on
    what still stands. random_start: uniform in the ball, else from the clean image. active_set: False carries fooled
    questions along to the end.
    """

    name: ClassVar[str] = "apgd"

    steps: int = 50

    def walk(self, pursuit: Pursuit) -> Walk:
        return (AutoSparse if pursuit.threat.norm == "l1" else Auto)(pursuit, self.steps)
