"""What the report of a run is made from: verdicts, summary, records with their words, questions, the resolved suite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import DataError
from ..core.types import Record
from ..results.frames import Condition, Run, Verdicts, load_run, read_records
from ..results.summary import summarise
from ..results.tables import Numbers

SUITE = "suite.yaml"


@dataclass(frozen=True)
class Source:
    """A run as the report sees it.

    records: (model, condition) -> question id -> record. questions: id -> what run.json says of it, in the order of the
    plan; its words and its image are not there in runs of an older version. suite: as resolved, {} where unknown.
    """

    run: Run
    summary: Mapping[str, Any]
    records: Mapping[tuple[str, str], Mapping[str, Record]]
    questions: Mapping[str, Mapping[str, Any]]
    suite: Mapping[str, Any]
    suite_text: str

    @property
    def folder(self) -> Path:
        return self.run.folder

    @cached_property
    def numbers(self) -> Numbers:
        return Numbers(self.summary)

    @property
    def cards(self) -> list[Mapping[str, Any]]:
        """A card for each model that was measured; its name alone where run.json has no more."""
        known = {card.get("name"): card for card in self.run.info.get("models", ())}
        return [known.get(v.model) or {"name": v.model} for v in self.run.verdicts]


def read_source(folder: Path | str) -> Source:
    """Read a run folder, its records once, and compute and write its summary.

    Raises DataError where the folder holds no records, or a file in it is broken.
    """
    folder = Path(folder)
    read = list(read_records(folder))
    run = load_run(folder, read)
    summary = summarise(folder, run)
    records: dict[tuple[str, str], dict[str, Record]] = {}
    for record in read:
        records.setdefault((record.model, record.condition), {})[record.question_id] = record
    told = {question["id"]: question for question in run.info.get("questions", ())}
    known = run.verdicts[0].questions
    questions = {id: told.get(id) or _of_frame(known, id) for id in map(str, known.index)}
    text, suite = _suite(folder / SUITE)
    return Source(run, summary, records, questions, suite, text)


def _of_frame(questions: Any, id: str) -> dict[str, Any]:
    row = questions.loc[id]
    return {"id": id, "modality": row["modality"], "question_type": row["question_type"]}


def _suite(path: Path) -> tuple[str, Mapping[str, Any]]:
    if not path.is_file():
        return "", {}
    text = path.read_text(encoding="utf-8")
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"{path}: not YAML ({error})") from error
    return text, found if isinstance(found, dict) else {}


def attacks_at(verdicts: Verdicts, threat: str | None) -> list[Condition]:
    """The attacks that a model was put under at one threat, each with its objective, in the plan's order."""
    return [c for c in verdicts.conditions if c.is_attack and c.threat == threat]
