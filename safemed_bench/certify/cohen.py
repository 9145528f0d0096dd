"""Cohen, Rosenfeld, Kolter 2019 (1902.02918): a fixed number of samples and the Clopper-Pearson bound.

n0 samples choose the candidate, n fresh ones test it. With p_low the one-sided lower bound of its probability at
confidence 1 - alpha the smoothed model answers it within R = sigma Phi^-1(p_low); below 1/2 there is no answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from ..core.registry import certifiers
from .base import Certifier, Decision, State, merged
from .evidence import certified_radius, clopper_pearson_low, cohen_needs


@certifiers.register("cohen")
@dataclass(frozen=True)
class Cohen(Certifier):
    """n: how many test samples, all of them drawn. radii: only refused where out of reach, and reported on.

    It never refutes: a radius that is not certified is abstained on. n is part of the state's identity, because the
    bound holds for an n fixed beforehand, not for one that grows until the bound is good enough.
    """

    name: ClassVar[str] = "cohen"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < self.n0:
            raise self._refused(
                f"n = {self.n} test samples are fewer than the n0 = {self.n0} that select; "
                f"the smallest n that will do is {self.n0}"
            )

    @property
    def largest_radius(self) -> float:
        """L2, reached where all n samples agree: sigma Phi^-1(alpha^(1/n))."""
        return certified_radius(self.lower(self.n, self.n), self.sigma)

    def lower(self, k: int, n: int) -> float:
        """Lower bound at confidence 1 - alpha of a probability that showed k times in n. With another one, and its
        `needs`, a subclass is another certifier."""
        return float(clopper_pearson_low(k, n, self.alpha))

    def needs(self, p0: float) -> int:
        return cohen_needs(p0, self.alpha)

    def _count(self, state: State, labels: Sequence[int]) -> State:
        return replace(state, test=merged(state.test, labels))

    def _ended(self, state: State) -> bool:
        return False

    def _p_low(self, state: State) -> float:
        return self.lower(state.test.get(state.candidate, 0), state.tested)

    def _decisions(self, state: State, p_low: float) -> tuple[Decision, ...]:
        reached = certified_radius(p_low, self.sigma) if p_low >= 0.5 else -1.0
        return tuple(
            Decision(radius, "certified" if radius <= reached else "abstain", state.tested)
            for radius in self.radii or (0.0,)
        )

    def _identity(self) -> tuple[object, ...]:
        return self.sigma, self.n0, self.alpha, self.n
