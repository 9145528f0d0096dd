"""One perturbation for all questions of a modality (Moosavi-Dezfooli et al., 1610.08401), fitted on some questions and
shown on others.

Fitted by ascent on the mean loss of the questions that still stand (Shafahi et al., 1811.11304, section 3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from ..core.errors import UsageError
from ..core.types import Answer, ThreatModel
from ..models.base import Batch, VisionLanguageModel
from .base import AttackResult, Objective, Prepared, climbing
from .climb import require_count
from .given import judged
from .threat import ascent, project, quantize

AT_ONCE = 8
"""Questions in one pass of the fit. Not the run's batch size: sums over other batches are rounded otherwise."""

InBatches = Callable[[Sequence[int], Callable[[Sequence[int]], None]], None]
"""(places, work): `work` on consecutive runs of `places`, in their order."""


def in_eights(places: Sequence[int], work: Callable[[Sequence[int]], None]) -> None:
    for start in range(0, len(places), AT_ONCE):
        work(places[start : start + AT_ONCE])


@dataclass(frozen=True)
class UniversalAttack:
    """How a universal perturbation is fitted.

    steps: of 2.5 eps / steps each, from no perturbation. questions: of each modality that it is fitted on. split: whose
    questions these are; never those that it is shown on.
    """

    name: ClassVar[str] = "universal"

    steps: int = 50
    questions: int = 25
    split: Literal["validation", "train"] = "validation"

    def __post_init__(self) -> None:
        for name in ("steps", "questions"):
            require_count(self.name, name, getattr(self, name))
        if self.split not in ("validation", "train"):
            raise UsageError(f"attack '{self.name}': split must be validation or train, not {self.split!r}")


@dataclass(frozen=True)
class Universal:
    """Perturbations by modality, each (3, H, W) on the [0, 1] pixel scale, inside the ball of `threat`.

    fitted: on how many questions each was.
    """

    threat: ThreatModel
    deltas: Mapping[str, Tensor]
    fitted: Mapping[str, int] = field(default_factory=dict)

    def images(self, batch: Batch) -> Tensor:
        """(B, 3, H, W) uint8: the questions' images, each with its modality's perturbation, inside ball and box.

        An image of a modality that nothing was fitted for is the clean canvas.
        """
        none = torch.zeros_like(batch.pixels[:1])[0]
        delta = torch.stack([self.deltas.get(q.modality, none).to(none) for q in batch.questions])
        pixels = batch.pixels
        return quantize(self.threat, batch.canvas, pixels + project(self.threat, delta, pixels))

    def __call__(
        self,
        model: VisionLanguageModel,
        batch: Batch,
        threat: ThreatModel,
        *,
        generators: Sequence[Generator],
        clean_answers: Sequence[Answer],
    ) -> AttackResult:
        """See Attack.__call__: every question is shown its modality's perturbation. `threat` is that of the fit."""
        if threat != self.threat:
            raise ValueError(f"fitted for {self.threat.label}, shown under {threat.label}")
        images = self.images(batch).cpu()
        for i, (question, answer) in enumerate(zip(batch.questions, clean_answers, strict=True)):
            if answer.index != question.answer:  # wrong already, and left alone as by every attack
                images[i] = batch.canvas[i].cpu()
        notes = [{"fitted_on": self.fitted.get(q.modality, 0)} for q in batch.questions]
        return judged(model, batch, images, clean_answers, extra=notes)


def fit_universal(
    model: VisionLanguageModel,
    batch: Batch,
    clean_answers: Sequence[Answer],
    objective: Objective,
    threat: ThreatModel,
    *,
    steps: int = 50,
    in_batches: InBatches = in_eights,
) -> Universal:
    """Fits one perturbation to each modality of `batch`, on the questions that are answered rightly.

    clean_answers: the deployed path on the clean canvas. steps: of 2.5 eps / steps each, from no perturbation, each on
    the slope of the whole modality, summed over `in_batches`.
    """
    right = [i for i, (q, a) in enumerate(zip(batch.questions, clean_answers, strict=True)) if a.index == q.answer]
    groups: dict[str, list[int]] = {}
    for i in right:
        groups.setdefault(batch.questions[i].modality, []).append(i)
    deltas = {}
    with climbing(model):
        for modality, rows in groups.items():
            part = batch.select(rows)
            prepared = objective.prepare(model, part, [clean_answers[i] for i in rows])
            deltas[modality] = _ascend(prepared, part.pixels, threat, steps, in_batches)
    return Universal(threat, deltas, {modality: len(rows) for modality, rows in groups.items()})


def _ascend(prepared: Prepared, clean: Tensor, threat: ThreatModel, steps: int, in_batches: InBatches) -> Tensor:
    """The (3, H, W) iterate that leaves the fewest standing, by the surrogate; of equals, that of the highest loss."""
    # The box is another one for every image; no value can move further than from one end of it to the other.
    ball = replace(threat, bounds=(-0.5, 1.5))
    nowhere = torch.full_like(clean[:1], 0.5)
    delta, best, reached = torch.zeros_like(clean[:1]), torch.zeros_like(clean[:1]), (-1.0, -math.inf)
    for step in range(steps + 1):
        found, slope = _slope(prepared, clean, project(threat, delta.expand_as(clean), clean), in_batches)
        if found > reached:
            best, reached = delta, found
        if step < steps:
            move = 2.5 * threat.eps / steps * ascent(ball, slope, nowhere + delta)
            delta = project(ball, delta + move, nowhere)
    return best[0]


def _slope(
    prepared: Prepared, clean: Tensor, delta: Tensor, in_batches: InBatches
) -> tuple[tuple[float, float], Tensor]:
    """(share fooled, mean loss) by the surrogate at clean + delta, and the (1, 3, H, W) slope of what stands.

    Where nothing stands any more, of all.
    """
    losses, fooled = list[Tensor](), list[Tensor]()
    slopes = {standing: torch.zeros_like(clean[:1]) for standing in (True, False)}

    def work(places: Sequence[int]) -> None:
        rows = torch.tensor(places, device=clean.device)
        pixels = (clean[rows] + delta[rows]).requires_grad_()
        with torch.enable_grad():
            loss, suspects = prepared.select(rows)(pixels)
            # a text-only entry's loss does not depend on the picture: nothing is found then
            slope = torch.autograd.grad(loss.sum(), pixels)[0] if loss.requires_grad else torch.zeros_like(pixels)
        losses.append(loss.detach())
        fooled.append(suspects)
        slopes[True].add_(slope[~suspects].sum(dim=0, keepdim=True))
        slopes[False].add_(slope.sum(dim=0, keepdim=True))

    in_batches(range(len(clean)), work)
    share = torch.cat(fooled).float().mean().item()
    return (share, torch.cat(losses).mean().item()), slopes[share < 1]
