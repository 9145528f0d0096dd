"""Evidence about a probability from counts: pure functions of arrays, without torch.

Throughout, k of n noisy copies gave the candidate answer, p is the unknown probability of it and p0 the threshold that
a radius asks for. All functions broadcast over k, n and p0.

**The e-process.** Against H0: p <= p0 the likelihood ratio (x/p0)^k ((1-x)/(1-p0))^(n-k) of an alternative x > p0 is
a martingale with mean 1 at p = p0 and a supermartingale below it. So is its mean over x uniform on (p0, 1),

    E_n = B(k+1, n-k+1) (1 - I_p0(k+1, n-k+1)) / ((1 - p0) p0^k (1-p0)^(n-k)),

and by Ville's inequality E_n reaches 1/alpha at any n whatever with probability at most alpha (Robbins 1970;
Ramdas et al. 2210.01948). Looking after every sample costs nothing.

**All thresholds at once.** d log E_n / d p0 < 0 wherever k > (n+1) p0. Where k <= (n+1) p0, E_n <= e: the largest
ratio is (k/(n p0))^k ((n-k)/(n - n p0))^(n-k) with k/n <= p0 (n+1)/n, which is at most ((n+1)/n)^k <= e. For
alpha < 1/e the p0 with E_n(p0) >= 1/alpha therefore form an interval from 0 to a bound L_n. If any p0 >= p is ever
rejected, then p itself is, and that happens with probability at most alpha: one alpha covers every p0 and every n, so
that many radii may share the samples and L_n is a lower bound for p at any stopping time.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincc, betaln
from scipy.stats import norm
from statsmodels.stats.proportion import proportion_confint

Floats = NDArray[np.float64]
BISECTIONS = 60
"""Halvings of [0, 1], down to double precision."""


def needed_probability(radius: ArrayLike, sigma: float) -> Any:
    """p0 = Phi(radius / sigma): a probability above it certifies `radius` (Cohen et al., theorem 1)."""
    return norm.cdf(np.asarray(radius, dtype=float) / sigma)


def certified_radius(p_low: float, sigma: float) -> float:
    """sigma * Phi^-1(p_low), L2 on the scale of sigma; 0 where p_low <= 1/2."""
    return sigma * max(0.0, float(norm.ppf(p_low)))


def clopper_pearson_low(k: ArrayLike, n: ArrayLike, alpha: float) -> Any:
    """One-sided lower bound of p at confidence 1 - alpha; 0 where k = 0."""
    return proportion_confint(k, n, alpha=2 * alpha, method="beta")[0]


def log_evidence_above(k: ArrayLike, n: ArrayLike, p0: ArrayLike) -> Floats:
    """log E_n against p <= p0; k and n count from any fixed start, 0 < p0 < 1.

    It may underflow to -inf where k/n is far below p0, and E_n then is far below 1.
    """
    k, n, p0 = (np.asarray(value, dtype=float) for value in (k, n, p0))
    misses = n - k
    with np.errstate(divide="ignore"):
        tail = np.log(betaincc(k + 1, misses + 1, p0))
    return betaln(k + 1, misses + 1) + tail - (k * np.log(p0) + (misses + 1) * np.log1p(-p0))


def log_evidence_below(k: ArrayLike, n: ArrayLike, p0: ArrayLike) -> Floats:
    """The mirror process: log evidence against p >= p0."""
    k, n, p0 = (np.asarray(value, dtype=float) for value in (k, n, p0))
    return log_evidence_above(n - k, n, 1 - p0)


def sequential_low(k: ArrayLike, n: ArrayLike, alpha: float) -> Floats:
    """L_n, the lower confidence sequence: the largest p0 with E_n(p0) >= 1/alpha, 0 where there is none.

    alpha < 1/e. Rounded down, to within 1e-15 or so.
    """
    k, n = (np.asarray(value, dtype=float) for value in (k, n))
    low = np.zeros(np.broadcast(k, n).shape)
    high = low + np.clip(k / np.maximum(n, 1), 1e-300, np.nextafter(1.0, 0.0))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        rejected = (middle > 0) & (log_evidence_above(k, n, np.maximum(middle, 1e-300)) >= -math.log(alpha))
        low, high = np.where(rejected, middle, low), np.where(rejected, high, middle)
    return low


def cohen_needs(p0: float, alpha: float) -> int:
    """The smallest N whose bound can reach p0, with all N answers the same: alpha^(1/N) >= p0."""
    return max(1, math.ceil(math.log(alpha) / math.log(p0) * (1 - 1e-12)))


def sequential_needs(p0: float, alpha: float) -> int:
    """The smallest n at which E_n can reach 1/alpha, with all n answers the same."""
    high = 1
    while log_evidence_above(high, high, p0) < -math.log(alpha):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        if log_evidence_above(middle, middle, p0) < -math.log(alpha):
            low = middle
        else:
            high = middle
    return high
