"""Records on disk -> pandas frames. A question without a verdict stays MISSING (NaN): it is never right or wrong.

From one run folder `load_run` gives a `Run`: who was measured on what (`run.json`), and for each model its `Verdicts`,
tables of question x condition. Aggregates over attacks are more columns of the same tables (`with_worst_cases`).

Fields of run.json that are read, all optional: `suite`, `title` (words); `data` {name, fingerprint, stamp}; `headline`
(a threat's label); `notices` (lines a reader must see, such as LIMITED); `models` [{name, reasons, smooth}]; `cells`
[{model, condition, questions (ids, where not all are asked), certifier, attack, corruption}] and `questions` [{id and
the QUESTION_COLUMNS}] in the plan's order (without them a question is known to be missing only where another cell has
it; what else they say of a question, its words and its image, is for the report); `provenance` (copied into the
summary).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..core import journal
from ..core.errors import DataError
from ..core.types import FROM, LETTERS, MODALITIES, PROBE, Record

RECORDS = "records.jsonl"
RUN = "run.json"
HEAVY = {"text", "extra"}
COLUMNS = tuple(f.name for f in fields(Record) if f.name not in HEAVY)
CERTIFICATE = ("candidate", "decisions")
PROBED = ("again", "spread", "slope", "mismatch", "noise", "reach")
EFFORT = ("dead_gradients", "suspected", "stage")
EXTRA = (*CERTIFICATE, *PROBED, *EFFORT)
"""What is kept of the `extra` of a certificate, of a probe of the diagnostics, and of an attack."""
CORRUPTION = "corruption"
NO_ATTACK = ("noise", "certify", "certified")
QUESTION_COLUMNS = ("modality", "question_type", "image_sha256", "n_options", "text_prior", "reassuring", "alarming")
"""What is known of a question; all but the last three also stands in each of its records."""

_CONDITION = re.compile(r"(?P<kind>[^\[@]+)(?:\[(?P<objective>[^\]]*)\])?(?:@(?P<threat>.+))?")


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition's name taken apart: `pgd[answer]@linf:4/255` is kind pgd, objective answer, threat linf:4/255.

    Of `pgd<-sft[answer]@linf:4/255`, images of the attack pgd against the entry sft, the kind is `pgd<-sft`.
    Of `corruption[jpeg]@3` jpeg is the objective and 3 the severity; without one or the other it is a mean over them.
    """

    name: str
    kind: str
    objective: str | None
    threat: str | None
    severity: int | None = None

    @classmethod
    def parse(cls, name: str) -> Condition:
        match = _CONDITION.fullmatch(name)
        corrupted = match is not None and match["kind"] == CORRUPTION
        if match is None or (corrupted and not (match["threat"] or "1").isdecimal()):
            raise DataError(f"'{name}' is not the name of a condition")
        if corrupted:
            return cls(name, CORRUPTION, match["objective"], None, int(match["threat"]) if match["threat"] else None)
        return cls(name, match["kind"], match["objective"], match["threat"])

    @property
    def is_attack(self) -> bool:
        """An adversary's condition, single or aggregated; random noise is not one."""
        return self.threat is not None and self.kind not in NO_ATTACK

    @property
    def attack(self) -> str:
        """The kind without the entry whose images are shown."""
        return self.kind.partition(FROM)[0]

    @property
    def source(self) -> str:
        """The entry whose adversarial images are shown to another one, "" where they are made against it itself."""
        return self.kind.partition(FROM)[2]

    @property
    def words(self) -> str:
        """What a table calls the kind: `PGD`, `PGD from sft`."""
        return f"{self.attack.upper()} from {self.source}" if self.source else self.kind.upper()

    @property
    def norm(self) -> str:
        return (self.threat or "").partition(":")[0]

    @property
    def eps(self) -> float:
        """The size in the threat's label, `linf:4/255` or `l2:0.5`; 0 where there is none."""
        return float(Fraction((self.threat or ":0").partition(":")[2]))


@dataclass(frozen=True)
class Verdicts:
    """What one model answered; rows are questions in the order of the plan, columns are conditions.

    questions: index question id; columns modality, question_type, image_sha256, n_options, text_prior (whether the
    text-only lookup answers it, NaN where that is not known), reassuring and alarming (letters of the options that
    call a true disease normal, or a true normal a disease; NaN or "" for none).
    correct: 1.0 right, 0.0 wrong, NaN missing. status: "valid", "invalid", "truncated", "abstain", or NaN.
    spared: 0.0 where one of these letters is answered, 1.0 where not, NaN missing.
    clean: the verdict on the untouched image, from the clean cell or, where the suite has none, from attack records.
    errors: (condition, question id, message) of every record with an error.
    asked: condition -> ids of its questions, only where these are not all. certificates: one row per certificate,
    columns condition, question_id, target, candidate, decisions ([radius, verdict, n] each), radius, abstain, samples.
    certifiers: condition -> {name, values (d = 3 H W), sigma, ...}. smooth: whether the entry is a smoothed one, which
    may abstain. reasons: whether it writes a rationale before its answer.
    records: of all conditions and of the probes of the diagnostics, as `load_records` has them. attacks: condition ->
    {name, steps, ...}, what the suite said of an attack.
    """

    model: str
    questions: pd.DataFrame
    correct: pd.DataFrame
    status: pd.DataFrame
    spared: pd.DataFrame
    clean: pd.Series
    errors: tuple[tuple[str, str, str], ...] = ()
    asked: Mapping[str, frozenset[str]] = field(default_factory=dict)
    certificates: pd.DataFrame = field(default_factory=pd.DataFrame)
    certifiers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    smooth: bool = False
    reasons: bool = False
    records: pd.DataFrame = field(default_factory=pd.DataFrame)
    attacks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        return tuple(Condition.parse(name) for name in self.correct.columns)

    def of(self, rows: Iterable[str]) -> Verdicts:
        """The same with these questions alone, in the plan's order."""
        kept = self.questions.index.isin(list(rows))
        tables = {name: getattr(self, name)[kept] for name in ("questions", "correct", "status", "spared", "clean")}
        return replace(self, **tables)

    @property
    def images(self) -> np.ndarray:
        """(n,) codes, equal where questions share an image; a question whose image is unknown stands alone."""
        known = self.questions["image_sha256"].astype(object)
        alone = pd.Series([f"question:{i}" for i in self.questions.index], index=self.questions.index, dtype=object)
        return pd.factorize(known.where(known.fillna("") != "", alone))[0]


@dataclass(frozen=True)
class Run:
    """A run folder as results see it. `info` is run.json as it was written, {} where there is none."""

    folder: Path
    info: Mapping[str, Any]
    verdicts: tuple[Verdicts, ...]


def load_records(folder: Path | str) -> pd.DataFrame:
    """One row per record: COLUMNS of core.types.Record and EXTRA of its extra.

    `correct` and `clean_correct` are 1.0, 0.0 or NaN.

    Of a run that ended, `records.jsonl` is read: the records of its plan. Of one that was stopped, the journal, which
    may also hold records of an earlier plan of the same suite; of two records of one question in one cell the later
    one stands. Raises DataError.
    """
    folder = Path(folder)
    return _some(folder, read_records(folder))


def _some(folder: Path, records: Iterable[Record]) -> pd.DataFrame:
    frame = frame_of(records)
    if frame.empty:
        raise DataError(f"{folder} holds no records: neither {journal.JOURNAL} nor {RECORDS} has a line")
    return frame


def frame_of(records: Iterable[Record]) -> pd.DataFrame:
    """What `load_records` says, of records from anywhere."""
    rows = [
        [*(getattr(record, name) for name in COLUMNS), *(record.extra.get(name) for name in EXTRA)]
        for record in records
    ]
    frame = pd.DataFrame(rows, columns=[*COLUMNS, *EXTRA]).drop_duplicates(
        ["model", "condition", "question_id"], keep="last"
    )
    for name in ("correct", "clean_correct"):
        frame[name] = frame[name].map({True: 1.0, False: 0.0}).astype(float)
    frame.loc[frame["error"] != "", ["correct", "clean_correct"]] = np.nan
    return frame.reset_index(drop=True)


def read_records(folder: Path) -> Iterable[Record]:
    """The records that count, one by one and with their texts: see `load_records`. Raises DataError."""
    exported, written = (folder / RECORDS).is_file(), (folder / journal.JOURNAL).is_file()
    if exported and (_ended(load_info(folder)) or not written):
        return _exported(folder / RECORDS)
    if written:
        return journal.read(folder).values()
    raise DataError(f"{folder} is not a run folder: it has neither {journal.JOURNAL} nor {RECORDS}")


def _ended(info: Mapping[str, Any]) -> bool:
    """Whether the last session came to its end, at which records.jsonl is written."""
    sessions = info.get("provenance", {}).get("sessions") or [{}]
    return sessions[-1].get("outcome") in ("complete", "incomplete")


def _exported(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8") as lines:
        yield from parse_lines(lines, path)


def parse_lines(lines: Iterable[str], path: Path) -> Iterator[Record]:
    """Records from JSON lines. Raises DataError naming `path` and the line that is none."""
    for number, line in enumerate(lines, 1):
        try:
            yield Record.from_dict(json.loads(line))
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path}:{number}: not a record ({error})") from error


def load_info(folder: Path) -> dict[str, Any]:
    """`run.json` of a folder, {} where there is none."""
    path = folder / RUN
    if not path.is_file():
        return {}
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(info, dict):
        raise DataError(f"{path}: an object was expected")
    return info


def load_run(folder: Path | str, records: Iterable[Record] | None = None) -> Run:
    """Everything results need of a run folder. records: its own, where they were read already. Raises DataError."""
    folder = Path(folder)
    return assemble(folder, load_info(folder), _some(folder, read_records(folder) if records is None else records))


def assemble(folder: Path, info: Mapping[str, Any], records: pd.DataFrame) -> Run:
    """A run from what its run.json says and the records of `frame_of`."""
    probes = records["condition"].str.startswith(PROBE)
    cells = _planned_cells(info, records[~probes])
    questions = _planned_questions(info, records)
    tables = tuple(
        replace(
            _verdicts(model, conditions, questions, records[(records["model"] == model) & ~probes]),
            records=records[records["model"] == model],
            attacks=_of_cells(info, model, "attack"),
            asked=_asked(info, model, questions),
            certifiers=_of_cells(info, model, "certifier"),
            smooth=_card_says(info, model, "smooth"),
            reasons=_card_says(info, model, "reasons"),
        )
        for model, conditions in cells.items()
    )
    return Run(folder, info, tables)


def _card_says(info: Mapping[str, Any], model: str, key: str) -> bool:
    return any(card.get("name") == model and card.get(key) for card in info.get("models", ()))


def _asked(info: Mapping[str, Any], model: str, questions: pd.DataFrame) -> dict[str, frozenset[str]]:
    """Condition -> ids of its questions where they are not all: told one by one or, of a corruption, by modality."""
    found = {name: frozenset(ids) for name, ids in _of_cells(info, model, "questions").items()}
    for name, corruption in _of_cells(info, model, CORRUPTION).items():
        if modalities := corruption.get("modalities"):
            found[name] = frozenset(questions.index[questions["modality"].isin(modalities)])
    return found


def _of_cells(info: Mapping[str, Any], model: str, key: str) -> dict[str, Any]:
    """condition -> what run.json says under `key` of the model's cells that have it."""
    return {c["condition"]: c[key] for c in info.get("cells", ()) if c["model"] == model and key in c}


def _planned_cells(info: Mapping[str, Any], records: pd.DataFrame) -> dict[str, list[str]]:
    """model -> its conditions without probes, in the plan's order; from the records where run.json names none."""
    pairs = [(c["model"], c["condition"]) for c in info.get("cells", ()) if not c["condition"].startswith(PROBE)]
    pairs = pairs or list(records[["model", "condition"]].drop_duplicates().itertuples(index=False, name=None))
    cells: dict[str, list[str]] = {}
    for model, condition in pairs:
        cells.setdefault(model, []).append(condition)
    return cells


def _planned_questions(info: Mapping[str, Any], records: pd.DataFrame) -> pd.DataFrame:
    """Index question id, QUESTION_COLUMNS. A planned question without any record is a row all the same."""
    seen = records.drop_duplicates("question_id").set_index("question_id").reindex(columns=list(QUESTION_COLUMNS))
    planned = info.get("questions") or ()
    if not planned:
        return seen
    table = pd.DataFrame(planned).rename(columns={"id": "question_id"}).set_index("question_id")
    table = table.reindex(columns=list(QUESTION_COLUMNS)).astype(object)
    return table.combine_first(seen.reindex(table.index).astype(object)).reindex(table.index)[list(QUESTION_COLUMNS)]


def _verdicts(model: str, conditions: list[str], questions: pd.DataFrame, rows: pd.DataFrame) -> Verdicts:
    def table(column: str) -> pd.DataFrame:
        wide = rows.pivot(index="question_id", columns="condition", values=column)
        return wide.reindex(index=questions.index, columns=conditions)

    correct = table("correct")
    named = rows.loc[rows["error"] != "", ["condition", "question_id", "error"]]
    return Verdicts(
        model=model,
        questions=questions,
        correct=correct,
        status=table("status").where(correct.notna()),
        spared=_spared(table("answer"), questions).where(correct.notna()),
        clean=correct["clean"] if "clean" in conditions else table("clean_correct").bfill(axis=1).iloc[:, 0],
        errors=tuple(named.itertuples(index=False, name=None)),
        certificates=rows[(rows["samples"].notna()) & (rows["error"] == "")],
    )


def _spared(answers: pd.DataFrame, questions: pd.DataFrame) -> pd.DataFrame:
    """1.0 where the option index that was answered is not of the clinically opposite meaning, 0.0 where it is."""
    letters = questions["reassuring"].fillna("") + questions["alarming"].fillna("")
    opposite = [{LETTERS.index(letter) for letter in word} for word in letters]
    spared = {
        name: [float(answer not in among) for answer, among in zip(answers[name], opposite, strict=True)]
        for name in answers
    }
    return pd.DataFrame(spared, index=answers.index, columns=answers.columns)


def with_worst_cases(verdicts: Verdicts) -> Verdicts:
    """The same with the aggregates as columns: `pgd@…` per attack and threat, `worst@…` per threat.

    Per question the worst member counts. `pgd@…` spans the attack's objectives; `worst@…` spans every attack of the
    same norm and eps, and clean, and so the images that were made against other entries. Wrong in one member is wrong,
    whatever else is missing; otherwise a question that is missing in one member is missing.
    """
    members: dict[str, list[str]] = {}
    for condition in verdicts.conditions:
        if condition.is_attack:
            members.setdefault(f"{condition.kind}@{condition.threat}", []).append(condition.name)
            members.setdefault(f"worst@{condition.threat}", []).append(condition.name)
    correct, status, spared = verdicts.correct.copy(), verdicts.status.copy(), verdicts.spared.copy()
    for name, columns in members.items():
        if name.startswith("worst@") and "clean" in verdicts.correct:
            columns.append("clean")
        if name not in verdicts.correct:
            correct[name], spared[name] = _worst(verdicts.correct[columns]), _worst(verdicts.spared[columns])
            status[name] = _worst_status(verdicts.correct[columns], verdicts.status[columns], correct[name])
    return replace(verdicts, correct=correct, status=status, spared=spared)


def _worst(correct: pd.DataFrame) -> pd.Series:
    lowest = correct.min(axis=1)
    return lowest.mask(correct.isna().any(axis=1) & (lowest != 0))


def _worst_status(correct: pd.DataFrame, status: pd.DataFrame, worst: pd.Series) -> pd.Series:
    """ "invalid", "abstain" or "truncated" only where no member was wrong with a valid answer.

    So the invalid rate of an aggregate is the share of questions lost through an unreadable answer alone.
    """
    result = pd.Series(np.nan, index=worst.index, dtype=object).mask(worst.notna(), "valid")
    wrong = status.where(correct == 0)
    for kind in ("truncated", "abstain", "invalid"):
        only = (wrong == kind).any(axis=1) & ~(wrong == "valid").any(axis=1)
        result = result.mask(only & worst.notna(), kind)
    return result


def modality_order(names: Iterable[str]) -> list[str]:
    """The eight known modalities first, in their usual order, then others by name."""
    present = set(names)
    return [m for m in MODALITIES if m in present] + sorted(present - set(MODALITIES))
