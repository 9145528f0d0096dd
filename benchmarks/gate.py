"""Does the gate keep its promises? Simulated runs with known drops: `python benchmarks/gate.py [--quick] [--json]`.

Two runs answer n questions on images of one to three questions. In half of the images all questions share one fate, in
the others each has its own. A question flips either way with chance noise / 2, and turns wrong with chance drop beside.

`test` cases hold one paired test to this, at margins 0 and 2 pp, from `sims` pairs of runs each:
  false alarm   where the drop is at most the margin, `regressed` comes up at most alpha = 5% of the time
  false pass    where the drop is at least the margin, `pass` comes up at most 5% of the time
  power         where the drop is larger, `regressed` comes up as often as a run without a drop claims it would; and at
                the smallest detectable drop that such a run prints, 80% of the time; both within 5 pp
`gate` cases hold whole gates, made of eight modalities, to the same: the default rules on a run that differs from its
baseline by noise alone, and on one whose modality lost the printed drop.

A rate counts as above 5%, or as more than 5 pp off a claim, where an exact binomial test at level 0.001 says so: of few
simulations a rate is noise itself (87% in 300 where 6,000 give 81.7%), and the full run has 2,000. Nobody else has a
gate for robustness; as `peer` stands the one-sided exact McNemar test, which knows neither margins nor images, with its
time and false alarms. `same_verdicts`: every promise of the case was kept.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from safemed_bench.core.types import MODALITIES
from safemed_bench.results.compare import Pair
from safemed_bench.results.frames import Verdicts
from safemed_bench.results.gate import DEFAULT_RULES, Rule, gate
from safemed_bench.results.noninferiority import PairedDrop, paired_drop
from safemed_bench.results.protocol import Protocol
from safemed_bench.results.sources import Measured

ALPHA, POWER, TOLERANCE = 0.05, 0.8, 0.05
MARGINS = (0.0, 0.02)
DROPS = (0.0, 0.01, 0.02, 0.05, 0.10)
CHECKED = 50
"""Of the fast tests one in so many is also made by the package, and must be the same."""
PILOTS = 200
"""Runs without a drop whose claims are averaged."""


@dataclass(frozen=True)
class World:
    """How two runs differ: n questions, share of flips without a drop, and the true drop, both in [0, 1]."""

    n: int
    noise: float
    drop: float = 0.0


def draw(rng: np.random.Generator, world: World) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Verdicts of the baseline and of the run, and the image of each question; (n,) each."""
    sizes = rng.integers(1, 4, world.n)
    images = np.repeat(np.arange(world.n), sizes)[: world.n]
    shares = [world.noise / 2 + world.drop, world.noise / 2, 1 - world.noise - world.drop]
    own, shared = (rng.choice([1, -1, 0], world.n, p=shares) for _ in range(2))
    fate = np.where((rng.random(world.n) < 0.5)[images], shared[images], own)
    right = rng.random(world.n) < 0.7
    before = np.where(fate == 0, right, fate == 1).astype(float)
    return before, before - fate, images


def sample(rng: np.random.Generator, world: World, sims: int) -> list[PairedDrop]:
    """One test per pair of runs. Raises AssertionError where a checked one is not the package's own."""
    return [quick_drop(*draw(rng, world), check=i % CHECKED == 0) for i in range(sims)]


def quick_drop(before: np.ndarray, after: np.ndarray, images: np.ndarray, check: bool) -> PairedDrop:
    """`paired_drop` from sums per image instead of two regressions, up to twenty times as fast."""
    difference, sizes = before - after, np.bincount(images).astype(float)
    sums, n = np.bincount(images, weights=difference), len(difference)
    squares = float(np.sum(difference**2))
    most = n / len(sizes)
    _, alone, together = moments(sums, sizes, squares)
    weight = min(max(together / alone, 1.0), most) if np.ptp(difference) else most
    added = np.array([weight, weight])
    centre, alone, together = moments(
        np.concatenate((sums, added * (1.0, -1.0))), np.concatenate((sizes, added)), squares + 2 * weight, n + 2
    )
    effect = max(together / alone, 1.0)
    lost, gained = int(np.sum(difference > 0)), int(np.sum(difference < 0))
    found = PairedDrop(n, len(sizes), lost, gained, centre, math.sqrt(alone * effect), weight, effect)
    if check:
        np.testing.assert_allclose(astuple(found), astuple(paired_drop(before, after, images)), rtol=1e-9, atol=1e-12)
    return found


def moments(
    sums: np.ndarray, weights: np.ndarray, squares: float, count: int | None = None
) -> tuple[float, float, float]:
    """Mean, its variance were all values independent, and its cluster-robust variance (one degree of freedom spent,
    G / (G - 1) for G clusters), from weighted sums and weights per cluster and the weighted sum of squares."""
    total, clusters = weights.sum(), len(sums)
    centre = sums.sum() / total
    alone = (squares - total * centre**2) / ((total if count is None else count) - 1) / total
    together = np.sum((sums - centre * weights) ** 2) / total**2 * clusters / (clusters - 1)
    return float(centre), float(alone) or math.inf, float(together)


def kept(hits: int, sims: int) -> bool:
    """Whether a rate may well be at most alpha."""
    return bool(binomtest(hits, sims, ALPHA, alternative="greater").pvalue > 0.001)


def close(hits: int, sims: int, claim: float) -> bool:
    """Whether a rate may well be within TOLERANCE of what was claimed."""
    too_low = binomtest(hits, sims, max(claim - TOLERANCE, 0.0), alternative="less").pvalue
    too_high = binomtest(hits, sims, min(claim + TOLERANCE, 1.0), alternative="greater").pvalue
    return bool(min(too_low, too_high) > 0.001)


def test_cases(n: int, noise: float, sims: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """One case per margin and known drop, and one at the printed smallest detectable drop."""
    found = {drop: sample(rng, World(n, noise, drop), sims) for drop in DROPS}
    for margin in MARGINS:
        for drop in DROPS:
            yield test_case(World(n, noise, drop), margin, found[drop], found[0.0][:PILOTS])
        printed = [d for run in found[0.0][:PILOTS] if (d := run.detectable(margin, ALPHA, POWER)) is not None]
        if len(printed) == len(found[0.0][:PILOTS]):
            world = World(n, noise, min(statistics.median(printed), 1 - noise))
            yield test_case(world, margin, sample(rng, world, sims), [], claim=POWER)


def test_case(
    world: World, margin: float, runs: list[PairedDrop], pilots: list[PairedDrop], claim: float | None = None
) -> dict[str, Any]:
    sims = len(runs)
    regressed = sum(r.p_above(margin) <= ALPHA for r in runs)
    passed = sum(r.p_below(margin) <= ALPHA for r in runs)
    promises = []
    if world.drop <= margin:
        promises.append(kept(regressed, sims))
    else:
        claim = claim if claim is not None else statistics.mean(p.power(world.drop, margin, ALPHA) for p in pilots)
        promises.append(close(regressed, sims, claim))
    if world.drop >= margin:
        promises.append(kept(passed, sims))
    name = f"n {world.n}, noise {world.noise:.0%}, drop {world.drop:.1%}, margin {margin:.0%}"
    printed = claim == POWER and not pilots
    return {
        "name": f"test: {name}{' (printed)' if printed else ''}",
        "n": world.n,
        "noise": world.noise,
        "drop": world.drop,
        "margin": margin,
        "sims": sims,
        "regressed": regressed / sims,
        "passed": passed / sims,
        "claimed_power": claim,
        "same_verdicts": all(promises),
    }


def measured(correct: Mapping[str, np.ndarray], images: np.ndarray, modality: list[str]) -> Measured:
    """A model with these verdicts per condition."""
    index = pd.Index([f"q{i}" for i in range(len(images))])
    questions = pd.DataFrame(
        {"modality": modality, "question_type": "", "image_sha256": [f"i{i}" for i in images], "n_options": 4},
        index=index,
    )
    frame = pd.DataFrame({k: v for k, v in correct.items()}, index=index)
    status = frame.map(lambda _: "valid")
    verdicts = Verdicts("m", questions, frame, status, spared=frame, clean=frame["clean"])
    protocol = Protocol("f00d", "simulated", "linf at 4/255", "64 px", "p", "e", {})
    return Measured("m", verdicts, protocol, {"headline": "linf:4/255"}, {})


def gate_case(
    name: str, rules: tuple[Rule, ...], noise: float, drop: float, each: int, sims: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Eight modalities of `each` questions, the first of which loses `drop` under attack; clean, a third as noisy."""
    modality = [m for m in MODALITIES for _ in range(each)]
    regressed, claims = 0, []
    began = time.perf_counter()
    for _ in range(sims):
        parts = [draw(rng, World(each, noise, drop if i == 0 else 0.0)) for i in range(len(MODALITIES))]
        images = np.concatenate([p[2] + 3 * each * i for i, p in enumerate(parts)])
        before, after = (np.concatenate([p[side] for p in parts]) for side in (0, 1))
        clean = draw(rng, World(len(images), noise / 3))[:2]
        a = measured({"clean": clean[0], "worst@linf:4/255": before}, images, modality)
        b = measured({"clean": clean[1], "worst@linf:4/255": after}, images, modality)
        outcome = gate([Pair(a, b)], rules)
        regressed += outcome.verdict == "regressed"
        claims += [t.detectable for t in outcome.tests if t.slice == MODALITIES[0] and t.detectable is not None]
    seconds = time.perf_counter() - began
    rate = regressed / sims
    good = kept(regressed, sims) if not drop else close(regressed, sims, POWER)
    return {
        "name": f"gate: {name}",
        "n": each * len(MODALITIES),
        "noise": noise,
        "drop": drop,
        "sims": sims,
        "regressed": rate,
        "claimed_power": POWER if drop else None,
        "printed": statistics.median(claims) if claims else None,
        "ours_s": seconds / sims,
        "same_verdicts": good,
    }


def gate_cases(sims: int, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    for each in (25, 250):
        for noise in (0.05, 0.2):
            name = f"default rules, 8 x {each} questions, noise {noise:.0%}, no drop"
            yield gate_case(name, DEFAULT_RULES, noise, 0.0, each, sims, rng)
    alone = (Rule(slice="each", allowed_drop=2),)
    still = gate_case("8 x 250 questions, noise 10%, no drop, 2 pp allowed", alone, 0.1, 0.0, 250, sims, rng)
    yield still
    lost = still["printed"]
    yield gate_case(f"the same, one modality lost the printed {lost:.1%}", alone, 0.1, lost, 250, sims, rng)


def peer(n: int, noise: float, sims: int, rng: np.random.Generator) -> dict[str, Any]:
    """Time per test, and false alarms without a drop, of ours and of McNemar's one-sided exact test."""
    world = World(n, noise)
    pairs = [draw(rng, world) for _ in range(sims)]
    began = time.perf_counter()
    ours = sum(paired_drop(*pair).p_above(0.0) <= ALPHA for pair in pairs)
    middle = time.perf_counter()
    theirs = 0
    for before, after, _ in pairs:
        lost, gained = int(np.sum(before > after)), int(np.sum(after > before))
        flips = max(lost + gained, 1)
        theirs += binomtest(lost, flips, 0.5, alternative="greater").pvalue <= ALPHA
    end = time.perf_counter()
    return {
        "name": f"peer: n {n}, noise {noise:.0%}, no drop: false alarms",
        "n": n,
        "noise": noise,
        "sims": sims,
        "regressed": ours / sims,
        "peer": "exact McNemar, one-sided",
        "peer_regressed": theirs / sims,
        "ours_s": (middle - began) / sims,
        "peer_s": (end - middle) / sims,
        "ratio": (end - middle) / (middle - began),
        "same_verdicts": kept(ours, sims),
    }


def cases(quick: bool, sizes: Sequence[int]) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(20261125)
    sims = 1000 if quick else 2000
    for n in sizes or ((100, 2000) if quick else (100, 256, 1000, 4000, 17662)):
        for noise in (0.1,) if quick else (0.05, 0.1, 0.2, 0.3):
            yield from test_cases(n, noise, sims, rng)
    yield peer(2000, 0.1, sims, rng)
    yield from gate_cases(100 if quick else sims, rng)


def line(case: Mapping[str, Any]) -> str:
    claim = f", claimed {case['claimed_power']:.1%}" if case.get("claimed_power") is not None else ""
    passed = f", pass {case['passed']:.1%}" if "passed" in case else ""
    other = f", peer {case['peer_regressed']:.1%}" if "peer_regressed" in case else ""
    word = "kept  " if case["same_verdicts"] else "BROKEN"
    return f"{word}  {case['name']}: regressed {case['regressed']:.1%}{claim}{passed}{other}"


def table(cases: Sequence[Mapping[str, Any]]) -> str:
    """The `test` cases in short, as Markdown: per n the worst of every promise, over all flips and margins."""
    head = ("n", "false alarm", "false pass", "printed drop, pp", "regressed at it", "largest gap to a claim, pp")
    rows = [head, ("---:",) * len(head)]
    tests = [case for case in cases if case["name"].startswith("test:")]
    for n in sorted({case["n"] for case in tests}):
        own = [case for case in tests if case["n"] == n]
        printed = [case for case in own if "printed" in case["name"]]
        claims = [case for case in own if case["drop"] > case["margin"]]
        rows.append(
            (
                f"{n:,}",
                f"{100 * max(c['regressed'] for c in own if c['drop'] <= c['margin']):.1f}%",
                f"{100 * max(c['passed'] for c in own if c['drop'] >= c['margin']):.1f}%",
                span([100 * case["drop"] for case in printed if not case["margin"]]),
                f"{span([100 * case['regressed'] for case in printed])}%",
                f"{100 * max(abs(c['regressed'] - c['claimed_power']) for c in claims):.1f}",
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def span(values: Sequence[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: fewer sizes and runs")
    parser.add_argument("--json", action="store_true", help="one object on stdout")
    parser.add_argument("--sizes", type=int, nargs="*", default=(), help="only these numbers of questions")
    arguments = parser.parse_args()
    found = []
    for case in cases(arguments.quick, arguments.sizes):
        found.append(case)
        if not arguments.json:
            print(line(case), flush=True)
    if arguments.json:
        print(json.dumps({"cases": found}))
    else:
        print(f"{sum(c['same_verdicts'] for c in found)} of {len(found)} cases kept every promise\n\n{table(found)}")


if __name__ == "__main__":
    main()
