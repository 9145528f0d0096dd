"""The frame of every gradient attack, doing no work that changes nothing.

A question leaves the batch as soon as the deployed path is seen to answer it wrongly, and restarts run on survivors
only. How the next point is chosen is a `Walk`; that is all in which PGD, MIM and APGD differ.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.errors import UsageError
from .base import Attack, Pursuit
from .threat import random_start


class Walk(ABC):
    """The moves of one restart. What it remembers it holds for all questions of the batch, looked up by `rows`."""

    def __init__(self, pursuit: Pursuit) -> None:
        self.threat, self.clean = pursuit.threat, pursuit.clean

    @abstractmethod
    def move(self, rows: Tensor, delta: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        """The next perturbations of `rows`, inside ball and box, from loss and gradient at the present ones."""


@dataclass(frozen=True)
class Climb(Attack):
    """Gradient ascent from one or more starts.

    steps: gradient steps per restart. restarts: starts; later ones run on what still stands. random_start: uniform in
    the ball, else from the clean image. active_set: False carries fooled questions along to the end, the naive loop
    that verdicts are tested against.
    """

    steps: int = 20
    restarts: int = 1
    random_start: bool = True
    active_set: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "restarts"):
            require_count(self.name, name, getattr(self, name))

    @abstractmethod
    def walk(self, pursuit: Pursuit) -> Walk:
        """A new walk, for one restart."""

    @property
    def keeps_last(self) -> bool:
        """Whether the result of a restart is its last iterate, not the best by loss."""
        return False

    def perturb(self, pursuit: Pursuit) -> None:
        rows = pursuit.rows()
        for _ in range(self.restarts):
            if len(rows):
                self._climb(pursuit, rows)
            rows = pursuit.survivors() if self.active_set else rows

    def _climb(self, pursuit: Pursuit, rows: Tensor) -> None:
        """One restart: `steps` steps from one start, then a verdict on the best iterate of all that still stand, or on
        the last one where the surrogate, in place of a costly verdict, has never held any for wrong."""
        walk, restarted = self.walk(pursuit), rows
        delta = self._start(pursuit, rows)
        pursuit.begin(rows)
        for step in range(self.steps):
            reading, gradient = pursuit.read(rows, delta)
            loss = reading.loss
            pursuit.keep(rows, delta, loss, always=self.keeps_last)
            if self._verdict_due(step, pursuit.costly):
                pursuit.verify(rows[reading.suspects], delta[reading.suspects], loss[reading.suspects])
            if self.active_set:
                standing = ~pursuit.success[rows]
                if not standing.all():
                    rows, delta, loss, gradient = rows[standing], delta[standing], loss[standing], gradient[standing]
                if not len(rows):
                    return
            delta = walk.move(rows, delta, loss, gradient)
        if self.keeps_last and not pursuit.judged:  # nobody asks for its loss: the trainer saves a forward pass
            pursuit.keep(rows, delta, torch.zeros_like(pursuit.best_loss[rows]), always=True)
        else:
            reading, _ = pursuit.read(rows, delta, gradient=False)
            pursuit.keep(rows, delta, reading.loss, always=self.keeps_last | pursuit.unsuspected(rows))
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


def require_count(attack: str, name: str, value: object) -> None:
    """Raises UsageError where a parameter of an attack is not a whole number above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"attack '{attack}': {name} must be a whole number above 0, not {value!r}")
