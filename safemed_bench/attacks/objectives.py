"""What an attack may maximise. Each works with every attack; none is the strongest everywhere.

For a model that reasons, the answer token after the model's own clean rationale is a weak target, for the text
leaks the answer. Robust accuracy is therefore the per-sample worst over all objectives that apply.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..core.types import Answer
from ..models.answers import split_at_letter
from ..models.base import Batch, Text, VisionLanguageModel
from .base import Objective, Prepared, Reading
from .pursuit import Scored
from .slots import Slot, find_slot


def _pick(items: Sequence[Any], rows: Tensor) -> tuple[Any, ...]:
    return tuple(items[i] for i in rows.tolist())


def _at_least_float32(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    """(B,) among the options that exist; -inf elsewhere adds nothing to it."""
    return cross_entropy(scores, targets, reduction="none")


@dataclass(frozen=True)
class Letter(Scored):
    """The true letter right after `text` (None: the model's own answer prefix)."""

    model: VisionLanguageModel
    batch: Batch
    text: tuple[Text, ...] | None
    loss: Callable[[Tensor, Tensor], Tensor] = _cross_entropy
    extra: tuple[dict[str, Any], ...] = ()

    def __call__(self, pixels: Tensor) -> Reading:
        scores = self.scores(pixels)
        targets = self.batch.targets.to(scores.device)
        return Reading(self.loss_of(scores, targets), scores.detach().argmax(dim=1) != targets)

    def scores(self, pixels: Tensor) -> Tensor:
        return _at_least_float32(self.model.option_logits(self.batch, pixels, self.text))

    def loss_of(self, scores: Tensor, targets: Tensor) -> Tensor:
        return self.loss(scores, targets)

    def select(self, rows: Tensor) -> Letter:
        text = _pick(self.text, rows) if self.text is not None else None
        return Letter(self.model, self.batch.select(rows), text, self.loss)


@dataclass(frozen=True)
class _Reply(Prepared):
    """Mean negative log-likelihood of given replies, as token ids."""

    model: VisionLanguageModel
    batch: Batch
    replies: tuple[tuple[int, ...], ...]
    extra: tuple[dict[str, Any], ...] = ()

    def __call__(self, pixels: Tensor) -> Reading:
        loss = self.model.token_loss(self.batch, pixels, self.replies)
        lengths = torch.tensor([len(r) for r in self.replies], device=loss.device)
        # Below ln 2 in total each token has more than half of the probability: greedy decoding repeats the reply.
        return Reading(loss, loss.detach() * lengths > math.log(2))

    def select(self, rows: Tensor) -> _Reply:
        return _Reply(self.model, self.batch.select(rows), _pick(self.replies, rows))


@dataclass(frozen=True)
class _Slot(Prepared):
    """Margin at the decision slot: candidates (B, K), the chosen option's token first, -1 where there is none."""

    model: VisionLanguageModel
    batch: Batch
    text: tuple[Text, ...]
    candidates: Tensor
    extra: tuple[dict[str, Any], ...] = ()

    def __call__(self, pixels: Tensor) -> Reading:
        scores = self.model.next_token_logits(self.batch, pixels, self.text, self.candidates)
        scores = _at_least_float32(scores)
        chosen, others = scores[:, 0], scores[:, 1:].amax(dim=1)
        alone = self.candidates.to(scores.device)[:, 1:].amax(dim=1) < 0
        # Scores are log-probabilities: where no other option names a token, all other tokens are the rival.
        rival = torch.where(alone, torch.log1p(-chosen.exp().clamp(max=1 - 1e-6)), others)
        loss = torch.where(alone, -chosen, others - chosen)
        return Reading(loss, (rival > chosen).detach())

    def select(self, rows: Tensor) -> _Slot:
        candidates = self.candidates[rows.to(self.candidates.device)]
        return _Slot(self.model, self.batch.select(rows), _pick(self.text, rows), candidates)


@dataclass(frozen=True)
class _Either(Prepared):
    """One objective for some questions, another for the rest; `first` and `second` are their positions."""

    first: Tensor
    second: Tensor
    main: Prepared
    fallback: Prepared
    extra: tuple[dict[str, Any], ...] = ()

    def __call__(self, pixels: Tensor) -> Reading:
        parts = [(at, of) for at, of in ((self.first, self.main), (self.second, self.fallback)) if len(at)]
        readings = [of(pixels[at.to(pixels.device)]) for at, of in parts]
        order = torch.cat([at for at, _ in parts]).argsort().to(pixels.device)
        return Reading(torch.cat([r.loss for r in readings])[order], torch.cat([r.suspects for r in readings])[order])

    def select(self, rows: Tensor) -> _Either:
        rows = rows.cpu()
        halves = []
        for at, of in ((self.first, self.main), (self.second, self.fallback)):
            wanted = (rows[:, None] == at[None]).nonzero()
            halves.append((wanted[:, 0], of.select(wanted[:, 1])))
        (first, main), (second, fallback) = halves
        return _Either(first, second, main, fallback)


def rationale_prefix(model: VisionLanguageModel, answer: Answer) -> str:
    """The model's own reply up to the place of its letter; its plain answer prefix where there is none."""
    found = split_at_letter(answer.text)
    return found[0] if found else model.answer_prefix()


def own_tokens(model: VisionLanguageModel, answer: Answer) -> tuple[int, ...]:
    return tuple(answer.tokens) or model.encode(answer.text)


def slot_margin(
    model: VisionLanguageModel,
    batch: Batch,
    replies: Sequence[tuple[int, ...]],
    slots: Sequence[Slot | None],
    at: Sequence[int],
) -> Prepared:
    """Margin at the decision slots of the questions at `at`, which have one, of `batch`."""
    found = [(slot, replies[i]) for i in at if (slot := slots[i])]
    width = max([2, *(len(slot.candidates) for slot, _ in found)])
    table = [[*slot.candidates, *[-1] * (width - len(slot.candidates))] for slot, _ in found]
    candidates = torch.tensor(table, dtype=torch.long).view(-1, width)
    return _Slot(model, batch.select(at), tuple(reply[: slot.position] for slot, reply in found), candidates)


def either(
    slots: Sequence[object],
    main: Callable[[Sequence[int]], Prepared],
    fallback: Callable[[Sequence[int]], Prepared],
    extra: tuple[dict[str, Any], ...] = (),
) -> Prepared:
    """`main` for the questions that have a slot, or whatever it needs; `fallback` for the rest."""
    at = [i for i, slot in enumerate(slots) if slot]
    rest = [i for i, slot in enumerate(slots) if not slot]
    first, second = torch.tensor(at, dtype=torch.long), torch.tensor(rest, dtype=torch.long)
    return _Either(first, second, main(at), fallback(rest), extra)


@dataclass(frozen=True)
class AnswerToken(Objective):
    """Cross-entropy of the true letter at the answer position, among the options.

    A reasoning model is teacher-forced with its own clean rationale: the weak attack of the literature, reported as
    such. A subclass with another `loss` is another objective at the same place.
    """

    name: ClassVar[str] = "answer"

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """(B,) to be maximised, of (B, K) log-probabilities (-inf where there is no option) and (B,) true options."""
        return _cross_entropy(scores, targets)

    def prepare(self, model: VisionLanguageModel, batch: Batch, clean_answers: Sequence[Answer]) -> Prepared:
        text = tuple(rationale_prefix(model, a) for a in clean_answers) if model.reasons else None
        return Letter(model, batch, text, self.loss)


@dataclass(frozen=True)
class Margin(AnswerToken):
    """Best other option's log-probability minus the true one's, where `answer` takes the cross-entropy.

    Does not saturate on confident models (Carlini & Wagner, 1608.04644); DLR would need four options.
    """

    name: ClassVar[str] = "margin"

    def loss(self, scores: Tensor, targets: Tensor) -> Tensor:
        """(B,) best other score minus the true one; -inf where there is no other."""
        true = scores.gather(1, targets[:, None]).squeeze(1)
        return scores.scatter(1, targets[:, None], -torch.inf).amax(dim=1) - true


@dataclass(frozen=True)
class NoThink(Objective):
    """Cross-entropy of the true letter after an empty rationale: no text leaks the answer."""

    name: ClassVar[str] = "no_think"
    reasoning_only: ClassVar[bool] = True

    def prepare(self, model: VisionLanguageModel, batch: Batch, clean_answers: Sequence[Answer]) -> Prepared:
        return Letter(model, batch, (model.answer_prefix(""),) * len(batch))


@dataclass(frozen=True)
class RationaleAnswer(Objective):
    """Negative log-likelihood of the model's whole own clean reply, rationale and answer."""

    name: ClassVar[str] = "rationale_answer"
    reasoning_only: ClassVar[bool] = True

    def prepare(self, model: VisionLanguageModel, batch: Batch, clean_answers: Sequence[Answer]) -> Prepared:
        return _Reply(model, batch, tuple(own_tokens(model, a) for a in clean_answers))


@dataclass(frozen=True)
class DecisionSlot(Objective):
    """Margin between the options where the model's own rationale first tells them apart (see `slots`).

    A question whose rationale never names its answer falls back to `rationale_answer`; the record's extra says
    which it was: `slot` (position in the reply) or `fallback`.
    """

    name: ClassVar[str] = "decision_slot"
    reasoning_only: ClassVar[bool] = True
    fallback: ClassVar[Objective] = RationaleAnswer()

    def prepare(self, model: VisionLanguageModel, batch: Batch, clean_answers: Sequence[Answer]) -> Prepared:
        replies = [own_tokens(model, a) for a in clean_answers]
        slots = [
            find_slot(q.options, q.answer, reply, model.encode, model.decode_text)
            for q, reply in zip(batch.questions, replies, strict=True)
        ]

        def fallback(rest: Sequence[int]) -> Prepared:
            return self.fallback.prepare(model, batch.select(rest), [clean_answers[i] for i in rest])

        extra = tuple({"slot": s.position} if s else {"fallback": self.fallback.name} for s in slots)
        return either(slots, lambda at: slot_margin(model, batch, replies, slots, at), fallback, extra)
