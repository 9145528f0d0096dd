"""The report of a run: one file, the same twice, with the right numbers. In a browser: test_report_browser.py."""

from __future__ import annotations

import base64
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_run import ATTACKS, REASONED, read_records, unpacked, write_records, write_run
from test_training_page import Page as Html
from test_training_page import config, lines
from test_training_page import write as write_training

from safemed_bench import cli
from safemed_bench.core.types import LETTERS
from safemed_bench.report import packing
from safemed_bench.report.gallery import examples
from safemed_bench.report.jinja import TEMPLATES
from safemed_bench.report.matrices import overlap_grids
from safemed_bench.report.run import run_page, write_run_page
from safemed_bench.report.source import Source, read_source
from safemed_bench.report.words import compare
from safemed_bench.run import artefacts

REPO = Path(__file__).parents[1]
WIDE_SCRIPT = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def source(folder: Path) -> Source:
    return read_source(folder)


@pytest.fixture(scope="module")
def html(source: Source) -> str:
    return run_page(source)


def with_summary(source: Source, **changes: Any) -> Source:
    return replace(source, summary=dict(source.summary) | changes)


def section(html: str, name: str) -> str:
    found = re.search(rf'<section id="{name}">.*?</section>', html, re.DOTALL)
    return found[0] if found else ""


# --- the page as a file ---


def test_the_same_records_give_the_same_bytes(folder: Path, html: str) -> None:
    before = (folder / "summary.json").read_bytes()
    assert write_run_page(folder).read_text() == html
    assert (folder / "summary.json").read_bytes() == before


def test_the_page_needs_nothing_else(html: str) -> None:
    found = Html(html)
    assert len(found.ids) == len(set(found.ids)), "an id stands once"
    assert not found.tags & {"link", "iframe", "object", "base"}
    assert all(src.startswith("data:image/png;base64,") for src in re.findall(r' src="([^"]*)"', html))
    assert {ref for ref in re.findall(r'(?:href="|url\()#([^"=)]+)[")]', html)} <= set(found.ids)
    assert "default-src 'none'" in html and "://" not in html.replace("data:image", "")


def test_importing_the_report_imports_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'matplotlib.pyplot'}"
    code = f"import sys, safemed_bench.report.run; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=REPO).returncode == 0


def test_colours_of_the_report_have_a_light_and_a_dark_value() -> None:
    css = (TEMPLATES / "run.css").read_text() + (TEMPLATES / "page.css").read_text()
    used = set(re.findall(r"var\(--([a-z-]+)\)", css)) - {"own", "v", "stamp", "serif", "right", "wrong"}
    assert used and {name for name in used if css.count(f"--{name}:") < 2} == set()


def test_what_is_hostile_is_text(folder: Path, tmp_path: Path) -> None:
    bad = "</script><img src=x onerror=alert(1)>"
    run = write_run(tmp_path / "bad", title=bad, notices=[bad])
    records = [replace(r, text=bad, error=bad if r.condition == "blank" else "") for r in read_records(run)]
    write_records(run, records)
    info = json.loads((run / "run.json").read_text())
    for question in info["questions"]:
        question |= {"question": bad, "options": [bad] * question["n_options"]}
    (run / "run.json").write_text(json.dumps(info))
    html = run_page(read_source(run))
    found = Html(html)
    assert "onerror" not in found.attributes and 'src="x"' not in html
    assert html.count("<script") == html.count("</script>") == 2, "the records and the page's own script"
    assert found.text.count(bad) > 10


# --- what is on it ---


def test_the_head_says_what_it_is_and_what_was_found(html: str, source: Source) -> None:
    told = Html(html).text
    assert "PHANTOM DATA" in told and "nothing here is about medical images" in told
    numbers = source.numbers
    best = max(("plain", "thinks"), key=lambda m: numbers.get(m, "worst@linf:4/255").value)
    e = numbers.get(best, "worst@linf:4/255")
    said = f"{best} {100 * e.value:.1f}% [{100 * e.low:.1f}, {100 * e.high:.1f}]"
    assert f"Under the worst of the attacks at L∞ 4/255, still right of 24 questions: {said}" in told
    assert "chance is" in told and "without the image up to" in told
    assert "every 8-bit value of the 16 × 16 image by up to 4/255" in told
    assert "PGD (5 steps, 2 restarts; answer token, decision slot)" in told and "Limits and intended use" in told


def test_data_that_are_real_are_not_called_phantom(tmp_path: Path) -> None:
    html = run_page(read_source(write_run(tmp_path, data="omnimedvqa")))
    told = html[html.index("<body>") : html.index("<script")].lower()
    assert "phantom" not in told and "omnimedvqa at mini, split test" in told


def test_a_partial_run_says_so_above_all_numbers(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    records = read_records(run)
    gone = [r for r in records if r.model == "thinks" and r.condition == REASONED][:5]
    failed = [replace(r, error="CUDA <out>", answer=None, status=None, correct=None) if r is records[0] else r
              for r in records if r not in gone]  # fmt: skip
    write_records(run, failed)
    html = run_page(read_source(run))
    alert = re.search(r'<p class="callout warn" role="alert">([^<]*)', html)
    assert alert and "PARTIAL: 6 of 312 units have no verdict (1 errors, 5 not run)" in alert[1]
    assert html.index(alert[0]) < html.index('class="verdict"')
    cells = unpacked(html)["cells"]
    assert [c["marks"].count("-") for c in cells if c["condition"] == REASONED] == [5]
    assert cells[0]["marks"][0] == "e" and "CUDA &lt;out&gt;" in html


def test_the_table_has_every_modality_micro_and_macro(html: str, source: Source) -> None:
    part = section(html, "modalities")
    rows = re.findall(r"<tr[^>]*><th[^>]*>([^<]*)</th><th[^>]*>([^<]*)</th>(.*?)</tr>", part, re.DOTALL)
    names = ("all (micro)", "all (macro)", "CT", "MRI", "X-Ray")
    assert [(a, b) for a, b, _ in rows] == [(name, model) for name in names for model in ("plain", "thinks")]
    heads = [unescape(h) for h in re.findall(r"<th scope=\"col\"[^>]*>([^<]*)", part)]
    at = heads.index("worst 4/255") - 2
    for name, metric, modality in (("all (micro)", "accuracy", "all"), ("all (macro)", "accuracy_macro", "all"),
                                   ("MRI", "accuracy", "MRI")):  # fmt: skip
        e = source.numbers.get("thinks", "worst@linf:4/255", metric, modality)
        cell = re.findall(r"<td.*?</td>", next(c for a, b, c in rows if (a, b) == (name, "thinks")), re.DOTALL)[at]
        assert f">{100 * e.value:.1f}<small>[{100 * e.low:.1f}, {100 * e.high:.1f}]</small>" in cell
        assert float(re.search(r'data-sort="([^"]+)"', cell)[1]) == pytest.approx(e.value, abs=1e-6)


def test_a_figure_for_every_modality_with_its_table(html: str) -> None:
    part = section(html, "eps")
    assert re.findall(r'<figure class="panel" id="([^"]+)"', part) == [
        f"eps-linf-{name}" for name in ("all", "ct", "mri", "x-ray")
    ]
    assert part.count("<details>") == 4 and "n = 24" in part and "blind</th>" in part and "chance</th>" in part


def test_both_attacks_at_once_by_hand(source: Source) -> None:
    verdicts = {}
    for record in source.records["thinks", ATTACKS[2]].values():
        verdicts[record.question_id] = [record.correct]
    for record in source.records["thinks", REASONED].values():
        verdicts[record.question_id].append(record.correct)
    share = np.mean([all(both) for both in verdicts.values()])
    grids = dict(overlap_grids(source))
    keys = [row[0][0] for row in grids["thinks"].rows]
    assert keys == ["FGSM answer", "PGD answer", "PGD decision slot"]
    assert grids["thinks"].rows[2][1][1].value == f"{100 * share:.1f}"
    assert grids["thinks"].rows[1][1][2].value == "", "the other half says the same"


def test_the_objectives_table_ends_in_the_worst(html: str, source: Source) -> None:
    part = section(html, "attacks")
    e = source.numbers.get("thinks", "worst@linf:4/255")
    last = re.findall(r"<tr class=\"total.*?</tr>", part.split("overlap-0")[0], re.DOTALL)[-1]
    assert "every attack" in last and f">{100 * e.value:.1f}<small>" in last


def test_sections_only_where_there_is_something_to_say(source: Source, html: str) -> None:
    assert section(html, "diagnostics") and not section(html, "certified") and not section(html, "training")
    checks = [
        {"id": "monotone-eps", "status": "pass", "rule": "more eps, less accuracy", "evidence": {"drop": 0.2}},
        {"id": "zero-eps", "status": "fail", "rule": "eps 0 is clean", "evidence": "2 <of> 24 differ"},
    ]
    clean = [r for r in source.summary["estimates"] if r["condition"] == "clean" and r["metric"] == "accuracy"]
    rows = [
        row
        | {
            "metric": "certified_accuracy",
            "condition": condition,
            "value": value,
            "low": value - 0.1,
            "high": value + 0.1,
        }
        for condition, value in (
            ("certify[sigma=0.25]", 0.875),
            ("certified@l2:0.25", 0.75),
            ("certified@l2:0.5", 0.5),
        )
        for row in clean
    ]
    more = with_summary(source, diagnostics=checks, estimates=[*source.summary["estimates"], *rows])
    html = run_page(more)
    told = section(html, "diagnostics")
    assert told.index("zero-eps") < told.index("monotone-eps"), "what failed comes first"
    assert "2 &lt;of&gt; 24 differ" in told and "more eps, less accuracy" in told and "&#34;drop&#34;: 0.2" in told
    assert "Diagnostics failed: zero-eps" in html[: html.index('class="verdict"')]
    proven = section(html, "certified")
    assert "75.0 [65.0, 85.0]" in proven and 'id="radius-all"' in proven
    assert "L2 0<" in proven and "87.5 [77.5, 97.5]" in proven, "at radius 0 what the smoothed model answers at all"
    assert "certified" not in section(html, "attacks").lower()


def test_unreadable_answers_are_shown_as_they_are(html: str) -> None:
    part = section(html, "audit")
    assert "1 of 312 replies could not be read" in part
    assert "&lt;think&gt;no &lt;i&gt;end" in part and "no answer could be read" in part


def test_provenance_is_complete(html: str) -> None:
    part = Html(section(html, "provenance")).text
    for words in (
        "c0ffee with uncommitted changes",
        "f00d",
        "safemed-bench run 'toy suite.yaml'",
        "Seed 7",
        "python 3.11",
    ):
        assert words in part
    assert "restarts: 2" in part, "the suite as it was resolved"


def test_a_training_beside_the_entry_is_shown(tmp_path: Path) -> None:
    training = write_training(tmp_path / "toy", lines(), config())
    cards = [{"name": "plain", "path": str(training / "entry")}, {"name": "thinks", "path": ""}]
    html = run_page(read_source(write_run(tmp_path / "run", models=cards)))
    part = section(html, "training")
    assert 'id="training-0-validation"' in part and "<h3>plain</h3>" in part and "<h3>thinks</h3>" not in part


def test_runs_with_little_in_them_have_a_page_all_the_same(tmp_path: Path) -> None:
    run = write_run(tmp_path / "clean")
    clean = [r for r in read_records(run) if r.condition == "clean" and r.model == "plain"]
    for name in ("run.json", "suite.yaml"):
        (run / name).unlink()
    write_records(run, clean)
    html = run_page(read_source(run))
    told = Html(html).text
    assert "DATA UNKNOWN" in told and "No attack was run." in told and "Right of 24 questions: plain" in told
    assert not section(html, "eps") and not section(html, "attacks") and not section(html, "gallery")
    assert unpacked(html)["questions"]["id"] == [r.question_id for r in clean]
    write_records(run, [replace(r, error="no image", answer=None, status=None, correct=None) for r in clean])
    html = run_page(read_source(run))
    assert "No question has a verdict." in html and "PARTIAL: 24 of 24 units" in html


# --- pictures ---


def pixels(uri: str) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))).astype(int)


def test_pictures_are_the_pixels_that_were_judged(source: Source) -> None:
    shown = examples(source)
    assert {e.model for e in shown} == {"plain", "thinks"} and {e.held for e in shown} == {True, False}
    for example in shown:
        question, condition = example.question, {"plain": ATTACKS[2], "thinks": REASONED}[example.model]
        record = source.records[example.model, _condition(source, example.model, condition)][question["id"]]
        canvas = np.asarray(Image.open(question["image"])).astype(int)
        saved = artefacts.load(source.folder, record.artefact, canvas.transpose(2, 0, 1).astype(np.uint8))
        assert np.array_equal(pixels(example.clean), canvas)
        assert np.array_equal(pixels(example.adversarial), saved.transpose(1, 2, 0))
        difference = pixels(example.difference) - 128
        assert example.factor == 127 // np.abs(saved.transpose(1, 2, 0) - canvas).max()
        assert np.array_equal(difference, example.factor * (saved.transpose(1, 2, 0) - canvas))
        assert record.clean_correct and record.correct is example.held


def _condition(source: Source, model: str, guess: str) -> str:
    """The attack that leaves least right, counted by hand; `guess` is only where the counting begins."""
    names = [c for m, c in source.records if m == model and c.endswith("@linf:4/255")]
    return min(names, key=lambda c: (sum(bool(r.correct) for r in source.records[model, c].values()), names.index(c)))


def test_no_picture_without_its_files(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for image in (run / "images").iterdir():
        image.write_bytes(image.read_bytes() + b"changed")
    source = read_source(run)
    assert examples(source) == []
    assert "No picture is shown" in section(run_page(source), "gallery")


@pytest.mark.parametrize(
    ("before", "after", "old", "new"),
    [
        ("a b c", "a x c", ["b"], ["x"]),
        ("same", "same", [], []),
        ("", "new", [], ["new"]),
        ("B</a>", "C</a>", ["B"], ["C"]),
    ],
)
def test_words_that_changed(before: str, after: str, old: list[str], new: list[str]) -> None:
    first, second = compare(before, after)
    assert "".join(p.text for p in first) == before and "".join(p.text for p in second) == after
    assert [p.text for p in first if p.changed] == old and [p.text for p in second if p.changed] == new


# --- the records inside ---


def test_every_verdict_is_in_the_page(html: str, source: Source) -> None:
    data = unpacked(html)
    assert len(data["cells"]) == 13 and data["questions"]["id"] == list(source.questions)
    for cell in data["cells"]:
        records = source.records[cell["model"], cell["condition"]]
        for q, id in enumerate(data["questions"]["id"]):
            record = records[id]
            assert data["strings"][cell["texts"][q]] == record.text
            assert cell["marks"][q] == (LETTERS[record.answer] if record.answer is not None else "i")


def test_a_page_that_would_be_too_large_tells_what_it_leaves_out(source: Source) -> None:
    whole = len(packing.pack(source).data)
    assert not packing.pack(source).note
    sizes = []
    for budget in (whole - 1, whole // 2, whole // 4, 10):
        packed = packing.pack(source, budget)
        sizes.append(len(packed.data))
        assert packed.note and len(packed.data) <= budget
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] == 0
    assert "too large for a page" in packing.pack(source, 10).note


# --- the command ---


def test_the_command_writes_page_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path)
    assert cli.invoke(["report", str(run), "--figures", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    names = sorted(Path(name).name for name in told["figures"])
    assert names == sorted(f"eps-linf-{m}.{s}" for m in ("all", "ct", "mri", "x-ray") for s in ("pdf", "svg"))
    first = {name: Path(name).read_bytes() for name in (*told["figures"], told["page"])}
    assert b"phantom (generated images" in first[told["figures"][0]], "a figure that is passed on says what data it is"
    assert cli.invoke(["report", str(run), "--figures"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(run / "report.html")
    assert first == {name: Path(name).read_bytes() for name in first}


@pytest.mark.parametrize(
    ("flag", "word"), [("latex", r"\begin{table*}"), ("markdown", "| model |"), ("csv", "data,model")]
)
def test_the_command_prints_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str, word: str) -> None:
    run = write_run(tmp_path)
    assert cli.invoke(["report", str(run), f"--{flag}"]) == 0
    out = capsys.readouterr().out
    assert word in out and "phantom (generated images" in out and not (run / "report.html").exists()


def test_the_command_refuses_what_makes_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    training = write_training(tmp_path / "toy", lines(), config())
    for arguments, told in (
        ([str(run), "--latex", "--csv"], "one of --latex, --markdown, --csv at a time"),
        ([str(run), "--csv", "--figures"], "without --figures"),
        ([str(training), "--csv"], "the folder of a training"),
    ):
        assert cli.invoke(["report", *arguments]) == 2
        assert told in capsys.readouterr().err
