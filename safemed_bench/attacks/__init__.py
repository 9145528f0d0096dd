"""Attacks and objectives: the catalogue, readable without torch.

An objective says what is maximised, an attack says how; every pair works. The classes are imported when they are
first asked for. Others add theirs with `core.registry.attacks.register` and `core.registry.objectives.register`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..core import registry
from ..core.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from .base import Attack, Objective

CODE_VERSION = 1
"""Goes into unit keys; raised whenever a change here can change a record."""


@dataclass(frozen=True, slots=True)
class AttackInfo:
    """target: `module:Class`. parameters: what a suite may set, beside the objectives. needs_sigma: of the noise, from
    the suite or from a smoothed entry."""

    target: str
    summary: str
    parameters: tuple[str, ...] = ()
    needs_sigma: bool = False


@dataclass(frozen=True, slots=True)
class ObjectiveInfo:
    """reasoning_only: needs a model that writes a rationale. standard: part of `objectives: all`. weak_on_reasoning:
    known to overstate the robustness of such a model; `objectives: strong` leaves it out there."""

    target: str
    summary: str
    reasoning_only: bool = False
    standard: bool = True
    weak_on_reasoning: bool = False


_PGD = ("steps", "restarts", "step_size", "rel_step", "random_start", "keep", "active_set")
ATTACKS: dict[str, AttackInfo] = {
    "fgsm": AttackInfo("safemed_bench.attacks.fgsm:FGSM", "one step of length eps (Goodfellow, 1412.6572)"),
    "pgd": AttackInfo(
        "safemed_bench.attacks.pgd:PGD",
        "projected gradient ascent (Madry, 1706.06083) with an active set and verified early stopping",
        _PGD,
    ),
    "smoothadv": AttackInfo(
        "safemed_bench.attacks.smoothadv:SmoothAdv",
        "PGD on the smoothed model: mean probability over noisy copies (Salman, 1906.04584)",
        (*_PGD, "draws", "sigma"),
        needs_sigma=True,
    ),
    "eot": AttackInfo(
        "safemed_bench.attacks.smoothadv:EOT",
        "PGD on the expected loss of a randomised model (Athalye, 1707.07397)",
        (*_PGD, "draws", "sigma"),
    ),
}

_OBJECTIVES = "safemed_bench.attacks.objectives:"
OBJECTIVES: dict[str, ObjectiveInfo] = {
    "answer": ObjectiveInfo(
        _OBJECTIVES + "AnswerToken",
        "cross-entropy of the true letter; weak after a rationale, which leaks it",
        weak_on_reasoning=True,
    ),
    "rationale_answer": ObjectiveInfo(
        _OBJECTIVES + "RationaleAnswer", "likelihood of the whole clean reply, rationale and answer", True
    ),
    "decision_slot": ObjectiveInfo(
        _OBJECTIVES + "DecisionSlot", "margin between the options where the rationale first tells them apart", True
    ),
    "no_think": ObjectiveInfo(
        _OBJECTIVES + "NoThink",
        "cross-entropy of the true letter after an empty rationale",
        True,
        weak_on_reasoning=True,
    ),
    "margin": ObjectiveInfo(
        _OBJECTIVES + "Margin", "best other option minus the true one at the answer position", standard=False
    ),
}

for _name, _attack in ATTACKS.items():
    registry.attacks.lazy(_name, _attack.target)
for _name, _objective in OBJECTIVES.items():
    registry.objectives.lazy(_name, _objective.target)


def standard_objectives(reasons: bool, *, strong: bool = False) -> tuple[str, ...]:
    """What `objectives: all`, or `strong`, means for an entry that reasons, or does not; in the catalogue's order."""
    standard = {n: i for n, i in OBJECTIVES.items() if i.standard and (reasons or not i.reasoning_only)}
    return tuple(n for n, info in standard.items() if not (strong and reasons and info.weak_on_reasoning))


def applies(objective: str, reasons: bool) -> bool:
    """Whether an objective can be used on an entry. Raises UsageError for an unknown name."""
    info = OBJECTIVES.get(objective)
    only = info.reasoning_only if info else bool(registry.objectives.get(objective).reasoning_only)
    return reasons or not only


def build_attack(name: str, parameters: Mapping[str, Any] | None = None) -> Attack:
    """An attack from its registered name and parameters. Raises UsageError where one is wrong."""
    kind = registry.attacks.get(name)
    parameters = dict(parameters or {})
    known = tuple(getattr(kind, "__dataclass_fields__", parameters))
    for key in parameters:
        if key not in known:
            raise UsageError(f"attack '{name}' has no parameter '{key}'.{did_you_mean(key, known)}")
    return kind(**parameters)


def build_objective(name: str) -> Objective:
    """An objective from its registered name. Raises UsageError for an unknown one."""
    return registry.objectives.get(name)()
