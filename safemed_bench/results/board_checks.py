"""Why an entry may not stand on a board: every number is made again from its records and held to what it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from ..core.errors import DataError
from ..corruptions import CORRUPTIONS
from .entries import REPRODUCED, SELF_REPORTED, digest_of, findings
from .frames import CORRUPTION, Condition
from .intervals import paired_difference
from .metrics import BLIND
from .protocol import protocol_of
from .sources import Measured, entry_files, load_board, load_entry, load_packed, measured_entry
from .standards import short_efforts, standard_attack, standard_of
from .summary import threat_order

SLACK = 1e-6
"""By how much a stored norm may exceed eps, on the [0, 1] pixel scale: its rounding."""


def check_board(folder: Path) -> dict[str, list[str]]:
    """Entry's file name -> what is wrong with it; [] where it may stand. Raises DataError for a board without terms."""
    board = load_board(folder)
    return {path.name: check_file(path, board) for path in entry_files(folder)}


def check_file(path: Path, board: Mapping[str, Any]) -> list[str]:
    """All that is wrong with an entry on disk."""
    try:
        entry = load_entry(path)
        frame = load_packed(path.parent / entry["records"])
        found = [*_check_digest(entry, path.parent), *check_entry(entry, frame, board)]
        return found or _check_status(entry, path.parent, board)
    except DataError as error:
        return [str(error)]


def check_entry(entry: Mapping[str, Any], frame: pd.DataFrame, board: Mapping[str, Any]) -> list[str]:
    """What is wrong with an entry and its records, as `frame_of` has them, on this board."""
    early = [*_check_data(entry, frame, board), *_check_terms(entry, board)]
    if early:
        return early
    measured = measured_entry(entry, frame, board)
    return [
        *_check_coverage(entry, frame, measured),
        *_check_records(frame),
        *standard_attack(measured, standard_of(board)),
        *short_efforts(frame, measured),
        *_check_adaptive(entry),
        *_check_numbers(entry, measured),
    ]


def _check_digest(entry: Mapping[str, Any], folder: Path) -> Iterator[str]:
    if digest_of(folder / entry["records"]) != entry.get("records_sha256"):
        yield f"{entry['records']} is not the file that the entry was made from (its SHA-256 differs)"


def _check_data(entry: Mapping[str, Any], frame: pd.DataFrame, board: Mapping[str, Any]) -> Iterator[str]:
    """The data it says it has, and the images and questions that its records have, are the board's."""
    said, own = entry["run"].get("data", {}), board["data"]
    if (said.get("name"), said.get("fingerprint")) != (own["name"], own["fingerprint"]):
        yield f"mixed data: measured on {said.get('stamp')} ({said.get('fingerprint')}), the board is of {own['stamp']}"
    if names := sorted(set(frame["model"]) - {entry["model"]}):
        yield f"its records are also of {', '.join(names)}"
    asked = {q["id"]: q for q in board["questions"]}
    strange = sorted(set(frame["question_id"]) - asked.keys())
    if strange:
        yield f"mixed data: {len(strange):,} questions are not of this board, such as {strange[0]}"
    for column in ("image_sha256", "modality", "n_options"):
        expected = frame["question_id"].map({key: q[column] for key, q in asked.items()})
        other = frame[expected.notna() & (frame[column] != expected)]
        if len(other):
            yield f"mixed data: {column} of {other['question_id'].iloc[0]} and {len(other) - 1:,} more records differs"


def _check_terms(entry: Mapping[str, Any], board: Mapping[str, Any]) -> Iterator[str]:
    protocol = protocol_of(entry["model"], entry["run"], entry["settings"])
    terms = board["terms"]
    if protocol.threat != terms["threat"] or entry["run"].get("headline") != board["headline"]:
        yield f"another threat model: {protocol.threat}, the board has {terms['threat']}, first {board['headline']}"
    if protocol.canvas != terms["canvas"]:
        yield f"another canvas: {protocol.canvas}, the board has {terms['canvas']}"
    # parts that one of the two does not know are behind conditions that it has not
    shared = protocol.code.keys() & terms["code"].keys()
    if not protocol.code or any(protocol.code[part] != terms["code"][part] for part in shared):
        yield f"other versions of the code behind the records: {dict(protocol.code)}, the board has {terms['code']}"


def _check_coverage(entry: Mapping[str, Any], frame: pd.DataFrame, measured: Measured) -> Iterator[str]:
    """Every question has a verdict in every cell, and no record is of another cell."""
    cells = [c["condition"] for c in entry["run"]["cells"]]
    for needed in ("clean", *BLIND):
        if needed not in cells:
            yield f"no {needed} condition, which every entry has"
    for cell in entry["run"]["cells"]:
        if _shrunk(cell.get(CORRUPTION, {})):
            yield f"{cell['condition']} leaves out modalities that it happens to"
        correct = measured.verdicts.correct[cell["condition"]]
        asked = measured.verdicts.asked.get(cell["condition"], frozenset(correct.index))
        if lost := int(correct[correct.index.isin(list(asked))].isna().sum()):
            yield f"missing questions: {lost:,} of {len(asked):,} have no verdict under {cell['condition']}"
    if other := sorted(set(frame["condition"]) - set(cells)):
        yield f"records of {', '.join(other)}, which is none of its cells"


def _shrunk(corruption: Mapping[str, Any]) -> bool:
    """Whether a corruption's cell asks fewer modalities than the catalogue has for it."""
    said, info = corruption.get("modalities"), CORRUPTIONS.get(corruption.get("name", ""))
    return bool(said and info and set(said) != set(info.modalities))


def _check_records(frame: pd.DataFrame) -> Iterator[str]:
    """A record agrees with itself, with its threat, and with the others about which option is right."""
    right = (frame["status"] == "valid") & (frame["answer"] == frame["target"])
    told = frame["correct"].notna()
    if wrong := int((told & (frame["correct"] != right)).sum()):
        yield f"{wrong:,} records call an answer right or wrong that is not"
    targets = frame.groupby("question_id")["target"].nunique()
    if unsure := int((targets > 1).sum()):
        yield f"{unsure:,} questions have another right answer in some of their records"
    for name, rows in frame.groupby("condition"):
        condition = Condition.parse(str(name))
        if condition.threat is None:
            continue
        norm, eps = threat_order(condition.threat)
        if outside := int((rows[norm].fillna(0) > eps + SLACK).sum()):
            yield f"another threat model: {outside:,} images under {name} are outside its ball"


def _check_adaptive(entry: Mapping[str, Any]) -> Iterator[str]:
    if needs_adaptive(entry) and not str(entry.get("adaptive", "")).strip():
        yield "a defence must state the attack that was adapted to it (--adaptive)"


def needs_adaptive(entry: Mapping[str, Any]) -> bool:
    """Whether an entry may defend itself beyond its weights: one whose model is built by code may do anything."""
    return bool(entry.get("built_by_code"))


def _check_numbers(entry: Mapping[str, Any], measured: Measured) -> Iterator[str]:
    made = findings(measured)
    said = {_key(row): row for row in entry.get("numbers", ())}
    for row in made["numbers"]:
        other = said.pop(_key(row), None)
        if other != row:
            shown = other and {k: other.get(k) for k in ("value", "low", "high", "n")}
            yield f"edited number: {' '.join(_key(row))} says {shown}, its records give {row['value']} (n {row['n']})"
    for key in said:
        yield f"edited number: {' '.join(key)} does not follow from its records"
    for field in ("best_known_attack", "flags"):
        if entry.get(field) != made[field]:
            yield f"edited {field.replace('_', ' ')}: says {entry.get(field)}, its records give {made[field]}"


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(row.get("condition")), str(row.get("metric")), str(row.get("modality"))


# -- reproduction ------------------------------------------------------------------------------------------------------


def disagreements(first: Measured, again: Measured) -> list[str]:
    """Where a second measurement of the same model gives other numbers than the first, beyond its 95% interval."""
    problems = []
    for name in ("clean", *(c.name for c in first.verdicts.conditions if c.kind == "worst")):
        if name not in again.conditions:
            problems.append(f"{name} was not measured again")
            continue
        pair = pd.concat([first.verdicts.correct[name], again.verdicts.correct[name]], axis=1).to_numpy(dtype=float)
        change = paired_difference(pair[:, 1], pair[:, 0], first.verdicts.images)
        if change.low > 0 or change.high < 0:
            problems.append(f"{name} differs by {change.value:+.1%} [{change.low:+.1%}, {change.high:+.1%}]")
    return problems


def _check_status(entry: Mapping[str, Any], folder: Path, board: Mapping[str, Any]) -> list[str]:
    """`reproduced` is proved by the records of a second measurement, with another seed."""
    status, again = entry.get("status"), entry.get("reproduction")
    if status == SELF_REPORTED and not again:
        return []
    if status != REPRODUCED or not isinstance(again, Mapping):
        return [f"status '{status}' without the records that would show it"]
    second = {**entry, **again}
    frame = load_packed(folder / second["records"])
    problems = [*_check_digest(second, folder), *check_reproduction(entry, second, frame, board)]
    if not problems:
        first = measured_entry(entry, load_packed(folder / entry["records"]), board)
        problems = disagreements(first, measured_entry(second, frame, board))
    return [f"reproduction: {problem}" for problem in problems]


def check_reproduction(
    entry: Mapping[str, Any], second: Mapping[str, Any], frame: pd.DataFrame, board: Mapping[str, Any]
) -> list[str]:
    """What is wrong with a second measurement, itself as complete as an entry, of the same model with another seed."""
    problems = check_entry(second, frame, board)
    if second["run"]["models"] != entry["run"]["models"]:
        problems.append("it is of another model, prompt or extraction")
    if seed_of(second) == seed_of(entry):
        problems.append("it has the same seed: the same run twice shows nothing")
    return problems


def seed_of(entry: Mapping[str, Any]) -> Any:
    return entry["settings"].get("run", {}).get("seed")
