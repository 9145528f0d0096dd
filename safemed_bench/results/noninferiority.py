"""How sure one can be that accuracy dropped, or that it did not: a paired one-sided test with a margin.

Two runs answer the same questions; a question counts +1 where the first is right and the second wrong, -1 the other way
round, 0 where they agree. The mean of that is the drop. Its standard error comes from a regression on a constant with
the cluster-robust variance of statsmodels, images being the clusters, and is never below that of independent
questions.

With few flips the plain standard error is too small just when the drop is underestimated. So one flip each way is
added, as an image of its own (Bonett & Price 2012, "Adjusted Wald confidence interval for a difference of binomial
proportions based on paired data"). Where images are shared each of the two weighs as much as the design effect, so that
it is one flip among as many as are independent. How well all this keeps its promises: benchmarks/gate.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import stdtr, stdtrit
from statsmodels.regression.linear_model import WLS

from .intervals import Codes, Floats


@dataclass(frozen=True, slots=True)
class PairedDrop:
    """The drop between two runs over n questions on `images` images, in [-1, 1]; positive is worse.

    lost, gained: questions that turned wrong, and right. centre, error: the drop and its standard error with the added
    flips; all tests use these, and all are inconclusive (p = 1) on fewer than two images. weight: of an added flip, in
    questions. effect: design effect of shared images, at least 1, with the added flips.
    """

    n: int
    images: int
    lost: int
    gained: int
    centre: float
    error: float
    weight: float
    effect: float

    @property
    def drop(self) -> float:
        return (self.lost - self.gained) / self.n if self.n else math.nan

    @property
    def testable(self) -> bool:
        """A variance between images takes two of them."""
        return self.images > 1

    def p_above(self, margin: float) -> float:
        """One-sided p of "the drop is at most `margin`": small where it is larger."""
        return _upper((self.centre - margin) / self.error, self.images - 1) if self.testable else 1.0

    def p_below(self, margin: float) -> float:
        """One-sided p of "the drop is at least `margin`": small where it is smaller."""
        return _upper((margin - self.centre) / self.error, self.images - 1) if self.testable else 1.0

    def bounds(self, alpha: float) -> tuple[float, float]:
        """Lower and upper confidence bound of the drop, each one-sided at level 1 - alpha."""
        if not self.testable:
            return -1.0, 1.0
        reach = _critical(alpha, self.images - 1) * self.error
        return max(self.centre - reach, -1.0), min(self.centre + reach, 1.0)

    def power(self, drop: float, margin: float, alpha: float) -> float:
        """Chance in [0, 1] that a true `drop` would be shown to exceed `margin`, at level alpha.

        The flips that were seen are taken as noise that stays, less what is established as a drop; `drop` is on top.
        """
        if not self.testable:
            return 0.0
        added, degrees = 2 * self.weight, self.images - 1
        total = self.n + added
        centre = drop * self.n / total
        moved = min(self._noise(alpha) + drop, 1.0)
        error = math.sqrt(((moved * self.n + added) / total - centre**2) * self.effect / total)
        # the added flips are in the error, but they do not vary from run to run
        spread = math.sqrt((moved - drop**2) * self.n * self.weight) / total
        short = margin + _critical(alpha, degrees) * error - centre
        return _upper(short / spread, degrees) if spread > 0 else float(short <= 0)

    def detectable(self, margin: float, alpha: float, power: float) -> float | None:
        """The smallest true drop shown to exceed `margin` with that power; None where not even the largest would be."""
        most = 1.0 - self._noise(alpha) if self.testable else margin
        if most <= margin or self.power(most, margin, alpha) < power:
            return None
        return float(brentq(lambda drop: self.power(drop, margin, alpha) - power, margin, most, xtol=1e-6))

    def _noise(self, alpha: float) -> float:
        low, high = self.bounds(alpha)
        return (self.lost + self.gained) / self.n - max(low, -high, 0.0)


def _upper(t: float, degrees: int) -> float:
    """Share of Student's t distribution above t."""
    return float(stdtr(degrees, -t))


def _critical(alpha: float, degrees: int) -> float:
    """The t above which a share alpha of Student's distribution lies."""
    return -float(stdtrit(degrees, alpha))


def paired_drop(before: Floats, after: Floats, clusters: Codes) -> PairedDrop:
    """before, after: (n,) of 0 and 1, 1 being good, on the same questions. clusters: (n,), equal codes: one image."""
    n, images = len(before), len(np.unique(clusters))
    difference = before - after
    lost, gained = int(np.sum(difference > 0)), int(np.sum(difference < 0))
    if images < 2:
        return PairedDrop(n, images, lost, gained, math.nan, math.nan, 1.0, 1.0)
    weight = _weight(difference, clusters, n / images)
    last = int(np.max(clusters))
    values = np.concatenate((difference, (1.0, -1.0)))
    weights = np.concatenate((np.ones(n), (weight, weight)))
    centre, alone, together = _mean(values, np.concatenate((clusters, (last + 1, last + 2))), weights)
    effect = max(together / alone, 1.0)
    return PairedDrop(n, images, lost, gained, centre, math.sqrt(alone * effect), weight, effect)


def _weight(difference: Floats, clusters: Codes, most: float) -> float:
    """The design effect of the differences, in [1, most]; `most`, the mean size of an image, where nothing flipped."""
    if np.ptp(difference) == 0:
        return most
    _, alone, together = _mean(difference, clusters, np.ones(len(difference)))
    return min(max(together / alone, 1.0), most)


def _mean(values: Floats, clusters: Codes, weights: Floats) -> tuple[float, float, float]:
    """Weighted mean, its variance were all values independent, and its cluster-robust variance."""
    model = WLS(values, np.ones(len(values)), weights=weights)
    alone = model.fit()
    together = model.fit(cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True)
    return float(alone.params[0]), float(alone.bse[0]) ** 2, float(together.bse[0]) ** 2
