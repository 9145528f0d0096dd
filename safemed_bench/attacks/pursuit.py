"""What an attack sees: loss, gradient and verdict as functions of a perturbation, with the bookkeeping between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.errors import UsageError
from ..core.types import Answer, ThreatModel
from .threat import quantize


class Reading(NamedTuple):
    """What an objective says of (B, 3, H, W) pixels, from one forward pass.

    loss: (B,) to be maximised, differentiable. suspects: (B,) bool, where the surrogate holds a wrong answer
    possible; only these are worth a verdict of the deployed path.
    """

    loss: Tensor
    suspects: Tensor


class Prepared(ABC):
    """An objective tied to a batch: the clean rationale is tokenised, slots are found, and so on.

    extra: one dict per question with what the record should tell.
    """

    extra: tuple[dict[str, Any], ...] = ()

    @abstractmethod
    def __call__(self, pixels: Tensor) -> Reading: ...

    @abstractmethod
    def select(self, rows: Tensor) -> Prepared:
        """The same for the questions at `rows` (long)."""

    def turn(self, restart: int) -> Prepared:
        """What restart `restart` (from 0) maximises: itself, unless each aims at something else. Of all questions."""
        return self


class Scored(Prepared):
    """An objective that is a function of the options' scores alone, as a classifier's loss is of its logits."""

    @abstractmethod
    def scores(self, pixels: Tensor) -> Tensor:
        """(B, K) differentiable, -inf where there is no option."""

    @abstractmethod
    def loss_of(self, scores: Tensor, targets: Tensor) -> Tensor:
        """(B,) of (B, K) scores and (B,) true options."""


Score = Callable[[Answer, int], float]
"""What a black box sees of an answer, given the true option; higher is worse for the model."""

Verdict = Callable[[Tensor, Tensor], list[Answer]]
"""(rows, uint8 images of these rows) to the answers of the deployed path."""


class Pursuit:
    """One attack on one batch: counts passes, keeps each question's best iterate, remembers verified successes.

    `rows` are always positions in the batch (long, on the pixels' device) and `delta` the perturbations of these
    rows. `targets` are the true options; `costly` says that a verdict costs as much as a few steps. Without a
    verdict (the trainer's inner maximisation) nothing ever counts as a success. `notes` is what an attack has to tell
    of each question, for its record.
    """

    def __init__(
        self,
        objective: Prepared,
        clean: Tensor,
        canvas: Tensor,
        threat: ThreatModel,
        generators: Sequence[torch.Generator],
        verdict: Verdict | None = None,
        targets: Sequence[int] = (),
        *,
        costly: bool = False,
    ) -> None:
        self.clean, self.canvas, self.threat = clean, canvas, threat
        self.generators, self.costly = tuple(generators), costly
        self._objective, self._verdict, self.targets = objective, verdict, tuple(targets)
        self._active: tuple[Tensor, Prepared] = (self.rows(), objective)
        self._turns, self._restart = objective, -1
        count, on = len(clean), clean.device
        self.success = torch.zeros(count, dtype=torch.bool, device=on)
        self.answers: list[Answer | None] = [None] * count
        self.images = canvas.clone()
        self.final_loss = torch.full((count,), -torch.inf, device=on)
        self.start_loss = torch.full((count,), torch.nan, device=on)
        self.best_loss = torch.full((count,), -torch.inf, device=on)
        self.best_delta = torch.zeros_like(clean)
        self.peak_delta = torch.zeros_like(clean)
        self.trace: list[Tensor] = []
        zeros = torch.zeros(4, count, dtype=torch.long, device=on)
        self.forwards, self.backwards, self.verdicts, self.dead = zeros.unbind()
        self.suspected = torch.full((count,), -1, dtype=torch.long, device=on)
        self.notes: list[dict[str, Any]] = [{} for _ in range(count)]

    @property
    def judged(self) -> bool:
        return self._verdict is not None

    def rows(self) -> Tensor:
        """All rows."""
        return torch.arange(len(self.clean), device=self.clean.device)

    def survivors(self) -> Tensor:
        """Rows without a verified success."""
        return (~self.success).nonzero().flatten()

    def begin(self, rows: Tensor) -> None:
        """A new restart: forget the best iterate of the last one, and aim anew."""
        self._restart += 1
        self._objective = self._turns.turn(self._restart)
        self._active = (self.rows(), self._objective)
        self.best_loss[rows] = -torch.inf
        self.best_delta[rows] = 0.0

    def read(self, rows: Tensor, delta: Tensor, *, gradient: bool = True) -> tuple[Reading, Tensor]:
        """Loss and suspects (detached) at `delta` and the loss gradient (else zeros), from one forward pass.

        A loss that does not depend on the picture (a text-only entry's) has a dead gradient, not an error.
        """
        pixels = (self.clean[rows] + delta).detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):  # whatever the caller has set
            loss, suspects = self._at(rows)(pixels)
            alive = gradient and loss.requires_grad
            slope = torch.autograd.grad(loss.sum(), pixels)[0] if alive else torch.zeros_like(delta)
        if gradient:
            slope = self._repaired(rows, slope)
        reading = Reading(loss.detach().float(), suspects.detach())
        self._note(rows, reading, gradient)
        return reading, slope

    def scored(self, rows: Tensor) -> Scored:
        """The objective of `rows`, for an attack that brings its own loop and `spend`s what it takes."""
        prepared = self._objective.select(rows)
        if not isinstance(prepared, Scored):
            raise UsageError("this attack climbs the options' scores: its objective must be answer or margin")
        return prepared

    def spend(self, row: int, *, forwards: int = 0, backwards: int = 0) -> None:
        """Count passes that were not made by `read`."""
        self.forwards[row] += forwards
        self.backwards[row] += backwards

    def _at(self, rows: Tensor) -> Prepared:
        held, prepared = self._active
        if not torch.equal(held, rows):
            prepared = self._objective.select(rows)
            self._active = (rows, prepared)
        return prepared

    def _repaired(self, rows: Tensor, slope: Tensor) -> Tensor:
        """A gradient that is not finite becomes zero, is counted, and moves nothing."""
        largest = slope.flatten(1).abs().amax(dim=1)  # NaN where any value is
        finite = largest.isfinite()
        self.dead[rows] += (~finite | (largest == 0)).long()
        return slope if finite.all() else torch.where(finite.view(-1, 1, 1, 1), slope, 0.0)

    def _note(self, rows: Tensor, reading: Reading, gradient: bool) -> None:
        self.start_loss[rows] = torch.where(self.forwards[rows] == 0, reading.loss, self.start_loss[rows])
        self.forwards[rows] += 1
        self.backwards[rows] += int(gradient)
        column = torch.full_like(self.start_loss, torch.nan)
        column[rows] = reading.loss
        first = reading.suspects & (self.suspected[rows] < 0)
        self.suspected[rows] = torch.where(first, len(self.trace), self.suspected[rows])
        self.trace.append(column)

    def unsuspected(self, rows: Tensor) -> Tensor:
        """(rows,) bool: verdicts are costly and the surrogate has held no iterate of the row for wrong.

        The highest of its losses then says little of where a rationale that is written anew goes wrong: of 64 questions
        each to two entries that reason, PGD on the answer token fooled 6 by the last iterate and 3 by the best.
        """
        return (self.suspected[rows] < 0) & (self.costly and self.judged)

    def keep(self, rows: Tensor, delta: Tensor, loss: Tensor, *, always: bool | Tensor = False) -> None:
        """Hold `delta` as the rows' candidate where its loss beats the candidate's, or always (bool, or (rows,))."""
        better = (loss > self.best_loss[rows]) | always
        self.best_loss[rows[better]] = loss[better]
        self.best_delta[rows[better]] = delta[better]

    def verify(self, rows: Tensor, delta: Tensor, loss: Tensor) -> None:
        """The deployed path's verdict on the 8-bit images of `delta`.

        A wrong answer is a success and settles the row for good. Otherwise the image becomes the row's result if
        its loss is above that of the result so far.
        """
        open_rows = ~self.success[rows]
        rows, delta, loss = rows[open_rows], delta[open_rows], loss[open_rows]
        if self._verdict is None or not len(rows):
            return
        self._judge(rows, *self._ask(rows, delta), loss)

    def query(self, rows: Tensor, delta: Tensor, score: Score) -> Tensor:
        """Black box: (rows,) score of the deployed path's answers on the 8-bit images of `delta`, rows that still
        stand. Remembers what `verify` does. Raises ValueError where there is no deployed path to ask.
        """
        images, answers = self._ask(rows, delta)
        scores = [score(answer, self.targets[row]) for answer, row in zip(answers, rows.tolist(), strict=True)]
        loss = torch.tensor(scores, dtype=self.final_loss.dtype, device=rows.device)
        self.start_loss[rows] = torch.where(self.verdicts[rows] == 1, loss, self.start_loss[rows])
        self._judge(rows, images, answers, loss)
        return loss

    def _ask(self, rows: Tensor, delta: Tensor) -> tuple[Tensor, list[Answer]]:
        if self._verdict is None:
            raise ValueError("a black-box attack needs the deployed path's answers; it cannot train a model")
        images = quantize(self.threat, self.canvas[rows], self.clean[rows] + delta)
        self.verdicts[rows] += 1
        return images, self._verdict(rows, images)

    def _judge(self, rows: Tensor, images: Tensor, answers: Sequence[Answer], loss: Tensor) -> None:
        for place, row in enumerate(rows.tolist()):
            fooled = answers[place].index != self.targets[row]
            if fooled or self.answers[row] is None or loss[place] > self.final_loss[row]:
                self.answers[row], self.images[row] = answers[place], images[place]
                self.final_loss[row], self.success[row] = loss[place], fooled

    def settle(self, rows: Tensor) -> None:
        """The end of a restart: verdict on the rows' candidates; without one, the best so far is held."""
        if self.judged:
            return self.verify(rows, self.best_delta[rows], self.best_loss[rows])
        higher = rows[self.best_loss[rows] > self.final_loss[rows]]
        self.final_loss[higher], self.peak_delta[higher] = self.best_loss[higher], self.best_delta[higher]
