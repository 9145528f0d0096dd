"""A sequential certificate: sample until the evidence decides, valid at any stopping time.

For each radius r the threshold is p0 = Phi(r / sigma). The e-process against p <= p0 certifies r when it reaches
1/alpha (Ville's inequality), its mirror against p >= p0 refutes r; what is open at the cap is abstained on. The
processes, and why one alpha covers all radii and the radius that is read off at the end, are in evidence.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..core.registry import certifiers
from .base import Certifier, Decision, State, Verdict, merged
from .evidence import (
    log_evidence_above,
    log_evidence_below,
    needed_probability,
    sequential_low,
    sequential_needs,
)

LARGEST_ALPHA = 1 / math.e
"""Below it one alpha covers all thresholds at once (evidence.py)."""


@certifiers.register("sequential")
@dataclass(frozen=True)
class Sequential(Certifier):
    """n: the cap on test samples. radii: decide each of them, on shared samples, and stop when all are decided.

    Without radii it draws up to the cap, for the largest radius it can show, and stops only where the candidate is
    refuted as the majority answer. A higher cap may be set when an interrupted or finished state is taken up again.
    A certified radius is wrong with probability at most alpha, and so is a refuted one.
    """

    name: ClassVar[str] = "sequential"

    n: int = 100_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha >= LARGEST_ALPHA:
            raise self._refused(f"alpha must be below 1/e = {LARGEST_ALPHA:.3f}, not {self.alpha}")

    def needs(self, p0: float) -> int:
        return sequential_needs(p0, self.alpha)

    @property
    def _thresholds(self) -> NDArray[np.float64]:
        return np.atleast_1d(needed_probability(self.radii or (0.0,), self.sigma))

    def _count(self, state: State, labels: Sequence[int]) -> State:
        hits = np.asarray(labels) == state.candidate
        k = state.test.get(state.candidate, 0) + np.cumsum(hits)
        n = state.tested + np.arange(1, len(labels) + 1)
        decided = list(state.decided or (None,) * len(self._thresholds))
        for place, p0 in enumerate(self._thresholds):
            if decided[place] is None:
                decided[place] = first_decision(k, n, p0, self.alpha)
        taken = len(labels)
        if self._stops(tuple(decided)):
            taken = max(done[1] for done in decided if done is not None) - state.tested
        return replace(state, test=merged(state.test, labels[:taken]), decided=tuple(decided))

    def _stops(self, decided: tuple[tuple[Verdict, int] | None, ...]) -> bool:
        if self.radii:
            return None not in decided
        return decided[0] is not None and decided[0][0] == "refuted"

    def _ended(self, state: State) -> bool:
        return bool(state.decided) and self._stops(state.decided)

    def _p_low(self, state: State) -> float:
        low = float(sequential_low(state.test.get(state.candidate, 0), state.tested, self.alpha))
        certified = [
            float(p0)
            for p0, done in zip(self._thresholds, state.decided, strict=True)
            if done is not None and done[0] == "certified"
        ]
        # What was once certified stays so, though the bound may have sunk a little since: both hold at all n at once.
        return max([low, *certified])

    def _decisions(self, state: State, p_low: float) -> tuple[Decision, ...]:
        return tuple(
            Decision(radius, *(done or ("abstain", state.tested)))
            for radius, done in zip(self.radii or (0.0,), state.decided, strict=True)
        )

    def _identity(self) -> tuple[object, ...]:
        return self.sigma, self.n0, self.alpha, self.radii


def first_decision(k: NDArray[Any], n: NDArray[Any], p0: float, alpha: float) -> tuple[Verdict, int] | None:
    """The first of the counts (k of n each, in the order drawn) that decides, as (verdict, n); None if none does."""
    limit = -math.log(alpha)
    certified = log_evidence_above(k, n, p0) >= limit
    ended = certified | (log_evidence_below(k, n, p0) >= limit)
    if not ended.any():
        return None
    place = int(ended.argmax())
    return ("certified" if certified[place] else "refuted"), int(n[place])
