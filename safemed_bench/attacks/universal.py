"""One perturbation for all questions of a modality (Moosavi-Dezfooli et al., 1610.08401), fitted on some questions and
shown on others.

Fitted by ascent on the mean loss of the questions that still stand (Shafahi et al., 1811.11304, section 3). Here to be
called from Python; a suite's cells hold one chunk of questions each and cannot fit on others yet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.types import Answer, ThreatModel
from ..models.base import Batch, VisionLanguageModel
from .base import Objective, Prepared, frozen
from .threat import ascent, project, quantize


@dataclass(frozen=True)
class Universal:
    """Perturbations by modality, each (3, H, W) on the [0, 1] pixel scale, inside the ball of `threat`."""

    threat: ThreatModel
    deltas: Mapping[str, Tensor]

    def images(self, batch: Batch) -> Tensor:
        """(B, 3, H, W) uint8: the questions' images, each with its modality's perturbation, inside ball and box.

        An image of a modality that nothing was fitted for is the clean canvas.
        """
        none = torch.zeros_like(batch.pixels[:1])[0]
        delta = torch.stack([self.deltas.get(q.modality, none).to(none) for q in batch.questions])
        pixels = batch.pixels
        return quantize(self.threat, batch.canvas, pixels + project(self.threat, delta, pixels))


def fit_universal(
    model: VisionLanguageModel,
    batch: Batch,
    clean_answers: Sequence[Answer],
    objective: Objective,
    threat: ThreatModel,
    *,
    steps: int = 50,
) -> Universal:
    """Fits one perturbation to each modality of `batch`, on the questions that are answered rightly.

    clean_answers: the deployed path on the clean canvas. steps: of 2.5 eps / steps each, from no perturbation; the
    whole modality is one forward pass.
    """
    right = [i for i, (q, a) in enumerate(zip(batch.questions, clean_answers, strict=True)) if a.index == q.answer]
    groups: dict[str, list[int]] = {}
    for i in right:
        groups.setdefault(batch.questions[i].modality, []).append(i)
    deltas = {}
    with frozen(model):
        for modality, rows in groups.items():
            part = batch.select(rows)
            prepared = objective.prepare(model, part, [clean_answers[i] for i in rows])
            deltas[modality] = _ascend(prepared, part.pixels, threat, steps)
    return Universal(threat, deltas)


def _ascend(prepared: Prepared, clean: Tensor, threat: ThreatModel, steps: int) -> Tensor:
    """The (3, H, W) iterate that leaves the fewest standing, by the surrogate; of equals, that of the highest loss."""
    # The box is another one for every image; no value can move further than from one end of it to the other.
    ball = replace(threat, bounds=(-0.5, 1.5))
    nowhere = torch.full_like(clean[:1], 0.5)
    delta, best, reached = torch.zeros_like(clean[:1]), torch.zeros_like(clean[:1]), (-1.0, -math.inf)
    for step in range(steps + 1):
        pixels = (clean + project(threat, delta.expand_as(clean), clean)).requires_grad_()
        with torch.enable_grad():
            loss, suspects = prepared(pixels)
            standing = loss[~suspects]
            (slopes,) = torch.autograd.grad((standing if len(standing) else loss).mean(), pixels)
        score = (suspects.float().mean().item(), loss.detach().mean().item())
        if score > reached:
            best, reached = delta, score
        if step < steps:
            move = 2.5 * threat.eps / steps * ascent(ball, slopes.sum(dim=0, keepdim=True), nowhere + delta)
            delta = project(ball, delta + move, nowhere)
    return best[0]
