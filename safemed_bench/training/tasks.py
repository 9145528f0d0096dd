"""Training examples: (prompt text, reply, loss weight of each token), made from a question or from words alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..core.types import LETTERS, Question
from ..models.prompts import get_prompt, problem_text
from .config import TaskConfig


class TextModel(Protocol):
    """What the examples need of a model: its tokens."""

    end_of_turn: int

    def encode(self, text: str) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Example:
    """user: the prompt's text. reply: token ids with the end of turn. weights: one per token of the reply."""

    user: str
    reply: tuple[int, ...]
    weights: tuple[float, ...]


def question_example(
    model: TextModel, task: TaskConfig, question: Question, rationale: str, rng: np.random.Generator
) -> Example:
    """`answer` and `rationale` tasks: the reply that one of the task's prompts asks for."""
    prompt = get_prompt(task.prompts[int(rng.integers(len(task.prompts)))])
    letter = LETTERS[question.answer]
    reply = model.encode(prompt.reply(letter, rationale if prompt.reasons else None))
    spelt = {model.encode(letter), model.encode(f" {letter}")}
    weights = [task.letter_weight if (token,) in spelt else 1.0 for token in reply]
    return Example(prompt.user_text(question), (*reply, model.end_of_turn), (*weights, 1.0))


def binding_example(model: TextModel, task: TaskConfig, words: Sequence[str], rng: np.random.Generator) -> Example:
    """Text alone, so that an option's letter is found from its text before any image is understood.

    Half of the examples list words as options and name them all in random order, each with its letter after it (only
    the letters are scored: which word comes next is not to be learnt); half state the answer in the question and reply
    in the form of one of the task's prompts.
    """
    count = int(rng.integers(2, len(LETTERS) + 1))
    options = tuple(words[i] for i in rng.choice(len(words), count, replace=False))
    if rng.random() < 0.5:
        return _stated(model, task, options, rng)
    reply: list[int] = []
    weights: list[float] = []
    for i in rng.permutation(count):
        before, after = model.encode(f" {options[i]}"), model.encode(f" {LETTERS[i]}")
        reply += [*before, *after]
        weights += [0.0] * len(before) + [1.0] * len(after)
    return Example(problem_text(_question("so", options, 0)), tuple(reply), tuple(weights))


def _stated(model: TextModel, task: TaskConfig, options: tuple[str, ...], rng: np.random.Generator) -> Example:
    answer = int(rng.integers(len(options)))
    question = _question(f"this image is {options[answer]} . so", options, answer)
    return question_example(model, task, question, f"so {options[answer]} {LETTERS[answer]}", rng)


def _question(stem: str, options: tuple[str, ...], answer: int) -> Question:
    return Question("", "", "", stem, options, answer, "", "", "", "train")
