"""What the conditions of a suite are for each entry: every attack with every objective at every eps, one by one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from ..attacks import CODE_VERSION as ATTACK_VERSION
from ..attacks import accepts, applies, fitted_on, needs_objective, standard_objectives
from ..certify import CODE_VERSION as CERTIFY_VERSION
from ..core.types import PROBE, Question, ThreatModel
from ..corruptions import CODE_VERSION as CORRUPTION_VERSION
from ..corruptions import chosen
from .schema import ConditionSpec, ModelSpec, Suite

if TYPE_CHECKING:
    from ..models.card import ModelCard

Kind = Literal["clean", "blank", "shuffled", "noise", "attack", "certify", "corruption", "repeat", "gradient"]


CODE_VERSIONS: Mapping[str, int] = {
    "canvas": 1,
    "verdict": 1,
    "blank": 1,
    "shuffled": 1,
    "noise": 1,
    "attack": ATTACK_VERSION,
    "safemed-attack": 2,
    "certify": CERTIFY_VERSION,
    "corruption": CORRUPTION_VERSION,
    "repeat": 1,
    "gradient": 2,
    "smooth": 3,
}
"""Versions of the code behind a record. Raise one whenever a change to that part can change a record; an attack that
changes alone has its own."""


@dataclass(frozen=True, slots=True)
class Condition:
    """What is done to the image before a question is asked; `name` is how tables and records call it.

    attack, objective, params, threat: for kind "attack" (and threat for "noise"); params are sorted by name. objective
    is "" where the attack takes none: a black box, a cascade. source: the entry that the attack is made against, where
    that is not the one which is shown the images.
    corruption, severity, modalities: for kind "corruption"; what it does to whose pictures, () is every modality.
    certifier, params: for kind "certify". per_modality: at most so many of the suite's questions; None is all.
    share: such a part of each modality's questions, for the probes of the diagnostics (probes.py).
    """

    kind: Kind
    name: str
    attack: str = ""
    objective: str = ""
    params: tuple[tuple[str, Any], ...] = ()
    threat: ThreatModel | None = None
    certifier: str = ""
    per_modality: int | None = None
    share: float | None = None
    source: str = ""
    corruption: str = ""
    severity: int = 0
    modalities: tuple[str, ...] = ()

    @property
    def versions(self) -> tuple[int, ...]:
        parts = ("canvas", "verdict", self.kind, self.attack)
        return tuple(CODE_VERSIONS[part] for part in parts if part in CODE_VERSIONS)


def conditions_for(
    suite: Suite,
    card: ModelCard,
    notes: list[str] | None = None,
    model: ModelSpec | None = None,
    others: Mapping[str, ModelCard] | None = None,
) -> Iterator[Condition]:
    """The suite's conditions for one entry, in the suite's order; what does not apply to it goes into `notes`.

    others: name -> card of the entries whose adversarial images it may be shown.
    """
    for spec in suite.conditions:
        if not spec.is_for(card.name, model is not None and model.smooth is not None):
            continue
        if spec.kind == "certify":
            yield _certificate(spec, model)
        elif spec.kind == "noise":
            for threat in suite.threat.models:
                yield Condition("noise", f"noise@{threat.label}", threat=threat)
        elif spec.kind == "corruption":
            yield from corruptions_of(spec)
        elif spec.kind == "attack":
            yield from _attacks(suite, spec, card, notes if notes is not None else [], others or {})
        else:
            yield Condition(spec.kind, spec.label)


def _certificate(spec: ConditionSpec, model: ModelSpec | None) -> Condition:
    """A smoothed entry brings its own sigma; the suite's checks have seen to it that there is one."""
    smooth = model.smooth if model else None
    parameters = ({"sigma": smooth.sigma} if smooth else {}) | spec.parameters
    name = spec.certificate_label(parameters.get("sigma", 0))
    params = tuple(sorted(parameters.items()))
    return Condition("certify", name, params=params, certifier=spec.certify or "", per_modality=spec.per_modality)


def corruptions_of(spec: ConditionSpec) -> Iterator[Condition]:
    for name, modalities in chosen(spec.corruption or ()).items():
        for severity in sorted(spec.severities):
            label = f"corruption[{name}]@{severity}"
            yield Condition("corruption", label, corruption=name, severity=severity, modalities=modalities)


def _attacks(
    suite: Suite, spec: ConditionSpec, card: ModelCard, notes: list[str], others: Mapping[str, ModelCard]
) -> Iterator[Condition]:
    if spec.transfer:
        if spec.transfer not in others:
            notes.append(f"{card.name} goes without {spec.label}: {spec.transfer} is not among the entries of this run")
            return
        card = others[spec.transfer]  # which objectives there are is decided by the entry that is attacked
    objectives: tuple[str, ...]
    if not needs_objective(spec.attack or ""):
        objectives = ("",)
    elif isinstance(spec.objectives, str):
        standard = standard_objectives(card.reasons, strong=spec.objectives == "strong")
        objectives = tuple(name for name in standard if accepts(spec.attack or "", name))
        if not objectives:
            notes.append(f"{card.name} is not attacked by {spec.label}: it can climb no {spec.objectives} objective")
        elif left_out := [name for name in standard if name not in objectives]:
            notes.append(f"{spec.label} cannot climb {', '.join(left_out)}: {card.name} is attacked without")
    else:
        objectives = tuple(name for name in spec.objectives if applies(name, card.reasons))
        if left_out := [name for name in spec.objectives if name not in objectives]:
            notes.append(f"{card.name} does not reason: {spec.label} goes without {', '.join(left_out)}")
        if not objectives:
            notes.append(f"{card.name} is not attacked by {spec.label}: no objective of it applies")
    params = tuple(sorted(spec.parameters.items()))
    for threat in suite.threat.models:
        if not spec.at_eps(threat.eps == suite.threat.headline):
            continue
        for objective in objectives:
            bracket = f"[{objective}]" if objective else ""
            name = f"{spec.label}{bracket}@{threat.label}"
            source = spec.transfer or ""
            yield Condition("attack", name, spec.attack or "", objective, params, threat, source=source)


def asked(questions: Sequence[Question], condition: Condition) -> Sequence[Question]:
    """The questions of one condition: all, those of its modalities, or the first of each modality, in the data set's
    order (types are mixed)."""
    if condition.modalities:
        return [question for question in questions if question.modality in condition.modalities]
    if condition.per_modality is None and condition.share is None:
        return questions
    there, seen = Counter(question.modality for question in questions), Counter[str]()
    kept = []
    for question in questions:
        seen[question.modality] += 1
        share = math.ceil((condition.share or 1) * there[question.modality] - 1e-9)
        if seen[question.modality] <= min(share, condition.per_modality or share):
            kept.append(question)
    return kept


def probes_of(suite: Suite, model: ModelSpec, conditions: Sequence[Condition]) -> Iterator[Condition]:
    """What `diagnostics: {level: probe}` asks of an entry beside the suite's conditions, on a part of the questions.

    The deployed path twice (`probe:repeat`), the gradient against finite differences (`probe:gradient`; a smoothed
    entry's attacks climb its base, and a server shows no gradient), and every attack of the headline eps at eps 0 and
    on the whole box.
    """
    if suite.diagnostics.level != "probe":
        return
    share, side = suite.diagnostics.share, model.resolution or suite.data.resolution
    yield Condition("repeat", f"{PROBE}repeat", share=share)
    if model.smooth is None and model.api is None:
        yield Condition("gradient", f"{PROBE}gradient", share=share)
    norm = suite.threat.norm
    unbounded = {"linf": 1.0, "l2": math.sqrt(3) * side, "l1": 3.0 * side * side}[norm]
    # What was not made on the image at hand is no test of the attack on it.
    attacks = [c for c in conditions if c.kind == "attack" and not c.source and not fitted_on(c.attack, dict(c.params))]
    headline = [c for c in attacks if c.threat and c.threat.eps == suite.threat.headline]
    for eps in (0.0, unbounded):
        threat = ThreatModel(norm, eps)
        for condition in headline:
            name = f"{PROBE}{condition.name.partition('@')[0]}@{threat.label}"
            yield replace(condition, name=name, threat=threat, share=share)
