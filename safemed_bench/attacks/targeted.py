"""Objectives towards a named wrong option; every restart of an attack aims at the next one.

For a model that reasons the place to push is where its own rationale first tells the true option from the wanted one
(the decision slot); where there is none, its own reply rewritten for the wanted option is made likely instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..core.clinical import opposite_options, reads_normal
from ..core.types import LETTERS, Answer, Question
from ..models.answers import split_at_letter
from ..models.base import Batch, VisionLanguageModel
from .base import Objective, Prepared, Reading
from .objectives import either, own_tokens, slot_margin
from .slots import find_slot


@dataclass(frozen=True)
class _Letter(Prepared):
    """The letter of option `aims` (B,): its margin over the true one, or its log-probability among the options."""

    model: VisionLanguageModel
    batch: Batch
    aims: Tensor
    margin: bool

    def __call__(self, pixels: Tensor) -> Reading:
        scores = self.model.option_logits(self.batch, pixels)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        true, aims = self.batch.targets.to(scores.device), self.aims.to(scores.device)
        if self.margin:
            loss = scores.gather(1, aims[:, None]).squeeze(1) - scores.gather(1, true[:, None]).squeeze(1)
        else:
            loss = -cross_entropy(scores, aims, reduction="none")
        return Reading(loss, scores.detach().argmax(dim=1) != true)  # another wrong answer is a success as well

    def select(self, rows: Tensor) -> _Letter:
        return _Letter(self.model, self.batch.select(rows), self.aims[rows.to(self.aims.device)], self.margin)


@dataclass(frozen=True)
class _WrongReply(Prepared):
    """Mean log-likelihood per token of replies that argue for another option.

    Every question is a suspect: how likely a given wrong reply is does not bound what else may be answered.
    """

    model: VisionLanguageModel
    batch: Batch
    replies: tuple[tuple[int, ...], ...]

    def __call__(self, pixels: Tensor) -> Reading:
        loss = -self.model.token_loss(self.batch, pixels, self.replies)
        return Reading(loss, torch.ones_like(loss, dtype=torch.bool))

    def select(self, rows: Tensor) -> _WrongReply:
        return _WrongReply(self.model, self.batch.select(rows), tuple(self.replies[i] for i in rows.tolist()))


@dataclass(frozen=True)
class _Aimed(Prepared):
    """`first` aims at each question's first target, `aim(k)` at the next ones."""

    first: Prepared
    aim: Callable[[int], Prepared]
    extra: tuple[dict[str, Any], ...] = ()

    def __call__(self, pixels: Tensor) -> Reading:
        return self.first(pixels)

    def select(self, rows: Tensor) -> Prepared:
        return self.first.select(rows)

    def turn(self, restart: int) -> Prepared:
        return self.aim(restart) if restart else self.first


def wrong_reply(question: Question, reply: str, target: int) -> str:
    """A reply of the model's own that names the true option, rewritten to name option `target`.

    The true option's text becomes the target's, in small letters where it was, and so do its letter right behind that
    text and the letter in the answer tag. Nothing else changes.
    """
    own, wanted = question.options[question.answer], question.options[target]
    letter, wanted_letter = LETTERS[question.answer], LETTERS[target]
    named = re.compile(rf"(?<!\w)((?i:{re.escape(own)}))(?!\w)(?:([^\w<]+){letter}(?!\w))?")

    def other(match: re.Match[str]) -> str:
        text = wanted.lower() if match[1].islower() else wanted
        return text + (match[2] + wanted_letter if match[2] else "")

    head, tail = split_at_letter(reply) or (reply, None)
    return named.sub(other, head) + (wanted_letter + tail if tail is not None else "")


def wrong_options(question: Question, answer: Answer) -> tuple[int, ...]:
    """The wrong options, those that the clean image speaks for most first."""
    scores = answer.option_logprobs or (0.0,) * len(question.options)
    wrong = [i for i in range(len(question.options)) if i != question.answer]
    return tuple(sorted(wrong, key=lambda i: -scores[i]))


@dataclass(frozen=True)
class TargetedMargin(Objective):
    """A wrong option minus the true one where the answer is decided; restart k aims at the k-th likeliest wrong option
    and then starts over (Croce & Hein, 2003.01690, targeted APGD; margins, since questions have 2 to 4 options).

    For a model that does not reason that place is the answer's letter. For one that does it is the decision slot
    between these two options alone, and a question without one falls back to `targeted`.
    """

    name: ClassVar[str] = "targeted_margin"

    def targets(self, question: Question, answer: Answer) -> tuple[int, ...]:
        """The options to aim at, one or more, in the order of the restarts."""
        return wrong_options(question, answer)

    def note(self, question: Question) -> dict[str, Any]:
        """What the record's extra should tell of a question."""
        return {}

    def prepare(self, model: VisionLanguageModel, batch: Batch, clean_answers: Sequence[Answer]) -> Prepared:
        lists = [self.targets(q, a) for q, a in zip(batch.questions, clean_answers, strict=True)]

        def aim(restart: int) -> Prepared:
            aims = [targets[restart % len(targets)] for targets in lists]
            return self._toward(model, batch, clean_answers, aims)

        return _Aimed(aim(0), aim, tuple(self.note(q) for q in batch.questions))

    def _toward(
        self, model: VisionLanguageModel, batch: Batch, answers: Sequence[Answer], aims: Sequence[int]
    ) -> Prepared:
        if not model.reasons:
            return _Letter(model, batch, torch.tensor(aims, dtype=torch.long), margin=True)
        replies = [own_tokens(model, answer) for answer in answers]
        slots = [
            find_slot((q.options[q.answer], q.options[aim]), 0, reply, model.encode, model.decode_text)
            for q, aim, reply in zip(batch.questions, aims, replies, strict=True)
        ]

        def fallback(rest: Sequence[int]) -> Prepared:
            return _rewritten(model, batch.select(rest), [answers[i] for i in rest], [aims[i] for i in rest])

        return either(slots, lambda at: slot_margin(model, batch, replies, slots, at), fallback)


@dataclass(frozen=True)
class Targeted(TargetedMargin):
    """Likelihood of a wrong option; restart k aims at the k-th likeliest one.

    For a model that does not reason, of its letter among the options. For one that does, of the model's own clean
    reply rewritten for that option, rationale and answer: a targeted wrong rationale.
    """

    name: ClassVar[str] = "targeted"

    def _toward(
        self, model: VisionLanguageModel, batch: Batch, answers: Sequence[Answer], aims: Sequence[int]
    ) -> Prepared:
        if not model.reasons:
            return _Letter(model, batch, torch.tensor(aims, dtype=torch.long), margin=False)
        return _rewritten(model, batch, answers, aims)


@dataclass(frozen=True)
class StopReasoning(TargetedMargin):
    """Likelihood of a reply that ends its rationale at once and gives a wrong letter (Wang et al., 2402.14899).

    Restart k gives the k-th likeliest wrong letter. `no_think` asks how the letter falls where there is no rationale;
    this also makes the model write none.
    """

    name: ClassVar[str] = "stop_reasoning"
    reasoning_only: ClassVar[bool] = True

    def _toward(
        self, model: VisionLanguageModel, batch: Batch, answers: Sequence[Answer], aims: Sequence[int]
    ) -> Prepared:
        tails = [split_at_letter(answer.text) or ("", "") for answer in answers]
        texts = [model.answer_prefix("") + LETTERS[aim] + tail for aim, (_, tail) in zip(aims, tails, strict=True)]
        return _WrongReply(model, batch, tuple(model.encode(text) for text in texts))


@dataclass(frozen=True)
class Directed(TargetedMargin):
    """`targeted_margin` towards the clinically opposite answer: from a disease to `normal`, and from normal to one.

    The record's extra says which: `directed` is `reassurance` or `alarm`. A question without such options is attacked
    towards any wrong one and says nothing.
    """

    name: ClassVar[str] = "directed"

    def targets(self, question: Question, answer: Answer) -> tuple[int, ...]:
        wrong, opposite = wrong_options(question, answer), opposite_options(question.options, question.answer)
        return tuple(i for i in wrong if i in opposite) or wrong

    def note(self, question: Question) -> dict[str, Any]:
        if not opposite_options(question.options, question.answer):
            return {}
        return {"directed": "alarm" if reads_normal(question.options[question.answer]) else "reassurance"}


def _rewritten(model: VisionLanguageModel, batch: Batch, answers: Sequence[Answer], aims: Sequence[int]) -> _WrongReply:
    texts = [wrong_reply(q, a.text, aim) for q, a, aim in zip(batch.questions, answers, aims, strict=True)]
    return _WrongReply(model, batch, tuple(model.encode(text) for text in texts))
