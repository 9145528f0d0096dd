"""The `rebalanced` scheme: distractors redrawn, so that the text of the options tells less of the answer.

OmniMedVQA's own distractors are seldom the truth of any question, so that a table of option texts answers nearly all of
it without an image. Here a question's distractors are true answers of other questions of its modality and question
type, drawn by how often they are true: first among the answers to the very same question text, then among all of the
type. An answer that is also true of this image is never a distractor. Modality questions draw from the answers that
name another modality, as any name of the same one would be true as well. The number of options stays where the pool
allows.
"""

from __future__ import annotations

import random
import re
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

from ..core.seeds import derive_seed
from ..core.types import Question

MODALITY_TYPE = "Modality Recognition"
_TRIES = 8

Key = tuple[str, ...]
"""Modality, question type and, for the nearest pool, the question's text."""


@dataclass(frozen=True)
class _Pool:
    """Answers and the running sums of how often each is true."""

    answers: tuple[str, ...]
    sums: tuple[int, ...]

    @classmethod
    def of(cls, counts: Counter[str]) -> _Pool:
        answers = tuple(sorted(counts))
        return cls(answers, tuple(accumulate(counts[a] for a in answers)))

    def draw(self, barred: set[str], rng: random.Random) -> str | None:
        """One answer by frequency, its meaning not in `barred`; None where there is none left."""
        if not self.answers:
            return None
        for _ in range(_TRIES):
            answer = self.answers[bisect(self.sums, rng.random() * self.sums[-1])]
            if meaning(answer) not in barred:
                return answer
        left = [i for i, answer in enumerate(self.answers) if meaning(answer) not in barred]
        weights = [self.sums[i] - (self.sums[i - 1] if i else 0) for i in left]
        return self.answers[rng.choices(left, weights)[0]] if left else None


@lru_cache(1 << 16)
def meaning(answer: str) -> str:
    """An answer without case, punctuation and plural s, so that `Lungs.` is no distractor of `lung`."""
    words = re.sub(r"[^a-z0-9]+", " ", answer.casefold()).split()
    return " ".join(w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w for w in words)


def rebalance(questions: Sequence[Question], seed: int = 0) -> tuple[Question, ...]:
    """The same questions with new distractors in a new order; ids, answers' texts and splits stay.

    Deterministic in `seed` and the questions; a question for which no distractor exists keeps its options.
    """
    pools = _pools(questions)
    true_of: dict[tuple[str, str], set[str]] = defaultdict(set)
    for question in questions:
        true_of[question.image, question.question_type].add(meaning(question.options[question.answer]))
    return tuple(
        _redraw(q, [pools[key] for key in _keys(q)], true_of[q.image, q.question_type], seed) for q in questions
    )


def _redraw(question: Question, pools: Iterable[_Pool], true: set[str], seed: int) -> Question:
    rng = random.Random(derive_seed("rebalanced", seed, question.id))
    truth = question.options[question.answer]
    barred, drawn = set(true), [truth]
    for pool in pools:
        while len(drawn) < len(question.options) and (answer := pool.draw(barred, rng)) is not None:
            drawn.append(answer)
            barred.add(meaning(answer))
    if len(drawn) < 2:
        return question
    rng.shuffle(drawn)
    return replace(question, options=tuple(drawn), answer=drawn.index(truth))


def _keys(question: Question) -> list[Key]:
    """Pools of a question, nearest first."""
    wide = (question.modality, question.question_type)
    return [wide] if question.question_type == MODALITY_TYPE else [(*wide, question.question), wide]


def _pools(questions: Sequence[Question]) -> dict[Key, _Pool]:
    counts: dict[Key, Counter[str]] = defaultdict(Counter)
    for question in questions:
        for key in _keys(question):
            counts[key][question.options[question.answer]] += 1
    named = {key[0]: held for key, held in counts.items() if key[1] == MODALITY_TYPE}
    for modality in named:
        own = {meaning(answer) for answer in named[modality]}
        others = Counter[str]()
        for other, held in named.items():
            if other != modality:
                others.update({a: n for a, n in held.items() if meaning(a) not in own})
        counts[modality, MODALITY_TYPE] = others
    return {key: _Pool.of(held) for key, held in counts.items()}
