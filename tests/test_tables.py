"""Tables: the right number in the right place, and the data's stamp on every one of them."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from safemed_bench.core.journal import to_line
from safemed_bench.core.types import Estimate, Record
from safemed_bench.results import render, summarise
from safemed_bench.results.formats import cell_parts, escape_latex, texts, to_csv, to_latex, to_markdown
from safemed_bench.results.tables import (
    Column,
    Numbers,
    Row,
    Table,
    build,
    condition_label,
    modalities,
    objectives,
    overall,
)

STAMP = "PHANTOM – generated images, no patients"
LIMIT = "LIMITED: --limit 2 (50% of the suite's questions)"
EPS = ("2/255", "4/255", "8/255")
OBJECTIVES = ("answer", "rationale_answer", "decision_slot", "no_think")
MODALITIES = ("CT", "MRI")


def make_record(model: str, condition: str, i: int, correct: bool) -> Record:
    return Record(
        key=f"{model}|{condition}|{i}",
        cell=f"{model}/{condition}",
        model=model,
        condition=condition,
        question_id=f"q{i}",
        modality=MODALITIES[i % 2],
        question_type="diagnosis",
        image_sha256=f"sha{i}",
        n_options=4,
        target=0,
        answer=0 if correct else 1,
        status="valid",
        correct=correct,
    )


def records(model: str, condition: str, right: int) -> list[Record]:
    """Ten questions of which the first `right` are answered rightly."""
    return [make_record(model, condition, i, i < right) for i in range(10)]


def run_records(models: tuple[str, ...]) -> list[Record]:
    out: list[Record] = []
    for model in models:
        out += [*records(model, "clean", 9), *records(model, "blank", 2), *records(model, "shuffled", 3)]
        names = OBJECTIVES if model == "cot" else ("answer",)
        for e, eps in enumerate(EPS):
            out += records(model, f"noise@linf:{eps}", 9 - e)
            out += records(model, f"fgsm[answer]@linf:{eps}", 7 - e)
            for k, name in enumerate(names):
                out += records(model, f"pgd[{name}]@linf:{eps}", 6 - e - k)
    return out


def write_run(folder: Path, models: tuple[str, ...] = ("sft", "instruct", "cot")) -> Path:
    (folder / "journal.jsonl").write_bytes(b"".join(map(to_line, run_records(models))))
    info = {
        "suite": "omnimed_pgd",
        "title": "Mini_suite 100% & more",
        "data": {"name": "phantom", "fingerprint": "f00d", "stamp": STAMP},
        "headline": "linf:4/255",
        "notices": [LIMIT],
        "models": [{"name": m, "reasons": m == "cot"} for m in models],
        "questions": [{"id": f"q{i}", "modality": MODALITIES[i % 2], "text_prior": i < 4} for i in range(10)],
    }
    (folder / "run.json").write_text(json.dumps(info))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("run"))
    summarise(folder)
    return folder


@pytest.fixture(scope="module")
def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def printed(summary: dict[str, Any], *, terminal: bool, width: int = 100) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, no_color=True)
    render(summary, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    return re.sub(r"\x1b\[[0-9;]*m", "", text) if terminal else text


def test_every_file_carries_stamp_and_notices(folder: Path) -> None:
    files = sorted((folder / "tables").iterdir())
    assert {f.name for f in files} == {
        f"{name}.{suffix}"
        for name in ("overall", "modalities", "objectives", "validity")
        for suffix in ("csv", "md", "tex")
    }
    for file in files:
        text = file.read_text().replace("\\", "")
        assert STAMP.replace("–", "--") in text or STAMP in text, file
        assert "LIMITED" in text, file


def test_csv_is_read_back_with_value_interval_and_n(folder: Path) -> None:
    frame = pd.read_csv(folder / "tables" / "overall.csv", comment="#").set_index("model")
    assert frame.loc["cot", "clean"] == 0.9 and frame.loc["cot", "clean_n"] == 10
    assert frame.loc["cot", "blind"] == 0.3
    assert frame.loc["cot", "PGD_4/255"] == pytest.approx(0.2)
    assert frame.loc["sft", "PGD_4/255"] == pytest.approx(0.5) and frame.loc["sft", "worst_8/255"] == 0.4
    assert frame.loc["cot", "clean_low"] < 0.9 < frame.loc["cot", "clean_high"]
    assert (frame["data"] == STAMP).all()
    per = pd.read_csv(folder / "tables" / "modalities.csv", comment="#").set_index(["model", "modality"])
    assert per.loc[("sft", "CT"), "clean"] == 1.0 and per.loc[("sft", "MRI"), "n"] == 5


def test_markdown_cells_and_column_order(folder: Path) -> None:
    text = (folder / "tables" / "overall.md").read_text()
    assert text.startswith(f"> **{STAMP}**")
    lines = [[w.strip() for w in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert lines[0] == ["", "sft", "instruct", "cot"], "a table too wide for a page is turned"
    words = [line[0] for line in lines[2:]]
    variants = [f"{kind} {eps}" for kind in ("noise", "FGSM", "PGD", "worst") for eps in EPS]
    unread = [f"{status} {name}" for name in ("clean", "worst 4/255") for status in ("invalid", "truncated")]
    assert words == ["n", "chance", "text prior", "clean", "blind", "image gain", *variants, *unread]
    wide = (folder / "tables" / "modalities.md").read_text()
    assert "| model | modality | n |" in wide and "FGSM" not in wide and "noise 8/255" not in wide
    assert "| 90.0 [59.6, 98.2] |" in text and "| 25.0 |" in text and "| +60.0 [" in text


def test_latex_is_balanced_and_escaped(folder: Path) -> None:
    for file in (folder / "tables").glob("*.tex"):
        lines = file.read_text().splitlines()
        body = [line for line in lines if not line.startswith("%")]
        text = "\n".join(body)
        bare = text.replace(r"\\", "").replace(r"\{", "").replace(r"\}", "")
        assert bare.count("{") == bare.count("}")
        assert r"Mini\_suite 100\% \& more" in text
        rows = [line for line in body if line.endswith(r"\\") and not line.startswith("\\")]
        assert len({line.replace(r"\&", "").count("&") for line in rows}) == 1 and len(rows) > 1
        assert all(character.isascii() for character in text)


def test_latex_escapes() -> None:
    assert escape_latex(r"50% & a_b #1 {x} $y ~ ^ \z –") == (
        r"50\% \& a\_b \#1 \{x\} \$y \textasciitilde{} \textasciicircum{} \textbackslash{}z --"
    )


def test_objectives_table_puts_weakest_beside_worst(summary: dict[str, Any]) -> None:
    table = objectives(Numbers(summary))
    assert [row.keys for row in table.rows] == [("cot", "pgd")], "one objective alone has nothing to compare"
    row = table.rows[0]
    assert [c.label for c in table.columns] == [*OBJECTIVES, "weakest alone", "worst of all"]
    assert [e and e.value for e in row.cells] == [0.5, 0.4, 0.3, 0.2, 0.5, 0.2]


def test_cells_that_rest_on_fewer_questions_say_so() -> None:
    column = Column("clean")
    assert cell_parts(Estimate(0.95, 0.911, 0.9731, 200, "wilson"), column, 200) == ("95.0", "[91.1, 97.3]")
    assert cell_parts(Estimate(0.5, 0.4, 0.6, 150, "wilson"), column, 200)[1] == "[40.0, 60.0] (n=150)"
    assert cell_parts(None, column) == ("–", "")
    nothing = Estimate(float("nan"), float("nan"), float("nan"), 0, "none")
    assert cell_parts(nothing, column) == ("missing", "")


def hostile_table() -> Table:
    row = Row(('a|b,"c"_d',), (Estimate(0.5, 0.4, 0.6, 9, "wilson"), None))
    return Table("odd", "T & T\n%", ("model",), (Column("x"), Column("y")), (row,), "STAMP\n# 1", ("N1", "N2"))


def test_hostile_names_break_no_format() -> None:
    table = hostile_table()
    lines = [line for line in to_csv(table).splitlines() if not line.startswith("#")]
    parsed = list(csv.reader(lines))
    assert parsed[1][:2] == ["STAMP # 1", 'a|b,"c"_d'] and len(parsed[1]) == len(parsed[0])
    assert r"a\|b" in to_markdown(table)
    assert r"\_d" in to_latex(table)
    assert texts(table) == [["50.0 [40.0, 60.0]", "–"]]


@pytest.mark.parametrize("terminal", [True, False])
def test_terminal_output_is_stamped_and_fits(summary: dict[str, Any], terminal: bool) -> None:
    text = printed(summary, terminal=terminal)
    assert STAMP in text and "LIMITED" in text
    assert max(map(len, text.splitlines())) <= 100
    assert "90.0 [59.6, 98.2]" in text and "PGD 8/255" in text and "decision_slot" in text
    assert "chance" in text and "invalid" in text and "MRI" in text


def test_no_control_codes_off_a_terminal(summary: dict[str, Any]) -> None:
    text = printed(summary, terminal=False, width=40)
    assert "\x1b" not in text and "│" not in text and "─" not in text
    assert "90.0 [59.6, 98.2]" in text, "a narrow pipe must not wrap numbers"


def test_many_models_are_cut_into_blocks_that_fit(tmp_path: Path) -> None:
    models = tuple(f"model-number-{i}" for i in range(7))
    text = printed(summarise(write_run(tmp_path, models)), terminal=False)
    assert max(map(len, text.splitlines())) <= 100
    assert all(model in text for model in models)


def test_a_partial_run_is_shown_with_a_banner(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes(
        b"".join(map(to_line, [*records("sft", "clean", 9), *records("sft", "blank", 3)[:4]]))
    )
    made = summarise(tmp_path)
    text = printed(made, terminal=False)
    assert "PARTIAL: 6 of 20" in text and "UNKNOWN DATA" in text
    assert [t.name for t in build(made)] == ["overall", "modalities", "validity"]
    assert "(n=4)" in to_markdown(overall(Numbers(made)))


def unreadable_under_attack(folder: Path) -> dict[str, Any]:
    """Every clean answer is read; under attack q6 is lost to an unreadable answer and q7 to one cut off.

    q8 too is unreadable in one attack, but a readable wrong answer of another loses it anyhow.
    """
    lost = {6: "invalid", 7: "truncated", 8: "invalid"}
    made = [*records("cot", "clean", 9), *records("cot", "pgd[no_think]@linf:4/255", 8)]
    for i, record in enumerate(records("cot", "pgd[answer]@linf:4/255", 6)):
        made.append(replace(record, status=lost.get(i, "valid"), answer=None) if i in lost else record)
    (folder / "journal.jsonl").write_bytes(b"".join(map(to_line, made)))
    return summarise(folder)


def test_unreadable_answers_stand_beside_the_robust_number(tmp_path: Path) -> None:
    made = unreadable_under_attack(tmp_path)
    statuses = ("invalid", "truncated")
    for table, judged in (
        (overall(Numbers(made)), ("clean", "worst 4/255")),
        (modalities(Numbers(made)), ("worst 4/255",)),
    ):
        labels = [f"{status} {name}" for name in judged for status in statuses]
        assert [c.label for c in table.columns if c.label.startswith(statuses)] == labels
        row = dict(zip((c.label for c in table.columns), table.rows[0].cells, strict=True))
        values = {label: e.value for label, e in row.items() if e and label in ("worst 4/255", *labels)}
        expected = {"worst 4/255": 0.6, "invalid clean": 0, "truncated clean": 0}
        expected |= {"invalid worst 4/255": 0.1, "truncated worst 4/255": 0.1}
        assert values == {label: expected[label] for label in values} and len(values) == len(labels) + 1
    for terminal in (True, False):
        text = printed(made, terminal=terminal)
        assert max(map(len, text.splitlines())) <= 100
        line = next(line for line in text.splitlines() if "invalid worst 4/255" in line)
        assert line.split()[-1] == "10.0"
        assert "under worst, questions lost by that alone" in " ".join(text.split())
        assert "clean answers that could not" not in text


def test_the_text_prior_stands_beside_chance(folder: Path, summary: dict[str, Any]) -> None:
    frame = pd.read_csv(folder / "tables" / "overall.csv", comment="#").set_index("model")
    assert (frame["text_prior"] == 0.4).all() and (frame["text_prior_n"] == 10).all()
    assert list(frame.columns).index("text_prior") == list(frame.columns).index("chance_n") + 1
    text = printed(summary, terminal=False)
    assert re.search(r"^text prior +40\.0 \[16\.8, 68\.7\]", text, re.MULTILINE)


def test_condition_labels() -> None:
    assert condition_label("pgd@linf:4/255") == "PGD 4/255"
    assert condition_label("pgd[answer]@l2:0.5") == "PGD[answer] L2 0.5"
    assert condition_label("worst@linf:8/255") == "worst 8/255" and condition_label("clean") == "clean"
