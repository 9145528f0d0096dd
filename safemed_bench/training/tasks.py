"""Training examples: (prompt text, reply, loss weight of each token), made from a question or from words alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..core.types import LETTERS, Question
from ..models.answers import fork
from ..models.prompts import get_prompt, problem_text
from .config import TaskConfig


class TextModel(Protocol):
    """What the examples need of a model: its tokens."""

    @property
    def end_of_turn(self) -> int: ...

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
    """The reply that one of the task's prompts asks for; the letter that ends `rationale` is set to the true one."""
    prompt = get_prompt(task.prompts[int(rng.integers(len(task.prompts)))])
    letter = LETTERS[question.answer]
    rationale = rationale[:-1] + letter
    text = prompt.reply(letter, rationale if prompt.reasons else None)
    reply = model.encode(text)
    weights = [1.0] * len(reply)
    if task.letter_weight != 1:
        places = [len(prompt.answer_prefix(rationale))]
        if prompt.reasons:
            places.append(text.index(rationale) + len(rationale) - 1)
        for place in places:
            for token in letter_tokens(model, text, place):
                weights[token] = task.letter_weight
    return Example(prompt.user_text(question), (*reply, model.end_of_turn), (*weights, 1.0))


def letter_tokens(model: TextModel, text: str, place: int) -> range:
    """Positions of the tokens of `text` that spell the letter at character `place`.

    They are what lies between the tokens that the text has in common with its likes, with each other letter there, at
    its beginning and at its end; so a letter may be joined to what stands beside it (`>A`).
    """
    around = text[:place], text[place + 1 :]
    before, _ = fork(model.encode, *around)
    after, _ = fork(lambda like: model.encode(like)[::-1], *around)
    return range(len(before), len(model.encode(text)) - len(after))


CAPTION_REQUEST = "Describe this image."


def caption_example(model: TextModel, caption: str) -> Example:
    """The image in words: the cheapest way to learn to look, for each image shows all its signs at once."""
    reply = (*model.encode(caption), model.end_of_turn)
    return Example(CAPTION_REQUEST, reply, (1.0,) * len(reply))


def open_example(model: TextModel, question: Question) -> Example:
    """The question without its options; the reply is the answer's text, so that it is known before any letter is."""
    reply = (*model.encode(f" {question.options[question.answer]}"), model.end_of_turn)
    return Example(question.question, reply, (1.0,) * len(reply))


QUERIES = 8


def binding_example(model: TextModel, words: Sequence[str], rng: np.random.Generator) -> Example:
    """Options of random words; the reply names QUERIES of them, each with its letter after it.

    Words are drawn with replacement, so that a letter cannot be found by elimination. Only the letters are scored:
    which word comes next is not to be learnt.
    """
    question, _ = _random_question(words, "so", rng)
    reply: list[int] = []
    weights: list[float] = []
    for i in rng.integers(len(question.options), size=QUERIES):
        before, after = model.encode(f" {question.options[i]}"), model.encode(f" {LETTERS[i]}")
        reply += [*before, *after]
        weights += [0.0] * len(before) + [1.0] * len(after)
    return Example(problem_text(question), tuple(reply), tuple(weights))


def stated_example(model: TextModel, task: TaskConfig, words: Sequence[str], rng: np.random.Generator) -> Example:
    """The question states the answer in words; the reply is in the form that one of the task's prompts asks for."""
    question, answer = _random_question(words, "this image is {} . so", rng)
    return question_example(model, task, question, f"this image is {answer} . so {answer} X", rng)


def _random_question(words: Sequence[str], stem: str, rng: np.random.Generator) -> tuple[Question, str]:
    count = int(rng.integers(2, len(LETTERS) + 1))
    options = tuple(words[i] for i in rng.choice(len(words), count, replace=False))
    answer = int(rng.integers(count))
    return Question("", "", "", stem.format(options[answer]), options, answer, "", "", "", "train"), options[answer]
