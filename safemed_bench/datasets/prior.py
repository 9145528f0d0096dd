"""The text-only prior: how far a lookup table gets that never sees an image. It stands beside every accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from ..core.types import Question

PRIOR_WEIGHT = 2.0
"""Pseudo-counts with which a finer level of the table leans on the coarser one."""


@dataclass(frozen=True)
class Lookup:
    """How often each option text was the true one when it was offered.

    Levels, from coarse to fine: anywhere; with the question type; with the question's text. Each is smoothed towards
    the one before it, so that an unseen question falls back on its type. With `modality` the table is also told the
    question's modality, which is a label and stands in no text: it then answers every "which modality is this?".
    """

    modality: bool = False
    true: Counter[Hashable] = field(default_factory=Counter)
    offered: Counter[Hashable] = field(default_factory=Counter)

    @classmethod
    def learn(cls, questions: Sequence[Question], *, modality: bool = False) -> Lookup:
        table = cls(modality)
        for question in questions:
            truth = question.options[question.answer]
            for level in table._levels(question):
                table.true[level, truth] += 1
                table.offered.update((level, option) for option in set(question.options))
        return table

    def guess(self, question: Question) -> int:
        """Index of the likeliest option; the first of equals."""
        levels = self._levels(question)
        rates = [self._rate(levels, option, 1 / len(question.options)) for option in question.options]
        return rates.index(max(rates))

    def _rate(self, levels: Sequence[Hashable], option: str, rate: float) -> float:
        for level in levels:
            key = (level, option)
            rate = (self.true[key] + PRIOR_WEIGHT * rate) / (self.offered[key] + PRIOR_WEIGHT)
        return rate

    def _levels(self, question: Question) -> tuple[Hashable, ...]:
        told = question.modality if self.modality else ""
        kind, asked = question.question_type, question.question
        finer = ((told, "type", kind), (told, "text", asked))
        return ("", told, *finer) if told else ("", *finer)


def lookup_hits(train: Sequence[Question], test: Sequence[Question], *, modality: bool = False) -> list[bool]:
    """For each test question, whether the lookup learnt on `train` answers it."""
    table = Lookup.learn(train, modality=modality)
    return [table.guess(question) == question.answer for question in test]


def hits_by_id(train: Sequence[Question], asked: Sequence[Question]) -> dict[str, bool]:
    """Question id -> whether the lookup learnt on `train` answers it; {} where there is nothing to learn from."""
    return dict(zip((q.id for q in asked), lookup_hits(train, asked), strict=True)) if train else {}


def letter_hits(train: Sequence[Question], test: Sequence[Question]) -> list[bool]:
    """The same for the commonest letter among train questions with as many options (the first where there are none)."""
    counts = {n: Counter(q.answer for q in train if len(q.options) == n) for n in (2, 3, 4)}
    best = {n: max(range(n), key=lambda i, c=c: c[i]) for n, c in counts.items()}  # type: ignore[misc]
    return [best[len(question.options)] == question.answer for question in test]
