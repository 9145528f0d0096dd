"""Attacks held against each other: an attack that a weaker one beats overstates robustness."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import pandas as pd
from scipy.stats import binom

from ..frames import Condition, Verdicts
from ..intervals import ALPHA
from .base import (
    BLACK_BOX,
    BLIND,
    CASCADES,
    ONE_STEP,
    Contest,
    Diagnostic,
    Status,
    attack_name,
    contest,
    is_gradient_attack,
    is_iterative,
    is_own,
    judged,
    probes,
    rows_of,
)

EFFORT = ("steps", "restarts", "queries")
"""Parameters of which more cannot make an attack weaker."""


def monotone_eps(verdicts: Verdicts) -> Diagnostic | None:
    """Equal attacks in balls of different sizes. One step of FGSM may well overshoot in the larger ball, and what was
    made against another entry or on other questions need not grow with it."""
    own = [c for c in verdicts.conditions if c.is_attack and is_own(verdicts, c)]
    attacks = [c for c in own if attack_name(verdicts, c) not in ONE_STEP]
    return judged(
        "monotone-in-eps",
        "an attack that can do more never does less: at a larger eps it does not leave right what it changes at a "
        "smaller one (McNemar, paired by question, one-sided 5% over all pairs)",
        (
            contest(
                f"{large.name} after {small.threat}",
                verdicts.correct[large.name],
                verdicts.correct[small.name],
                verdicts,
            )
            for small, large in _ordered(attacks)
            if _settings(verdicts, small) == _settings(verdicts, large)
        ),
    )


def _ordered(conditions: list[Condition]) -> Iterator[tuple[Condition, Condition]]:
    """Pairs of one attack, objective and norm, the smaller eps first."""
    for one, two in combinations(conditions, 2):
        if (one.kind, one.objective, one.norm) == (two.kind, two.objective, two.norm) and one.eps != two.eps:
            yield (one, two) if one.eps < two.eps else (two, one)


def _settings(verdicts: Verdicts, condition: Condition, leave: tuple[str, ...] = ()) -> dict[str, Any]:
    return {k: v for k, v in verdicts.attacks.get(condition.name, {}).items() if k not in leave}


def monotone_effort(verdicts: Verdicts) -> Diagnostic | None:
    """The same attack in the same ball with more steps, restarts or queries."""
    contests = []
    own = [c for c in verdicts.conditions if c.name in verdicts.attacks and is_own(verdicts, c)]
    for one, two in combinations(own, 2):
        if (one.objective, one.threat) != (two.objective, two.threat):
            continue
        if _settings(verdicts, one, EFFORT) != _settings(verdicts, two, EFFORT):
            continue
        less, more = (one, two) if _effort(verdicts, one) <= _effort(verdicts, two) else (two, one)
        pairs = list(zip(_effort(verdicts, less), _effort(verdicts, more), strict=True))
        if any(a < b for a, b in pairs) and all(a <= b for a, b in pairs):
            right = verdicts.correct
            contests.append(contest(f"{more.name} after {less.kind}", right[more.name], right[less.name], verdicts))
    return judged(
        "monotone-in-effort",
        "with more steps, restarts or queries an attack does not leave right what it changes with fewer (McNemar, "
        "paired by question, one-sided 5% over all pairs)",
        contests,
    )


def _effort(verdicts: Verdicts, condition: Condition) -> tuple[float, ...]:
    settings = verdicts.attacks[condition.name]
    return tuple(float(settings.get(name, 1 if name == "restarts" else 0)) for name in EFFORT)


def iterative_against_fgsm(verdicts: Verdicts) -> Diagnostic | None:
    """Many small steps against one large one, towards the same objective in the same ball."""
    one_step = [c for c in verdicts.conditions if c.is_attack and attack_name(verdicts, c) in ONE_STEP]
    return judged(
        "iterative-not-weaker-than-fgsm",
        "an iterative attack does not leave right what one step towards the same objective changes (McNemar, paired by "
        "question, one-sided 5% over all pairs); otherwise its steps are lost or its gradient is of no use",
        (
            contest(f"{many.name} after fgsm", verdicts.correct[many.name], verdicts.correct[one.name], verdicts)
            for one in one_step
            for many in verdicts.conditions
            if is_iterative(verdicts, many) and (many.objective, many.threat) == (one.objective, one.threat)
        ),
    )


def white_box_against_black(verdicts: Verdicts) -> Diagnostic | None:
    """All gradient attacks together against whatever needs no gradient, in the same ball."""
    contests = []
    for threat in dict.fromkeys(c.threat for c in verdicts.conditions if c.threat):
        here = [c for c in verdicts.conditions if c.threat == threat]
        white = [c.name for c in here if is_gradient_attack(verdicts, c)]
        best = verdicts.correct[white].min(axis=1, skipna=False) if white else None
        for condition in here:
            if best is not None and _needs_no_gradient(verdicts, condition):
                name = f"gradient attacks after {condition.name}"
                contests.append(contest(name, best, verdicts.correct[condition.name], verdicts))
            elif condition.is_attack and attack_name(verdicts, condition) in CASCADES:
                contests.append(_stages(verdicts, condition))
    return judged(
        "white-box-not-weaker",
        "attacks that know the gradient, together, do not leave right what random noise, Square, a transferred image "
        "or a universal perturbation changes in the same ball (McNemar, paired by question, one-sided 5% over all "
        "pairs; of a cascade: what its black box alone changed against what its gradient stages did); otherwise the "
        "gradient is masked",
        contests,
    )


def _needs_no_gradient(verdicts: Verdicts, condition: Condition) -> bool:
    if condition.kind == "noise" or attack_name(verdicts, condition) in BLACK_BOX:
        return True
    return condition.is_attack and not is_own(verdicts, condition)


def _stages(verdicts: Verdicts, condition: Condition) -> Contest:
    """Questions that stood until the black box came, against those that a gradient changed before."""
    stages = rows_of(verdicts, condition.name)["stage"].dropna().map(lambda label: label.partition("[")[0])
    black = int(stages.isin(BLACK_BOX).sum())
    return Contest(f"gradient stages of {condition.name}, before its black box", black, len(stages) - black)


def unbounded_reaches_floor(verdicts: Verdicts) -> Diagnostic | None:
    """With the whole box to paint in, an attack can at least hide the picture."""
    found: dict[str, pd.DataFrame] = {}
    for condition in probes(verdicts):
        rows = rows_of(verdicts, condition.name)
        if condition.threat and condition.eps > 0 and is_iterative(verdicts, condition) and not rows.empty:
            found[condition.name] = rows
    if not found:
        return None
    stands = pd.DataFrame({name: rows["correct"] for name, rows in found.items()}).dropna()
    floor = _floor(verdicts, stands.index)
    worst = _above(int(stands.min(axis=1).sum()), len(stands), floor)
    single = {name: _above(int(stands[name].sum()), len(stands), floor) for name in found}
    weak = [name for name, p in single.items() if p * len(single) < ALPHA]
    status: Status = "fail" if worst < ALPHA else "warn" if weak else "pass"
    return Diagnostic(
        "unbounded-reaches-floor",
        status,
        "with no bound on the perturbation the iterative attacks together leave no more right than is answered without "
        "the image or by chance (binomial, one-sided 5%); a single one that does is a warning",
        f"{100 * stands.min(axis=1).mean():.1f}% right, floor {100 * floor:.1f}%, n = {len(stands)}, p = {worst:.3g}"
        + (f"; on its own above it: {', '.join(map(str, weak))}" if weak and status == "warn" else ""),
    )


def _floor(verdicts: Verdicts, index: pd.Index) -> float:
    """The higher of chance and blind accuracy on these questions."""
    options = verdicts.questions["n_options"].reindex(index).astype(float)
    blind = [verdicts.correct[name].reindex(index).mean() for name in BLIND if name in verdicts.correct]
    return max([float((1 / options).mean()), *(float(value) for value in blind if value == value)])


def _above(right: int, n: int, floor: float) -> float:
    """p value of so many right answers if the floor were true."""
    return float(binom.sf(right - 1, n, min(floor, 1.0))) if right else 1.0
