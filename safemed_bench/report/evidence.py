"""The back of a run's report: diagnostics, unreadable answers, trainings, provenance."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..results.frames import Condition
from ..results.tables import condition_label, validity
from ..training.log import METRICS
from .history import read_history
from .matrices import Grid, grid_of
from .source import Source
from .training import figures
from .words import verdict

EXAMPLES = 12
"""Unreadable replies that are shown as they are."""
STATUSES = ("fail", "warn", "pass")
CURVES = ("validation", "robustness", "loss", "reward-accuracy")


def diagnostics(summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Each check with its rule and its evidence, those that failed first; empty where none were made."""
    keys = ("id", "model", "status", "rule", "evidence")
    found = [{key: _words(check.get(key)) for key in keys} for check in summary.get("diagnostics") or ()]
    order = {status: i for i, status in enumerate(STATUSES)}
    return sorted(found, key=lambda check: order.get(check["status"], 1))


def _words(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False)


def audit(source: Source) -> dict[str, Any]:
    """How many answers could not be read, per model and condition, and some of them as they are."""
    unread = [
        record
        for verdicts in source.run.verdicts
        for condition in verdicts.conditions
        for record in source.records.get((verdicts.model, condition.name), {}).values()
        if not record.error and record.status in ("invalid", "truncated")
    ]
    verdicts = sum(not r.error for records in source.records.values() for r in records.values())
    shown = [(r.model, condition_label(r.condition), verdict(r), r.question_id, r.text) for r in unread[:EXAMPLES]]
    grid = grid_of(validity(source.numbers))
    rows = tuple(row for row in grid.rows if Condition.parse(row[0][1]).kind != "worst")
    return {
        "unread": len(unread),
        "verdicts": verdicts,
        "examples": shown,
        "grid": Grid(grid.keys, grid.columns, rows, grid.caption),
        "errors": source.summary["coverage"]["named_errors"],
        "coverage": source.summary["coverage"],
    }


def trainings(source: Source) -> list[dict[str, Any]]:
    """The main curves of every entry whose training left its metrics beside it (`<training>/entry` is the entry)."""
    found = list[dict[str, Any]]()
    for card in source.cards:
        folder = Path(card["path"]).parent if card.get("path") else None
        if folder is None or Path(card["path"]).name != "entry" or not (folder / METRICS).is_file():
            continue
        panels = figures(read_history(folder), CURVES)
        for panel in panels:
            panel["key"] = f"training-{len(found)}-{panel['key']}"
        found.append({"model": card["name"], "panels": panels})
    return found


def provenance(source: Source) -> dict[str, Any]:
    """What was measured with what, where, when and how, as far as the run folder tells."""
    made = source.summary.get("provenance") or {}
    sessions = [s for s in made.get("sessions") or () if isinstance(s, Mapping)]
    git = made.get("git") or {}
    commit = git.get("commit") or "not a git checkout"
    run = source.suite.get("run") or {}
    facts = [
        ("Data", source.summary["data"]["stamp"]),
        ("Data fingerprint", source.summary["data"]["fingerprint"] or "unknown"),
        ("Code", f"{commit}{' with uncommitted changes' if git.get('dirty') else ''}"),
        ("Seed", str(run.get("seed", "unknown"))),
        ("Precision", str(run.get("dtype", "unknown"))),
        *((card["name"], _served(card, sessions)) for card in source.cards if card.get("api")),
        ("Machine", ", ".join(filter(None, (made.get("processor"), _cores(made), made.get("platform"))))),
    ]
    return {
        "facts": [(key, value) for key, value in facts if value],
        "versions": sorted((name, value or "–") for name, value in (made.get("versions") or {}).items()),
        "sessions": [_session(session) for session in sessions],
        "models": [_card(card) for card in source.cards],
        "suite": source.suite_text,
    }


def _served(card: Mapping[str, Any], sessions: Sequence[Mapping[str, Any]]) -> str:
    api, last = card["api"], (sessions[-1].get("served") or {}) if sessions else {}
    said = (last.get(card["name"]) or {}).get("served") or ()
    named = f", which called it {' and then '.join(said)}" if said else ""
    return (
        f"{api.get('model')}, as {api.get('base_url')} answered it{named}. The weights behind a server cannot be "
        "fingerprinted: the fingerprint is of address, name, prompt and decoding, and says nothing of what was served"
    )


def _cores(made: Mapping[str, Any]) -> str:
    return f"{made['cores']} cores" if made.get("cores") else ""


def _session(session: Mapping[str, Any]) -> dict[str, str]:
    hardware = [" ".join(f"{key} {value}" for key, value in h.items()) for h in session.get("hardware") or ()]
    return {
        "command": shlex.join(map(str, session.get("command") or ())),
        "started": str(session.get("started") or "–"),
        "finished": str(session.get("finished") or "–"),
        "outcome": str(session.get("outcome") or "–"),
        "workers": ", ".join(map(str, session.get("workers") or ())) or "–",
        "hardware": "; ".join(hardware) or "–",
    }


def _card(card: Mapping[str, Any]) -> dict[str, str]:
    keys = ("name", "prompt", "decode", "max_new_tokens", "dtype", "adapter", "quantize", "fingerprint", "path")
    return {key.replace("_", " "): str(card[key]) if card.get(key) not in (None, "") else "–" for key in keys}
