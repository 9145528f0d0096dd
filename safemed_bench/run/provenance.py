"""`run.json`: what was planned, on which data, with which models, versions and hardware."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.clinical import opposite_options, reads_normal
from ..core.journal import write_atomic
from ..core.types import LETTERS, Question, ThreatModel
from ..models.api_calls import sent
from ..suite.conditions import CODE_VERSIONS, asked
from .artefacts import slug

if TYPE_CHECKING:
    from ..models.card import ModelCard
    from ..suite.plan import Cell, Plan

RUN = "run.json"
PACKAGES = ("safemed-bench", "torch", "transformers", "numpy", "pillow", "tokenizers", "safetensors", "accelerate")


class RunFile:
    """Writes `run.json` at the start and at the end of a session; a resumed run has several sessions."""

    def __init__(self, folder: Path, plan: Plan, devices: Sequence[str]) -> None:
        self._path = folder / RUN
        self._sessions = _earlier_sessions(self._path)
        self._body = describe(plan)
        self.session: dict[str, Any] = {
            "started": now(),
            "finished": None,
            "outcome": "running",
            "command": sys.argv,
            "workers": list(devices),
            "hardware": [],
        }
        self.write()

    def met(self, hardware: dict[str, Any]) -> None:
        """A worker told what it runs on."""
        if hardware not in self.session["hardware"]:
            self.session["hardware"].append(hardware)

    def finish(self, outcome: str, **values: Any) -> None:
        told = sent(self._path.parent)
        served = {name: told[slug(name)] for name in (m["name"] for m in self._body["models"]) if slug(name) in told}
        self.session |= {"finished": now(), "outcome": outcome, **values} | ({"served": served} if served else {})
        self.write()

    def write(self) -> None:
        provenance = environment() | {"sessions": [*self._sessions, self.session]}
        text = json.dumps(self._body | {"provenance": provenance}, ensure_ascii=False, indent=1) + "\n"
        write_atomic(self._path, text.encode())


def describe(plan: Plan) -> dict[str, Any]:
    """What results need to know of a plan: data, cells, questions; a unit without a record is then seen as missing."""
    suite, dataset = plan.suite, plan.dataset
    headline = suite.threat.headline
    return {
        "schema": 1,
        "suite": suite.name,
        "title": suite.title,
        "data": {"name": dataset.name, "fingerprint": dataset.fingerprint, "stamp": dataset.stamp},
        "notices": list(plan.notes),
        "code": dict(CODE_VERSIONS),
        "diagnostics": suite.diagnostics.model_dump(),
        "headline": ThreatModel(suite.threat.norm, headline).label if headline is not None else None,
        "models": [model_facts(plan, card) for card in plan.cards],
        "cells": [cell_facts(cell, plan) for cell in plan.cells],
        "questions": [
            {
                "id": q.id,
                "modality": q.modality,
                "question_type": q.question_type,
                "image_sha256": q.image_sha256,
                "n_options": len(q.options),
                "text_prior": dataset.text_prior.get(q.id),
                **_opposite(q),
                "question": q.question,
                "options": list(q.options),
                "image": q.image,
            }
            for q in dataset.questions
        ],
    }


def model_facts(plan: Plan, card: ModelCard) -> dict[str, Any]:
    """An entry's card, and how it is smoothed or where a server answers for it."""
    return card.to_dict() | _smooth(plan, card.name) | _api(plan, card.name)


def _smooth(plan: Plan, name: str) -> dict[str, Any]:
    found = next((m.smooth for m in plan.suite.models if m.name == name), None)
    return {"smooth": found.model_dump()} if found else {}


def _api(plan: Plan, name: str) -> dict[str, Any]:
    """Where an entry's answers come from that a server gives; nothing that could hold a key."""
    found = next((m.api for m in plan.suite.models if m.name == name), None)
    return {"api": found.model_dump(include={"base_url", "model", "temperature", "seed"})} if found else {}


def cell_facts(cell: Cell, plan: Plan) -> dict[str, Any]:
    """`questions` only where not all are asked. Certificates name certifier, parameters and `values`, d = 3 H W;
    attacks their registered name, what the suite sets of their parameters, and whose images are shown where they are
    another entry's; corruptions name, severity and modalities, [] for all."""
    described: dict[str, Any] = {"model": cell.model.name, "condition": cell.condition.name}
    if cell.condition.certifier:
        side = cell.model.resolution or plan.suite.data.resolution
        facts = {"name": cell.condition.certifier, "values": 3 * side * side}
        described["certifier"] = facts | dict(cell.condition.params)
    if cell.condition.attack:
        described["attack"] = {"name": cell.condition.attack, **dict(cell.condition.params)}
        described["attack"] |= {"source": cell.condition.source} if cell.condition.source else {}
    if cell.condition.corruption:  # its questions follow from its modalities; a list for each of its cells is long
        facts = {"name": cell.condition.corruption, "severity": cell.condition.severity}
        return described | {"corruption": facts | {"modalities": list(cell.condition.modalities)}}
    chosen = asked(plan.dataset.questions, cell.condition)
    if len(chosen) < len(plan.dataset.questions):
        described["questions"] = [question.id for question in chosen]
    return described


def _opposite(question: Question) -> dict[str, str]:
    """Letters of the options whose clinical meaning is the other one, by what such an answer would do."""
    letters = "".join(LETTERS[i] for i in opposite_options(question.options, question.answer))
    normal = reads_normal(question.options[question.answer])
    return {"reassuring": "" if normal else letters, "alarming": letters if normal else ""}


def environment() -> dict[str, Any]:
    """Versions, code state and machine, without importing what is asked about."""
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "git": git_state(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
    }


def git_state() -> dict[str, Any] | None:
    """Commit of the code and whether it was changed since; None where the package is not in a git checkout."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None

    def ask(*words: str) -> str | None:
        try:
            answer = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    commit, changes = ask("rev-parse", "HEAD"), ask("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changes)} if commit else None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _earlier_sessions(path: Path) -> list[dict[str, Any]]:
    """Sessions of the run so far. They are history only: a file that cannot be read does not stop a run."""
    try:
        sessions = json.loads(path.read_text())["provenance"]["sessions"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return sessions if isinstance(sessions, list) else []
