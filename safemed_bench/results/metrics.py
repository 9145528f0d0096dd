"""Verdicts -> estimates per model, condition and modality.

accuracy             share of right answers among questions with a verdict
accuracy_macro       mean over modalities of their accuracies (modality `all` only)
attack_success_rate  share of clean-correct questions that the attack turned wrong
false_reassurance_rate  of clean-correct questions with a true disease and an option that reads normal, the share that
                     the attack had answered so; false_alarm_rate: the same from normal to a disease
invalid_rate         share of verdicts whose answer could not be extracted (they count as wrong)
abstain_rate         share of verdicts where a smoothed entry gave no answer (wrong too)
truncated_rate       share of verdicts whose text ended before an answer (wrong too, told apart from invalid)
error_rate           share of planned questions without a verdict: an error was recorded, or nothing at all
chance               mean of 1 / number of options (condition `clean`)
text_prior           share that a lookup of texts learnt on train answers, without image or model (condition `clean`)
image_gain           clean accuracy - the higher of blank and shuffled accuracy, paired by question (condition `clean`)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..core.types import Estimate
from .frames import Condition, Verdicts, modality_order
from .intervals import NOTHING, exact, paired_difference, proportion

METRICS = (
    "accuracy",
    "accuracy_macro",
    "attack_success_rate",
    "false_reassurance_rate",
    "false_alarm_rate",
    "invalid_rate",
    "truncated_rate",
    "abstain_rate",
    "error_rate",
    "chance",
    "text_prior",
    "image_gain",
)
DIRECTIONS = {"false_reassurance_rate": "reassuring", "false_alarm_rate": "alarming"}
BLIND = ("blank", "shuffled")
ALL = "all"


@dataclass(frozen=True, slots=True)
class Measure:
    """One estimate and what it is of. `modality` is `all` (every question) or a name."""

    model: str
    condition: str
    metric: str
    modality: str
    estimate: Estimate


@dataclass(frozen=True)
class _Slice:
    """The questions of one modality (or all) of one model; every array has one entry per question."""

    name: str
    questions: pd.DataFrame
    correct: pd.DataFrame
    status: pd.DataFrame
    spared: pd.DataFrame
    clean: np.ndarray
    images: np.ndarray

    def share(self, hits: np.ndarray, among: np.ndarray, weights: np.ndarray | None = None) -> Estimate:
        """Share of `hits` in the questions marked by `among`, both (n,) bool."""
        kept = None if weights is None else weights[among]
        return proportion(hits[among].astype(float), self.images[among], kept)


def measures(verdicts: Verdicts) -> Iterator[Measure]:
    """All estimates of one model, in a fixed order: condition, metric, modality (`all` first)."""
    slices: dict[frozenset[str] | None, list[_Slice]] = {}
    for condition in verdicts.conditions:
        if condition.kind == "certify":
            continue  # certified.py
        asked = verdicts.asked.get(condition.name)
        if asked not in slices:
            slices[asked] = _slices(verdicts if asked is None else verdicts.of(asked))
        for metric in METRICS:
            if metric == "abstain_rate" and not verdicts.smooth:
                continue
            for part in slices[asked]:
                estimate = _estimate(metric, condition, part)
                if estimate is not None:
                    yield Measure(verdicts.model, condition.name, metric, part.name, estimate)


def _slices(verdicts: Verdicts) -> list[_Slice]:
    modality = verdicts.questions["modality"].to_numpy()
    clean, images = verdicts.clean.to_numpy(dtype=float), verdicts.images

    def part(name: str, rows: np.ndarray) -> _Slice:
        frames = (verdicts.questions[rows], verdicts.correct[rows], verdicts.status[rows], verdicts.spared[rows])
        return _Slice(name, *frames, clean[rows], images[rows])

    every = part(ALL, np.ones(len(modality), dtype=bool))
    return [every, *(part(name, modality == name) for name in modality_order(verdicts.questions["modality"].dropna()))]


def _estimate(metric: str, condition: Condition, part: _Slice) -> Estimate | None:
    """None where the metric says nothing about this condition or slice."""
    correct = part.correct[condition.name].to_numpy(dtype=float)
    known = ~np.isnan(correct)
    match metric:
        case "accuracy":
            return part.share(correct == 1, known)
        case "accuracy_macro" if part.name == ALL:
            return part.share(correct == 1, known, _macro_weights(part, known))
        case "attack_success_rate" if condition.is_attack:
            return part.share(correct == 0, known & (part.clean == 1))
        case "false_reassurance_rate" | "false_alarm_rate" if condition.is_attack:
            directed = part.questions[DIRECTIONS[metric]].fillna("").to_numpy(dtype=object) != ""
            among = known & (part.clean == 1) & directed
            return part.share(part.spared[condition.name].to_numpy(dtype=float) == 0, among) if among.any() else None
        case "invalid_rate" | "truncated_rate" | "abstain_rate":
            status = part.status[condition.name].to_numpy(dtype=object)
            return part.share(status == metric.removesuffix("_rate"), known)
        case "error_rate":
            return part.share(~known, np.ones_like(known))
        case "chance" if condition.name == "clean":
            options = part.questions["n_options"].to_numpy(dtype=float)[known]
            return exact(float(np.mean(1 / options)), len(options)) if len(options) else NOTHING
        case "text_prior" if condition.name == "clean":
            hits = part.questions["text_prior"].to_numpy(dtype=float)
            told = ~np.isnan(hits)
            return part.share(hits == 1, known & told) if told.any() else None
        case "image_gain" if condition.name == "clean":
            return _image_gain(part)
    return None


def _macro_weights(part: _Slice, known: np.ndarray) -> np.ndarray:
    """1 / number of verdicts in the question's modality: every modality then weighs the same."""
    modality = part.questions["modality"].astype(str)
    counts = modality[known].value_counts()
    return 1 / modality.map(counts).fillna(1).to_numpy(dtype=float)


def _image_gain(part: _Slice) -> Estimate | None:
    """Paired over the questions with both verdicts. None where the suite has no blind condition."""
    blind = [part.correct[name].to_numpy(dtype=float) for name in BLIND if name in part.correct]
    if not blind:
        return None
    clean = part.correct["clean"].to_numpy(dtype=float)
    best = max(blind, key=lambda values: float(np.nanmean(values)) if not np.isnan(values).all() else -1.0)
    both = ~np.isnan(clean) & ~np.isnan(best)
    return paired_difference(clean[both], best[both], part.images[both])
