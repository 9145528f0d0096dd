"""A run folder as a run leaves it, made without a model: what the report is tested on."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from safemed_bench.core.types import LETTERS, Record
from safemed_bench.run import artefacts

SIDE = 16
MODALITIES = ("CT", "MRI", "X-Ray")
OPTIONS = ("cyst", "mass", "normal", "nodule")
CLEAN = ("clean", "blank", "shuffled")
ATTACKS = ("fgsm[answer]@linf:4/255", "pgd[answer]@linf:2/255", "pgd[answer]@linf:4/255")
REASONED = "pgd[decision_slot]@linf:4/255"
HOSTILE = '<think></script><img src=x onerror="window.hacked=1"> a mass</think><answer>B</answer>'
RATES = {"clean": 0.9, "blank": 0.5, "shuffled": 0.45, "fgsm": 0.6, "pgd": 0.4}
TEXT = "this image shows a small bright dark large ring spot of the liver lung knee with no sign so"
WORDS = tuple(TEXT.split())
LONG_WORDS = [word + ending for word in WORDS for ending in ("", "al", "ation", "ic", "ous")]


def write_run(folder: Path, count: int = 24, data: str = "phantom", **changes: Any) -> Path:
    """A run of two models; `plain` answers with a letter, `thinks` with a rationale. changes: of run.json."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = [_question(folder, i) for i in range(count)]
    cells = [(m, c) for m in ("plain", "thinks") for c in (*CLEAN, *ATTACKS, *((REASONED,) * (m == "thinks")))]
    records = [r for model, condition in cells for r in _cell(folder, model, condition, questions)]
    write_records(folder, records)
    stamp = "phantom (generated images, seed 0), split test" if data == "phantom" else f"{data} at Mini, split test"
    info = {
        "schema": 1,
        "suite": "toy",
        "title": "Toy suite",
        "data": {"name": data, "fingerprint": "f00d", "stamp": stamp},
        "notices": [],
        "headline": "linf:4/255",
        "models": [
            {"name": "plain", "path": "", "prompt": "bare", "reasons": False, "description": "A letter"},
            {"name": "thinks", "path": "", "prompt": "think", "reasons": True, "description": "A <b>rationale</b>"},
        ],
        "cells": [{"model": m, "condition": c} for m, c in cells],
        "questions": questions,
        "provenance": {
            "versions": {"python": "3.11", "safemed-bench": "0.1.0"},
            "git": {"commit": "c0ffee", "dirty": True},
            "sessions": [{"command": ["safemed-bench", "run", "toy suite.yaml"], "outcome": "complete"}],
        },
    }
    (folder / "run.json").write_text(json.dumps(info | changes))
    suite = {
        "name": "toy",
        "data": {"resolution": SIDE, "fit": "pad"},
        "models": [{"name": "plain"}, {"name": "thinks"}],
        "conditions": ["clean", {"attack": "pgd", "steps": 5, "restarts": 2}],
        "run": {"seed": 7},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(suite))
    return folder


def write_large_run(folder: Path, count: int, words: int = 30) -> Path:
    """A run of one model under six conditions, without pictures: `count` questions, each reply of so many words."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    questions = [
        {
            "id": f"Dataset_{i:06d}",
            "modality": MODALITIES[i % 3],
            "question_type": ("Diagnosis", "Anatomy")[i % 2],
            "image_sha256": f"{i:064x}",
            "n_options": 4,
            "text_prior": bool(draw.random() < 0.5),
            "question": f"What does picture {i} most likely show?",
            "options": [f"{OPTIONS[(i + k) % 4]} of kind {draw.integers(9)}" for k in range(4)],
        }
        for i in range(count)
    ]
    conditions = (*CLEAN, "noise@linf:4/255", *ATTACKS[::2])
    records = []
    for condition in conditions:
        rate = RATES.get(condition.partition("[")[0].partition("@")[0], 0.9)
        for i, question in enumerate(questions):
            record = _record(draw, "thinks", condition, i, question, rate)
            said = " ".join(draw.choice(LONG_WORDS, words))
            records.append(replace(record, text=f"<think>{said}</think>{record.text[-18:]}"))
    write_records(folder, records)
    cells = [{"model": "thinks", "condition": condition} for condition in conditions]
    info = {"suite": "large", "data": {"name": "omnimedvqa", "stamp": "OmniMedVQA at Large"}, "headline": "linf:4/255"}
    models = [{"name": "thinks", "reasons": True}]
    (folder / "run.json").write_text(json.dumps(info | {"models": models, "cells": cells, "questions": questions}))
    return folder


def read_records(folder: Path) -> list[Record]:
    return [Record.from_dict(json.loads(line)) for line in (folder / "records.jsonl").read_text().splitlines()]


def write_records(folder: Path, records: list[Record]) -> None:
    text = "".join(json.dumps(record.to_dict(), ensure_ascii=False) + "\n" for record in records)
    (folder / "records.jsonl").write_text(text)


def _question(folder: Path, i: int) -> dict[str, Any]:
    path = folder / "images" / f"{i}.png"
    path.parent.mkdir(exist_ok=True)
    levels = np.random.default_rng(i).integers(20, 230, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(levels).save(path)
    return {
        "id": f"q {i}/{MODALITIES[i % 3]}",
        "modality": MODALITIES[i % 3],
        "question_type": ("Diagnosis", "Anatomy")[i % 2],
        "image_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "n_options": 2 + i % 3,
        "text_prior": i % 4 == 0,
        "question": f"What is shown in picture {i}?",
        "options": list(OPTIONS[: 2 + i % 3]),
        "image": str(path),
    }


def _cell(folder: Path, model: str, condition: str, questions: list[dict[str, Any]]) -> list[Record]:
    seed = int.from_bytes(hashlib.sha256(f"{model} {condition}".encode()).digest()[:4], "big")
    draw = np.random.default_rng(seed)
    kind = condition.partition("[")[0]
    records = [_record(draw, model, condition, i, q, RATES[kind]) for i, q in enumerate(questions)]
    if kind not in ("fgsm", "pgd"):
        return records
    name = artefacts.artefact_name(f"{model}/{condition}", "0000", [r.key for r in records])
    canvas = np.stack([np.asarray(Image.open(q["image"])).transpose(2, 0, 1) for q in questions])
    delta = draw.integers(-4, 5, canvas.shape)
    artefacts.save(folder, name, canvas, (canvas + delta).astype(np.uint8), [q["id"] for q in questions])
    return [replace(r, artefact=f"{name}#{i}", linf=4 / 255, l2=0.2, steps=5) for i, r in enumerate(records)]


def _record(
    draw: np.random.Generator, model: str, condition: str, i: int, question: dict[str, Any], rate: float
) -> Record:
    n, target = question["n_options"], i % 2
    right = bool(draw.random() < rate)
    answer = target if right else (target + 1) % n
    words = " ".join(draw.choice(WORDS, 9))
    text = LETTERS[answer] if model == "plain" else f"<think>{words}</think><answer>{LETTERS[answer]}</answer>"
    record = Record(
        key=f"{model}/{condition}/{i}",
        cell=f"{model}/{condition}",
        model=model,
        condition=condition,
        question_id=question["id"],
        modality=question["modality"],
        question_type=question["question_type"],
        image_sha256=question["image_sha256"],
        n_options=n,
        target=target,
        answer=answer,
        status="valid",
        correct=right,
        clean_correct=None if condition in CLEAN else i % 5 != 0,
        text=text,
    )
    if condition == REASONED and i == 3:
        return replace(record, text=HOSTILE)
    if condition == REASONED and i == 4:
        return replace(record, answer=None, status="invalid", correct=False, text="<think>no <i>end")
    return record


def unpacked(html: str) -> dict[str, Any]:
    """The records inside a page."""
    text = re.search(r'id="records">([^<]*)<', html)
    assert text
    return json.loads(gzip.decompress(base64.b64decode(text[1])))
