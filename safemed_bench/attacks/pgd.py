"""Projected gradient ascent in the L∞, L2 and L1 ball (Madry et al., 1706.06083)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..core.errors import UsageError
from .base import Pursuit
from .climb import Climb, Walk
from .threat import ascent, project


class Straight(Walk):
    """Steps of one length along the steepest direction."""

    def __init__(self, pursuit: Pursuit, length: float) -> None:
        super().__init__(pursuit)
        self.length = length

    def move(self, rows: Tensor, delta: Tensor, loss: Tensor, gradient: Tensor) -> Tensor:
        clean = self.clean[rows]
        step = ascent(self.threat, gradient, clean + delta)
        return project(self.threat, delta.add(step, alpha=self.length), clean)


@dataclass(frozen=True)
class PGD(Climb):
    """Projected gradient descent on the negative objective.

    steps: gradient steps per restart. restarts: random starts; later ones run on what still stands. step_size:
    absolute, on the [0, 1] pixel scale; rel_step: as a fraction of eps; neither: 2.5 eps / steps, which can cross
    the ball and come back (Madry et al.). random_start: uniform in the ball, else from the clean image. keep: which
    iterate of a restart is its result, the `best` by loss or the `last`. active_set: False carries fooled questions
    along to the end, the naive loop that verdicts are tested against.
    """

    name: ClassVar[str] = "pgd"

    step_size: float | None = None
    rel_step: float | None = None
    keep: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("step_size", "rel_step"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"attack '{self.name}': {name} must be above 0, not {value!r}")
        if self.step_size is not None and self.rel_step is not None:
            raise UsageError(f"attack '{self.name}': give step_size or rel_step, not both")
        if self.keep not in ("best", "last"):
            raise UsageError(f"attack '{self.name}': keep must be best or last, not {self.keep!r}")

    @property
    def keeps_last(self) -> bool:
        return self.keep == "last"

    def length(self, eps: float) -> float:
        """Length of one step on the [0, 1] pixel scale."""
        if self.step_size is not None:
            return self.step_size
        return eps * (self.rel_step if self.rel_step is not None else 2.5 / self.steps)

    def walk(self, pursuit: Pursuit) -> Walk:
        return Straight(pursuit, self.length(pursuit.threat.eps))
