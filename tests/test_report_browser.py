"""The report of a run in a real browser: what a person does with it, and how large a run it bears."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, chromium
from report_run import ATTACKS, HOSTILE, REASONED, unpacked, write_large_run, write_run

from safemed_bench.report.run import write_page, write_run_page
from safemed_bench.report.source import Source, read_source

WIDE_SCRIPT = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return read_source(write_run(tmp_path_factory.mktemp("report") / "run"))


@pytest.fixture(scope="module")
def page(source: Source) -> Path:
    return write_page(source)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_it_opens_quietly_in_both_schemes_at_both_widths(browser: Browser, page: Path, scheme: str, width: int) -> None:
    with browser.page(page, width=width, scheme=scheme) as tab:
        assert tab.problems == [] and tab.requests == []
        assert tab.run(WIDE_SCRIPT) <= 0, "nothing makes the page wider than the window"
        paper = tab.run("getComputedStyle(document.body).backgroundColor")
        assert paper == {"light": "rgb(244, 246, 248)", "dark": "rgb(15, 19, 23)"}[scheme]
        pictures = tab.run("[...document.images].map((i) => i.complete && i.naturalWidth)")
        assert pictures and set(pictures) == {16}


def test_a_table_is_sorted_with_the_keyboard(browser: Browser, page: Path) -> None:
    column = (
        "[...document.querySelectorAll('#table-modalities th[scope=col]')].findIndex((h) => h.textContent === 'clean')"
    )
    values = (
        f"[...document.querySelectorAll('#table-modalities tbody tr')].map((r) => r.cells[{column}].firstChild.data)"
    )
    state = f"document.querySelectorAll('#table-modalities th[scope=col]')[{column}].getAttribute('aria-sort')"
    with browser.page(page) as tab:
        first = tab.run(values)
        tab.run(f"document.querySelectorAll('#table-modalities th[scope=col]')[{column}].firstChild.focus()")
        tab.press("Enter")
        down = [float(v) for v in tab.run(values)]
        assert down == sorted(map(float, first), reverse=True) and tab.run(state) == "descending"
        tab.press(" ")
        assert [float(v) for v in tab.run(values)] == sorted(map(float, first)) and tab.run(state) == "ascending"
        tab.press("Enter")
        assert tab.run(values) == first and tab.run(state) == "none", "a third time gives the first order back"
        assert tab.problems == []


def choose(tab: Any, **values: str) -> None:
    for name, value in values.items():
        tab.run(
            f"(() => {{ const f = document.getElementById('f-{name}'); f.value = {json.dumps(value)};"
            " f.dispatchEvent(new Event('input', { bubbles: true })); })()"
        )


COUNT = "document.getElementById('count').textContent"


def test_filters_find_what_the_records_hold(browser: Browser, page: Path, source: Source) -> None:
    records = [r for cell in source.records.values() for r in cell.values()]
    clean = {(r.model, r.question_id): r.correct for r in records if r.condition == "clean"}
    wanted = [
        ({"condition": ""}, lambda r: True),
        ({"model": "thinks"}, lambda r: r.model == "thinks"),
        ({"modality": "MRI"}, lambda r: r.model == "thinks" and r.modality == "MRI"),
        ({"modality": "", "type": "Anatomy"}, lambda r: r.model == "thinks" and r.question_type == "Anatomy"),
        (
            {"type": "", "outcome": "turned"},
            lambda r: r.model == "thinks" and clean[r.model, r.question_id] and not r.correct,
        ),
        ({"outcome": "unreadable"}, lambda r: r.model == "thinks" and r.status == "invalid"),
        ({"outcome": "missing"}, lambda r: False),
        ({"outcome": "right", "condition": REASONED, "model": ""}, lambda r: r.condition == REASONED and r.correct),
    ]
    with browser.page(page) as tab:
        began = [r for r in records if r.condition == ATTACKS[2]]
        assert tab.run(COUNT) == f"{len(began)} verdicts on 24 questions", "it begins with the attack that all met"
        for values, fits in wanted:
            choose(tab, **values)
            found = [r for r in records if fits(r)]
            questions = len({r.question_id for r in found})
            tab.wait(f"{COUNT} === '{len(found)} verdicts on {questions} questions'")
        tab.run("document.getElementById('clear').click()")
        assert tab.run(COUNT) == "312 verdicts on 24 questions"
        assert tab.run("document.getElementById('found').rows.length") == 50
        tab.run("document.getElementById('more').click()")
        assert tab.run("document.getElementById('found').rows.length") == 100
        assert tab.problems == [] and tab.requests == []


@pytest.mark.parametrize(
    ("words", "fits"),
    [
        ("PICTURE 7?", lambda r: r.question_id.startswith("q 7/")),
        ("nodule", lambda r: r.n_options == 4),
        ("onerror", lambda r: r.text == HOSTILE),
        ("q 11/", lambda r: r.question_id.startswith("q 11/")),
        ("no such words", lambda r: False),
    ],
)
def test_search_looks_at_questions_options_replies_and_ids(
    browser: Browser, page: Path, source: Source, words: str, fits: Any
) -> None:
    found = [r for cell in source.records.values() for r in cell.values() if fits(r)]
    with browser.page(page) as tab:
        choose(tab, condition="")
        tab.run("document.getElementById('f-text').focus()")
        tab.type(words)
        tab.wait(f"{COUNT} === '{len(found)} verdicts on {len({r.question_id for r in found})} questions'")


def test_a_link_opens_its_question_and_the_keyboard_goes_on(browser: Browser, page: Path) -> None:
    title = "document.querySelector('#q-body h3').textContent"
    with browser.page(page, "#q=q%205%2FX-Ray") as tab:
        assert tab.run("document.getElementById('question').open")
        assert tab.run(title) == "What is shown in picture 5?"
        assert tab.run("document.querySelectorAll('#q-body tbody tr').length") == 13
        tab.press("ArrowRight")
        tab.wait(f"{title} === 'What is shown in picture 6?'")
        assert tab.run("location.hash") == "#q=q%206%2FCT"
        tab.press("ArrowLeft")
        tab.wait(f"{title} === 'What is shown in picture 5?'")
        tab.press("Escape")
        tab.wait("!document.getElementById('question').open && location.hash === ''")
        tab.run("document.querySelector('#found a').focus()")
        tab.press("Enter")
        tab.wait(f"document.getElementById('question').open && {title} === 'What is shown in picture 0?'")
        assert tab.problems == []


def test_a_link_to_no_question_says_so(browser: Browser, page: Path) -> None:
    with browser.page(page, "#q=%zz") as tab:
        assert tab.run(COUNT) == "There is no question %zz in this run."
        assert not tab.run("document.getElementById('question').open") and tab.problems == []


def test_what_a_model_wrote_does_nothing(browser: Browser, page: Path) -> None:
    with browser.page(page, "#q=q%203%2FCT") as tab:
        told = tab.run("[...document.querySelectorAll('#q-body .reply')].map((cell) => cell.textContent)")
        assert HOSTILE in told, "it is there, word by word"
        assert tab.run("window.hacked === undefined && !document.querySelector('#q-body img')")
        assert tab.problems == [] and tab.requests == []


def test_changed_words_are_marked_in_the_browser_as_in_the_gallery(browser: Browser, page: Path) -> None:
    with browser.page(page, "#q=q%203%2FCT") as tab:
        rows = tab.run(
            "[...document.querySelectorAll('#q-body tbody tr')].filter((r) => r.cells[0].textContent === 'thinks')"
            ".map((r) => [r.cells[3].textContent, [...r.cells[3].querySelectorAll('mark')].map((m) => m.textContent)])"
        )
        assert rows[0][1] == [] and any(marks for _, marks in rows[1:])
        assert all(mark in text for text, marks in rows for mark in marks)


@pytest.mark.parametrize("width", [400, 1600])
def test_without_scripts_it_can_be_read(browser: Browser, page: Path, width: int) -> None:
    with browser.page(page, width=width, scripts=False) as tab:
        assert tab.run("document.querySelectorAll('#table-modalities tbody tr').length") == 10
        seen = "document.querySelector('{}').getBoundingClientRect().height > 0"
        assert tab.run(seen.format("noscript p")) and tab.run(seen.format("#eps svg.chart"))
        assert tab.run("getComputedStyle(document.querySelector('.browser')).display") == "none"
        assert not tab.run("document.documentElement.classList.contains('scripted')")
        assert tab.run(WIDE_SCRIPT) <= 0 and tab.problems == [] and tab.requests == []


def test_on_paper_there_is_no_browser_and_all_of_the_tables(browser: Browser, page: Path) -> None:
    with browser.page(page, media="print", scheme="dark", width=1000) as tab:
        assert tab.run("getComputedStyle(document.querySelector('nav')).display") == "none"
        assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert tab.run("getComputedStyle(document.querySelector('.card')).overflowX") == "visible"
        printed = tab.call("Page.printToPDF")["data"]
        assert base64.b64decode(printed).startswith(b"%PDF")


# --- size ---


def opening(browser: Browser, page: Path) -> tuple[float, float]:
    """Seconds until page and records are there and the first search has run: by the clock, and of the page's thread.

    The clock of a machine that others use measures them, too; the thread's own time is the page's alone.
    """
    with browser.page(page) as tab:
        assert tab.problems == [] and tab.requests == []
        return tab.run("Number(document.documentElement.dataset.seconds)"), tab.work


@pytest.mark.parametrize("count", [1000, pytest.param(17662, marks=pytest.mark.slow)])
def test_a_large_run_is_a_small_page(browser: Browser, tmp_path: Path, count: int) -> None:
    page = write_run_page(write_large_run(tmp_path, count))
    size, (clock, work) = page.stat().st_size, opening(browser, page)
    print(f"{count} questions x 6 conditions: {size / 1e6:.2f} MB, opened in {clock:.2f} s, {work:.2f} s of them work")
    assert size <= 10e6 * max(count / 17662, 0.1) and work < 3
    assert len(unpacked(page.read_text())["cells"]) == 6
