"""What a check says, and the few statistics that the rules are made of."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import binom

from ...core.types import PROBE, Estimate
from ..frames import Condition, Verdicts
from ..intervals import ALPHA, proportion

Status = Literal["pass", "warn", "fail"]
TOLERATED = 0.05
"""Share of questions that may break a rule before the number is not to be believed: the 95% interval must reach it."""

ONE_STEP, BLACK_BOX, CASCADES = ("fgsm", "art:FGM"), ("square", "art:Square"), ("safemed-attack",)
FITTED = ("universal",)
"""Attacks that are made on other questions than they are shown on."""

SHORTEST = ("fab",)
"""Attacks that look for the nearest wrong answer, not for the worst of the ball: they are no test of ascent."""


@dataclass(frozen=True)
class Diagnostic:
    """id: of the check. rule: what must hold. evidence: what was found, with its numbers.

    fail: the number must not be believed. warn: look before it is quoted.
    """

    id: str
    status: Status
    rule: str
    evidence: str


class Contest(NamedTuple):
    """Two attacks on the same questions, one of which must not be the weaker.

    lost: images on which only the other one changed the answer. won: the reverse. An image counts once, whatever
    number of questions share it.
    """

    name: str
    lost: int
    won: int

    @property
    def p(self) -> float:
        """Of at least so many lost if both were equally strong: exact McNemar, one-sided."""
        return float(binom.sf(self.lost - 1, self.lost + self.won, 0.5)) if self.lost else 1.0

    def __str__(self) -> str:
        return f"{self.name}: {self.lost} against {self.won}, p = {self.p:.3g}"


def contest(name: str, strong: pd.Series, weak: pd.Series, verdicts: Verdicts) -> Contest:
    """strong, weak: verdicts under attack, 1.0 right, 0.0 wrong, NaN missing; indexed by question."""
    both = strong.notna() & weak.notna()
    images = pd.Series(verdicts.images, index=verdicts.questions.index)
    net = (strong[both] - weak[both]).groupby(images.reindex(both.index[both])).sum()
    return Contest(name, int((net > 0).sum()), int((net < 0).sum()))


def judged(id: str, rule: str, contests: Iterable[Contest]) -> Diagnostic | None:
    """fail where one contest is lost for certain (Bonferroni over all of them), warn where one is lost in numbers."""
    held = sorted(contests, key=lambda c: (c.p, c.won - c.lost))
    if not held:
        return None
    worst = held[0]
    status: Status = "pass"
    if worst.p * len(held) < ALPHA:
        status = "fail"
    elif any(c.lost > c.won for c in held):
        status = "warn"
    return Diagnostic(id, status, rule, f"{worst} (the worst of {len(held)})")


def share_status(estimate: Estimate) -> Status:
    """Of questions that break a rule: none, some, or for certain more than TOLERATED."""
    if not estimate.value > 0:
        return "pass"
    return "fail" if estimate.low > TOLERATED else "warn"


def share(hits: pd.Series, verdicts: Verdicts) -> Estimate:
    """Of a bool per question, indexed by question, clustered by image."""
    images = pd.Series(verdicts.images, index=verdicts.questions.index)
    codes = images.reindex(hits.index).fillna(-1).to_numpy(dtype=np.intp)
    return proportion(hits.to_numpy(dtype=float), codes)


def half_width(estimate: Estimate) -> float:
    return (estimate.high - estimate.low) / 2


def per_cent(estimate: Estimate) -> str:
    """`3 of 60 (5.0%, 95% interval 1.7 to 13.7)`"""
    count = round(estimate.value * estimate.n)
    return (
        f"{count} of {estimate.n} ({100 * estimate.value:.1f}%, "
        f"95% interval {100 * estimate.low:.1f} to {100 * estimate.high:.1f})"
    )


def attack_name(verdicts: Verdicts, condition: Condition) -> str:
    """The registered name of a condition's attack; what the condition is called where the run does not say."""
    return str(verdicts.attacks.get(condition.name, {}).get("name", condition.kind.removeprefix(PROBE)))


def is_gradient_attack(verdicts: Verdicts, condition: Condition) -> bool:
    """Whether it climbs a gradient of the entry itself on the image at hand, and nothing else: black boxes, cascades
    and images that were made elsewhere have no objective."""
    return condition.is_attack and condition.objective is not None and is_own(verdicts, condition)


def is_own(verdicts: Verdicts, condition: Condition) -> bool:
    """Whether an attack was made against the entry itself and on the image at hand, not another entry or question."""
    return not condition.source and attack_name(verdicts, condition) not in FITTED


def is_iterative(verdicts: Verdicts, condition: Condition) -> bool:
    return is_gradient_attack(verdicts, condition) and attack_name(verdicts, condition) not in (*ONE_STEP, *SHORTEST)


def rows_of(verdicts: Verdicts, condition: str) -> pd.DataFrame:
    """Records of one condition that have a verdict, indexed by question."""
    rows = verdicts.records
    if rows.empty:
        return rows
    return rows[(rows["condition"] == condition) & (rows["error"] == "")].set_index("question_id")


def probes(verdicts: Verdicts) -> tuple[Condition, ...]:
    """The conditions of probes that have records, in the order of these."""
    if verdicts.records.empty:
        return ()
    names = dict.fromkeys(verdicts.records["condition"])
    return tuple(Condition.parse(name) for name in names if name.startswith(PROBE))


def answers(rows: pd.DataFrame, column: str = "answer") -> pd.Series:
    """Option indices, -1 for no answer."""
    return rows[column].astype(float).fillna(-1).astype(int)


BLIND = ("blank", "shuffled")


def same_without_image(verdicts: Verdicts) -> bool:
    """Whether every question has the clean answer, at the same scores, where the image is not shown."""
    if "clean" not in verdicts.correct:
        return False
    clean = rows_of(verdicts, "clean")
    found = False
    for name in BLIND:
        blind = rows_of(verdicts, name) if name in verdicts.correct else clean.iloc[:0]
        both = clean.index.intersection(blind.index)
        if not len(both):
            continue
        found = True
        if (answers(clean.loc[both]) != answers(blind.loc[both])).any():
            return False
        pairs = zip(clean.loc[both, "option_logprobs"], blind.loc[both, "option_logprobs"], strict=True)
        if not all(len(a) == len(b) and np.allclose(a, b, atol=1e-4) for a, b in pairs):
            return False
    return found
