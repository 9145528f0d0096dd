"""The records themselves: complete, allowed, readable, repeatable, and about the image."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ...core.types import PROBE
from ..frames import Condition, Verdicts
from ..intervals import paired_difference
from .base import (
    BLIND,
    Diagnostic,
    Status,
    answers,
    half_width,
    per_cent,
    probes,
    rows_of,
    same_without_image,
    share,
    share_status,
)

SLACK = 1e-9


def coverage(verdicts: Verdicts) -> Diagnostic | None:
    """Questions without a verdict, cell by cell, the probes' cells included."""
    worst: tuple[float, str] | None = None
    lost = planned = 0
    known = [*verdicts.asked, *verdicts.attacks]
    names = [c.name for c in verdicts.conditions] + [c.name for c in probes(verdicts)]
    for name in dict.fromkeys([*names, *(n for n in known if n.startswith(PROBE))]):
        asked = verdicts.asked.get(name, frozenset(verdicts.questions.index))
        rows = rows_of(verdicts, name)
        absent = len(asked) - len(rows)
        lost, planned = lost + absent, planned + len(asked)
        width = half_width(share(rows["correct"].astype(bool), verdicts)) if len(rows) else 0.0
        excess = absent / max(len(asked), 1) - width
        if absent and (worst is None or excess > worst[0]):
            worst = (excess, f"{name}: {absent} of {len(asked)}, interval ±{100 * width:.1f} points")
    if not planned:
        return None
    status: Status = "pass" if worst is None else "fail" if worst[0] > 0 else "warn"
    return Diagnostic(
        "coverage",
        status,
        "every planned question has a verdict in every cell; a failure where those that have none (an error, or "
        "nothing at all) could move a cell's accuracy further than its interval is wide",
        f"{lost} of {planned} without a verdict" + (f"; worst in {worst[1]}" if worst else ""),
    )


def constraint_audit(verdicts: Verdicts) -> Diagnostic | None:
    """The saved images, as they were read back, against the threat model."""
    records = verdicts.records
    saved = records[records["artefact"].fillna("") != ""] if not records.empty else records
    if saved.empty:
        return None
    refused = saved[saved["error"] != ""]
    kept = saved[(saved["error"] == "") & saved["linf"].notna()]
    threats = {name: Condition.parse(name) for name in kept["condition"].unique()}
    eps = kept["condition"].map(lambda name: threats[name].eps).astype(float)
    norm = kept["condition"].map(lambda name: threats[name].norm)
    size = kept["linf"].where(norm == "linf", kept["l2"].where(norm == "l2", 0.0)).astype(float)
    outside = int((size > eps + SLACK).sum())
    broken = len(refused) + outside
    first = f"; {refused.iloc[0]['condition']}: {refused.iloc[0]['error']}" if len(refused) else ""
    return Diagnostic(
        "constraint-audit",
        "fail" if broken else "pass",
        "every saved 8-bit image lies inside ball and box and is the one that was judged",
        f"{broken} of {len(saved)} saved images break it" + first,
    )


def zero_eps(verdicts: Verdicts) -> Diagnostic | None:
    """Attacks that may change nothing."""
    clean = rows_of(verdicts, "clean")
    at_zero = [c.name for c in probes(verdicts) if c.threat and c.eps == 0]
    if not at_zero:
        return None
    every = verdicts.records[verdicts.records["condition"].isin(at_zero)]
    changed = (every["artefact"].fillna("") != "") & (every["error"] != "")
    moved = (every["linf"].astype(float) > 0) | (every["correct"] != every["clean_correct"]).where(
        every["error"] == "", False
    )
    unequal = set(every.loc[changed | moved, "question_id"])
    other: set[str] = set()
    for name in at_zero:
        rows = rows_of(verdicts, name)
        both = rows.index.intersection(clean.index)
        other |= set(both[(answers(rows.loc[both]) != answers(clean.loc[both])).to_numpy()])
    asked = pd.Index(every["question_id"].unique())
    drift = share(pd.Series(asked.isin(other), index=asked), verdicts)
    return Diagnostic(
        "zero-eps-equals-clean",
        "fail" if unequal else share_status(drift),
        "at eps 0 an attack leaves every image bit for bit and every verdict as it was; where the clean cell, measured "
        "in other batches, answers otherwise it is a warning, for more than 5% (95% interval) a failure",
        f"{len(unequal)} of {len(asked)} questions changed by {len(at_zero)} attacks; "
        f"{per_cent(drift)} answered otherwise in the clean cell",
    )


def repeat_run(verdicts: Verdicts) -> Diagnostic | None:
    """The deployed path, asked twice about the same batch."""
    rows = rows_of(verdicts, f"{PROBE}repeat")
    if rows.empty:
        return None
    estimate = share(answers(rows) != answers(rows, "again"), verdicts)
    return Diagnostic(
        "repeat-run",
        share_status(estimate),
        "asked twice about the same image the deployed path gives the same answer; a warning for any question where it "
        "does not, a failure for more than 5% (95% interval): such an entry must be measured as a randomised one",
        f"{per_cent(estimate)} answered otherwise; scores move by up to {rows['spread'].astype(float).max():.3g}",
    )


def readable(verdicts: Verdicts) -> Diagnostic | None:
    """Answers that could not be read count as wrong; here they are held against the accuracy."""
    if "clean" not in verdicts.correct:
        return None
    status = verdicts.status["clean"].dropna()
    if status.empty:
        return None
    unread = share(status.isin(["invalid", "truncated"]), verdicts)
    width = half_width(share(verdicts.correct["clean"].dropna() == 1, verdicts))
    level: Status = "fail" if unread.low > 0.5 else "warn" if unread.value > width else "pass"
    return Diagnostic(
        "readable-answers",
        level,
        "answers on clean images can be read; a warning where those that cannot could move the accuracy further than "
        "its interval is wide, a failure where for certain most cannot: that is a broken output, not a weak model",
        f"{per_cent(unread)} invalid or truncated; interval ±{100 * width:.1f} points",
    )


def image_reliance(verdicts: Verdicts) -> Diagnostic | None:
    """Clean accuracy against that without the image."""
    if "clean" not in verdicts.correct or not (blind := [name for name in BLIND if name in verdicts.correct]):
        return None
    pairs = {name: verdicts.correct[["clean", name]].dropna() for name in blind}
    pairs = {name: both for name, both in pairs.items() if len(both)}
    if not pairs:
        return None
    name, both = max(pairs.items(), key=lambda item: float(item[1].iloc[:, 1].mean()))
    images = pd.Series(verdicts.images, index=verdicts.questions.index).reindex(both.index).to_numpy(dtype=np.intp)
    gain = paired_difference(both["clean"].to_numpy(dtype=float), both[name].to_numpy(dtype=float), images)
    blank = same_without_image(verdicts)
    return Diagnostic(
        "image-reliance",
        "fail" if blank else "warn" if gain.low <= 0 else "pass",
        "clean accuracy is above that without the image (95% interval of the paired difference); a failure where every "
        "answer and score is the same without it: robustness of an entry that does not look means nothing",
        f"gain {100 * gain.value:.1f} points over {name}, 95% interval {100 * gain.low:.1f} to {100 * gain.high:.1f}, "
        f"n = {gain.n}" + ("; answers and scores are all the same" if blank else ""),
    )
