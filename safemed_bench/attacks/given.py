"""Images that nobody looked for against the question at hand: shown as they are, and judged like any other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.types import Answer
from ..models.base import Batch, VisionLanguageModel
from .base import AttackResult, deployed_verdict, frozen
from .threat import norms


def judged(
    model: VisionLanguageModel,
    batch: Batch,
    images: Tensor,
    clean_answers: Sequence[Answer],
    *,
    problems: Sequence[str] = (),
    extra: Sequence[Mapping[str, Any]] = (),
) -> AttackResult:
    """The deployed path's verdicts on `images` (B, 3, H, W) uint8, CPU, one for each question of `batch`.

    Asked only of questions that are answered rightly on the clean canvas, whose image is another one, and with which
    nothing is wrong. problems: why there is no verdict on a question, "" for none. extra: notes for the records.
    """
    canvas, count = batch.canvas.cpu(), len(batch)
    problems = problems or ("",) * count
    right = [a.index == q.answer for a, q in zip(clean_answers, batch.questions, strict=True)]
    ask = [i for i, told in enumerate(problems) if right[i] and not told and not torch.equal(images[i], canvas[i])]
    answers = list(clean_answers)
    if ask:
        shown = images[ask].to(batch.canvas.device).float() / 255
        with frozen(model):
            found = deployed_verdict(model, batch.select(ask), shown)
        for i, answer in zip(ask, found, strict=True):
            answers[i] = answer
    attacked = torch.tensor([ok and not told for ok, told in zip(right, problems, strict=True)], dtype=torch.bool)
    wrong = torch.tensor([a.index != q.answer for a, q in zip(answers, batch.questions, strict=True)], dtype=torch.bool)
    asked = torch.zeros(count, dtype=torch.long).index_fill(0, torch.tensor(ask, dtype=torch.long), 1)
    none, unknown = torch.zeros_like(asked), torch.full((count,), torch.nan)
    linf, l2 = norms(canvas, images)
    return AttackResult(
        adversarial=images,
        attacked=attacked,
        success=attacked & wrong,
        answers=tuple(answers),
        steps=none,
        loss_trace=torch.empty(count, 0),
        forwards=none,
        backwards=none,
        verdicts=asked,
        linf=linf,
        l2=l2,
        start_loss=unknown,
        final_loss=unknown,
        dead_gradients=none,
        extra=tuple(map(dict, extra)) or ({},) * count,
        problems=tuple(problems),
    )
