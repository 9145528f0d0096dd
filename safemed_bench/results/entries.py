"""What a leaderboard entry says: numbers, flags and attacks, all of it made from its records alone.

An entry is one JSON file beside its records; the board's terms (board.json) say which questions were to be asked, on
what canvas and under which threat. How both are checked is in board_checks.py.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ..core.journal import to_line
from ..core.types import Record
from .compare import ALL
from .frames import CORRUPTION, Condition, Verdicts
from .intervals import paired_difference
from .metrics import BLIND, measures
from .protocol import attack_of
from .sources import Measured
from .summary import DIGITS, row_of, threat_order

SCHEMA = 1
SELF_REPORTED, REPRODUCED = "self-reported", "reproduced"
INVALID_LIMIT = 0.1
"""Share of unreadable clean answers above which an entry is called unreliable."""
TERMS = ("name", "data", "threat", "models", "conditions", "run")
METRICS = ("accuracy", "attack_success_rate", "invalid_rate", "truncated_rate", "chance", "text_prior", "image_gain")


def make_entry(measured: Measured, records: str, digest: str, adaptive: str) -> dict[str, Any]:
    """The entry of one measured model. records, digest: name and SHA-256 of the file with its records."""
    info = measured.info
    card = dict(next(c for c in info["models"] if c["name"] == measured.model))
    built = not card.pop("path", "")
    card.pop("adapter", None)  # a folder; its weights are in the fingerprint
    return {
        "schema": SCHEMA,
        "model": measured.model,
        "description": card.get("description", ""),
        "built_by_code": built,
        "adaptive": adaptive,
        "status": SELF_REPORTED,
        "reproduction": None,
        **findings(measured),
        "records": records,
        "records_sha256": digest,
        "run": {
            **{key: info[key] for key in ("suite", "title", "data", "headline") if key in info},
            "code": dict(info.get("code", {})),
            "models": [card],
            "cells": [_cell(c) for c in info["cells"] if c["model"] == measured.model],
        },
        "settings": _settings(measured),
    }


def _cell(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Of a cell what says which questions it asks."""
    return {key: cell[key] for key in ("model", "condition", CORRUPTION) if key in cell}


def _settings(measured: Measured) -> dict[str, Any]:
    """The suite as it was resolved, for this model alone and without the folders of one machine."""
    settings = {key: measured.settings[key] for key in TERMS if key in measured.settings}
    settings["data"] = {k: v for k, v in settings.get("data", {}).items() if k != "root"}
    own = [m for m in settings.get("models", ()) if m.get("name") == measured.model]
    local = ("path", "adapter")
    settings["models"] = [{k: v for k, v in m.items() if k not in local or not Path(str(v)).is_absolute()} for m in own]
    return settings


def make_board(measured: Measured, standard: str) -> dict[str, Any]:
    """The terms of a new board, those of its first entry, without the image files' places on one machine.

    standard: the least that its entries are attacked with (standards.py).
    """
    info, protocol = measured.info, measured.protocol
    return {
        "schema": SCHEMA,
        "suite": info["suite"],
        "title": info.get("title", ""),
        "data": info["data"],
        "headline": info["headline"],
        "standard": standard,
        "terms": {"threat": protocol.threat, "canvas": protocol.canvas, "code": dict(protocol.code)},
        "questions": [{k: v for k, v in q.items() if k != "image"} for q in info["questions"]],
    }


def findings(measured: Measured) -> dict[str, Any]:
    """Everything of an entry that its records decide."""
    return {
        "numbers": numbers(measured),
        "best_known_attack": best_known_attack(measured),
        "flags": [{"id": name, "why": why} for name, why in flags(measured)],
    }


def numbers(measured: Measured) -> list[dict[str, Any]]:
    """Estimates over all questions and, for clean and the headline's worst case, per modality."""
    worst = f"worst@{measured.info['headline']}"
    kept = [c for c in measured.verdicts.conditions if c.objective is None]
    names = [c.name for c in kept]
    verdicts = measured.verdicts
    chosen = replace(verdicts, correct=verdicts.correct[names], status=verdicts.status[names])
    return [
        row_of(m)
        for m in measures(chosen)
        if m.metric in METRICS and (m.modality == ALL or (m.metric == "accuracy" and m.condition in ("clean", worst)))
    ]


def best_known_attack(measured: Measured) -> dict[str, Any] | None:
    """The single attack at the headline that leaves the least accuracy; the board's number is the worst over all."""
    headline, cells = measured.info["headline"], measured.info["cells"]
    asked = {cell["condition"] for cell in cells if cell["model"] == measured.model}
    single = [c for c in measured.verdicts.conditions if c.is_attack and c.name in asked and c.threat == headline]
    if not single:
        return None
    shares = {c.name: accuracy(measured.verdicts, c.name) for c in single}
    name = min(shares, key=lambda key: shares[key])
    return {
        "condition": name,
        "attack": attack_of(Condition.parse(name), measured.settings),
        "accuracy": round(shares[name], DIGITS),
    }


def accuracy(verdicts: Verdicts, condition: str) -> float:
    return float(verdicts.correct[condition].mean())


def flags(measured: Measured) -> Iterator[tuple[str, str]]:
    """(id, why) of each reason to doubt an entry's robust number: it is then called unreliable."""
    for check in (_weaker_than_simple, _grows_with_eps, _does_not_look, _often_unreadable):
        yield from check(measured)


def _weaker_than_simple(measured: Measured) -> Iterator[tuple[str, str]]:
    """An attack that climbs for many steps leaves more than one step, or than noise."""
    headline, correct = measured.info["headline"], measured.verdicts.correct
    strong = f"pgd@{headline}"
    for simple in (f"fgsm@{headline}", f"noise@{headline}"):
        if strong in correct and simple in correct:
            less, more = accuracy(measured.verdicts, simple), accuracy(measured.verdicts, strong)
            if less < more:
                yield "attack-too-weak", f"{simple} leaves {less:.1%}, {strong} leaves {more:.1%}"


def _grows_with_eps(measured: Measured) -> Iterator[tuple[str, str]]:
    """A larger ball leaves more accuracy, beyond what the interval allows."""
    worst = sorted(
        (c for c in measured.verdicts.conditions if c.kind == "worst"), key=lambda c: threat_order(c.threat or "")
    )
    for small, large in pairwise(worst):
        pair = measured.verdicts.correct[[small.name, large.name]].to_numpy(dtype=float)
        known = ~np.isnan(pair).any(axis=1)
        gain = paired_difference(pair[known, 1], pair[known, 0], measured.verdicts.images[known])
        if gain.low > 0:
            yield "not-monotone", f"{large.name} leaves {gain.value:.1%} more than {small.name}"


def _does_not_look(measured: Measured) -> Iterator[tuple[str, str]]:
    """Without the image it answers as well: then it is robust by not looking."""
    verdicts = measured.verdicts
    for name in (c for c in BLIND if c in verdicts.correct and "clean" in verdicts.correct):
        pair = verdicts.correct[["clean", name]].to_numpy(dtype=float)
        known = ~np.isnan(pair).any(axis=1)
        gain = paired_difference(pair[known, 0], pair[known, 1], verdicts.images[known])
        if gain.n and gain.low <= 0:
            yield "image-not-needed", f"clean exceeds {name} by {gain.value:.1%} [{gain.low:.1%}, {gain.high:.1%}]"


def _often_unreadable(measured: Measured) -> Iterator[tuple[str, str]]:
    if "clean" in measured.verdicts.status:
        status = measured.verdicts.status["clean"].dropna()
        share = float((status != "valid").mean()) if len(status) else 0.0
        if share > INVALID_LIMIT:
            yield "often-unreadable", f"{share:.1%} of clean answers cannot be read"


def pack(records: Iterable[Record]) -> bytes:
    """Records as gzipped JSON lines, without what only the machine that made them needs; equal records, equal bytes."""
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=9, mtime=0, filename="") as file:
        for record in records:
            logprobs = tuple(round(value, 4) for value in record.option_logprobs)
            lean = replace(record, seconds=0.0, artefact="", loss_trace=(), option_logprobs=logprobs)
            file.write(to_line(lean))
    return out.getvalue()


def digest_of(path: Path) -> str:
    """SHA-256 of a file, hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def dump(value: Mapping[str, Any]) -> bytes:
    """How entries and boards are written."""
    return (json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n").encode()
