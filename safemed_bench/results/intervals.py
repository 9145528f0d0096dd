"""95% intervals for proportions and paired differences; all quantiles and variances come from statsmodels.

Several questions can be asked about one image, and their verdicts then rise and fall together: a plain binomial
interval would be too narrow. Where that happens the cluster-robust variance of the mean gives a design effect, and the
Wilson interval is computed at n / design effect (Korn & Graubard 1998, Franco et al. 2019). `Estimate.method` says
which was used:

wilson             no two questions share an image (Wilson 1927)
wilson-clustered   some do: Wilson at the effective n
wilson-weighted    mean of the strata's means (weights 1/n of the stratum): Wilson at the effective n
paired-t, paired-t-clustered
                   mean of per-question differences, t interval on the (cluster-)robust standard error
mean-t, mean       mean of numbers: t interval on the (cluster-)robust standard error; none where all are equal
newcombe           the same where all differences are equal, so that a t interval would have width 0 (Newcombe 1998)
exact              a known quantity of the questions, not an estimate: low = high = value
none               no question to estimate from: value, low and high are NaN, n is 0
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from statsmodels.regression.linear_model import WLS
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from ..core.types import Estimate

ALPHA = 0.05
Floats = NDArray[np.float64]
Codes = NDArray[np.intp]

NOTHING = Estimate(math.nan, math.nan, math.nan, 0, "none")


def proportion(values: Floats, clusters: Codes, weights: Floats | None = None) -> Estimate:
    """Share of ones with its interval.

    values: (n,) of 0 and 1. clusters: (n,) whose equal codes mark one image. weights: (n,) positive, None = equal.
    """
    n = len(values)
    if n == 0:
        return NOTHING
    share = float(np.average(values, weights=weights))
    shared = len(np.unique(clusters)) < n
    if weights is None and not shared:
        return _wilson(share, n, n, "wilson")
    method = "wilson-clustered" if weights is None else "wilson-weighted"
    return _wilson(share, n, n / design_effect(values, clusters, weights), method)


def design_effect(values: Floats, clusters: Codes, weights: Floats | None = None) -> float:
    """Variance of the (weighted) mean over that of n independent questions, in [1, its value at full dependence].

    It is never below 1: that verdicts within an image happen to differ is not taken as evidence of a narrower
    interval. With all verdicts equal there is nothing to estimate it from, and full dependence is assumed.
    """
    n = len(values)
    w = np.ones(n) if weights is None else weights
    totals = np.bincount(np.unique(clusters, return_inverse=True)[1], weights=w)
    full = n * float(np.sum(totals**2)) / float(np.sum(w)) ** 2
    share = float(np.average(values, weights=w))
    binomial = share * (1 - share) / n
    if len(totals) < 2 or np.ptp(values) == 0:
        return max(1.0, full)
    fit = _mean_fit(values, clusters, w)
    return min(max(float(fit.bse[0]) ** 2 / binomial, 1.0), max(1.0, full))


def paired_difference(first: Floats, second: Floats, clusters: Codes) -> Estimate:
    """Mean of first - second, both (n,) of 0 and 1 on the same questions; in [-1, 1]."""
    n = len(first)
    if n == 0:
        return NOTHING
    difference = first - second
    shared = len(np.unique(clusters)) < n
    value = float(difference.mean())
    if len(np.unique(clusters)) < 2 or np.ptp(difference) == 0:
        size = n / max(design_effect(first, clusters), design_effect(second, clusters))
        low, high = confint_proportions_2indep(
            first.mean() * size, size, second.mean() * size, size, compare="diff", method="newcomb", alpha=ALPHA
        )
        return Estimate(value, float(low), float(high), n, "newcombe")
    low, high = _mean_fit(difference, clusters, np.ones(n)).conf_int(ALPHA)[0]
    method = "paired-t-clustered" if shared else "paired-t"
    return Estimate(value, max(float(low), -1.0), min(float(high), 1.0), n, method)


def mean(values: Floats, clusters: Codes) -> Estimate:
    """Mean of (n,) numbers, t interval on the (cluster-)robust standard error; no width where all are equal."""
    n = len(values)
    if n == 0:
        return NOTHING
    value = float(values.mean())
    if len(np.unique(clusters)) < 2 or np.ptp(values) == 0:
        return Estimate(value, math.nan, math.nan, n, "mean")
    low, high = _mean_fit(values, clusters, np.ones(n)).conf_int(ALPHA)[0]
    return Estimate(value, float(low), float(high), n, "mean-t")


def exact(value: float, n: int) -> Estimate:
    return Estimate(value, value, value, n, "exact") if n else NOTHING


def _wilson(share: float, n: int, effective: float, method: str) -> Estimate:
    low, high = proportion_confint(share * effective, effective, alpha=ALPHA, method="wilson")
    # Rounding can leave an end a hair on the wrong side of a share of exactly 0 or 1.
    return Estimate(share, min(float(low), share), max(float(high), share), n, method)


def _mean_fit(values: Floats, clusters: Codes, weights: Floats) -> Any:
    """A regression on a constant: its coefficient is the weighted mean, its variance the cluster-robust one."""
    model = WLS(values, np.ones(len(values)), weights=weights)
    return model.fit(cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True)
