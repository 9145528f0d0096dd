"""Runs of entries that a server on loopback answers for: their suites, and what their records say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_server import KEY

from safemed_bench import cli
from safemed_bench.models import load_model
from safemed_bench.models.huggingface import HuggingFaceVLM
from safemed_bench.suite.schema import ModelSpec

SIDE, VARIABLE = 64, "SAFEMED_TEST_KEY"
LOCAL = {"name": "local", "entry": "sft", "decode": "generate"}
SQUARE = {"attack": "square", "params": {"queries": 4, "feedback": "verdict"}}


def surround(patch: pytest.MonkeyPatch) -> None:
    """The right key, and none of the variables that may be set where the tests run."""
    for name in [n for n in os.environ if n.startswith("SAFEMED_") and n != "SAFEMED_CACHE"]:
        patch.delenv(name)
    patch.setenv(VARIABLE, KEY)


def here(spec: dict[str, Any]) -> HuggingFaceVLM:
    """The model that an entry is, for a server to answer with."""
    vlm = load_model(ModelSpec.model_validate(spec), SIDE, device="cpu", dtype="fp32")
    assert isinstance(vlm, HuggingFaceVLM)
    return vlm


def remote(url: str, **more: Any) -> dict[str, Any]:
    api = {"base_url": url, "model": "tiny", "key_env": VARIABLE, "retries": 1, **more}
    return {"name": "remote", "prompt": "bare", "max_new_tokens": 4, "api": api}


def suite(folder: Path, models: list[Any], conditions: list[Any], **more: Any) -> str:
    body = {
        "name": "served",
        "data": {"name": "phantom", "per_modality": 2, "filter": {"modality": ["CT", "OCT"]}},
        "threat": {"eps": [8 / 255]},
        "models": models,
        "conditions": conditions,
        "run": {"workers": 1, "device": "cpu", "chunk": 4},
    }
    path = folder / "served.yaml"
    path.write_text(yaml.safe_dump(body | more))
    return str(path)


def run(path: str, folder: Path, *more: str) -> int:
    return cli.invoke(["run", path, "--output", str(folder), "--quiet", *more])


def records(folder: Path, model: str = "remote") -> dict[tuple[str, str], dict[str, Any]]:
    name = "records.jsonl" if (folder / "records.jsonl").is_file() else "journal.jsonl"
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return {(r["condition"], r["question_id"]): r for r in lines if r["model"] == model}


def verdict(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record[name] for name in ("answer", "status", "correct", "text", "letter", "linf", "radius", "error"))


def untold(folder: Path, *keys: str) -> None:
    """No key is in any file of a run's folder."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files and not [str(file) for file in files for key in keys if key.encode() in file.read_bytes()]
