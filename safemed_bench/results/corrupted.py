"""Corruptions -> means over kinds and severities, beside the accuracy that metrics.py gives for every cell.

mean_corruption_accuracy
        mCA: mean accuracy over kinds and severities: of all of them (condition `corruption`), of one kind
        (`corruption[jpeg]`), of one severity (`corruption@3`). Every question weighs the same, and has the mean of the
        kinds that happen to its modality. Only questions with a verdict under every one of these count; n is their
        number. The interval is clustered by question and by image; the wider of the two stands
clean_accuracy
        accuracy of the same questions on the untouched image
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from ..core.types import Estimate
from .frames import CORRUPTION, Verdicts, modality_order
from .intervals import NOTHING, proportion
from .metrics import ALL, Measure


def corrupted(verdicts: Verdicts) -> Iterator[Measure]:
    """All means of one model's corruptions, in a fixed order; nothing where there are none."""
    for name, cells in groups(verdicts).items():
        planned = _planned(verdicts, cells)
        modality = verdicts.questions["modality"].where(planned.any(axis=1))
        parts = {ALL: modality.notna()} | {m: modality == m for m in modality_order(modality.dropna())}
        for part, rows in parts.items():
            for metric, estimate in _means(verdicts, planned, rows.to_numpy(dtype=bool)).items():
                yield Measure(verdicts.model, name, metric, part, estimate)


def groups(verdicts: Verdicts) -> dict[str, list[str]]:
    """Name of a mean -> the cells behind it."""
    found: dict[str, list[str]] = {}
    cells = [c for c in verdicts.conditions if c.kind == CORRUPTION]
    for key in (lambda c: "", lambda c: f"[{c.objective}]", lambda c: f"@{c.severity}"):
        for cell in cells:
            found.setdefault(f"{CORRUPTION}{key(cell)}", []).append(cell.name)
    return found


def _planned(verdicts: Verdicts, cells: Sequence[str]) -> pd.DataFrame:
    """Question x cell: whether it is asked there."""
    index = verdicts.questions.index
    asked = {name: index.isin(list(verdicts.asked.get(name, index))) for name in cells}
    return pd.DataFrame(asked, index=index)


def _means(verdicts: Verdicts, planned: pd.DataFrame, rows: np.ndarray) -> dict[str, Estimate]:
    asked = planned.to_numpy(dtype=bool)
    right = verdicts.correct[list(planned.columns)].to_numpy(dtype=float)
    whole = rows & asked.any(axis=1) & ~(asked & np.isnan(right)).any(axis=1)
    counts = asked[whole].sum(axis=1)
    images, clean = verdicts.images[whole], verdicts.clean.to_numpy(dtype=float)[whole]
    found = {"mean_corruption_accuracy": NOTHING}
    if len(counts):
        weights = None if np.ptp(counts) == 0 else np.repeat(1 / counts, counts)
        values = right[whole][asked[whole]]
        by = [proportion(values, np.repeat(codes, counts), weights) for codes in (np.arange(len(counts)), images)]
        found["mean_corruption_accuracy"] = replace(max(by, key=lambda e: e.high - e.low), n=len(counts))
    if (told := ~np.isnan(clean)).any():
        found["clean_accuracy"] = proportion(clean[told], images[told])
    return found
