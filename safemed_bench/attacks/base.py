"""The frame of every attack: what an objective and an attack are, and what an attack gives.

An attack sees only a `Pursuit`: the loss, its gradient and the verdict of the deployed path, as functions of a
perturbation. It knows no model and no text. An objective knows no attack (DESIGN, section 3).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor, nn

from ..core.seeds import derive_seed
from ..core.types import ATTACK_DRAWS, Answer, ThreatModel
from ..models.base import Batch, VisionLanguageModel
from .pursuit import Prepared, Pursuit, Reading
from .threat import norms, project


class Objective(ABC):
    """What an attack maximises. `prepare` is given questions that the model answers rightly, and these answers."""

    name: ClassVar[str]
    reasoning_only: ClassVar[bool] = False

    @abstractmethod
    def prepare(self, model: VisionLanguageModel, batch: Batch, clean_answers: Sequence[Answer]) -> Prepared: ...


class NoObjective(Objective):
    """What a black-box attack is given. Raises ValueError where it is asked for a loss after all."""

    name: ClassVar[str] = ""

    def prepare(self, model: VisionLanguageModel, batch: Batch, clean_answers: Sequence[Answer]) -> Prepared:
        return _NoLoss()


class _NoLoss(Prepared):
    def __call__(self, pixels: Tensor) -> Reading:
        raise ValueError("this attack needs an objective")

    def select(self, rows: Tensor) -> Prepared:
        return self


@dataclass(frozen=True)
class AttackResult:
    """What an attack gave for a batch of B questions; all tensors are on the CPU.

    adversarial: (B, 3, H, W) uint8, inside the ball; the clean canvas where nothing was attacked.
    attacked: (B,) bool, answered rightly on the clean image. success: (B,) bool, attacked and then answered wrongly
    by the deployed path on `adversarial`. answers: that path's answer on `adversarial`, the clean one if not
    attacked. steps: (B,) gradient steps. loss_trace: (B, T) loss of each iterate over all restarts, NaN where there
    was none. forwards, backwards: (B,) passes through the objective. verdicts: (B,) calls of the deployed path.
    linf, l2: (B,) float64 norms of the 8-bit perturbation, [0, 1] pixel scale.
    start_loss: (B,) loss of the first iterate. final_loss: (B,) loss of the iterate behind `adversarial`. NaN if
    not attacked. dead_gradients: (B,) steps whose gradient was all zero or not finite.
    extra: per question, the objective's notes, the attack's, and `suspected`, the first iterate that the surrogate held
    for wrong.
    problems: per question, why there is no verdict on it, "" for none; () where nothing can be wrong.
    """

    adversarial: Tensor
    attacked: Tensor
    success: Tensor
    answers: tuple[Answer, ...]
    steps: Tensor
    loss_trace: Tensor
    forwards: Tensor
    backwards: Tensor
    verdicts: Tensor
    linf: Tensor
    l2: Tensor
    start_loss: Tensor
    final_loss: Tensor
    dead_gradients: Tensor
    extra: tuple[dict[str, Any], ...]
    problems: tuple[str, ...] = ()

    def trace(self, index: int) -> tuple[float, ...]:
        """The losses of one question, without the gaps."""
        row = self.loss_trace[index]
        return tuple(row[~row.isnan()].tolist())


class Maximum(NamedTuple):
    """delta: (B, 3, H, W) perturbation, on the device of the pixels. dead: (B,) steps without a usable gradient."""

    delta: Tensor
    dead: Tensor


class Attack(ABC):
    """How an objective is maximised inside a threat model. A subclass writes one hook, `perturb`.

    needs_objective: False for a black-box attack; its cells have no objective in their name.
    """

    name: ClassVar[str]
    needs_objective: ClassVar[bool] = True

    @abstractmethod
    def perturb(self, pursuit: Pursuit) -> None:
        """Climb: `read` losses and gradients, `keep` candidates, `verify` or `settle` them, all through
        `pursuit`."""

    def surrogate(
        self, prepared: Prepared, model: VisionLanguageModel, generators: Sequence[torch.Generator]
    ) -> Prepared:
        """What is climbed in place of the objective; itself unless the attack knows better."""
        return prepared

    @final
    def __call__(
        self,
        model: VisionLanguageModel,
        batch: Batch,
        objective: Objective,
        threat: ThreatModel,
        *,
        generators: Sequence[torch.Generator],
        clean_answers: Sequence[Answer],
    ) -> AttackResult:
        """Attack the questions that are answered rightly; the others come back as they are, with 0 steps.

        generators: one CPU generator per question, so that a draw does not depend on the batch. clean_answers: the
        deployed path on the clean canvas. The model's parameters are frozen meanwhile.
        """
        if not len(batch) == len(generators) == len(clean_answers):
            raise ValueError(f"{len(batch)} questions, {len(generators)} generators, {len(clean_answers)} answers")
        right = [a.index == q.answer for a, q in zip(clean_answers, batch.questions, strict=True)]
        places = [i for i, is_right in enumerate(right) if is_right]
        if not places:
            return _gather(batch, clean_answers, places, None, ())
        chosen, answers = batch.select(places), [clean_answers[i] for i in places]

        def verdict(rows: Tensor, images: Tensor) -> list[Answer]:
            return deployed_verdict(model, chosen.select(rows), images.float() / 255)

        with climbing(model):
            prepared = self.surrogate(objective.prepare(model, chosen, answers), model, [generators[i] for i in places])
            pursuit = Pursuit(
                prepared,
                chosen.pixels,
                chosen.canvas,
                threat,
                [generators[i] for i in places],
                verdict,
                [q.answer for q in chosen.questions],
                costly=model.decode == "generate" or getattr(model, "randomised", False),
            )
            self.perturb(pursuit)
        return _gather(batch, clean_answers, places, pursuit, prepared.extra)

    @final
    def maximise(
        self, prepared: Prepared, clean: Tensor, threat: ThreatModel, generators: Sequence[torch.Generator]
    ) -> Maximum:
        """The best (B, 3, H, W) float perturbation, without verdicts and without the 8-bit grid.

        The inner maximisation of adversarial training; every sample takes all steps. `clean` is float in [0, 1].
        """
        canvas = (clean * 255).round().to(torch.uint8)
        pursuit = Pursuit(prepared, clean, canvas, threat, generators)
        self.perturb(pursuit)
        return Maximum(project(threat, pursuit.peak_delta, clean), pursuit.dead)


def deployed_verdict(model: VisionLanguageModel, batch: Batch, pixels: Tensor) -> list[Answer]:
    """The deployed path; of a randomised model wrong only where `ATTACK_DRAWS` draws all are, so that no attack ends
    with the first lucky one."""
    answers = model.answer(batch, pixels, generator=_own_stream(0))
    for number in range(1, ATTACK_DRAWS if getattr(model, "randomised", False) else 1):
        wrong = [i for i, q in enumerate(batch.questions) if answers[i].index != q.answer]
        if not wrong:
            break
        again = model.answer(batch.select(wrong), pixels[wrong], generator=_own_stream(number))
        for i, answer in zip(wrong, again, strict=True):
            answers[i] = answer if answer.index == batch.questions[i].answer else answers[i]
    return answers


def _own_stream(number: int) -> torch.Generator:
    """Of a randomised model's draws the attack sees other ones than the deployed path's and the judge's."""
    return torch.Generator().manual_seed(derive_seed("attack verdict", number))


@contextmanager
def frozen(model: VisionLanguageModel) -> Iterator[None]:
    """No parameter of the model asks for a gradient inside; each gets its own setting back at the end."""
    modules = [owner for owner in _owners(model) if isinstance(owner, nn.Module)]
    parameters = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(True)


@contextmanager
def climbing(model: VisionLanguageModel) -> Iterator[None]:
    """`frozen`, and every model that has a cheaper pass for an attack's steps may take it (`climbing` of models)."""
    with frozen(model), ExitStack() as stack:
        for owner in _owners(model):
            if callable(own := getattr(owner, "climbing", None)):
                stack.enter_context(own())
        yield


def _owners(model: object) -> Iterator[object]:
    """The model, what it holds, and the same of the entry that a smoothed one stands on."""
    held = getattr(model, "__dict__", {})
    yield from (model, *held.values())
    if "base" in held:
        yield from _owners(held["base"])


def _gather(
    batch: Batch,
    clean_answers: Sequence[Answer],
    places: Sequence[int],
    pursuit: Pursuit | None,
    notes: Sequence[dict[str, Any]],
) -> AttackResult:
    """The attacked rows' outcome, put back among the questions that were left alone."""
    count, canvas, at = len(batch), batch.canvas.cpu(), torch.tensor(places, dtype=torch.long)

    def spread(values: Tensor | None, empty: float, like: torch.dtype) -> Tensor:
        shape = (count, *values.shape[1:]) if values is not None else (count,)
        full = torch.full(shape, empty, dtype=like)
        if values is not None:
            full[at] = values.to("cpu", like)
        return full

    def of(name: str) -> Tensor | None:
        return getattr(pursuit, name) if pursuit else None

    adversarial, answers = canvas.clone(), list(clean_answers)
    extra: list[dict[str, Any]] = [{} for _ in range(count)]
    trace = torch.empty(count, 0)
    if pursuit:
        adversarial[at] = pursuit.images.cpu()
        if pursuit.trace:
            trace = spread(torch.stack(pursuit.trace, dim=1), torch.nan, torch.float32)
        for place, answer, suspected in zip(places, pursuit.answers, pursuit.suspected.tolist(), strict=True):
            moved = not torch.equal(adversarial[place], canvas[place])
            # An image that was not changed has the verdict that it had, bit for bit: eps 0 is clean.
            answers[place] = answer if answer and moved else answers[place]
            extra[place] = {"suspected": suspected} if suspected >= 0 else {}
        for place, note in zip(places, pursuit.notes, strict=True):
            extra[place] |= note
        for place, note in zip(places, notes, strict=False):
            extra[place] |= note
    linf, l2 = norms(canvas, adversarial)
    return AttackResult(
        adversarial=adversarial,
        attacked=spread(torch.ones(len(places)), 0, torch.bool),
        success=spread(of("success"), 0, torch.bool),
        answers=tuple(answers),
        steps=spread(of("backwards"), 0, torch.long),
        loss_trace=trace,
        forwards=spread(of("forwards"), 0, torch.long),
        backwards=spread(of("backwards"), 0, torch.long),
        verdicts=spread(of("verdicts"), 0, torch.long),
        linf=linf,
        l2=l2,
        start_loss=spread(of("start_loss"), torch.nan, torch.float32),
        final_loss=spread(of("final_loss"), torch.nan, torch.float32),
        dead_gradients=spread(of("dead"), 0, torch.long),
        extra=tuple(extra),
    )
