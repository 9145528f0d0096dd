"""Run folders with all that a comparison reads, small enough to be worked out by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from safemed_bench.core.journal import to_line
from safemed_bench.core.types import Record

CLEAN, PGD, WORST = "clean", "pgd[answer]@linf:4/255", "worst@linf:4/255"
SETTINGS: dict[str, Any] = {
    "name": "small",
    "data": {"resolution": 64, "fit": "pad"},
    "threat": {"norm": "linf", "eps": ["4/255"], "headline": "4/255"},
    "models": [{"name": "m"}],
    "conditions": ["clean", {"attack": "pgd", "steps": 20, "restarts": 1}],
    "run": {"fail_on_error": 0.0},
}
INFO: dict[str, Any] = {
    "schema": 1,
    "suite": "small",
    "title": "Small",
    "data": {"name": "phantom", "fingerprint": "f00d", "stamp": "phantom (small), split test"},
    "notices": [],
    "code": {"attack": 1},
    "headline": "linf:4/255",
    "provenance": {"sessions": [{"outcome": "complete"}]},
}
CARD = {
    "path": "/weights/m",
    "prompt": "bare",
    "decode": "logprob",
    "max_new_tokens": 4,
    "reasons": False,
    "fingerprint": "beef",
    "description": "A small model",
}


def questions(count: int, per_image: int = 1) -> list[dict[str, Any]]:
    """The first half is CT, the second MRI; `per_image` neighbours share an image."""
    return [
        {
            "id": f"q{i}",
            "modality": "CT" if i < count / 2 else "MRI",
            "question_type": "diagnosis",
            "image_sha256": f"image-{i // per_image}",
            "n_options": 4,
            "text_prior": None,
        }
        for i in range(count)
    ]


def write(
    folder: Path,
    outcomes: Mapping[str, str],
    *,
    model: str = "m",
    card: Mapping[str, Any] | None = None,
    info: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    per_image: int = 1,
) -> Path:
    """A run of one model. outcomes: condition -> a letter a question: 1 right, 0 wrong, i invalid, e error, . none."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = questions(len(next(iter(outcomes.values()))), per_image)
    body = copy.deepcopy(INFO) | {
        "models": [{"name": model, **CARD, **(card or {})}],
        "cells": [{"model": model, "condition": c} for c in outcomes],
        "questions": asked,
    }
    (folder / "run.json").write_text(json.dumps(body | dict(info or {})))
    suite = copy.deepcopy(SETTINGS) | {"models": [{"name": model}]} | dict(settings or {})
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    lines = [
        to_line(record(model, condition, question, letter))
        for condition, letters in outcomes.items()
        for question, letter in zip(asked, letters, strict=True)
        if letter != "."
    ]
    (folder / "records.jsonl").write_bytes(b"".join(lines))
    return folder


def record(model: str, condition: str, question: Mapping[str, Any], letter: str) -> Record:
    attacked = "@" in condition
    right = {"1": True, "e": None}.get(letter, False)
    return Record(
        key=f"{model}|{condition}|{question['id']}",
        cell=f"{model}/{condition}",
        model=model,
        condition=condition,
        question_id=question["id"],
        modality=question["modality"],
        question_type=question["question_type"],
        image_sha256=question["image_sha256"],
        n_options=question["n_options"],
        target=0,
        answer={"1": 0, "0": 1}.get(letter),
        status=None if right is None else "invalid" if letter == "i" else "valid",
        correct=right,
        linf=4 / 255 if attacked else None,
        l2=0.5 if attacked else None,
        steps=20 if attacked else None,
        backwards=20 if attacked else 0,
        error="out of memory" if right is None else "",
    )
