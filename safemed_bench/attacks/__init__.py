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
from ..core.types import Norm

if TYPE_CHECKING:
    from .base import Attack, Objective
    from .cascade import Cascade, Stage
    from .external import External
    from .universal import UniversalAttack

CODE_VERSION = 3
"""Goes into unit keys; raised whenever a change here can change a record."""


@dataclass(frozen=True, slots=True)
class AttackInfo:
    """target: `module:Class`. parameters: what a suite may set, beside the objectives. objectives: whether it takes
    any; a black box and a cascade do not. needs_sigma: of the noise, from the suite or from a smoothed entry. accepts:
    the only objectives it can climb, () for all. norms: of the ball. why: it is limited to these two. queries: of a
    black box, which sees answers and no gradient: how often it asks of a question, unless a suite says otherwise; 0 for
    an attack that climbs."""

    target: str
    summary: str
    parameters: tuple[str, ...] = ()
    objectives: bool = True
    needs_sigma: bool = False
    accepts: tuple[str, ...] = ()
    norms: tuple[Norm, ...] = ("linf", "l2", "l1")
    why: str = ""
    queries: int = 0


@dataclass(frozen=True, slots=True)
class ObjectiveInfo:
    """reasoning_only: needs a model that writes a rationale. standard: part of `objectives: all`. weak_on_reasoning:
    known to overstate the robustness of such a model; `objectives: strong` leaves it out there."""

    target: str
    summary: str
    reasoning_only: bool = False
    standard: bool = True
    weak_on_reasoning: bool = False


_PGD = ("steps", "restarts", "random_start", "active_set", "step_size", "rel_step", "keep")
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
    "mim": AttackInfo(
        "safemed_bench.attacks.mim:MIM",
        "ascent along accumulated gradients (Dong, 1710.06081)",
        ("steps", "restarts", "random_start", "active_set", "decay", "rel_step"),
    ),
    "apgd": AttackInfo(
        "safemed_bench.attacks.apgd:APGD",
        "Auto-PGD (Croce & Hein, 2003.01690; L1: 2103.01208): momentum, a step that halves where it stalls",
        ("steps", "restarts", "random_start", "active_set"),
    ),
    "fab": AttackInfo(
        "safemed_bench.attacks.fab:FAB",
        "the shortest way to a wrong answer (Croce & Hein, 1907.02044): its length is in the record's extra",
        ("steps",),
        accepts=("margin", "decision_slot"),
        norms=("linf", "l2"),
        why="it needs a margin, whose zero is the boundary, and steps that fill the ball",
    ),
    "square": AttackInfo(
        "safemed_bench.attacks.square:Square",
        "random search on option scores or verdicts, no gradient (Andriushchenko, 1912.00049)",
        ("queries", "feedback", "share"),
        objectives=False,
        queries=500,
    ),
    "safemed-attack": AttackInfo(
        "safemed_bench.attacks.cascade:SafeMedAttack",
        "the standard: FGSM, PGD on all objectives, APGD on a margin and targeted, Square, each on what still stands",
        ("steps", "apgd_steps", "queries"),
        objectives=False,
    ),
    "universal": AttackInfo(
        "safemed_bench.attacks.universal:UniversalAttack",
        "one perturbation per modality (1610.08401), fitted on questions of another split, shown on all that are asked",
        ("steps", "questions", "split"),
    ),
    "external": AttackInfo(
        "safemed_bench.attacks.external:External",
        "images made elsewhere, by question id: a folder of pictures or .npz files; audited, then shown to the entry",
        ("path",),
        objectives=False,
        queries=1,
    ),
}


def _art(name: str, summary: str, *parameters: str, objectives: bool = True) -> AttackInfo:
    return AttackInfo(
        f"safemed_bench.attacks.art:{name}",
        f"{summary} of the Adversarial Robustness Toolbox, one question per call",
        parameters,
        objectives,
        accepts=("answer", "margin") if objectives else (),
        norms=("linf", "l2"),
        why=(
            "ART climbs a function of a classifier's logits, which are the options' scores at the answer position; in "
            "the L1 ball its steps and projection are approximate and its Square does nothing"
        ),
        queries=0 if objectives else 500,
    )


ATTACKS |= {
    "art:FGM": _art("FGM", "FastGradientMethod"),
    "art:PGD": _art("PGD", "ProjectedGradientDescent", "steps", "restarts", "random_start", "step_size", "rel_step"),
    "art:MIM": _art("MIM", "MomentumIterativeMethod", "steps", "decay", "rel_step"),
    "art:APGD": _art("APGD", "AutoProjectedGradientDescent", "steps", "restarts"),
    "art:Square": _art("Square", "SquareAttack", "queries", "share", objectives=False),
}
ART_CLASSES = {
    "art:FastGradientMethod": "art:FGM",
    "art:ProjectedGradientDescent": "art:PGD",
    "art:MomentumIterativeMethod": "art:MIM",
    "art:AutoProjectedGradientDescent": "art:APGD",
    "art:SquareAttack": "art:Square",
}
"""ART's own names of its attacks, which mean the same as ours."""

_OBJECTIVES = "safemed_bench.attacks.objectives:"
_TARGETED = "safemed_bench.attacks.targeted:"
_EXPECTED = "safemed_bench.attacks.expected:"
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
    "targeted": ObjectiveInfo(
        _TARGETED + "Targeted", "likelihood of a wrong answer, per restart another one", standard=False
    ),
    "targeted_margin": ObjectiveInfo(
        _TARGETED + "TargetedMargin",
        "a wrong option minus the true one where the answer is decided, per restart another one",
        standard=False,
    ),
    "decisive_slot": ObjectiveInfo(
        "safemed_bench.attacks.decisive:DecisiveSlot",
        "margin between the options at the place of the rationale whose change moves the answer",
        True,
        standard=False,
    ),
    "regenerated": ObjectiveInfo(
        "safemed_bench.attacks.regenerated:Regenerated",
        "cross-entropy of the true letter after a rationale that is written anew every few steps",
        True,
        standard=False,
    ),
    "stop_reasoning": ObjectiveInfo(
        _TARGETED + "StopReasoning", "likelihood of no rationale and a wrong letter (2402.14899)", True, standard=False
    ),
    "expected_rationales": ObjectiveInfo(
        _EXPECTED + "ExpectedRationales", "mean decision-slot margin over sampled rationales", True, standard=False
    ),
    "expected_prompts": ObjectiveInfo(
        _EXPECTED + "ExpectedPrompts",
        "mean decision-slot margin over orders of the options and wordings of the prompt",
        True,
        standard=False,
    ),
    "directed": ObjectiveInfo(
        _TARGETED + "Directed", "the same, from a disease towards `normal` and from normal to a disease", standard=False
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


def attack_name(written: str) -> str:
    """The name an attack is registered by; ART's class names are taken too."""
    return ART_CLASSES.get(written, written)


def accepts(attack: str, objective: str) -> bool:
    """Whether an attack can climb an objective."""
    info = ATTACKS.get(attack)
    return not (info and info.accepts) or objective in info.accepts


def unknown_attack(name: str) -> str:
    """What to say of an attack that there is none of; of one of ART's, why it is not offered."""
    if not name.startswith("art:"):
        return f"unknown attack '{name}'.{did_you_mean(name, [*registry.attacks])}"
    theirs = [known for known in (*ATTACKS, *ART_CLASSES) if known.startswith("art:")]
    why = "only attacks that were checked to keep each image with its question are offered"
    if name.removeprefix("art:") in ("AutoAttack", "AA"):
        why = "ART's AutoAttack reorders its batch and would pair images with the wrong question"
        return f"unknown attack '{name}': {why}. Use safemed-attack, or art:APGD and art:Square."
    return f"unknown attack '{name}': {why}.{did_you_mean(name, theirs)}"


def needs_objective(attack: str) -> bool:
    """Whether an attack maximises an objective that is named beside it: not if it is a black box, or a cascade that
    brings its own. Raises UsageError for an unknown name."""
    info = ATTACKS.get(attack)
    return info.objectives if info else bool(getattr(registry.attacks.get(attack), "needs_objective", True))


def black_box(attack: str) -> bool:
    """Whether an attack asks for answers alone: neither for a gradient nor for what is inside the model."""
    info = ATTACKS.get(attack)
    return info.queries > 0 if info else not needs_objective(attack)


def fitted_on(attack: str, parameters: Mapping[str, Any]) -> tuple[str, int] | None:
    """Split, and questions of each modality, that an attack is fitted on before it is shown any question; None for all
    that look at each question by itself."""
    if attack != "universal":
        return None
    return str(parameters.get("split", "validation")), int(parameters.get("questions", 25))


def build_attack(
    name: str, parameters: Mapping[str, Any] | None = None
) -> Attack | Cascade | External | UniversalAttack:
    """An attack or a cascade from its registered name and parameters. Raises UsageError where one is wrong."""
    kind = registry.attacks.get(attack_name(name))
    parameters = dict(parameters or {})
    known = tuple(getattr(kind, "__dataclass_fields__", parameters))
    for key in parameters:
        if key not in known:
            raise UsageError(f"attack '{name}' has no parameter '{key}'.{did_you_mean(key, known)}")
    return kind(**parameters)


def build_strike(
    attack: str, objective: str, parameters: Mapping[str, Any] | None = None
) -> Stage | Cascade | External:
    """What a cell does: an attack with its objective ("" for a black box), a cascade, or images made elsewhere; all are
    called alike. Raises UsageError for an attack that is fitted on other questions first."""
    from .base import Attack
    from .cascade import Stage
    from .universal import UniversalAttack

    built = build_attack(attack, parameters)
    if isinstance(built, UniversalAttack):
        raise UsageError(f"attack '{attack}' is fitted on other questions first: see universal.fit_universal")
    return Stage(built, objective) if isinstance(built, Attack) else built


def build_objective(name: str) -> Objective:
    """An objective from its registered name. Raises UsageError for an unknown one."""
    return registry.objectives.get(name)()
