"""Adversarial images that were made elsewhere: audited, then shown to the entry as any image of ours is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator

from ..core.errors import DataError, UsageError
from ..core.types import Answer, ThreatModel
from ..models.base import Batch, VisionLanguageModel
from .audit import audit
from .base import AttackResult
from .given import judged
from .supplied import Supplied, open_supplied


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
        return judged(model, batch, images, clean_answers, problems=problems)


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
