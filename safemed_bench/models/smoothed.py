"""Any entry as its smoothed version: the majority of its answers on noisy copies, or no answer at all.

PREDICT of Cohen, Rosenfeld, Kolter 2019 (1902.02918), algorithm 1. What is climbed by an attack is the entry itself;
smoothing-aware attacks (attacks/smoothadv.py) add the noise on their side.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor

from ..certify.base import INVALID, noisy
from ..core.seeds import derive_seed
from ..core.types import Answer, Question
from .base import Batch, Decode, Text, VisionLanguageModel

AT_ONCE = 256
"""Noisy copies in one batch, or fewer where memory ends."""

InBatches = Callable[[str, Sequence[int], Callable[[Sequence[int]], None]], None]


def labels(model: VisionLanguageModel, batch: Batch, pixels: Tensor) -> list[int]:
    """(B,) what the deployed path answers, INVALID where it names no option.

    pixels: (B, 3, H, W), also outside [0, 1]: an 8-bit image ends at both. A model that has `verdicts` is spared the
    scores that nobody reads here.
    """
    short = getattr(model, "verdicts", None)
    found = short(batch, pixels) if short else [answer.index for answer in model.answer(batch, pixels)]
    return [INVALID if index is None else index for index in found]


def _at_once(kind: str, items: Sequence[int], work: Callable[[Sequence[int]], None]) -> None:
    work(items)


class Smoothed:
    """Implements models.base.VisionLanguageModel; everything but `answer` is the entry's own.

    sigma: of the Gaussian noise, [0, 1] pixel scale. n: noisy copies behind an answer. alpha: it abstains unless the
    leading answer beats the second with this confidence (two-sided binomial test). in_batches: runs work over copies
    in batches that fit into memory.
    """

    randomised = True

    def __init__(self, base: VisionLanguageModel, sigma: float, n: int = 100, alpha: float = 0.001) -> None:
        self.base, self.sigma, self.n, self.alpha = base, sigma, n, alpha
        self.name, self.reasons, self.resolution, self.device = base.name, base.reasons, base.resolution, base.device
        self.decode: Decode = base.decode
        self.fingerprint = f"{base.fingerprint}-smoothed-{sigma:g}-{n}-{alpha:g}"
        self.in_batches: InBatches = _at_once

    def prepare(self, questions: Sequence[Question], canvas: Tensor) -> Batch:
        return self.base.prepare(questions, canvas)

    def encode(self, text: str) -> tuple[int, ...]:
        return self.base.encode(text)

    def decode_text(self, tokens: Sequence[int]) -> str:
        return self.base.decode_text(tokens)

    def answer_prefix(self, rationale: str | None = None) -> str:
        return self.base.answer_prefix(rationale)

    def next_token_logits(self, batch: Batch, pixels: Tensor, text: Sequence[Text], candidates: Tensor) -> Tensor:
        return self.base.next_token_logits(batch, pixels, text, candidates)

    def option_logits(self, batch: Batch, pixels: Tensor, text: Sequence[Text] | None = None) -> Tensor:
        return self.base.option_logits(batch, pixels, text)

    def token_loss(
        self, batch: Batch, pixels: Tensor, text: Sequence[Text], weights: Sequence[Sequence[float]] | None = None
    ) -> Tensor:
        return self.base.token_loss(batch, pixels, text, weights)

    def save_memory(self) -> bool:
        """The entry's own, False where it has none."""
        relieve = getattr(self.base, "save_memory", None)
        return bool(relieve and relieve())

    def self_check(self, batch: Batch) -> dict[str, Any]:
        return self.base.self_check(batch)

    @torch.no_grad()
    def answer(self, batch: Batch, pixels: Tensor, *, generator: torch.Generator | None = None) -> list[Answer]:
        """The majority's answer with status "abstain" where it is not clear, "invalid" where no option wins.

        The noise depends on the generator's initial seed (none: the deployed stream) and the question, not on the
        batch. text: that of the first copy that answered like the majority. option_logprobs: log of each option's
        share of the votes, half a vote added to every one.
        """
        seed = 0 if generator is None else generator.initial_seed()
        images = (pixels.detach() * 255).round().clamp(0, 255) / 255
        seeds = [derive_seed(seed, "smoothed", question.id) for question in batch.questions]
        copies = [(i, number) for i in range(len(batch)) for number in range(self.n)]
        votes: list[int] = []

        def ask(places: Sequence[int]) -> None:
            rows = [copies[place] for place in places]
            copied = [
                self._noisy(images[i], seeds[i], [n for _, n in some]) for i, some in groupby(rows, itemgetter(0))
            ]
            votes.extend(labels(self.base, batch.select([i for i, _ in rows]), torch.cat(copied)))

        for start in range(0, len(copies), AT_ONCE):
            self.in_batches("votes", range(start, min(start + AT_ONCE, len(copies))), ask)
        ballots = [votes[i * self.n : (i + 1) * self.n] for i in range(len(batch))]
        spoken = self._spoken(batch, images, seeds, ballots)
        return [elect(ballot, answer, self.alpha) for ballot, answer in zip(ballots, spoken, strict=True)]

    def _spoken(
        self, batch: Batch, images: Tensor, seeds: Sequence[int], ballots: Sequence[Sequence[int]]
    ) -> list[Answer]:
        """In full what the first copy of each question said that voted like the majority."""
        answers: list[Answer] = []

        def ask(places: Sequence[int]) -> None:
            chosen = [ballots[i].index(leader(ballots[i])) for i in places]
            copied = [self._noisy(images[i], seeds[i], [n]) for i, n in zip(places, chosen, strict=True)]
            answers.extend(self.base.answer(batch.select(list(places)), torch.cat(copied)))

        self.in_batches("spoken", range(len(batch)), ask)
        return answers

    def _noisy(self, image: Tensor, seed: int, numbers: Sequence[int]) -> Tensor:
        """The copies of these (consecutive) numbers."""
        return noisy(image, self.sigma, seed, "vote", numbers[0], len(numbers))


def leader(votes: Sequence[int]) -> int:
    """The label with the most votes; of equals, the one that was voted for first."""
    return Counter(votes).most_common(1)[0][0]


def elect(votes: Sequence[int], spoken: Answer, alpha: float) -> Answer:
    """The answer of the smoothed model: its copies' labels, told in the words of one that voted like the majority."""
    counts, options = Counter(votes), len(spoken.option_logprobs)
    winner = leader(votes)
    most, second = counts[winner], sum(n for _, n in counts.most_common(2)[1:])
    shares = [(counts[option] + 0.5) / (len(votes) + options / 2) for option in range(options)]
    shown = replace(spoken, option_logprobs=tuple(math.log(share) for share in shares))
    if binomtest(most, most + second, 0.5).pvalue > alpha:
        return replace(shown, index=None, status="abstain")
    return shown if winner == INVALID else replace(shown, index=winner, status="valid")
