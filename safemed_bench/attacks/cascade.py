"""Attacks made of stages: the cheap ones first, each next one on what still stands.

A question's verdict is the worst that any stage found, exactly as if all stages had been run apart and the per-sample
worst been taken (METHOD, Attack 5): every stage starts from the question's own random stream, and one that was never
reached could only have found a second success.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Generator, Tensor

from ..core.types import Answer, ThreatModel
from ..models.base import Batch, VisionLanguageModel
from . import OBJECTIVES, build_objective, standard_objectives
from .apgd import APGD
from .base import Attack, AttackResult, NoObjective
from .climb import require_count
from .fgsm import FGSM
from .pgd import PGD
from .square import Square


@dataclass(frozen=True)
class Stage:
    """An attack and what it maximises: the objective's registered name, "" for a black box."""

    attack: Attack
    objective: str = ""

    @property
    def label(self) -> str:
        """`pgd[answer]`, or `square`."""
        return f"{self.attack.name}[{self.objective}]" if self.objective else self.attack.name

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
        goal = build_objective(self.objective) if self.objective else NoObjective()
        return self.attack(model, batch, goal, threat, generators=generators, clean_answers=clean_answers)


class Cascade(ABC):
    """Stages in order; a subclass names them. Its cells have no objective: it brings its own."""

    name: ClassVar[str]
    needs_objective: ClassVar[bool] = False

    @abstractmethod
    def stages(self, reasons: bool) -> tuple[Stage, ...]:
        """At least one, for a model that reasons or one that does not."""

    @final
    def __call__(
        self,
        model: VisionLanguageModel,
        batch: Batch,
        threat: ThreatModel,
        *,
        generators: Sequence[Generator],
        clean_answers: Sequence[Answer],
    ) -> AttackResult:
        """All stages on the questions that are answered rightly, as one result.

        Passes, steps, verdicts and loss traces are those of all stages; image, answer, norms, final loss and extra are
        those of the stage that succeeded, named in the extra's `stage`, else of the last one.
        """
        states = [generator.get_state() for generator in generators]
        rows, total = torch.arange(len(batch)), None
        for stage in self.stages(model.reasons):
            if total is not None:
                rows = (total.attacked & ~total.success).nonzero().flatten()
                if not len(rows):
                    break
            at = rows.tolist()
            result = stage(
                model,
                batch.select(rows),
                threat,
                generators=[_restored(states[i]) for i in at],
                clean_answers=[clean_answers[i] for i in at],
            )
            result = _signed(result, stage.label)
            total = result if total is None else _joined(total, rows, result)
        if total is None:
            raise ValueError(f"attack '{self.name}' has no stage")
        return total


def _restored(state: Tensor) -> Generator:
    generator = Generator()
    generator.set_state(state)
    return generator


def _signed(result: AttackResult, label: str) -> AttackResult:
    """Successes say which stage they are of."""
    pairs = zip(result.extra, result.success.tolist(), strict=True)
    return replace(result, extra=tuple(({"stage": label} | note) if won else note for note, won in pairs))


ADDED = ("steps", "forwards", "backwards", "verdicts", "dead_gradients")
REPLACED = ("adversarial", "success", "linf", "l2", "final_loss")


def _joined(total: AttackResult, rows: Tensor, later: AttackResult) -> AttackResult:
    """`later` is of the questions at `rows`, which stood until then."""
    values: dict[str, Any] = {}
    for name in ADDED + REPLACED:
        part, whole = getattr(later, name), getattr(total, name).clone()
        whole[rows] = whole[rows] + part if name in ADDED else part
        values[name] = whole
    gaps = torch.full((len(total.success), later.loss_trace.shape[1]), torch.nan)
    gaps[rows] = later.loss_trace
    answers, extra = list(total.answers), list(total.extra)
    for place, row in enumerate(rows.tolist()):
        answers[row], extra[row] = later.answers[place], later.extra[place]
    trace = torch.cat([total.loss_trace, gaps], dim=1)
    return replace(total, **values, loss_trace=trace, answers=tuple(answers), extra=tuple(extra))


@dataclass(frozen=True)
class SafeMedAttack(Cascade):
    """The standard of this benchmark: FGSM, PGD on every standard objective, APGD on a margin, APGD towards each wrong
    option, Square.

    For a model that reasons the margin is that of the decision slot, and PGD also climbs the decisive slot, a rationale
    that is written anew as the picture changes, and a wrong one (METHOD, Attack 3).
    steps: of PGD. apgd_steps: of each APGD restart; the targeted one has three restarts, for up to three wrong options.
    queries: of Square.
    """

    name: ClassVar[str] = "safemed-attack"

    steps: int = 20
    apgd_steps: int = 50
    queries: int = 500

    def __post_init__(self) -> None:
        for name in ("steps", "apgd_steps", "queries"):
            require_count(self.name, name, getattr(self, name))

    def stages(self, reasons: bool) -> tuple[Stage, ...]:
        pgd, apgd = PGD(steps=self.steps), APGD(steps=self.apgd_steps)
        # The strongest first: what it fools the others need not try.
        names = sorted(standard_objectives(reasons), key=lambda name: OBJECTIVES[name].weak_on_reasoning)
        if reasons:
            first = ("decision_slot", "decisive_slot")
            names = [*first, *(name for name in names if name not in first), "targeted", "regenerated"]
        return (
            Stage(FGSM(), names[0]),
            *(Stage(pgd, name) for name in names),
            Stage(apgd, "decision_slot" if reasons else "margin"),
            Stage(replace(apgd, restarts=3), "targeted_margin"),
            Stage(Square(queries=self.queries)),
        )
