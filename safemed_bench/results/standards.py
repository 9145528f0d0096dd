"""What a board demands an entry to be attacked with, at the least; each board states its own (`standard`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from ..attacks import standard_objectives
from ..core.errors import UsageError, did_you_mean
from .frames import Condition
from .protocol import parameters_of, spec_of
from .sources import Measured

PGD, CASCADE = "pgd", "safemed-attack"
STANDARDS = {
    PGD: "PGD on every standard objective alone, weaker than safemed-attack",
    CASCADE: "safemed-attack: FGSM, PGD on every objective, Auto-PGD on a margin and towards each wrong option, Square",
}
STEPS, APGD_STEPS, TARGETS, QUERIES = 20, 50, 3, 500
"""Of PGD, and of each Auto-PGD restart; wrong options that it aims at; of Square. attacks/cascade.py has the same."""

DEFAULTS: Mapping[str, Mapping[str, int]] = {
    "fgsm": {},
    "pgd": {"steps": STEPS, "restarts": 1},
    "apgd": {"steps": APGD_STEPS, "restarts": 1},
    "square": {"queries": QUERIES},
    CASCADE: {"steps": STEPS, "apgd_steps": APGD_STEPS, "queries": QUERIES},
}
"""What of an attack may be raised, and what it is where a suite says nothing; all else stays as it is."""


@dataclass(frozen=True)
class Required:
    """A cell at the headline eps. objective: "" where the attack takes none. least: where more than the default is."""

    attack: str
    objective: str = ""
    least: Mapping[str, int] = field(default_factory=dict)

    def name(self, headline: str | None) -> str:
        return f"{self.attack}{f'[{self.objective}]' if self.objective else ''}@{headline}"


def standard_of(board: Mapping[str, Any]) -> str:
    """The standard of a board; boards that do not say were made when PGD was all that was asked for."""
    return str(board.get("standard", PGD))


def check_standard(name: str) -> str:
    """`name`. Raises UsageError where there is no such standard."""
    if name not in STANDARDS:
        raise UsageError(f"--standard {name}: no such standard.{did_you_mean(name, [*STANDARDS])}")
    return name


def standard_attack(measured: Measured, standard: str) -> list[str]:
    """What is missing for the attack that a board demands. More attacks, steps, restarts or queries are welcome.

    safemed-attack may be one cell of that name, or its stages as cells of their own, which attack every question.
    """
    reasons = _reasons(measured)
    if standard == PGD:
        return [problem for part in _pgd(reasons) for problem in _lacking(part, measured)]
    whole = list(_lacking(Required(CASCADE), measured))
    apart = [problem for part in _stages(reasons) for problem in _lacking(part, measured)]
    if not whole or not apart:
        return []
    there = any(Condition.parse(name).kind == CASCADE for name in measured.conditions)
    return whole if there else apart


def _pgd(reasons: bool) -> list[Required]:
    return [Required("pgd", objective) for objective in standard_objectives(reasons)]


def _stages(reasons: bool) -> list[Required]:
    """The stages of attacks.cascade.SafeMedAttack."""
    decided = "decision_slot" if reasons else "margin"
    return [
        Required("fgsm", "decision_slot" if reasons else "answer"),
        *_pgd(reasons),
        *(Required("pgd", name) for name in ("decisive_slot", "targeted", "regenerated") if reasons),
        Required("apgd", decided),
        Required("apgd", "targeted_margin", {"restarts": TARGETS}),
        Required("square"),
    ]


def _lacking(part: Required, measured: Measured) -> Iterator[str]:
    """Nothing where one cell is what is required; else why the nearest is not."""
    headline = measured.info.get("headline")
    found: list[tuple[str, list[str]]] = []
    for condition in map(Condition.parse, measured.conditions):
        if (condition.threat, condition.objective or "", condition.source) != (headline, part.objective, ""):
            continue
        spec = spec_of(condition, measured.settings)
        if part.attack in (condition.kind, (spec or {}).get("attack")):
            found.append((condition.name, list(_weakened(part, spec))))
    if not found:
        yield f"weaker attack: {part.name(headline)} is missing, which the standard attack has"
    elif all(why for _, why in found):
        yield from (f"weaker attack: {found[0][0]} {why}" for why in found[0][1])


def _weakened(part: Required, spec: Mapping[str, Any] | None) -> Iterator[str]:
    if spec is None or spec.get("attack") != part.attack:
        yield f"is not made by {part.attack}"
        return
    given, usual = parameters_of(spec), DEFAULTS[part.attack]
    for key, default in usual.items():
        least = part.least.get(key, default)
        if (has := int(given.pop(key, default))) < least:
            yield f"has {has} {key}, fewer than {least}"
    for key in given:
        yield f"sets {key}, which the standard attack leaves at its default"


def short_efforts(frame: pd.DataFrame, measured: Measured) -> Iterator[str]:
    """An answer that stood was attacked to the end, whatever the settings say.

    Of the cascade no less than PGD on all its objectives: what Auto-PGD takes in one step is its own affair.
    """
    headline, reasons = measured.info["headline"], _reasons(measured)
    for beginning, least in (("pgd[", STEPS), (f"{CASCADE}@", STEPS * len(_pgd(reasons)))):
        mine = frame["condition"].str.startswith(beginning) & frame["condition"].str.endswith(f"@{headline}")
        stood = frame[mine & (frame["correct"] == 1)]
        if few := int((stood["steps"].fillna(0) < least).sum()):
            yield f"weaker attack: {few:,} answers stood after fewer than {least} steps"


def _reasons(measured: Measured) -> bool:
    return any(c.get("name") == measured.model and c.get("reasons") for c in measured.info.get("models", ()))
