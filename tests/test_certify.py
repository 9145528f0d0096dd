"""Certificates: never more often wrong than alpha, and as others compute them."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.special import gammaln
from scipy.stats import binom, binomtest, norm
from statsmodels.stats.proportion import proportion_confint

from safemed_bench.certify.base import Certificate, Certifier, State
from safemed_bench.certify.cohen import Cohen
from safemed_bench.certify.evidence import (
    certified_radius,
    clopper_pearson_low,
    log_evidence_above,
    log_evidence_below,
    sequential_low,
)
from safemed_bench.certify.sequential import first_decision

Ints = NDArray[np.int64]
BLOCK = 256
REPEATS = 20_000


def allowed(repeats: int, alpha: float) -> int:
    """The most false certificates among `repeats` that a true rate of alpha gives with probability 0.999."""
    return int(binom.ppf(0.999, repeats, alpha))


@functools.lru_cache(maxsize=512)
def thresholds(block: int, p0: float, alpha: float) -> tuple[Ints, Ints, Ints]:
    """n of a block, the smallest k of n that certifies p0 (n + 1: none), the largest that refutes it (-1: none)."""
    n = np.arange(block * BLOCK + 1, (block + 1) * BLOCK + 1)
    above = _smallest(lambda k: log_evidence_above(k, n, p0) >= -math.log(alpha), n)
    below = n - _smallest(lambda misses: log_evidence_below(n - misses, n, p0) >= -math.log(alpha), n)
    return n, above, below


def _smallest(holds: Callable[[Ints], NDArray[np.bool_]], n: Ints) -> Ints:
    low, high = np.full(n.shape, -1), n + 1
    while (high - low > 1).any():
        middle = (low + high) // 2
        yes = holds(np.clip(middle, 0, n))
        low, high = np.where(yes, low, middle), np.where(yes, middle, high)
    return high


def simulate(
    p: NDArray[np.float64], p0: float, alpha: float, blocks: int, seed: int
) -> tuple[Ints, NDArray[np.int64], Ints]:
    """Sequential tests of p > p0, one per p: verdict (1 certified, -1 refuted, 0 open), samples, hits among them."""
    rng = np.random.default_rng(seed)
    verdict, k = np.zeros(len(p), np.int64), np.zeros(len(p), np.int64)
    drawn, live = np.zeros(len(p), np.int64), np.arange(len(p))
    for block in range(blocks):
        n, above, below = thresholds(block, p0, alpha)
        hits = rng.random((len(live), BLOCK), dtype=np.float32) < p[live, None]
        path = k[live, None] + hits.cumsum(axis=1, dtype=np.int32)
        certified = path >= above
        ended = certified | (path <= below)
        last = np.where(ended.any(axis=1), ended.argmax(axis=1), BLOCK - 1)
        rows = np.arange(len(live))
        drawn[live], k[live] = n[last], path[rows, last]
        verdict[live] = np.where(certified[rows, last], 1, -1) * ended.any(axis=1)
        live = live[~ended.any(axis=1)]
    return verdict, drawn, k


def lows(k: Ints, n: Ints, alpha: float) -> NDArray[np.float64]:
    """`sequential_low`, once for equal counts."""
    pairs, place = np.unique(np.stack([k, n]), axis=1, return_inverse=True)
    return sequential_low(*pairs, alpha)[place.ravel()]


def exact_rates(p: float, p0: float, alpha: float, cap: int) -> tuple[float, float, float]:
    """Probability to certify and to refute p0 within `cap` samples, and mean samples; exact, by recursion over n."""
    open_mass = np.zeros(cap + 2)  # by hits, the last place is never reached
    open_mass[0] = 1.0
    rates, mean, low, high = [0.0, 0.0], 0.0, 0, 0
    for block in range(math.ceil(cap / BLOCK)):
        for n, above, below in zip(*thresholds(block, p0, alpha), strict=True):
            if n > cap or low > high:
                break
            mean += open_mass[low : high + 1].sum()
            high += 1
            part = open_mass[low : high + 1]
            part[1:], part[0] = p * part[:-1] + (1 - p) * part[1:], (1 - p) * part[0]
            if above <= high:
                rates[0] += open_mass[above : high + 1].sum()
                open_mass[above : high + 1], high = 0.0, int(above) - 1
            if below >= low:
                rates[1] += open_mass[low : below + 1].sum()
                open_mass[low : below + 1], low = 0.0, int(below) + 1
    return rates[0], rates[1], mean


# --- false certificates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize(("p", "n"), [(0.5, 100), (0.841, 1000), (0.977, 1000), (0.9, 10_000)])
def test_cohen_bound_is_above_the_truth_at_most_alpha_of_the_time(p: float, n: int, alpha: float) -> None:
    k = np.random.default_rng(n).binomial(n, p, REPEATS)
    assert (clopper_pearson_low(k, n, alpha) > p).sum() <= allowed(REPEATS, alpha)
    every = np.arange(n + 1)
    wrong = clopper_pearson_low(every, n, alpha) > p
    assert binom.pmf(every, n, p)[wrong].sum() <= alpha * (1 + 1e-9), "exactly, over all counts"


@pytest.mark.parametrize("alpha", [0.001, 0.05])
@pytest.mark.parametrize(("p", "p0"), [(0.5, 0.5), (0.841, 0.841), (0.977, 0.977), (0.83, 0.841)])
def test_sequential_certifies_falsely_at_most_alpha_of_the_time(p: float, p0: float, alpha: float) -> None:
    verdict, _, _ = simulate(np.full(REPEATS, p), p0, alpha, blocks=4, seed=int(1000 * p))
    assert (verdict == 1).sum() <= allowed(REPEATS, alpha)
    if p == p0:
        assert (verdict == -1).sum() <= allowed(REPEATS, alpha), "nor is the truth refuted"


@pytest.mark.parametrize("p0", [0.5, 0.841, 0.977])
def test_sequential_errors_exactly(p0: float) -> None:
    certified, refuted, _ = exact_rates(p0, p0, alpha=0.001, cap=4096)
    assert 0 < certified <= 0.001 and 0 < refuted <= 0.001


def test_the_sequential_bound_holds_even_where_the_counts_look_best() -> None:
    """At the n that flatters each path most, with hindsight; a bound for a fixed n fails there."""
    p, alpha = 0.841, 0.05
    n = np.arange(1, 513)
    rng, counts = np.random.default_rng(5), []
    for _ in range(REPEATS // 1000):
        path = (rng.random((1000, len(n)), dtype=np.float32) < p).cumsum(axis=1, dtype=np.int32)
        best = ((path - p * n) / np.sqrt(n)).argmax(axis=1)
        counts.append(np.stack([path[np.arange(1000), best], n[best]]))
    k, stop = np.concatenate(counts, axis=1)
    assert (lows(k, stop, alpha) > p).sum() <= allowed(REPEATS, alpha)
    assert (clopper_pearson_low(k, stop, alpha) > p).sum() > 4 * allowed(REPEATS, alpha)


@pytest.mark.parametrize("sigma", [0.25, 1.0])
def test_linear_classifiers_are_never_over_certified(sigma: float) -> None:
    """Seen along its normal, a linear classifier with margin m answers 0 where m + sigma z > 0."""
    count, n, alpha = 10_000, 1000, 0.001
    rng = np.random.default_rng(int(100 * sigma))
    margin = sigma * rng.uniform(0, 3, count)
    draws = ((m[:, None], rng.standard_normal((500, n), dtype=np.float32)) for m in margin.reshape(-1, 500))
    k = np.concatenate([(m + sigma * z > 0).sum(axis=1) for m, z in draws])
    radius = np.array([certified_radius(low, sigma) for low in clopper_pearson_low(k, n, alpha)])
    assert (radius > margin).sum() <= allowed(count, alpha) and (radius > 0.8 * margin).mean() > 0.5

    verdict, drawn, hits = simulate(norm.cdf(margin / sigma), float(norm.cdf(1)), alpha, blocks=4, seed=3)
    assert ((verdict == 1) & (margin <= sigma)).sum() <= allowed(count, alpha)
    assert ((verdict == -1) & (margin >= sigma)).sum() <= allowed(count, alpha)
    low = lows(hits, drawn, alpha)
    assert (sigma * norm.ppf(np.maximum(low, 0.5)) > margin).sum() <= allowed(count, alpha)


# --- the bounds against others, and against themselves --------------------------------------------------------------


@given(st.integers(1, 100_000), st.floats(0, 1), st.sampled_from([0.001, 0.01, 0.05]))
@settings(max_examples=60, deadline=None)
def test_clopper_pearson_is_that_of_statsmodels_and_scipy(n: int, share: float, alpha: float) -> None:
    k = round(share * n)
    ours = clopper_pearson_low(k, n, alpha)
    assert ours == proportion_confint(k, n, alpha=2 * alpha, method="beta")[0]
    theirs = binomtest(k, n, alternative="greater").proportion_ci(1 - alpha, method="exact").low
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)


def counted(certifier: Certifier, k: int, candidate: int = 1) -> Certificate:
    """The certificate where `k` of n test samples gave the candidate and the rest label 0."""
    start = certifier.start(0)
    test = {label: count for label, count in ((candidate, k), (0, certifier.n - k)) if count}
    return certifier.certificate(State(start.seed, start.origin, {candidate: certifier.n0}, test))


def test_radii_agree_with_art() -> None:
    pytest.importorskip("art")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from art.estimators.certification.randomized_smoothing import PyTorchRandomizedSmoothing

    class Counting(PyTorchRandomizedSmoothing):
        """Its answers are given counts: n0 selection samples for class 1, then k of n."""

        k = 0

        def _prediction_counts(self, x: np.ndarray, n: int | None = None, batch_size: int = 128) -> np.ndarray:
            return np.array([0, n]) if n == self.sample_size else np.array([n - self.k, self.k])

    for sigma, n, alpha in [(0.25, 100, 0.001), (0.5, 1000, 0.001), (1.0, 10_000, 0.05)]:
        art = Counting(
            torch.nn.Linear(1, 2),
            loss=None,
            input_shape=(1,),
            nb_classes=2,
            sample_size=50,
            scale=sigma,
            alpha=alpha,
            device_type="cpu",
        )
        for k in sorted({0, 1, n // 2, round(0.6 * n), round(0.84 * n), round(0.99 * n), n - 1, n}):
            art.k = k
            prediction, radius = art.certify(np.zeros((1, 1), dtype=np.float32), n=n)
            ours = counted(Cohen(sigma, n, 50, alpha), k)
            assert (-1 if ours.answer is None else ours.answer) == prediction[0]
            assert ours.radius == pytest.approx(float(radius[0]), rel=1e-12)


@pytest.mark.parametrize(("k", "n", "p0"), [(0, 5, 0.3), (7, 9, 0.5), (95, 100, 0.841), (990, 1000, 0.977)])
def test_evidence_is_the_mean_likelihood_ratio(k: int, n: int, p0: float) -> None:
    steps = (np.arange(200_000) + 0.5) / 200_000
    for evidence, x in ((log_evidence_above, p0 + (1 - p0) * steps), (log_evidence_below, p0 * steps)):
        ratio = np.exp(k * np.log(x / p0) + (n - k) * np.log((1 - x) / (1 - p0)))
        assert float(evidence(k, n, p0)) == pytest.approx(math.log(ratio.mean()), abs=1e-5)


@pytest.mark.parametrize("n", [1, 6, 40])
@pytest.mark.parametrize("p0", [0.5, 0.9])
def test_evidence_has_mean_one_at_the_threshold(n: int, p0: float) -> None:
    k = np.arange(n + 1)
    log_pmf = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1) + k * np.log(p0) + (n - k) * np.log1p(-p0)
    for evidence in (log_evidence_above, log_evidence_below):
        assert np.exp(log_pmf + evidence(k, n, p0)).sum() == pytest.approx(1, abs=1e-9)


@given(st.integers(1, 5000), st.floats(0, 1), st.sampled_from([0.001, 0.05, 0.3]))
@settings(max_examples=60, deadline=None)
def test_the_rejected_thresholds_are_those_below_the_sequential_bound(n: int, share: float, alpha: float) -> None:
    """The claim of evidence.py that lets all radii share one alpha."""
    k = round(share * n)
    low = float(sequential_low(k, n, alpha))
    p0 = np.concatenate([np.linspace(0.001, 0.999, 500), 1 - np.geomspace(1e-9, 0.5, 300)])
    p0 = p0[np.abs(p0 - low) > 1e-9]
    assert ((log_evidence_above(k, n, p0) >= -math.log(alpha)) == (p0 < low)).all()
    assert low <= max(k / n, 1e-300)


def test_the_first_decision_is_that_of_the_simulated_thresholds() -> None:
    rng, p0 = np.random.default_rng(1), 0.8
    n, above, below = thresholds(0, p0, 0.01)
    for p in (0.5, 0.75, 0.8, 0.9, 0.99):
        k = (rng.random(BLOCK) < p).cumsum()
        ended = (k >= above) | (k <= below)
        found = first_decision(k, n, p0, 0.01)
        if not ended.any():
            assert found is None
            continue
        place = int(ended.argmax())
        assert found == ("certified" if k[place] >= above[place] else "refuted", n[place])


# --- what sequential saves ------------------------------------------------------------------------------------------

SIZES = [(0.99, 1.0, 62), (0.95, 1.0, 135), (0.90, 1.0, 550), (0.80, 1.0, 1700), (0.999, 2.0, 450), (0.5, 2.0, 7)]


@pytest.mark.parametrize(("p", "radius", "mean"), SIZES)
def test_expected_samples(p: float, radius: float, mean: float) -> None:
    """As FINDINGS, section 5 has them, but for 0.5, which it has at 20. Radius in sigmas; exact up to the cap."""
    p0 = float(norm.cdf(radius))
    certified, refuted, found = exact_rates(p, p0, 0.001, cap=6144)
    assert certified + refuted > 0.999
    assert (certified if p > p0 else refuted) > 0.998
    assert found == pytest.approx(mean, rel=0.15)


def test_sequential_decides_as_cohen_does_with_100_000_samples() -> None:
    repeats, n, alpha, p0 = 50, 100_000, 0.001, float(norm.cdf(1))
    p = np.repeat([0.5, 0.75, 0.80, 0.82, 0.86, 0.88, 0.92, 0.97, 0.999], repeats)
    verdict, drawn, k = simulate(p, p0, alpha, blocks=48, seed=11)
    k = k + np.random.default_rng(12).binomial(n - drawn, p)  # the same path, drawn on to the end
    cohen = clopper_pearson_low(k, n, alpha) >= p0
    assert (verdict != 0).mean() > 0.95
    assert ((verdict == 1) == cohen)[verdict != 0].all()
    assert drawn.mean() < 3000


def test_linf_equivalent() -> None:
    found = counted(Cohen(0.5, n=1000, n0=50), 990)
    assert found.radius == pytest.approx(0.5 * norm.ppf(clopper_pearson_low(990, 1000, 0.001)))
    assert found.linf_equivalent(3 * 64 * 64) == pytest.approx(found.radius / math.sqrt(12288))
    assert Cohen(1.0, n=1000).largest_radius == pytest.approx(2.46, abs=0.005)
    assert Cohen(1.0, n=100).largest_radius == pytest.approx(1.50, abs=0.005)
