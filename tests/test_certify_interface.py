"""The certifiers as they are used: the same certificate however it is drawn, and what is refused."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm
from torch import Tensor

from safemed_bench.certify import CERTIFIERS, build_certifier
from safemed_bench.certify.base import INVALID, Certifier, Predict, State, noise
from safemed_bench.certify.cohen import Cohen
from safemed_bench.certify.evidence import (
    cohen_needs,
    needed_probability,
    sequential_needs,
)
from safemed_bench.certify.panel import LEAST, certify_many
from safemed_bench.certify.sequential import Sequential
from safemed_bench.core import registry
from safemed_bench.core.errors import UsageError


def labels_of(answers: Sequence[int]) -> Predict:
    """A `predict` that gives these answers one after the other, whatever it sees."""
    stream = iter(answers)
    return lambda noisy: [next(stream) for _ in range(len(noisy))]


class Linear:
    """Answers 0 where w.x + b > 0, else 1. Smoothed, its radius is its distance to the plane, whatever sigma."""

    def __init__(self, margin: float, image: Tensor, seed: int) -> None:
        self.weights = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
        self.weights /= self.weights.norm()
        self.offset = margin - float((self.weights * image).sum())

    def __call__(self, noisy: Tensor) -> list[int]:
        return ((noisy * self.weights).flatten(1).sum(1) + self.offset <= 0).long().tolist()


def picture(side: int = 4, seed: int = 0) -> Tensor:
    return torch.rand((3, side, side), generator=torch.Generator().manual_seed(seed))


WHOLE = [Cohen(0.5, n=200, n0=20, alpha=0.05), Sequential(0.5, 200, 20, 0.05, (0.1, 0.3, 0.5))]


@pytest.mark.parametrize("certifier", WHOLE)
def test_linear_classifiers_through_the_whole_interface(certifier: Certifier) -> None:
    count, wrong, shown = 200, 0, 0
    for number in range(count):
        margin = (number % 20) / 15
        image = picture(seed=number)
        found = certifier(Linear(margin, image, number), image, seed=number, batch_size=100)
        if found.answer == 0:
            wrong += found.radius > margin
            wrong += any(d.verdict == "refuted" and d.radius < margin for d in found.decisions)
            shown += found.radius > 0
    assert wrong <= binom.ppf(0.999, count, 2 * certifier.alpha) and shown > 0.6 * count


# --- the interface --------------------------------------------------------------------------------------------------

CERTIFIERS_UNDER_TEST = [
    Cohen(0.5, n=150, n0=20, alpha=0.01),
    Sequential(0.5, n=150, n0=20, alpha=0.01, radii=(0.1, 0.4)),
    Sequential(0.5, n=150, n0=20, alpha=0.01),
]


@pytest.mark.parametrize("certifier", CERTIFIERS_UNDER_TEST)
@pytest.mark.parametrize("margin", [0.02, 0.25, 0.9])
def test_neither_batch_size_nor_interruption_changes_a_certificate(certifier: Certifier, margin: float) -> None:
    image = picture(seed=3)
    model = Linear(margin, image, 4)
    states: list[State] = []
    whole = certifier(model, image, seed=9, batch_size=1, save=states.append)
    assert certifier.done(states[-1]) and not certifier.done(states[-2])
    for size in (7, 64, 1000):
        assert certifier(model, image, seed=9, batch_size=size) == whole
    for state in states[::5] + states[-1:]:
        taken_up = State.from_dict(json.loads(json.dumps(state.to_dict())))
        assert taken_up == state
        assert certifier(model, image, seed=9, batch_size=13, state=taken_up) == whole
    assert certifier(model, image, seed=10) != whole or whole.counts == {0: whole.n}


@pytest.mark.parametrize("certifier", CERTIFIERS_UNDER_TEST)
def test_many_at_a_time_are_the_same_certificates(certifier: Certifier) -> None:
    """Whoever shares a batch with whom, and wherever it is cut; `near` never certifies and ends at another time."""
    margins = (0.9, 0.02, 0.25, 0.6, -0.4, 0.1)
    images = [picture(seed=number) for number in range(len(margins))]
    models = [Linear(margin, image, 40 + k) for k, (margin, image) in enumerate(zip(margins, images, strict=True))]
    seeds = [100 + k for k in range(len(margins))]
    alone = [certifier(m, i, seed=s) for m, i, s in zip(models, images, seeds, strict=True)]
    assert len({proof.verdict for proof in alone}) > 1 and len({proof.answer for proof in alone}) > 1

    def predict(noisy: Tensor, owners: Sequence[int]) -> list[int]:
        assert len(noisy) == len(owners) <= size
        return [models[owner](one[None])[0] for owner, one in zip(owners, noisy, strict=True)]

    for size in (1, 7, 64, 256):
        saves: list[dict[int, State]] = []
        held: dict[int, State] = {}

        def save(moved: Mapping[int, State], held: dict = held, saves: list = saves) -> None:
            held |= moved
            saves.append(dict(held))

        assert certify_many(certifier, predict, images, seeds=seeds, batch_size=size, save=save) == alone
        for states in saves[:: max(1, len(saves) // 12)] + saves[-1:]:
            taken_up = {k: State.from_dict(json.loads(json.dumps(state.to_dict()))) for k, state in states.items()}
            assert certify_many(certifier, predict, images, seeds=seeds, batch_size=size, states=taken_up) == alone
        cut = saves[len(saves) // 2]
        left = sum(proof.n + certifier.n0 for proof in alone) - sum(s.selected + s.tested for s in cut.values())
        shown = 0

        def counted(noisy: Tensor, owners: Sequence[int]) -> list[int]:
            nonlocal shown
            shown += len(owners)
            return predict(noisy, owners)

        certify_many(certifier, counted, images, seeds=seeds, batch_size=size, states=cut)
        beyond = len(images) * max(LEAST, size)  # drawn in the batch in which a test ends
        assert left <= shown <= left + (beyond if certifier.name == "sequential" else 0)


def test_many_pictures_are_checked_like_one() -> None:
    certifier = Cohen(0.5, n=100, n0=10)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        certify_many(certifier, lambda noisy, owners: [0] * len(owners), [picture(), picture() + 1], seeds=[1, 2])
    with pytest.raises(ValueError, match="gave 1 answers for 2"):
        certify_many(certifier, lambda noisy, owners: [0], [picture()], seeds=[1], batch_size=2)
    state = certifier.start(7)
    with pytest.raises(ValueError, match="belongs to another"):
        certify_many(certifier, lambda noisy, owners: [0], [picture()], seeds=[1], states={0: state})
    assert certify_many(certifier, lambda noisy, owners: [], [], seeds=[]) == []


def test_noise_is_the_same_sample_by_sample_and_phases_differ() -> None:
    image = picture()
    whole = noise(image, 1, "test", 0, 50)
    parts = [noise(image, 1, "test", start, min(7, 50 - start)) for start in range(0, 50, 7)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole[:16], noise(image, 1, "selection", 0, 16))
    assert not torch.equal(whole[:16], whole[16:32])
    assert abs(float(noise(image, 2, "test", 0, 1000).std()) - 1) < 0.01


def test_noise_has_the_declared_size_and_is_not_clamped() -> None:
    image, seen = torch.ones(3, 8, 8), []

    def predict(noisy: Tensor) -> list[int]:
        seen.append(noisy)
        return [0] * len(noisy)

    Cohen(0.25, n=100, n0=20)(predict, image, seed=0)
    shift = torch.cat(seen) - 1
    assert abs(float(shift.std()) - 0.25) < 0.01 and abs(float(shift.mean())) < 0.01 and shift.max() > 0.5


def test_a_state_of_something_else_is_refused() -> None:
    image, predict = picture(), lambda noisy: [0] * len(noisy)
    cohen, sequential = Cohen(0.5, n=100, n0=10), Sequential(0.5, n=100, n0=10)
    state = cohen.advance(cohen.start(1), predict, image, 10)
    others = [(cohen, 2), (sequential, 1), (Cohen(0.25, n=100, n0=10), 1), (Cohen(0.5, n=200, n0=10), 1)]
    for other, seed in others:
        with pytest.raises(ValueError, match="belongs to another"):
            other(predict, image, seed=seed, state=state)
    with pytest.raises(ValueError, match="not finished"):
        cohen.certificate(state)
    # A sequential test may go on to a higher cap; a fixed n may not grow after a look.
    states: list[State] = []
    short = sequential(predict, image, seed=1, save=states.append)
    longer = Sequential(0.5, n=300, n0=10)
    assert longer(predict, image, seed=1, state=states[-1]) == longer(predict, image, seed=1)
    assert longer(predict, image, seed=1).radius > short.radius


def test_selection_and_test_are_kept_apart() -> None:
    certifier = Cohen(0.5, n=100, n0=10)
    found = certifier(labels_of([2] * 6 + [1] * 4 + [1] * 100), picture(), seed=0)
    assert (found.candidate, found.answer, found.verdict, found.radius) == (2, None, "abstain", 0.0)
    assert found.counts == {1: 100} and found.n == 100
    found = Sequential(0.5, n=100, n0=10)(labels_of([2] * 6 + [1] * 4 + [1] * 100), picture(), seed=0)
    assert (found.candidate, found.answer, found.verdict) == (2, None, "refuted") and found.n < 20


@pytest.mark.parametrize("name", ["cohen", "sequential"])
def test_invalid_counts_as_a_class_and_never_certifies(name: str) -> None:
    certifier = build_certifier(name, {"sigma": 0.5, "n": 100, "n0": 10, "radii": (0.1, 0.2)})
    won = certifier(labels_of([INVALID] * 6 + [0] * 4), picture(), seed=0)
    assert (won.candidate, won.answer, won.verdict, won.radius, won.n) == (INVALID, None, "abstain", 0.0, 0)
    assert [d.verdict for d in won.decisions] == ["abstain", "abstain"]
    tied = certifier(labels_of([INVALID] * 5 + [3] * 5 + [3] * 100), picture(), seed=0)
    assert tied.answer == 3 and tied.radius > 0
    against = certifier(labels_of([3] * 10 + [3, INVALID] * 50), picture(), seed=0)
    assert against.answer is None and against.counts[INVALID] == against.n - against.counts[3]


def test_radii_share_their_samples_and_stop_when_all_are_decided() -> None:
    answers = [0] * 10 + (np.random.default_rng(0).random(20_000) > 0.8).astype(int).tolist()
    both = Sequential(0.5, n=20_000, n0=10, radii=(0.5, 0.25, 0.25))(labels_of(answers), picture(), seed=0)
    near, far = both.decisions
    assert (near.radius, near.verdict, far.radius, far.verdict) == (0.25, "certified", 0.5, "refuted")
    assert both.verdict == "certified" and both.n == max(near.n, far.n) < 5000
    assert 0.25 <= both.radius < 0.5 * norm.ppf(0.83)
    alone = Sequential(0.5, n=20_000, n0=10, radii=(0.5,))(labels_of(answers), picture(), seed=0)
    assert alone.verdict == "refuted" and alone.decisions == (far,)
    assert alone.answer == 0 and 0 < alone.radius < 0.5, "refuted at 0.5, proven in a smaller ball"


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("radius", [0.0, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize(("kind", "needs"), [(Cohen, cohen_needs), (Sequential, sequential_needs)])
def test_a_radius_out_of_reach_is_refused_with_the_smallest_n(kind: type[Certifier], needs, radius: float) -> None:
    least = needs(float(needed_probability(radius, 1.0)), 0.001)
    fits = kind(1.0, n=least, n0=1, radii=(radius,))
    with pytest.raises(UsageError, match=f"smallest n that can is {least}$"):
        kind(1.0, n=least - 1, n0=1, radii=(radius,))
    all_agree = fits(lambda noisy: [0] * len(noisy), picture(1), seed=0, batch_size=512)
    assert all_agree.verdict == "certified" and all_agree.n == least and all_agree.radius >= radius


@pytest.mark.parametrize(
    ("name", "parameters", "reason"),
    [
        ("cohen", {"sigma": 0}, "sigma must be above 0"),
        ("cohen", {"sigma": -0.5}, "sigma must be above 0"),
        ("cohen", {"sigma": "0.5"}, "sigma must be a number"),
        ("cohen", {"sigma": math.nan}, "sigma must be a number"),
        ("cohen", {}, "needs the parameter 'sigma'"),
        ("cohen", {"sigma": 0.5, "n": 50}, "fewer than the n0 = 100 that select; the smallest n that will do is 100"),
        ("cohen", {"sigma": 0.5, "n": 5, "n0": 5}, "smallest n that can is 10"),
        ("cohen", {"sigma": 0.5, "alpha": 0.0}, "alpha must lie between 0 and 1"),
        ("sequential", {"sigma": 0.5, "alpha": 1}, "alpha must lie between 0 and 1"),
        ("sequential", {"sigma": 0.5, "alpha": 0.5}, "alpha must be below 1/e"),
        ("sequential", {"sigma": 0.5, "n0": 0}, "n0 must be a whole number"),
        ("sequential", {"sigma": 0.5, "n": 1e4}, "n must be a whole number"),
        ("sequential", {"sigma": 0.5, "radii": [0.5, -1]}, "at least 0 and finite"),
        ("sequential", {"sigma": 0.5, "radii": 0.5}, "radii must be a list"),
        ("sequential", {"sigma": 0.05, "radii": [0.5]}, "10 sigma: out of reach"),
        ("cohen", {"sigma": 0.5, "name": "x"}, "has no parameter 'name'"),
        ("sequential", {"sigma": 0.5, "radi": [0.5]}, "Did you mean 'radii'?"),
        ("cohan", {"sigma": 0.5}, "Did you mean 'cohen'?"),
    ],
)
def test_bad_parameters_are_refused_with_the_reason(name: str, parameters: dict[str, object], reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        build_certifier(name, parameters)
    assert reason in str(caught.value)


def test_bad_pictures_and_answers_are_refused() -> None:
    certifier, predict = Cohen(0.5, n=100, n0=10), lambda noisy: [0] * len(noisy)
    for image in (torch.rand(1, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8), torch.rand(1, 3, 4, 4)):
        with pytest.raises(ValueError, match=r"must be \(3, H, W\) float"):
            certifier(predict, image, seed=0)
    for image in (torch.full((3, 4, 4), 1.01), torch.full((3, 4, 4), torch.nan)):
        with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
            certifier(predict, image, seed=0)
    with pytest.raises(ValueError, match="gave 1 answers for 10"):
        certifier(lambda noisy: [0], picture(), seed=0)
    with pytest.raises(ValueError, match="batch_size"):
        certifier(predict, picture(), seed=0, batch_size=0)


def test_the_catalogue_is_read_without_torch_and_matches_the_classes() -> None:
    code = (
        "import sys; from safemed_bench.core.registry import certifiers; print(list(certifiers)); "
        "assert 'torch' not in sys.modules and 'scipy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'cohen', 'sequential'" in done.stdout
    for name, info in CERTIFIERS.items():
        kind = registry.certifiers.get(name)
        assert kind.name == name and tuple(field.name for field in fields(kind)) == info.parameters
