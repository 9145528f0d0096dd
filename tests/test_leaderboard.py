"""The leaderboard: what may stand on it, and the pages that are built of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_boards import BASE, N, board, edit, problems, refused, with_one_entry
from small_runs import CLEAN, PGD, SETTINGS, WORST, write

from safemed_bench import cli
from safemed_bench.core.errors import UsageError
from safemed_bench.report import board as pages
from safemed_bench.results.boards import add, board_name
from safemed_bench.results.sources import load_measured
from safemed_bench.results.standards import CASCADE, standard_attack


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return with_one_entry(tmp_path)


# --- what stands on a board ---


def test_a_good_entry_stands(root: Path) -> None:
    assert problems(root) == ""
    entry = json.loads((board(root) / "entries" / "m.json").read_text())
    numbers = {(r["condition"], r["metric"], r["modality"]): r for r in entry["numbers"]}
    assert numbers[CLEAN, "accuracy", "all"]["value"] == 0.9 and numbers[WORST, "accuracy", "all"]["n"] == N
    assert numbers[WORST, "accuracy", "CT"]["value"] == 1.0
    assert entry["best_known_attack"] == {
        "condition": PGD,
        "attack": "pgd (restarts 1, steps 20)",
        "accuracy": 0.666667,
    }
    assert entry["status"] == "self-reported" and entry["flags"] == []
    assert "/weights" not in json.dumps(entry)


@pytest.mark.parametrize(("left", "known"), [(20, "safemed-attack@linf:4/255"), (50, PGD)])
def test_the_best_known_attack_may_be_one_without_an_objective(tmp_path: Path, left: int, known: str) -> None:
    """A measured cell, whether or not it has an objective; not the worst over the objectives of an attack."""
    run = write(tmp_path / "run", {**BASE, "safemed-attack@linf:4/255": "1" * left + "0" * (N - left)})
    add(run, tmp_path / "boards", standard="pgd")
    entry = json.loads((board(tmp_path / "boards") / "entries" / "m.json").read_text())
    assert entry["best_known_attack"]["condition"] == known


def test_the_same_run_gives_the_same_bytes(tmp_path: Path, root: Path) -> None:
    again = tmp_path / "again"
    add(tmp_path / "run", again, standard="pgd")
    for path in root.rglob("*.*"):
        assert path.read_bytes() == (again / path.relative_to(root)).read_bytes()


def test_phantom_and_real_data_have_boards_of_their_own(tmp_path: Path, root: Path) -> None:
    real = {"data": {"name": "omnimedvqa", "fingerprint": "beef", "stamp": "OmniMedVQA"}}
    add(write(tmp_path / "real", BASE, info=real), root, standard="pgd")
    assert sorted(p.name for p in root.iterdir()) == ["small", "small-phantom"]
    assert board_name({"suite": "s", "data": {"name": "mine"}}) == "s-mine"


def test_an_entry_is_a_baseline_for_gate_and_compare(tmp_path: Path, root: Path, capsys: Any) -> None:
    weak = write(tmp_path / "weak", {**BASE, PGD: "0" * N})
    entry = str(board(root) / "entries" / "m.json")
    assert cli.invoke(["gate", str(weak), "--baseline", entry]) == 4
    assert cli.invoke(["gate", str(tmp_path / "run"), "--baseline", str(board(root))]) == 0
    assert cli.invoke(["compare", str(board(root)), str(weak), "--json"]) == 0


# --- what is not put on it ---


@pytest.mark.parametrize(
    ("outcomes", "options", "words"),
    [
        ({**BASE, PGD: "1" * 59 + "."}, {}, "missing questions: 1 of 60 have no verdict under pgd"),
        ({**BASE, PGD: "1" * 59 + "e"}, {}, "missing questions: 1 of 60"),
        ({CLEAN: BASE[CLEAN], PGD: BASE[PGD]}, {}, "no blank condition"),
        (
            {**BASE, PGD: "1" * N},
            {"card": {"reasons": True}},
            "weaker attack: pgd[rationale_answer]@linf:4/255 is missing",
        ),
        (
            BASE,
            {"settings": {"conditions": ["clean", {"attack": "pgd", "steps": 10}]}},
            "weaker attack: pgd[answer]@linf:4/255 has 10 steps, fewer than 20",
        ),
        (
            BASE,
            {"settings": {"conditions": ["clean", {"attack": "pgd", "steps": 40, "step_size": 1e-6}]}},
            "sets step_size, which the standard attack leaves at its default",
        ),
        (
            BASE,
            {"settings": {"conditions": ["clean", {"attack": "fgsm", "name": "pgd"}]}},
            "pgd[answer]@linf:4/255 is not made by pgd",
        ),
        (BASE, {"card": {"path": ""}}, "a defence must state the attack that was adapted to it"),
    ],
)
def test_what_may_not_stand_is_not_written(
    tmp_path: Path, outcomes: dict[str, str], options: dict[str, Any], words: str
) -> None:
    root = tmp_path / "boards"
    root.mkdir()
    assert words in refused(root, write(tmp_path / "run", outcomes, **options), standard="pgd")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"info": {"data": {"name": "phantom", "fingerprint": "bad", "stamp": "others"}}},
            "mixed data: measured on others",
        ),
        (
            {"settings": {"threat": {"norm": "linf", "eps": ["2/255", "4/255"], "headline": "4/255"}}},
            "another threat model: linf at 2/255, 4/255, the board has linf at 4/255",
        ),
        ({"settings": {"data": {"resolution": 32, "fit": "pad"}}}, "another canvas: 32 px, pad"),
        ({"info": {"code": {"attack": 2}}}, "other versions of the code"),
    ],
)
def test_an_entry_of_other_terms_is_refused(tmp_path: Path, root: Path, options: dict[str, Any], words: str) -> None:
    assert words in refused(root, write(tmp_path / "other", BASE, model="n", **options))


def test_more_steps_are_welcome_and_a_stated_adaptive_attack_lets_a_defence_in(tmp_path: Path) -> None:
    strong = {"conditions": ["clean", {"attack": "pgd", "steps": 100, "restarts": 5}]}
    run = write(tmp_path / "run", BASE, settings=strong, card={"path": ""})
    (path,) = add(run, tmp_path / "boards", adaptive="PGD through 16 draws of the noise", standard="pgd")
    assert json.loads(path.read_text())["adaptive"].startswith("PGD through")
    (measured,) = load_measured(run).values()
    assert standard_attack(measured, "pgd") == []


STOOD = "1" * 40 + "0" * 20
STAGES = {f"{name}@linf:4/255": STOOD for name in ("fgsm[answer]", "apgd[margin]", "apgd[targeted_margin]", "square")}
APART = [
    "clean",
    {"attack": "fgsm"},
    {"attack": "pgd", "steps": 20},
    {"attack": "apgd", "restarts": 3, "objectives": ["margin", "targeted_margin"]},
    {"attack": "square", "params": {"queries": 500}},
]


def test_a_new_board_demands_the_cascade_and_says_so(tmp_path: Path) -> None:
    root = tmp_path / "boards"
    root.mkdir()
    said = refused(root, write(tmp_path / "weak", BASE))
    for name in STAGES:
        assert f"weaker attack: {name} is missing, which the standard attack has" in said
    whole = {**BASE, f"{CASCADE}@linf:4/255": STOOD}
    settings = {"conditions": [*SETTINGS["conditions"], {"attack": CASCADE}]}
    add(write(tmp_path / "whole", whole, settings=settings), root)
    add(write(tmp_path / "apart", BASE | STAGES, model="n", settings={"conditions": APART}), root)
    assert problems(root) == problems(root, "n.json") == ""
    assert json.loads((board(root) / "board.json").read_text())["standard"] == CASCADE
    pages.build(root)
    for page in ("README.md", "index.html"):
        assert "standard attack: safemed-attack: FGSM" in (root / page).read_text()
    with pytest.raises(UsageError, match="the board small-phantom has safemed-attack, for all its entries"):
        add(write(tmp_path / "more", BASE, model="o"), root, standard="pgd")
    with pytest.raises(UsageError, match="Did you mean 'pgd'"):
        add(tmp_path / "more", tmp_path / "others", standard="pgdd")


def test_a_board_that_does_not_say_was_made_for_pgd_and_keeps_it(tmp_path: Path, root: Path) -> None:
    terms = board(root) / "board.json"
    terms.write_text(json.dumps({k: v for k, v in json.loads(terms.read_text()).items() if k != "standard"}))
    add(write(tmp_path / "next", BASE, model="n"), root)
    assert problems(root) == problems(root, "n.json") == "" and "standard" not in json.loads(terms.read_text())
    pages.build(root)
    assert "PGD on every standard objective alone, weaker than safemed-attack" in (root / "README.md").read_text()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({3: {"attack": "apgd", "objectives": ["margin", "targeted_margin"]}}, "has 1 restarts, fewer than 3"),
        ({3: {"attack": "apgd", "steps": 10, "restarts": 3}}, "apgd[margin]@linf:4/255 has 10 steps, fewer than 50"),
        ({4: {"attack": "square", "params": {"queries": 50}}}, "square@linf:4/255 has 50 queries, fewer than 500"),
        ({4: {"attack": "square", "params": {"share": 0.1}}}, "sets share, which the standard attack leaves"),
        ({1: {"attack": "square", "name": "fgsm"}}, "fgsm[answer]@linf:4/255 is not made by fgsm"),
    ],
)
def test_weaker_stages_are_no_cascade(tmp_path: Path, change: dict[int, Any], words: str) -> None:
    root = tmp_path / "boards"
    root.mkdir()
    settings = {"conditions": [change.get(i, condition) for i, condition in enumerate(APART)]}
    assert words in refused(root, write(tmp_path / "run", BASE | STAGES, settings=settings))


@pytest.mark.parametrize("reasons", [False, True])
def test_the_stages_asked_for_are_those_of_the_cascade(reasons: bool) -> None:
    from safemed_bench.attacks.cascade import SafeMedAttack
    from safemed_bench.results.standards import DEFAULTS, _stages

    made = SafeMedAttack().stages(reasons)
    asked = {(part.attack, part.objective): part for part in _stages(reasons)}
    assert asked.keys() == {(stage.attack.name, stage.objective) for stage in made}
    for stage in made:
        part = asked[stage.attack.name, stage.objective]
        for key, default in DEFAULTS[stage.attack.name].items():
            assert part.least.get(key, default) == getattr(stage.attack, key)


def test_a_taken_name_is_not_overwritten_unasked(tmp_path: Path, root: Path) -> None:
    run = write(tmp_path / "new", {**BASE, PGD: "0" * N})
    assert "stands on the board already" in refused(root, run)
    add(run, root, replace=True)
    assert problems(root) == ""
    with pytest.raises(UsageError, match="has no model 'x'"):
        add(run, root, ("x",))


# --- pages and commands ---


def test_the_pages_are_static_escaped_and_in_order(tmp_path: Path, root: Path) -> None:
    evil = "</td><script>alert(1)</script>|"
    add(write(tmp_path / "n", {**BASE, PGD: "1" * 50 + "0" * 10}, model="n", card={"description": evil}), root)
    (readme, page) = pages.build(root)
    text, html = readme.read_text(), page.read_text()
    assert text.index("| 1 | n ") < text.index("| 2 | m ") and "**phantom (small), split test**" in text
    assert "83.3 [72.0, 90.7]" in text and "\\|" in text
    assert html.index(">n<") < html.index(">m<") and "83.3" in html
    assert "<script>alert" not in html and "&lt;script&gt;alert(1)" in html
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", html) and "prefers-color-scheme: dark" in html
    assert pages.to_html([]) != html and (readme.read_bytes(), page.read_bytes()) == tuple(
        p.read_bytes() for p in pages.build(root)
    )


def test_a_rejected_entry_is_shown_as_such(root: Path) -> None:
    edit(root, lambda entry: entry["numbers"][0].update(value=1.0))
    assert "rejected by check" in pages.to_markdown([pages.read_board(board(root))])


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, root = write(tmp_path / "run", BASE), tmp_path / "boards"
    root.mkdir()
    assert cli.invoke(["leaderboard", "check", "--root", str(root)]) == 0
    assert cli.invoke(["leaderboard", "add", str(run), "--root", str(root), "--model", "m", "--standard", "pgd"]) == 0
    assert capsys.readouterr().out.endswith("small-phantom/entries/m.json\n")
    assert (root / "README.md").is_file() and (root / "index.html").is_file()
    assert cli.invoke(["leaderboard", "check", "--root", str(root), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "entries": {"small-phantom/m.json": []}}
    edit(root, lambda entry: entry["numbers"][0].update(value=1.0))
    assert cli.invoke(["leaderboard", "check", "--root", str(root)]) == 2
    told = capsys.readouterr()
    assert "REJECTED  small-phantom/m.json" in told.out and "edited number" in told.err
    assert cli.invoke(["leaderboard", "build", "--root", str(root), "--json"]) == 0


def test_a_limited_run_of_a_shipped_suite_is_refused(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    shipped = {**SETTINGS, "models": [{"name": "m", "path": "/w"}], "data": {"per_modality": 25}}
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites" / "small.yaml").write_text(yaml.safe_dump(shipped))
    monkeypatch.chdir(tmp_path)
    data = {"per_modality": 2, "split": "test", "filter": {}, "resolution": 64, "fit": "pad"}
    run = write(tmp_path / "run", BASE, settings={"data": data})
    assert cli.invoke(["leaderboard", "add", str(run), "--root", "boards"]) == 2
    assert "data.per_modality is 2, not 25" in capsys.readouterr().err and not Path("boards").exists()
    whole = write(tmp_path / "whole", BASE, settings={"data": {**data, "per_modality": 25}})
    assert cli.invoke(["leaderboard", "add", str(whole), "--root", "boards", "--standard", "pgd"]) == 0


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_columns_sort_in_a_browser(tmp_path: Path, root: Path) -> None:
    """By robust accuracy m is second; a click on `clean` puts it first, another turns the order."""
    better = {**BASE, CLEAN: "1" * 50 + "0" * 10, PGD: "1" * 50 + "0" * 10}
    add(write(tmp_path / "n", better, model="n"), root)
    page = pages.build(root)[1].read_text()
    for clicks, first in ((0, "n"), (1, "m"), (2, "n")):
        click = "document.querySelectorAll('th button')[2].click();" * clicks
        file = tmp_path / f"{clicks}.html"
        file.write_text(page.replace("</body>", f"<script>{click}</script></body>"))
        browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", file.as_uri()]
        dom = subprocess.run(browser, capture_output=True, text=True, check=False, timeout=120).stdout
        head, _, body = dom[dom.index("<thead>") :].partition("<tbody>")
        assert re.findall(r'<td class="left">(\w+)<span', body)[0] == first
        assert re.findall(r'aria-sort="(\w+)"', head) == (
            ["descending", "ascending"][clicks - 1 :][:1] if clicks else []
        )
