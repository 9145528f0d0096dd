"""Certificates -> estimates: the accuracy that no attack inside an L2 ball can lower.

For each radius that a certifier was asked to decide, condition `certified@l2:R` (of the entry's first certify
condition; further ones are `certified[sigma=S]@l2:R`):

certified_accuracy   share of questions whose certified answer at R is right
abstain_rate         share on which the certifier could not decide R within its samples
refuted_rate         share shown not to be certifiable at R (sequential certifiers)
linf_equivalent      R / sqrt(d): the largest L-infinity ball inside the L2 ball
acr                  mean certified radius, 0 where the answer is wrong (all of the condition's radii; 1902.02918)
samples, samples_median
                     answers on noisy copies per question, selection included

and, for condition `certify[sigma=S]` itself, certified_accuracy and abstain_rate at radius 0: what the smoothed model
answers at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import pandas as pd

from ..core.types import Estimate
from .frames import Condition, Verdicts, modality_order
from .intervals import exact, mean, proportion
from .metrics import ALL, Measure


def certified(verdicts: Verdicts) -> Iterator[Measure]:
    """All estimates of one model's certificates, in a fixed order."""
    names = titles([c.name for c in verdicts.conditions])
    for condition in names:
        rows = _of(verdicts, condition)
        if rows.empty:
            continue
        images = pd.Series(verdicts.images, index=verdicts.questions.index).reindex(rows.index)
        modality = verdicts.questions["modality"].reindex(rows.index)
        parts = {ALL: rows} | {name: rows[modality == name] for name in modality_order(modality.dropna())}
        named = {radius: f"{names[condition]}@l2:{radius:g}" for radius in _radii(rows)}
        values = verdicts.certifiers.get(condition, {}).get("values")
        levels: list[tuple[float | None, str]] = [(None, condition), *named.items()]
        for radius, name in levels:
            for part, held in parts.items():
                found = _estimates(held, radius, images.reindex(held.index).to_numpy())
                if radius is not None and values:
                    found["linf_equivalent"] = exact(radius / math.sqrt(values), len(held))
                for metric, estimate in found.items():
                    yield Measure(verdicts.model, name, metric, part, estimate)


def titles(conditions: Iterable[str]) -> dict[str, str]:
    """Certify conditions of one entry -> what tables call them: the first `certified`, others `certified[sigma=S]`."""
    found = [c for c in map(Condition.parse, conditions) if c.kind == "certify"]
    return {c.name: f"certified[{c.objective or c.kind}]" if place else "certified" for place, c in enumerate(found)}


def held(verdicts: Verdicts) -> Mapping[str, pd.Series]:
    """`certified@l2:R` -> per question that was asked, 1.0 where its right answer is certified at R, 0.0 where not.

    NaN where there is no certificate: nothing is known of that question.
    """
    found: dict[str, pd.Series] = {}
    for condition, title in titles([c.name for c in verdicts.conditions]).items():
        rows = _of(verdicts, condition)
        asked = verdicts.questions.index[verdicts.questions.index.isin(list(verdicts.asked.get(condition, ())))]
        index = asked if len(asked) else verdicts.questions.index
        for radius in _radii(rows):
            found[f"{title}@l2:{radius:g}"] = _proven(rows, radius).reindex(index)
    return found


def _of(verdicts: Verdicts, condition: str) -> pd.DataFrame:
    """The certificates of one condition, by question id."""
    rows = verdicts.certificates
    return rows[rows["condition"] == condition].set_index("question_id") if len(rows) else rows


def _proven(rows: pd.DataFrame, radius: float) -> pd.Series:
    verdict = pd.Series([_verdict(decisions, radius) for decisions in rows["decisions"]], index=rows.index)
    return ((verdict == "certified") & (rows["candidate"] == rows["target"])).astype(float)


def _radii(rows: pd.DataFrame) -> list[float]:
    if rows.empty:
        return []
    return sorted({decision[0] for decisions in rows["decisions"] for decision in decisions or ()})


def _estimates(rows: pd.DataFrame, radius: float | None, images: np.ndarray) -> dict[str, Estimate]:
    right = (rows["candidate"] == rows["target"]).to_numpy()
    samples = rows["samples"].to_numpy(dtype=float)
    own = np.where(right & ~rows["abstain"].to_numpy(dtype=bool), rows["radius"].to_numpy(dtype=float), 0.0)
    if radius is None:
        verdict = np.where(rows["abstain"].to_numpy(dtype=bool), "abstain", "certified")
    else:
        verdict = np.array([_verdict(decisions, radius) for decisions in rows["decisions"]], dtype=object)
    found = {
        "certified_accuracy": proportion((right & (verdict == "certified")).astype(float), images),
        "abstain_rate": proportion((verdict == "abstain").astype(float), images),
        "acr": mean(own, images),
        "samples": mean(samples, images),
        "samples_median": exact(float(np.median(samples)), len(samples)) if len(samples) else exact(math.nan, 0),
    }
    if radius is not None:
        found["refuted_rate"] = proportion((verdict == "refuted").astype(float), images)
    return found


def _verdict(decisions: Any, radius: float) -> str:
    return next((word for at, word, _ in decisions or () if at == radius), "abstain")
