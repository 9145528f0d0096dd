"""Adversarial images that were made elsewhere: audited, then shown to the entry as any image of ours is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from ..core.errors import DataError, UsageError
from ..core.types import Answer, ThreatModel
from ..models.base import Batch, VisionLanguageModel
from .audit import audit
from .base import AttackResult, deployed_verdict, frozen
from .supplied import Supplied, open_supplied
from .threat import norms


@dataclass(frozen=True)
class External:
    """Looks nothing for itself: path is a folder or .npz of 8-bit images on the suite's canvas (see `supplied`).

    Every image is checked against the threat model, whoever made it: one that leaves the ball, or has another shape
    than the canvas, is an error record, and so is a missing one, unless the question is answered wrongly anyway.
    """

    name: ClassVar[str] = "external"
    needs_objective: ClassVar[bool] = False

    path: str = ""

    def __post_init__(self) -> None:
        if not self.path:
            raise UsageError(f"attack '{self.name}' needs `path`: a folder of pictures, or an .npz file")

    def __call__(
        self,
        model: VisionLanguageModel,
        batch: Batch,
        threat: ThreatModel,
        *,
        generators: Sequence[Generator],
        clean_answers: Sequence[Answer],
    ) -> AttackResult:
        """See Attack.__call__."""
        supplied, canvas = open_supplied(self.path), batch.canvas.cpu()
        right = [a.index == q.answer for a, q in zip(clean_answers, batch.questions, strict=True)]
        images = canvas.clone()
        problems: list[str] = []
        for i, (question, needed) in enumerate(zip(batch.questions, right, strict=True)):
            image, problem = _taken(supplied, question.id, canvas[i].numpy(), threat, needed=needed)
            images[i] = torch.from_numpy(image)
            problems.append(problem)
        ask = [i for i, told in enumerate(problems) if right[i] and not told and not torch.equal(images[i], canvas[i])]
        answers = list(clean_answers)
        if ask:
            shown = images[ask].to(batch.canvas.device).float() / 255
            with frozen(model):
                found = deployed_verdict(model, batch.select(ask), shown)
            for i, answer in zip(ask, found, strict=True):
                answers[i] = answer
        attacked = torch.tensor([ok and not told for ok, told in zip(right, problems, strict=True)])
        wrong = torch.tensor([a.index != q.answer for a, q in zip(answers, batch.questions, strict=True)])
        asked = torch.zeros(len(batch), dtype=torch.long).index_fill(0, torch.tensor(ask, dtype=torch.long), 1)
        return _result(canvas, images, attacked, wrong, asked, answers, problems)


def _taken(
    supplied: Supplied, question_id: str, canvas: NDArray[np.uint8], threat: ThreatModel, *, needed: bool
) -> tuple[NDArray[np.uint8], str]:
    """The image of one question and what is wrong with it; the canvas where there is none."""
    if question_id not in supplied and not needed:
        return canvas, ""
    try:
        image = supplied.image(question_id, canvas)
    except DataError as error:
        return canvas, str(error)
    return image, audit(threat, canvas, image)


def _result(
    canvas: Tensor,
    images: Tensor,
    attacked: Tensor,
    wrong: Tensor,
    asked: Tensor,
    answers: Sequence[Answer],
    problems: Sequence[str],
) -> AttackResult:
    none, unknown = torch.zeros_like(asked), torch.full((len(asked),), torch.nan)
    linf, l2 = norms(canvas, images)
    return AttackResult(
        adversarial=images,
        attacked=attacked,
        success=attacked & wrong,
        answers=tuple(answers),
        steps=none,
        loss_trace=torch.empty(len(asked), 0),
        forwards=none,
        backwards=none,
        verdicts=asked,
        linf=linf,
        l2=l2,
        start_loss=unknown,
        final_loss=unknown,
        dead_gradients=none,
        extra=({},) * len(asked),
        problems=tuple(problems),
    )
