"""What attacks and probes noted on the way: dead gradients, losses that still rise, successes that did not last."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ...core.types import PROBE
from ..frames import Verdicts
from ..intervals import mean
from .base import (
    TOLERATED,
    Diagnostic,
    Status,
    half_width,
    is_gradient_attack,
    is_iterative,
    per_cent,
    rows_of,
    same_without_image,
    share,
    share_status,
)

MISMATCH = 0.25
"""Relative difference of slope and finite difference that rounding of half-precision passes may cause."""
RISING = 0.1
"""Of all that the loss gained: at a steady pace the last quarter of the steps brings 0.25."""
MOSTLY = 0.5


def dead_gradients(verdicts: Verdicts) -> Diagnostic | None:
    """Questions that stand because no attack had anything to climb."""
    worst: tuple[float, str, Status] | None = None
    dead = steps = 0
    for threat in dict.fromkeys(c.threat for c in verdicts.conditions if is_gradient_attack(verdicts, c)):
        here = [c for c in verdicts.conditions if c.threat == threat and is_gradient_attack(verdicts, c)]
        rows = [r[r["steps"] > 0] for c in here if not (r := rows_of(verdicts, c.name)).empty]
        if not any(len(r) for r in rows):
            continue
        dead += int(sum(r["dead_gradients"].astype(float).sum() for r in rows))
        steps += int(sum(r["steps"].sum() for r in rows))
        untouched = _untouched(rows)
        robust = share(verdicts.correct[[c.name for c in here]].min(axis=1).dropna() == 1, verdicts)
        excess = untouched / max(robust.n, 1) - half_width(robust)
        status: Status = "fail" if excess > 0 else "warn" if untouched else "pass"
        said = f"{untouched} of {robust.n} at {threat}, where the interval is ±{100 * half_width(robust):.1f} points"
        if worst is None or excess > worst[0]:
            worst = (excess, said, status)
    if worst is None:
        return None
    status = worst[2] if worst[2] != "pass" else "warn" if dead > 0.01 * steps else "pass"
    blind = status == "fail" and same_without_image(verdicts)
    return Diagnostic(
        "dead-gradients",
        "warn" if blind else status,
        "questions that stand although in every gradient attack at least half of their gradients were zero or not "
        "finite are fewer than the interval of the robust accuracy allows for; a warning for any of them, for more "
        "than 1% dead gradients, and for an entry that does not use the image",
        f"{worst[1]}; {dead} of {steps} gradients dead",
    )


def _untouched(rows: Sequence[pd.DataFrame]) -> int:
    """Questions right under all these attacks, with half of the gradients dead in each."""
    stood = pd.DataFrame({i: _dead_share(r).where(r["correct"] == 1, 0.0) for i, r in enumerate(rows)})
    return int((stood.min(axis=1) >= MOSTLY).sum())


def _dead_share(rows: pd.DataFrame) -> pd.Series:
    return rows["dead_gradients"].astype(float).fillna(0.0) / rows["steps"].astype(float)


def budget_used(verdicts: Verdicts) -> Diagnostic | None:
    """Whether attacks that failed went as far as they may. (The L1 norm is not among the columns of a record.)"""
    found = []
    for condition in verdicts.conditions:
        if not is_gradient_attack(verdicts, condition) or condition.norm not in ("linf", "l2"):
            continue
        rows = rows_of(verdicts, condition.name)
        rows = rows[(rows["correct"] == 1) & (rows["steps"] > 0)] if not rows.empty else rows
        rows = rows[_dead_share(rows) < MOSTLY] if not rows.empty else rows
        if len(rows) and condition.eps >= 2 / 255:
            estimate = share(rows[condition.norm].astype(float) < condition.eps / 2, verdicts)
            found.append((estimate.low, estimate, condition.name))
    if not found:
        return None
    low, estimate, name = max(found, key=lambda item: item[:1])
    status: Status = "fail" if low > MOSTLY else "warn" if low > TOLERATED else "pass"
    return Diagnostic(
        "budget-used",
        status,
        "attacks that failed although they had gradients used at least half of eps; a warning where more than 5% of "
        "these questions have less (95% interval), a failure where most have: the ball was not searched",
        f"{name}: {per_cent(estimate)} of the questions that stand were moved by less than half of eps",
    )


def convergence(verdicts: Verdicts) -> Diagnostic | None:
    """Whether losses still rise at the end, on questions that stand."""
    found: list[tuple[float, float, int, str]] = []
    for condition in verdicts.conditions:
        if not is_iterative(verdicts, condition):
            continue
        rows = rows_of(verdicts, condition.name)
        rows = rows[(rows["correct"] == 1) & (rows["steps"] >= 4)] if not rows.empty else rows
        restarts = int(verdicts.attacks.get(condition.name, {}).get("restarts", 1))
        late = pd.Series([_late_gain(trace, restarts) for trace in rows["loss_trace"]], index=rows.index).dropna()
        if len(late) >= 2:
            images = pd.Series(verdicts.images, index=verdicts.questions.index).reindex(late.index)
            values: NDArray[np.float64] = np.asarray(late, dtype=np.float64)
            estimate = mean(values, images.to_numpy(dtype=np.intp))
            low = estimate.value if np.isnan(estimate.low) else estimate.low
            found.append((low, estimate.value, len(late), condition.name))
    if not found:
        return None
    low, value, n, name = max(found)
    return Diagnostic(
        "convergence",
        "warn" if low > RISING else "pass",
        f"of what the loss gained on questions that stand, the last quarter of the steps brought no more than "
        f"{RISING:.0%} (95% interval of the mean); otherwise more steps would find more",
        f"{name}: {100 * value:.1f}%, from {100 * low:.1f}% on, n = {n} (the highest of {len(found)})",
    )


def _late_gain(trace: Sequence[float], restarts: int) -> float:
    """Share of the gain, of the best loss so far over the first one, that came in the last quarter of the last restart.

    NaN where nothing was gained.
    """
    best = np.maximum.accumulate(np.asarray(trace[-(len(trace) // restarts) :], dtype=float))
    if len(best) < 5 or not np.isfinite(best).all() or best[-1] <= best[0]:
        return np.nan
    return float((best[-1] - best[(3 * (len(best) - 1)) // 4]) / (best[-1] - best[0]))


def silent_success(verdicts: Verdicts) -> Diagnostic | None:
    """The surrogate was fooled along the way, the deployed path never was."""
    found = []
    for condition in verdicts.conditions:
        if not is_gradient_attack(verdicts, condition):
            continue
        rows = rows_of(verdicts, condition.name)
        rows = rows[rows["suspected"].notna()] if not rows.empty else rows
        if len(rows):
            estimate = share(rows["correct"] == 1, verdicts)
            found.append((estimate.low, estimate, condition))
    if not found:
        return None
    low, estimate, condition = max(found, key=lambda item: item[0])
    status: Status = "pass"
    if low > MOSTLY and not verdicts.reasons:
        status = "fail"
    elif share_status(estimate) == "fail":
        status = "warn"
    return Diagnostic(
        "silent-success",
        status,
        "where the loss said that the answer had changed, the deployed path agrees on all but 5% (95% interval); "
        "disagreement on most is a failure, unless the entry reasons: a rationale may change and keep its answer",
        f"{condition.name}: {per_cent(estimate)} of the questions that looked lost were answered rightly after all",
    )


def unseen_success(verdicts: Verdicts) -> Diagnostic | None:
    """The deployed path was fooled, and the loss never knew."""
    found = []
    for condition in verdicts.conditions:
        if not is_gradient_attack(verdicts, condition):
            continue
        rows = rows_of(verdicts, condition.name)
        rows = rows[(rows["correct"] == 0) & (rows["steps"] > 0)] if not rows.empty else rows
        if len(rows):
            estimate = share(rows["suspected"].isna(), verdicts)
            found.append((estimate.low, estimate, condition))
    if not found:
        return None
    low, estimate, condition = max(found, key=lambda item: item[0])
    status = share_status(estimate)
    if verdicts.reasons:
        status = "warn" if low > MOSTLY else "pass"
    return Diagnostic(
        "unseen-success",
        status,
        "where an attack changed the answer its loss had said so; a warning for any question, a failure for more than "
        "5% (95% interval): such a loss is of another label or another place than the verdict. Of an entry that "
        "reasons, whose rationale may turn the answer, only a warning, if it is most",
        f"{condition.name}: {per_cent(estimate)} of the changed answers were unforeseen",
    )


def finite_difference(verdicts: Verdicts) -> Diagnostic | None:
    """The gradient that attacks climb against what the loss does along it."""
    rows = rows_of(verdicts, f"{PROBE}gradient")
    if rows.empty:
        return None
    estimate = share(rows["mismatch"].astype(float) > MISMATCH, verdicts)
    return Diagnostic(
        "gradient-is-slope",
        share_status(estimate),
        f"the gradient with respect to the image is within {MISMATCH:.0%} of a finite difference at one of three step "
        "sizes; a warning for any question where it is not, a failure where that is more than 5% (95% interval)",
        f"{per_cent(estimate)} off; median difference {100 * rows['mismatch'].astype(float).median():.2g}%, "
        f"{int((rows['slope'].astype(float) == 0).sum())} without a gradient",
    )


def loss_noise(verdicts: Verdicts) -> Diagnostic | None:
    """Whether the same image gives the same loss."""
    rows = rows_of(verdicts, f"{PROBE}gradient")
    if rows.empty:
        return None
    noise, reach = rows["noise"].astype(float), rows["reach"].astype(float)
    estimate = share((noise > 0) & (noise > reach / 2), verdicts)
    return Diagnostic(
        "loss-noise",
        share_status(estimate),
        "between two readings of one image the score moves by less than half of what a step of half a level along the "
        "gradient does; a warning for any question, a failure for more than 5% (95% interval): attacks would climb "
        "noise, and need an expectation over draws",
        f"{per_cent(estimate)} noisy; largest noise {noise.max():.3g}, median reach of a step {reach.median():.3g}",
    )
