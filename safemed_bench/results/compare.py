"""Two measurements side by side, question by question: difference, interval, exact McNemar, Holm across slices.

A difference is B - A. Its interval is clustered by image (intervals.paired_difference). McNemar's exact test counts the
questions that turned either way and takes them as independent; where images are shared, read it beside the interval.
Holm's adjustment spans the slices (all, and each modality) of one model under one condition.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests

from ..core.errors import DataError, UsageError, did_you_mean
from ..core.types import Estimate
from .frames import Verdicts, modality_order
from .intervals import Codes, Floats, paired_difference
from .protocol import Difference, differences
from .sources import Measured, pick

ALL = "all"


@dataclass(frozen=True)
class Pair:
    """Two measured models that compare. `waived`: in what they differ all the same, because that was allowed."""

    a: Measured
    b: Measured
    waived: tuple[Difference, ...] = ()

    @property
    def label(self) -> str:
        return self.a.model if self.a.model == self.b.model else f"{self.a.model} = {self.b.model}"


@dataclass(frozen=True)
class Slice:
    """The questions of one slice that both sides have a verdict for; arrays have one entry per question, 1 is good.

    planned: questions of the slice, of which some may lack a verdict on either side.
    """

    name: str
    a: Floats
    b: Floats
    images: Codes
    planned: int


@dataclass(frozen=True, slots=True)
class Row:
    """a, b: accuracies in [0, 1] over the n paired questions. lost, gained: questions that turned wrong, and right.

    difference: b - a with its 95% interval. p: exact McNemar. p_holm: adjusted across the slices of this model and
    condition. missing: planned questions without a verdict on both sides.
    """

    model: str
    condition: str
    slice: str
    a: float
    b: float
    difference: Estimate
    lost: int
    gained: int
    p: float
    p_holm: float
    missing: int

    def to_dict(self) -> dict[str, Any]:
        row = asdict(self)
        difference = row.pop("difference")
        return row | {"difference": difference["value"], **{k: difference[k] for k in ("low", "high", "n", "method")}}


def pair_up(
    a: Mapping[str, Measured],
    b: Mapping[str, Measured],
    wanted: Sequence[str] = (),
    allow: Collection[str] = (),
    names: tuple[str, str] = ("A", "B"),
) -> list[Pair]:
    """The models that are compared: those of `wanted` (`m` or `m=n`), else all of one name.

    Raises UsageError where a name is not there or no name is shared, DataError where a pair does not compare; `allow`
    names checks (protocol.OWN) that may differ. `names`: what the sides are called in messages.
    """
    one, two = names
    chosen = [pick((a, b), word, names) for word in wanted] or [(name, name) for name in a if name in b]
    if not chosen:
        raise UsageError(
            f"no model is in both: {', '.join(a)} in {one}, {', '.join(b)} in {two}. Say which two with --model"
        )
    pairs, refused = [], []
    for left, right in chosen:
        found = differences(a[left].protocol, b[right].protocol, names)
        pair = Pair(a[left], b[right], tuple(d for d in found if d.check in allow))
        pairs.append(pair)
        refused += [f"{pair.label}: {d}" for d in found if d.check not in allow]
    if refused:
        lines = "\n  ".join(dict.fromkeys(refused))
        raise DataError(f"{one} and {two} do not compare:\n  {lines}")
    return pairs


def slices(a: Verdicts, b: Verdicts, condition: str, *, status: str = "") -> list[Slice]:
    """`all`, then each modality. Good is a right answer or, where `status` is given, one that is not of that status."""
    good = [_good(v, condition, status) for v in (a, b)]
    return paired(a, good[0].reindex(good[0].index.union(good[1].index, sort=False)), good[1])


def paired(verdicts: Verdicts, a: pd.Series, b: pd.Series) -> list[Slice]:
    """The slices of the questions that `a` is about; a, b: by question id 1.0 good, 0.0 not, NaN unknown."""
    chosen = verdicts.questions.index.isin(a.index)
    questions, images = verdicts.questions[chosen], verdicts.images[chosen]
    index = questions.index
    sides = [side.reindex(index).to_numpy(dtype=float) for side in (a, b)]
    modality = questions["modality"].to_numpy(dtype=object)
    known = ~np.isnan(sides[0]) & ~np.isnan(sides[1])

    def part(name: str, rows: np.ndarray) -> Slice:
        kept = rows & known
        return Slice(name, sides[0][kept], sides[1][kept], images[kept], int(rows.sum()))

    every = part(ALL, np.ones(len(index), dtype=bool))
    return [every, *(part(name, modality == name) for name in modality_order(questions["modality"].dropna()))]


def _good(verdicts: Verdicts, condition: str, status: str) -> pd.Series:
    """Of the questions that the condition asks."""
    correct = verdicts.correct[condition]
    if asked := verdicts.asked.get(condition):
        correct = correct[correct.index.isin(list(asked))]
    if not status:
        return correct
    return (verdicts.status[condition].reindex(correct.index) != status).astype(float).where(correct.notna())


def compare(pairs: Sequence[Pair], conditions: Sequence[str] = ()) -> Iterator[Row]:
    """Every condition (of those named) that both sides have, in A's order, on every slice with a paired question.

    Raises UsageError for a named condition that no pair has.
    """
    shared = [(pair, [c for c in pair.a.conditions if c in pair.b.conditions]) for pair in pairs]
    known = list(dict.fromkeys(c for _, found in shared for c in found))
    for name in conditions:
        if name not in known:
            raise UsageError(f"--condition {name}: not measured on both sides.{did_you_mean(name, known)}")
    for pair, found in shared:
        for condition in found:
            if condition in (conditions or found):
                yield from _rows(pair, condition)


def _rows(pair: Pair, condition: str) -> list[Row]:
    parts = [s for s in slices(pair.a.verdicts, pair.b.verdicts, condition) if len(s.a)]
    found = [_mcnemar(s.a, s.b) for s in parts]
    adjusted = holm([p for _, _, p in found])
    return [
        Row(
            pair.label,
            condition,
            s.name,
            float(s.a.mean()),
            float(s.b.mean()),
            paired_difference(s.b, s.a, s.images),
            lost,
            gained,
            p,
            q,
            s.planned - len(s.a),
        )
        for s, (lost, gained, p), q in zip(parts, found, adjusted, strict=True)
    ]


def _mcnemar(a: Floats, b: Floats) -> tuple[int, int, float]:
    lost, gained = int(np.sum(a > b)), int(np.sum(b > a))
    return lost, gained, float(mcnemar([[0, lost], [gained, 0]], exact=True).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """p values adjusted for each other (Holm 1979); [] for none."""
    if not len(values):
        return []
    gc.freeze()  # statsmodels collects garbage at every call, 0.2 s where pandas is loaded; frozen objects cost nothing
    try:
        return [float(q) for q in multipletests(values, method="holm")[1]]
    finally:
        gc.unfreeze()


def unmatched(
    a: Mapping[str, Measured], b: Mapping[str, Measured], pairs: Sequence[Pair], names: tuple[str, str] = ("A", "B")
) -> list[str]:
    """What stays out of the comparison, in words."""
    notes = []
    for name, side, used in zip(names, (a, b), ({p.a.model for p in pairs}, {p.b.model for p in pairs}), strict=True):
        if left_out := [m for m in side if m not in used]:
            notes.append(f"not compared: {', '.join(left_out)} of {name}")
    for pair in pairs:
        for name, mine, other in zip(names, (pair.a, pair.b), (pair.b, pair.a), strict=True):
            if only := [c for c in mine.conditions if c not in other.conditions]:
                notes.append(f"{pair.label}: only in {name}: {', '.join(only)}")
        notes += [f"{pair.label}: differs all the same, as allowed: {d}" for d in pair.waived]
    return notes
