"""Objectives that are means over texts the model might have written: other rationales, other orders and wordings.

One rationale is one draw of what a reasoning model says, and a perturbation that moves it may leave the next one alone.
The mean over several (as Athalye et al., 1707.07397, over transformations of the image) is pushed at each text's own
decision slot.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core.errors import UsageError
from ..core.types import Answer, Question
from ..models.base import Batch, VisionLanguageModel
from .base import Objective, Prepared, Reading
from .objectives import RationaleAnswer, either, own_tokens, slot_margin
from .slots import find_slot

TEXTS = 4
"""Texts in the mean, the model's own clean reply to the question as it is asked among them."""

TEMPERATURE = 1.0

Reply = tuple[int, ...]


class Texts(NamedTuple):
    """R texts. batch: R rows, each as its text was asked for. owner: places of their questions. weight: in the mean."""

    batch: Batch
    replies: tuple[Reply, ...]
    owner: tuple[int, ...]
    weight: tuple[float, ...]


@dataclass(frozen=True)
class _Mean(Prepared):
    """The weighted mean of `inner`, which has R rows, over those of each of `count` questions. owner, weight: (R,)."""

    inner: Prepared
    owner: Tensor
    weight: Tensor
    count: int
    extra: tuple[dict[str, Any], ...] = ()

    def __call__(self, pixels: Tensor) -> Reading:
        owner = self.owner.to(pixels.device)
        loss, suspects = self.inner(pixels[owner])
        weight, none = self.weight.to(loss), torch.zeros(self.count, dtype=loss.dtype, device=loss.device)
        mean = none.index_add(0, owner, weight * loss) / none.index_add(0, owner, weight)
        return Reading(mean, none.index_add(0, owner, suspects.to(loss)) > 0)  # one text that fell is worth a verdict

    def select(self, rows: Tensor) -> _Mean:
        wanted = (rows.cpu()[:, None] == self.owner[None]).nonzero()
        return _Mean(self.inner.select(wanted[:, 1]), wanted[:, 0], self.weight[wanted[:, 1]], len(rows))


class Expected(Objective):
    """The mean margin at the decision slots of several texts. A text that does not name the true option has none and is
    left out; a question without any text that has one falls back to `rationale_answer`.

    The record's extra says how many `texts` are in the mean; or `fallback`.
    """

    reasoning_only: ClassVar[bool] = True
    fallback: ClassVar[Objective] = RationaleAnswer()

    @abstractmethod
    def texts(self, model: VisionLanguageModel, batch: Batch, replies: Sequence[Reply]) -> Texts:
        """What is averaged: `replies`, the model's own clean ones to the questions of `batch`, and others."""

    def prepare(self, model: VisionLanguageModel, batch: Batch, clean_answers: Sequence[Answer]) -> Prepared:
        found = self.texts(model, batch, [own_tokens(model, answer) for answer in clean_answers])
        slots = [
            find_slot(q.options, q.answer, reply, model.encode, model.decode_text)
            for q, reply in zip(found.batch.questions, found.replies, strict=True)
        ]
        rows = [[r for r, slot in enumerate(slots) if slot and found.owner[r] == i] for i in range(len(batch))]

        def main(at: Sequence[int]) -> Prepared:
            chosen = [r for i in at for r in rows[i]]
            owner = torch.tensor([place for place, i in enumerate(at) for _ in rows[i]], dtype=torch.long)
            weight = torch.tensor([found.weight[r] for r in chosen])
            return _Mean(slot_margin(model, found.batch, found.replies, slots, chosen), owner, weight, len(at))

        def fallback(rest: Sequence[int]) -> Prepared:
            return self.fallback.prepare(model, batch.select(rest), [clean_answers[i] for i in rest])

        counts = [round(sum(found.weight[r] for r in held)) for held in rows]
        extra = tuple({"texts": count} if count else {"fallback": self.fallback.name} for count in counts)
        return either(counts, main, fallback, extra)


@dataclass(frozen=True)
class ExpectedRationales(Expected):
    """The model's own clean rationale and others, sampled from it on the clean image at temperature 1.

    Raises UsageError for a model without `sample`.
    """

    name: ClassVar[str] = "expected_rationales"

    def texts(self, model: VisionLanguageModel, batch: Batch, replies: Sequence[Reply]) -> Texts:
        draw = getattr(model, "sample", None)
        if draw is None:
            raise UsageError(f"objective '{self.name}' samples replies, which {model.name} cannot: it has no `sample`")
        sampled: list[list[Reply]] = draw(batch, batch.pixels, TEXTS - 1, temperature=TEMPERATURE)
        counts = [Counter([own, *others]) for own, others in zip(replies, sampled, strict=True)]
        owner = tuple(i for i, held in enumerate(counts) for _ in held)
        texts = tuple(reply for held in counts for reply in held)
        weight = tuple(float(times) for held in counts for times in held.values())
        return Texts(batch.select(owner), texts, owner, weight)


@dataclass(frozen=True)
class ExpectedPrompts(Expected):
    """The question as it is asked, and with its options in other orders and in the model's other `wordings`, if it has
    any: each with the model's own clean reply to it, where that is right.
    """

    name: ClassVar[str] = "expected_prompts"

    def texts(self, model: VisionLanguageModel, batch: Batch, replies: Sequence[Reply]) -> Texts:
        wordings: Sequence[str] = getattr(model, "wordings", ())
        asked = [_ways(question, wordings) for question in batch.questions]
        owner = tuple(i for i, ways in enumerate(asked) for _ in ways)
        questions, worded = zip(*(way for ways in asked for way in ways), strict=True)
        options = {"wordings": worded} if wordings else {}
        whole = model.prepare(questions, batch.canvas[list(owner)], **options)
        answers = model.answer(whole, whole.pixels)
        first = [i == 0 or owner[i - 1] != owner[i] for i in range(len(owner))]
        kept = [r for r, a in enumerate(answers) if first[r] or a.index == questions[r].answer]
        texts = tuple(replies[owner[r]] if first[r] else own_tokens(model, answers[r]) for r in kept)
        return Texts(whole.select(kept), texts, tuple(owner[r] for r in kept), (1.0,) * len(kept))


def _ways(question: Question, wordings: Sequence[str]) -> list[tuple[Question, str]]:
    """A question as it is asked first, then with its options turned round by one place more each time, and the next
    wording; never twice the same."""
    count = len(question.options)
    pairs = dict.fromkeys((k % count, wordings[k % len(wordings)] if wordings else "") for k in range(TEXTS))
    return [(_turned(question, places), wording) for places, wording in pairs]


def _turned(question: Question, places: int) -> Question:
    options = question.options[places:] + question.options[:places]
    return replace(question, options=options, answer=(question.answer - places) % len(options))
