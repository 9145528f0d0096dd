"""Rewards: what a reply is worth, judged on its decoded text. Without torch.

Others add theirs with `core.registry.rewards.register`, or through the entry point group `safemed_bench.rewards`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from ..core import registry
from ..core.errors import UsageError
from ..core.types import LETTERS, Question
from ..models.answers import extract, split_at_letter
from ..models.prompts import Prompt

_FIRST = re.compile(r"\s*\(?([A-Z])(?:[).:,]|\s*$)")
"""A letter that opens a reply and stands apart from what follows: `B`, `(B)`, `B) cyst`; not the article `A cyst`."""


class Reward(Protocol):
    """text: the reply without special tokens. finished: False where it ran into the token limit. question: as it was
    put, its options in the order shown. prompt: the wording, which says what form the reply should have."""

    def __call__(self, text: str, finished: bool, question: Question, prompt: Prompt) -> float: ...


class Score(NamedTuple):
    """`values` of the single rewards before their weights, and their weighted sum."""

    total: float
    values: dict[str, float]


def total(weights: Mapping[str, float], text: str, finished: bool, question: Question, prompt: Prompt) -> Score:
    """Judge one reply by the rewards that `weights` names. UsageError on an unknown name, or a reward that is NaN."""
    values = {name: float(registry.rewards.get(name)(text, finished, question, prompt)) for name in weights}
    if bad := [name for name, value in values.items() if not math.isfinite(value)]:
        # one such number would turn every weight of the model to NaN
        raise UsageError(f"reward '{bad[0]}' gave {values[bad[0]]} for the reply {text!r}")
    return Score(sum(weights[name] * value for name, value in values.items()), values)


@registry.rewards.register("accuracy")
def accuracy(text: str, finished: bool, question: Question, prompt: Prompt) -> float:
    """1 where the letter in the answer's place is the true one, whatever stands around that place."""
    return float(answered_letter(text, prompt) == LETTERS[question.answer])


@registry.rewards.register("format")
def strict_format(text: str, finished: bool, question: Question, prompt: Prompt) -> float:
    """1 where the deployed path would read an answer off the reply, right or wrong."""
    return float(extract(text, prompt, len(question.options), finished=finished)[1] == "valid")


@registry.rewards.register("gated")
def gated(text: str, finished: bool, question: Question, prompt: Prompt) -> float:
    """1 where the deployed path would read the true answer: accuracy, in strict form only."""
    return float(extract(text, prompt, len(question.options), finished=finished)[0] == question.answer)


def answered_letter(text: str, prompt: Prompt) -> str | None:
    """The letter in the answer's place: in `<answer>` tags where the prompt wants them, else at the reply's beginning.

    None where there is none, and where several pairs of tags name different letters: hedging earns nothing.
    """
    if not prompt.tagged:
        match = _FIRST.match(text)
        return match[1] if match else None
    letters, rest = set(), split_at_letter(text)
    while rest:
        head, tail = rest
        letters.add(text[len(head)])
        text, rest = tail, split_at_letter(tail)
    return letters.pop() if len(letters) == 1 else None
