"""The rationale written anew as the picture changes, so that the climb is of what the model would say next.

The text that a model reasons to on the clean image pins its answer, and no longer is what it would write on the picture
under attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.types import Answer
from ..models.base import Batch, Text, VisionLanguageModel
from .base import Objective, Prepared, Reading
from .objectives import Letter, rationale_prefix

EVERY = 5
"""Readings of the loss between two rationales; a rationale costs as much as a few of them."""


class _Texts:
    """What each question of the whole batch is now teacher-forced with, and how often its loss was read."""

    def __init__(self, texts: Sequence[Text]) -> None:
        self.now, self.wrong, self.reads = list(texts), [False] * len(texts), [0] * len(texts)


@dataclass(frozen=True)
class _Regenerated(Prepared):
    """Cross-entropy of the true letter after the present rationale. places: of the rows in `texts`, which all
    selections of one restart share."""

    model: VisionLanguageModel
    batch: Batch
    first: tuple[Text, ...]
    texts: _Texts
    places: tuple[int, ...]
    extra: tuple[dict[str, Any], ...] = ()

    def __call__(self, pixels: Tensor) -> Reading:
        self._rewrite(pixels.detach())
        text = tuple(self.texts.now[place] for place in self.places)
        loss, suspects = Letter(self.model, self.batch, text)(pixels)
        wrong = torch.tensor([self.texts.wrong[place] for place in self.places], device=suspects.device)
        return Reading(loss, suspects | wrong)

    def _rewrite(self, pixels: Tensor) -> None:
        """A new rationale for the questions that are due, from the picture as the deployed path would see it."""
        rows = {place: row for row, place in enumerate(self.places)}  # of several copies one speaks for its question
        due = {place: row for place, row in rows.items() if self.texts.reads[place] % EVERY == EVERY - 1}
        for place in rows:
            self.texts.reads[place] += 1
        if not due:
            return
        asked = self.batch.select([*due.values()])
        answers = self.model.answer(asked, pixels[[*due.values()]])
        for place, answer, question in zip(due, answers, asked.questions, strict=True):
            self.texts.now[place] = rationale_prefix(self.model, answer)
            self.texts.wrong[place] = answer.index != question.answer

    def select(self, rows: Tensor) -> _Regenerated:
        chosen = tuple(self.places[i] for i in rows.tolist())
        return replace(self, batch=self.batch.select(rows), places=chosen, extra=())

    def turn(self, restart: int) -> Prepared:
        """Every restart begins with the clean rationale."""
        return replace(self, texts=_Texts(self.first)) if restart else self


@dataclass(frozen=True)
class Regenerated(Objective):
    """Cross-entropy of the true letter after the model's own rationale, which is written anew, on the picture as it is
    then, at every `EVERY`-th reading of the loss; at first the clean one."""

    name: ClassVar[str] = "regenerated"
    reasoning_only: ClassVar[bool] = True

    def prepare(self, model: VisionLanguageModel, batch: Batch, clean_answers: Sequence[Answer]) -> Prepared:
        first = tuple(rationale_prefix(model, answer) for answer in clean_answers)
        return _Regenerated(model, batch, first, _Texts(first), tuple(range(len(first))))
