"""What a sequential certificate saves: `python benchmarks/certify.py [--entry NAME ...] [--quick] [--json]`.

Against Cohen et al.'s test with N = 100,000 on the same entry, questions, noise, alpha and radius.

**Forward passes.** A hundred thousand passes a question are hours on a CPU, so they are not made. Instead every
question's noisy copies are answered a few thousand times for real; both tests, the shipped code, are then fed labels
drawn from the frequencies found (half a count added to each label and to one that was never seen, so that no answer is
taken for certain), each with the same ones, several times over. What the sequential test makes of the real labels
alone, in their order, is reported beside it. Seconds are passes times those of a pass through `certify_many`.

**Overhead.** `certify_many` draws noise, keeps counts and fills batches; samples a second are held against the bare
model's `verdicts` and `answer` on the very batches that it asked, in turns.

`same_verdicts`: certified and refuted mean what Cohen says, wherever the sequential test decides (but for the error
rates, alpha each); the counts of a certificate are those of the bare model's answers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import reporting
import torch
from torch import Tensor

from safemed_bench.certify.base import INVALID, Certificate, Certifier, State, noisy
from safemed_bench.certify.cohen import Cohen
from safemed_bench.certify.panel import PredictMany, certify_many
from safemed_bench.certify.sequential import Sequential
from safemed_bench.datasets import load
from safemed_bench.datasets.images import load_canvas
from safemed_bench.models import load_model
from safemed_bench.models.base import Batch, VisionLanguageModel
from safemed_bench.models.smoothed import labels
from safemed_bench.suite.schema import DataSpec, ModelSpec

SIDE = 64
N, N0, ALPHA = 100_000, 100, 0.001
UNSEEN = 99
"""A label that no copy gave."""

STRIDE = 4096
"""Labels that a simulated test is handed at a time."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class Size:
    """per_modality: questions of each of the eight modalities. samples: real ones a question. draws: simulated tests a
    question. rounds: timed, after one warm-up."""

    per_modality: int
    samples: int
    draws: int
    rounds: int
    batch: int


@dataclass(frozen=True)
class Case:
    """Medians in seconds; ratio: how many times less ours takes."""

    name: str
    ours: float
    peer: str
    theirs: float
    same: bool

    def row(self) -> dict[str, Any]:
        return reporting.row(self.name, [self.ours], self.peer, [self.theirs], self.same)


@dataclass
class Tests:
    """passes: of every sequential test, selection included. capped: tests that ran to N. agree: decided tests whose
    verdict is Cohen's, of `decided`."""

    passes: list[int] = field(default_factory=list)
    capped: int = 0
    decided: int = 0
    agree: int = 0
    certified: int = 0


class Bench:
    """One entry, its questions and a noise."""

    def __init__(self, entry: str, sigma: float, radius: float, size: Size, clock: Clock) -> None:
        self.size, self.clock = size, clock
        self.model: VisionLanguageModel = load_model(ModelSpec(name=entry), SIDE, device="cpu")
        questions = load(DataSpec(name="phantom", per_modality=size.per_modality)).questions
        canvas = [torch.from_numpy(load_canvas(Path(q.image), SIDE)).permute(2, 0, 1) for q in questions]
        self.batch: Batch = self.model.prepare(questions, torch.stack(canvas))
        self.cohen = Cohen(sigma, N, N0, ALPHA, (radius,))
        self.sequential = Sequential(sigma, N, N0, ALPHA, (radius,))

    # -- forward passes

    def real_labels(self, place: int) -> list[int]:
        """What the entry answers on noisy copies of one question's picture: N0 of the selection, then the test's."""
        found: list[int] = []
        for phase, total in (("selection", N0), ("test", self.size.samples)):
            for start in range(0, total, self.size.batch):
                found += self._answers(place, phase, start, min(self.size.batch, total - start))
        return found

    def _answers(self, place: int, phase: str, start: int, count: int) -> list[int]:
        image = self.batch.pixels[place]
        copies = noisy(image, self.cohen.sigma, place, phase, start, count)
        return labels(self.model, self.batch.select([place] * count), copies)

    def compare(self, real: Sequence[Sequence[int]]) -> tuple[Tests, Tests]:
        """Simulated tests on the frequencies of each question's real labels, and those on the real labels alone."""
        simulated, alone = Tests(), Tests()
        for place, found in enumerate(real):
            counts = Counter(found)
            values = np.array([*counts, UNSEEN])
            chances = np.array([*counts.values(), 0]) + 0.5
            for draw in range(self.size.draws):
                stream = np.random.default_rng([place, draw])
                drawn = stream.choice(values, N0 + N, p=chances / chances.sum()).tolist()
                _judge(simulated, fed(self.sequential, drawn), fed(self.cohen, drawn), self)
            state = fed(self.sequential, found)
            if self.sequential.done(state):
                _judge(alone, state, None, self)
        return simulated, alone

    # -- overhead

    def overhead(self) -> tuple[dict[str, float], int, bool]:
        """Median seconds of one certify_many, of the bare model's two ways to answer, how many samples, same counts."""
        size = self.size
        places, certifier = [0, 1], Cohen(self.cohen.sigma, 2 * size.batch, size.batch, ALPHA)
        images = [self.batch.pixels[place] for place in places]
        asked: list[tuple[Tensor, list[int]]] = []
        answered: dict[int, list[int]] = {place: [] for place in places}

        def predict(pictures: Tensor, owners: Sequence[int]) -> list[int]:
            return labels(self.model, self.batch.select(list(owners)), pictures)

        def record(pictures: Tensor, owners: Sequence[int]) -> list[int]:
            asked.append((pictures, list(owners)))
            found = predict(pictures, owners)
            for owner, label in zip(owners, found, strict=True):
                answered[owner].append(label)
            return found

        def proofs(model: PredictMany) -> list[Certificate]:
            return certify_many(certifier, model, images, seeds=places, batch_size=size.batch)

        counts = [dict(proof.counts) for proof in proofs(record)]
        ways: dict[str, Callable[[], Any]] = {
            "certify_many": lambda: proofs(predict),
            "verdicts": lambda: [predict(*one) for one in asked],
            "answer": lambda: [self.model.answer(self.batch.select(owners), seen) for seen, owners in asked],
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(size.rounds + 1):
            for name, way in ways.items():
                began = self.clock()
                way()
                taken[name].append(self.clock() - began)
        same = [dict(sorted(Counter(answered[place][certifier.n0 :]).items())) for place in places]
        seconds = {name: statistics.median(values[1:]) for name, values in taken.items()}
        return seconds, sum(len(owners) for _, owners in asked), same == counts


def fed(certifier: Certifier, drawn: Sequence[int]) -> State:
    """A test that is handed these labels, selection first, until it is done or there are no more."""
    state, place = certifier.start(0), 0
    while not certifier.done(state) and place < len(drawn):
        request = certifier.request(state, min(STRIDE, len(drawn) - place))
        state = certifier.take(state, drawn[place : place + request.size])
        place += request.size
    return state


def _judge(tests: Tests, state: State, against: State | None, bench: Bench) -> None:
    (found,) = bench.sequential.certificate(state).decisions
    unread = state.candidate == INVALID
    tests.passes.append(state.selected + state.tested)
    tests.capped += found.verdict == "abstain" and not unread
    if found.verdict == "abstain":
        return
    tests.decided += 1
    tests.certified += found.verdict == "certified"
    if against is not None:
        (theirs,) = bench.cohen.certificate(against).decisions
        tests.agree += (found.verdict == "certified") == (theirs.verdict == "certified")


def measure(entry: str, sigma: float, radius: float, size: Size, clock: Clock) -> tuple[list[Case], dict[str, Any]]:
    bench = Bench(entry, sigma, radius, size, clock)
    seconds, samples, same = bench.overhead()
    real = [bench.real_labels(place) for place in range(len(bench.batch))]
    simulated, alone = bench.compare(real)
    each, whole = seconds["certify_many"] / samples, N0 + N
    peer = f"Cohen, N = {N:,}"
    agree = simulated.agree >= simulated.decided * (1 - 2 * ALPHA)
    middle, average = statistics.median(simulated.passes), statistics.fmean(simulated.passes)
    cases = [
        Case(f"{entry}: median question", middle * each, peer, whole * each, agree),
        Case(f"{entry}: mean question", average * each, peer, whole * each, agree),
        Case(f"{entry}: {samples} samples", seconds["certify_many"], "bare verdicts", seconds["verdicts"], same),
        Case(f"{entry}: {samples} samples", seconds["certify_many"], "bare answer", seconds["answer"], same),
    ]
    return cases, {
        "entry": entry,
        "sigma": sigma,
        "radius": radius,
        "questions": len(real),
        "real_samples_per_question": size.samples,
        "simulated_tests": len(simulated.passes),
        "passes_median": middle,
        "passes_mean": round(average, 1),
        "share_at_the_cap": round(simulated.capped / len(simulated.passes), 4),
        "share_certified": round(simulated.certified / len(simulated.passes), 4),
        "decided": simulated.decided,
        "agree_with_cohen": simulated.agree,
        "real_decided": alone.decided,
        "real_passes_median": statistics.median(alone.passes) if alone.passes else None,
        "samples_per_second": {name: round(samples / value, 1) for name, value in seconds.items()},
    }


def table(found: Sequence[Case], facts: Sequence[dict[str, Any]], size: Size) -> str:
    head = (
        f"alpha {ALPHA}, n0 {N0}, cap {N:,}, batches of {size.batch}, {torch.get_num_threads()} thread(s), "
        f"median of {size.rounds} rounds"
    )
    lines = [reporting.table([case.row() for case in found], head)]
    for fact in facts:
        lines += ["", *(f"{key:<28}{value}" for key, value in fact.items())]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entry", action="append", help="a shipped entry, any number of times; default instruct")
    parser.add_argument("--sigma", type=float, default=0.12, help="of the noise, [0, 1] pixel scale")
    parser.add_argument("--radius", type=float, help="L2, to be decided; default sigma")
    parser.add_argument("--quick", action="store_true", help="few questions, samples and rounds: under a minute")
    parser.add_argument("--samples", type=int, help="real ones a question; default 2,000, and 256 with --quick")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds, for a machine that is not idle")
    given = parser.parse_args()
    torch.set_num_threads(1)
    few = given.quick
    size = Size(1 if few else 4, given.samples or (256 if few else 2000), 5 if few else 20, 3, given.batch_size)
    clock = time.process_time if given.cpu_time else time.perf_counter
    cases: list[Case] = []
    facts: list[dict[str, Any]] = []
    with contextlib.redirect_stdout(sys.stderr):
        for entry in given.entry or ["instruct"]:
            found, told = measure(entry, given.sigma, given.radius or given.sigma, size, clock)
            cases += found
            facts.append(told)
    print(table(cases, facts, size), file=sys.stderr if given.json else sys.stdout)
    if given.json:
        print(json.dumps({"cases": [case.row() for case in cases], "details": facts}))


if __name__ == "__main__":
    main()
