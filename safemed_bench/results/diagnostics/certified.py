"""Certified accuracy is a floor: what an attack does to an entry whose answers are proven."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd
from scipy.stats import binom

from ..frames import Condition, Verdicts
from .base import Diagnostic, Status

SLACK = 1e-9
"""Sizes of balls read from labels are equal up to this."""


class Meeting(NamedTuple):
    """An L2 attack on a smoothed entry and a certificate whose ball holds the attack's, on the questions of both.

    proven: certified with the right answer. changed: proven, and yet answered with another option under attack.
    mute: proven, and no answer at all under attack; smoothed entries abstain near the end of their radius.
    limit: so many `changed` may be chance, as a certificate is wrong with probability alpha (99.9%).
    """

    attack: str
    radius: float
    n: int
    empirical: float
    certified: float
    proven: int
    changed: int
    mute: int
    limit: int

    def __str__(self) -> str:
        return (
            f"{self.attack}: accuracy {self.empirical:.3f}, certified at L2 {self.radius:g} {self.certified:.3f}, "
            f"n = {self.n}; of {self.proven} proven answers {self.changed} changed, {self.mute} abstained"
        )


def certified_below_empirical(verdicts: Verdicts) -> Diagnostic | None:
    """A smoothed entry under an L2 attack against its own certificates."""
    meetings = list(_meetings(verdicts))
    if not meetings:
        return None
    worst = max(meetings, key=lambda m: (m.changed - m.limit, m.changed, m.certified - m.empirical))
    status: Status = "pass"
    if worst.changed > worst.limit:
        status = "fail"
    elif any(m.changed or m.empirical < m.certified for m in meetings):
        status = "warn"
    return Diagnostic(
        "certified-below-empirical",
        status,
        "under an L2 attack of radius R a smoothed entry is never less accurate than it is certified to be at R or "
        "beyond, on the same questions; a proven answer that an attack changed disproves the certificate",
        f"{worst}" + (f" (the closest of {len(meetings)} comparisons)" if len(meetings) > 1 else ""),
    )


def _meetings(verdicts: Verdicts) -> Iterator[Meeting]:
    """Every L2 attack with every certificate at its radius, or at the next one beyond it."""
    if not verdicts.smooth or verdicts.certificates.empty:
        return
    attacks = [c for c in verdicts.conditions if c.is_attack and c.norm == "l2" and c.kind != "worst" and c.objective]
    for condition in verdicts.conditions:
        rows = verdicts.certificates[verdicts.certificates["condition"] == condition.name].set_index("question_id")
        radii = sorted({decision[0] for decisions in rows["decisions"] for decision in decisions or ()})
        for attack in attacks:
            beyond = [radius for radius in radii if radius >= attack.eps - SLACK]
            if beyond:
                alpha = float(verdicts.certifiers.get(condition.name, {}).get("alpha", 0.001))
                yield _meeting(verdicts, attack, rows, beyond[0], alpha)


def _meeting(verdicts: Verdicts, attack: Condition, rows: pd.DataFrame, radius: float, alpha: float) -> Meeting:
    correct = verdicts.correct[attack.name].dropna()
    both = correct.index.intersection(rows.index)
    right, status, rows = correct[both] == 1, verdicts.status[attack.name][both], rows.loc[both]
    at_radius = rows["decisions"].map(lambda ds: any(r == radius and word == "certified" for r, word, _ in ds or ()))
    proven = at_radius & (rows["candidate"] == rows["target"])
    mute = proven & ~right & (status == "abstain")
    count = int(proven.sum())
    return Meeting(
        attack=attack.name,
        radius=radius,
        n=len(both),
        empirical=float(right.mean()) if len(both) else 0.0,
        certified=float(proven.mean()) if len(both) else 0.0,
        proven=count,
        changed=int((proven & ~right & ~mute).sum()),
        mute=int(mute.sum()),
        limit=int(binom.ppf(0.999, count, 2 * alpha)) if count else 0,
    )
