"""Smoothed entries: whose answer it is, what it depends on, and that nothing else of the entry changes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from scipy.stats import binom
from toy_model import ToyVLM, toy_batch

from safemed_bench.certify.base import INVALID, noise
from safemed_bench.core.seeds import derive_seed
from safemed_bench.core.types import Answer
from safemed_bench.datasets import load
from safemed_bench.datasets.images import load_canvas
from safemed_bench.models import load_model
from safemed_bench.models.base import Batch, VisionLanguageModel
from safemed_bench.models.smoothed import Smoothed, elect, labels, leader
from safemed_bench.suite.schema import DataSpec, ModelSpec

SIDE = 64


@cache
def entry(name: str, **settings) -> VisionLanguageModel:
    return load_model(ModelSpec(name=name, **settings), SIDE, device="cpu")


@pytest.fixture(scope="module")
def questions():
    return load(DataSpec(name="phantom", per_modality=1)).questions


def shown(model: VisionLanguageModel, questions) -> Batch:
    """The questions with their real image files."""
    canvas = [torch.from_numpy(load_canvas(Path(q.image), SIDE)).permute(2, 0, 1) for q in questions]
    return model.prepare(questions, torch.stack(canvas))


# -- the short way to a verdict


@pytest.mark.parametrize(
    ("name", "settings"),
    [("instruct", {}), ("cot", {}), ("cot", {"decode": "logprob"}), ("cot", {"max_new_tokens": 4})],
)
def test_verdicts_are_the_indices_of_answer(name: str, settings: dict, questions) -> None:
    model = entry(name, **settings)
    batch = shown(model, questions)
    seen: set[int | None] = set()
    for sigma in (0.0, 0.12, 0.5):
        draw = torch.randn(batch.pixels.shape, generator=torch.Generator().manual_seed(1))
        pixels = batch.pixels + sigma * draw  # not clamped, as a certifier gives them
        expected = [answer.index for answer in model.answer(batch, pixels)]
        assert model.verdicts(batch, pixels) == expected
        assert labels(model, batch, pixels) == [INVALID if index is None else index for index in expected]
        seen |= set(expected)
    assert seen == {None} if "max_new_tokens" in settings else len(seen) > 2, "a test that could not fail"


# -- the vote


def spoken(index: int, options: int = 4) -> Answer:
    unread = index == INVALID
    status = "invalid" if unread else "valid"
    return Answer(None if unread else index, status, f"says {index}", (-1.0,) * options, letter=None, tokens=(1,))


def elected(counts: Mapping[int, int], alpha: float, options: int = 4) -> Answer:
    votes = [index for index, count in counts.items() for _ in range(count)]
    return elect(votes, spoken(leader(votes), options), alpha)


@pytest.mark.parametrize(
    ("counts", "alpha"),
    [
        ({0: 100}, 0.001),
        ({1: 67, 0: 33}, 0.001),
        ({1: 66, 0: 34}, 0.001),
        ({2: 40, 0: 30, 1: 30}, 0.05),
        ({0: 50, 1: 50}, 0.999),
        ({0: 10}, 0.001),
        ({0: 11}, 0.001),
        ({3: 70, 0: 15, INVALID: 15}, 0.001),
    ],
)
def test_the_majority_answers_only_where_it_is_clear(counts: dict[int, int], alpha: float) -> None:
    first, second = (*sorted(counts.values(), reverse=True), 0)[:2]
    p = min(1.0, 2 * binom.sf(first - 1, first + second, 0.5))  # two-sided: the law is symmetric
    found = elected(counts, alpha)
    if p > alpha:
        assert (found.index, found.status) == (None, "abstain")
    else:
        winner = max(counts, key=counts.__getitem__)
        assert (found.index, found.status, found.text) == (winner, "valid", f"says {winner}")


def test_an_unreadable_answer_can_win_and_is_no_option() -> None:
    found = elected({INVALID: 80, 1: 20}, 0.001)
    assert (found.index, found.status) == (None, "invalid")
    assert elected({INVALID: 55, 1: 45}, 0.001).status == "abstain"
    assert elected({INVALID: 20, 1: 80}, 0.001).index == 1


def test_scores_are_shares_of_the_votes() -> None:
    shares = [(30 + 0.5) / 42, 0.5 / 42, (8 + 0.5) / 42, 0.5 / 42]
    assert elected({0: 30, 2: 8, INVALID: 2}, 0.001).option_logprobs == pytest.approx([math.log(s) for s in shares])
    assert sum(math.exp(s) for s in elected({0: 30, 1: 10}, 0.001, options=2).option_logprobs) == pytest.approx(1)


def by_hand(model: ToyVLM, batch: Batch, i: int, sigma: float, n: int, seed: int = 0) -> Counter:
    one, image = batch.select([i]), batch.pixels[i]
    stream = derive_seed(seed, "smoothed", batch.questions[i].id)
    noisy = image + sigma * noise(image, stream, "vote", 0, n)
    return Counter(a.index for k in range(n) for a in model.answer(one, noisy[k : k + 1]))


def test_it_answers_what_most_of_its_noisy_copies_answer() -> None:
    model = ToyVLM()
    batch, bare = toy_batch(model, 12)
    smoothed = Smoothed(model, 0.5, 40, alpha=0.05)
    found = smoothed.answer(batch, batch.pixels)
    for i, answer in enumerate(found):
        (winner, most), *others = by_hand(model, batch, i, 0.5, 40).most_common()
        clear = 2 * binom.sf(most - 1, most + (others[0][1] if others else 0), 0.5) <= 0.05
        assert (answer.index, answer.status) == ((winner, "valid") if clear else (None, "abstain"))
    statuses = {answer.status for answer in found}
    assert statuses == {"valid", "abstain"} and [a.index for a in found] != [a.index for a in bare]


def facts(answers: Sequence[Answer]) -> list[tuple]:
    return [(a.index, a.status, a.text) for a in answers]


def scores(answers: Sequence[Answer]) -> list[float]:
    return [value for answer in answers for value in answer.option_logprobs]


def in_batches_of(size: int) -> Callable:
    def run(kind: str, items: Sequence[int], work: Callable[[Sequence[int]], None]) -> None:
        for start in range(0, len(items), size):
            work(items[start : start + size])

    return run


def test_neither_the_batch_nor_its_size_changes_an_answer() -> None:
    model = ToyVLM()
    batch, _ = toy_batch(model, 8)
    smoothed = Smoothed(model, 0.5, 40, alpha=0.05)
    whole = smoothed.answer(batch, batch.pixels)
    order = torch.tensor([5, 2, 7])
    part = smoothed.answer(batch.select(order), batch.pixels[order])
    alone = [smoothed.answer(batch.select([i]), batch.pixels[[i]])[0] for i in range(8)]
    assert facts(part) == [facts(whole)[i] for i in order] and facts(alone) == facts(whole)
    for size in (1, 7, 1000):
        smoothed.in_batches = in_batches_of(size)
        again = smoothed.answer(batch, batch.pixels)
        assert facts(again) == facts(whole) and scores(again) == pytest.approx(scores(whole), abs=1e-5)


def test_the_draws_are_those_of_the_generators_seed_and_the_question() -> None:
    model = ToyVLM()
    batch, _ = toy_batch(model, 3)
    smoothed = Smoothed(model, 0.5, 20)

    def ask(seed: int | None, drawn: int = 0, asked: Batch = batch) -> list[float]:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        if drawn and generator:
            torch.rand(drawn, generator=generator)
        return scores(smoothed.answer(asked, asked.pixels, generator=generator))

    assert ask(5) == ask(5) == ask(5, drawn=3) and ask(None) == ask(None)
    assert ask(5) != ask(6) and ask(5) != ask(None)
    renamed = replace(batch, questions=tuple(replace(q, id=f"{q.id}'") for q in batch.questions))
    assert ask(5, asked=renamed) != ask(5)


# -- everything else is the entry's own


@pytest.mark.parametrize("name", ["instruct", "cot"])
def test_a_smoothed_entry_is_an_entry(name: str, questions) -> None:
    base = entry(name)
    smoothed = load_model(ModelSpec(name=name, smooth={"sigma": 1e-6, "n": 11}), SIDE, device="cpu")
    assert isinstance(smoothed, Smoothed) and isinstance(smoothed, VisionLanguageModel) and smoothed.randomised
    for field in ("name", "reasons", "decode", "resolution", "device"):
        assert getattr(smoothed, field) == getattr(base, field)
    changed = [Smoothed(base, 0.1), Smoothed(base, 0.2), Smoothed(base, 0.1, 50), Smoothed(base, 0.1, 100, 0.01), base]
    assert len({m.fingerprint for m in changed}) == len(changed)

    few = questions[:3]
    batch, pixels = shown(smoothed, few), shown(base, few).pixels
    assert torch.equal(batch.canvas, shown(base, few).canvas)
    assert smoothed.self_check(batch).keys() == base.self_check(batch).keys()
    assert smoothed.decode_text(smoothed.encode("<answer>B</answer>")) == "<answer>B</answer>"
    assert smoothed.answer_prefix() == base.answer_prefix()
    prefix, text = [base.answer_prefix()] * 3, ["<answer>A</answer>"] * 3
    asked = pixels.clone().requires_grad_()
    losses = smoothed.token_loss(batch, asked, text, [[1.0] * len(base.encode(text[0]))] * 3)
    (slope,) = torch.autograd.grad(losses.sum() - smoothed.option_logits(batch, asked)[:, 0].sum(), asked)
    assert slope.abs().amax((1, 2, 3)).min() > 0
    candidates = torch.tensor([[5, 6, -1]] * 3)
    for ours, theirs in (
        (smoothed.option_logits(batch, pixels), base.option_logits(batch, pixels)),
        (smoothed.token_loss(batch, pixels, text), base.token_loss(batch, pixels, text)),
        (
            smoothed.next_token_logits(batch, pixels, prefix, candidates),
            base.next_token_logits(batch, pixels, prefix, candidates),
        ),
    ):
        assert torch.equal(ours, theirs)
    # noise that the 8-bit image swallows: the smoothed entry is the bare one
    assert facts(smoothed.answer(batch, pixels)) == facts(base.answer(batch, pixels))
