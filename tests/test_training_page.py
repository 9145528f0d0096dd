"""The page of a training: which figures it has, what it says, and that it is one file that needs nothing else."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from safemed_bench import cli
from safemed_bench.core.errors import DataError, UsageError
from safemed_bench.report import training as page
from safemed_bench.report.figures import COLOURS, Chart, Curve, draw, inline, number
from safemed_bench.report.history import read_history, seconds
from safemed_bench.report.jinja import TEMPLATES
from safemed_bench.report.panels import POINTS, ROWS, SPECS
from safemed_bench.report.training import training_page, write_training_page

REPO = Path(__file__).parents[1]
Values = dict[str, Any]

SFT = {"loss/caption": 0.5, "gradient_norm": 2.0, "learning_rate": 1e-3, "steps_per_second": 4.0}
GRPO = {
    "loss/policy": -1e-4,
    "reward/accuracy/clean": 0.8,
    "reward/accuracy/adversarial": 0.6,
    "length/clean": 20.0,
    "invalid_rate/clean": 0.01,
    "truncated_rate/clean": 0.02,
    "attack/eps": 5 / 255,
    "attack/dead_gradients": 0.0,
    "zero_variance_groups": 0.4,
    "entropy": 0.3,
    "kl": 0.01,
    "gradient_norm": 0.2,
}


def config(**changes: Any) -> Values:
    """The part of an entry.json that the page reads."""
    adversary = {"norm": "linf", "eps": 5 / 255, "steps": 2, "alarm": 0.15}
    training = {
        "name": "toy",
        "init": "runs/base/entry",
        "data": {"name": "phantom"},
        "stages": [
            {"name": "look", "steps": 100, "batch_size": 8, "tasks": [{"kind": "caption"}], "max_grad_norm": 1.0},
            {"name": "rl", "steps": 100, "adversary": adversary, "grpo": {"group_size": 8, "max_new_tokens": 32}},
        ],
        "eval_questions": 200,
        "seed": 3,
    }
    return training | changes


def lines() -> list[Values]:
    """Metrics of the training that `config` tells of."""
    told: list[Values] = []
    for step in range(10, 201, 10):
        told.append({"step": step, "stage": "look", **SFT} if step <= 100 else {"step": step, "stage": "rl", **GRPO})
        if step % 100 == 0:
            told.append({"step": step, "event": "validation", "accuracy/all": step / 250, "invalid_rate": 0.0})
    return told


def robustness(step: int, train: float, strong: float) -> Values:
    values = {"robust/train_attack": train, "robust/pgd20": strong, "robust/gap": train - strong}
    return {"step": step, "event": "robustness", **values}


def write(folder: Path, told: list[Values], training: Values | None, **entry: Any) -> Path:
    """A folder as a training leaves it; without an entry where `training` is None."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    if training is not None:
        (folder / "entry").mkdir(exist_ok=True)
        whole = {"prompt": "think_brief", "decode": "generate", "max_new_tokens": 40, "description": "A toy"}
        (folder / "entry" / "entry.json").write_text(json.dumps(whole | {"training": training} | entry))
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("training") / "toy", lines(), config())


@pytest.fixture(scope="module")
def html(finished: Path) -> str:
    return training_page(finished)


class Page(HTMLParser):
    """What a page consists of; raises where a tag is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value for name, value in attrs if name == "id" and value]
        if tag not in ("meta", "br", "img", "input"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, self.getpos()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def figures(html: str) -> set[str]:
    return set(re.findall(r'<figure class="panel" id="([^"]+)"', html))


# --- the page as a file ---


def test_the_same_files_give_the_same_bytes(finished: Path, html: str) -> None:
    assert training_page(finished) == html
    path = write_training_page(finished)
    assert path == finished / "training.html" and path.read_text() == html


def test_the_page_needs_nothing_else(html: str) -> None:
    found = Page(html)
    assert len(found.ids) == len(set(found.ids)), "an id stands once"
    assert not found.tags & {"script", "link", "img", "iframe", "object"}
    assert not found.attributes & {"src", "xlink:href", "srcset", "onclick"}
    assert "://" not in html and "@import" not in html
    assert {ref for _, ref in re.findall(r'(href="|url\()#([^")]+)', html)} <= set(found.ids)


def test_figures_have_the_colours_of_the_page(html: str) -> None:
    css = (TEMPLATES / "page.css").read_text()
    charts = re.findall(r'<svg class="chart".*?</svg>', html, re.DOTALL)
    assert charts and not any(re.search(r": #[0-9a-f]{6}", chart) for chart in charts)
    for name, colour in COLOURS.items():
        assert css.count(f"--{name}:") == 2, f"{name} has a light and a dark value"
        assert f"--{name}: {colour};" in css, f"{name} is drawn as it is on a light page"


def test_what_is_hostile_is_text(tmp_path: Path) -> None:
    bad = "</script><img src=x onerror=alert(1)>$x^2$"
    training = config(name=bad, init=bad)
    training["stages"][0]["name"] = bad
    told = [line | {"stage": bad} if line.get("stage") == "look" else line for line in lines()]
    told[0] |= {f"loss/{bad}": 0.5, bad: 1.0}
    html = training_page(write(tmp_path, told, training, description=bad))
    found = Page(html)
    assert "img" not in found.tags and "script" not in found.tags and "onerror" not in found.attributes
    assert found.text.count("</script><img src=x onerror=alert(1)>$x^2$") >= 5


def test_importing_the_page_imports_no_torch() -> None:
    heavy = "{'torch', 'transformers', 'matplotlib.pyplot'}"
    code = f"import sys, safemed_bench.report.training; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=REPO).returncode == 0


# --- what is on it ---


def test_only_figures_whose_metrics_exist(html: str, tmp_path: Path) -> None:
    told = figures(html)
    assert {"validation", "loss", "reward-accuracy", "length", "invalid", "eps", "dead", "kl", "gradient"} <= told
    assert not told & {"robustness", "reward-format", "clip"}
    few = training_page(write(tmp_path, [{"step": 10, "stage": "look", "loss/caption": 1.0}], config()))
    assert figures(few) == {"loss"}


def test_every_metric_of_the_trainer_has_its_figure(html: str) -> None:
    keys = {spec.key for spec in SPECS}
    assert figures(html) <= keys, "no metric is left over for a figure of its own"
    known = [f"{name}/{view}" for name in ("length", "invalid_rate", "reward/total") for view in ("clean", "shuffled")]
    for name in (*SFT, *GRPO, *known):
        assert sum(bool(spec.label(name)) for spec in SPECS if not spec.event) == 1, name


def test_a_metric_that_nobody_knows_has_a_figure_of_its_own(tmp_path: Path) -> None:
    html = training_page(write(tmp_path, [{"step": 10, "stage": "look", "my/metric": 1.0}], config()))
    assert figures(html) == {"other-0"} and "my/metric" in html


def test_the_data_are_stamped(tmp_path: Path, html: str) -> None:
    assert "PHANTOM DATA" in html
    real = {"name": "omnimedvqa", "root": "/somewhere/OmniMed-mini", "scheme": "medr1"}
    told = Page(training_page(write(tmp_path / "real", lines(), config(data=real)))).text
    assert "OmniMedVQA folder OmniMed-mini, split scheme medr1" in told and "PHANTOM" not in told
    assert "DATA UNKNOWN" in training_page(write(tmp_path / "unknown", lines(), None))


def test_the_head_tells_the_last_validation_with_its_interval(html: str) -> None:
    told = Page(html).text
    assert "Last validation accuracy 80.0% [73.9, 85.0], n ≤ 200, at step 200" in told
    assert "Steps 200 2 stages" in told and "runs/base/entry seed 3" in told
    assert "AT-GRPO" in told and "PGD-2, L∞ 5/255" in told
    assert "init: runs/base/entry" in told, "the config is there in full"
    assert "What this is not." in told


def test_stages_are_named_in_the_figures(html: str) -> None:
    chart = re.findall(r'<svg class="chart".*?</svg>', html, re.DOTALL)[0]
    assert ">look</text>" in chart and ">rl</text>" in chart


def test_a_wide_gap_under_pgd_is_warned_of(tmp_path: Path) -> None:
    quiet = training_page(write(tmp_path / "quiet", [*lines(), robustness(200, 0.6, 0.5)], config()))
    assert "robustness" in figures(quiet) and "Catastrophic" not in quiet
    looks = [robustness(150, 0.9, 0.4), robustness(180, 0.8, 0.5), robustness(200, 0.6, 0.5)]
    loud = Page(training_page(write(tmp_path / "loud", [*lines(), *looks], config()))).text
    assert "Catastrophic overfitting? At step 150 the training attack leaves 90.0%" in loud
    assert "PGD-20 only 40.0%: a gap of 50.0 points, where 15 raise the alarm" in loud
    assert "2 of 3 looks raise the alarm; the last one, at step 200, does not." in loud


def test_the_alarm_is_that_of_the_stage(tmp_path: Path) -> None:
    training = config()
    training["stages"][1]["adversary"]["alarm"] = 0.6
    assert "Catastrophic" not in training_page(write(tmp_path, [*lines(), robustness(150, 0.9, 0.4)], training))


def test_as_many_questions_as_the_trainer_asks() -> None:
    from safemed_bench.training.validate import CHUNK

    assert page.ROBUSTNESS_QUESTIONS == CHUNK


def test_values_that_are_no_numbers_are_gaps_and_are_told_of(tmp_path: Path) -> None:
    told = lines()
    told[3] |= {"loss/caption": float("nan"), "gradient_norm": float("inf")}
    html = training_page(write(tmp_path, told, config()))
    assert "Not a number at step 40: loss/caption, gradient_norm" in html
    assert {"loss", "gradient"} <= figures(html) and Page(html).tags


def test_tables_and_curves_are_thinned(tmp_path: Path) -> None:
    many = [{"step": i, "stage": "look", "loss/caption": 1 / i} for i in range(1, 2001)]
    html = training_page(write(tmp_path, many, None))
    table = re.search(r"<details>.*?</details>", html, re.DOTALL)
    assert table and table[0].count("<tr>") == ROWS + 1
    assert f"Table ({ROWS} of 2,000 lines)" in html and ">1</td>" in html and ">2,000</td>" in html
    assert f"mean of up to {2000 // POINTS} lines" in html


# --- files that are not as they should be ---


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path, lines(), config())
    whole = (folder / "metrics.jsonl").read_bytes()
    for cut in (b'{"step": 210, "sta', b'{"step": 210, "stage": "\xc3', b"\0\0\0\0", b'{"step": 1\n'):
        (folder / "metrics.jsonl").write_bytes(whole + cut)
        history = read_history(folder)
        assert len(history.lines) == len(lines()) and "cut off" in " ".join(history.notes)
        assert "cut off" in training_page(folder)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{]", "not JSON"),
        ("7", "a whole number `step`"),
        ('{"stage": "look"}', "a whole number `step`"),
        ('{"step": 3, "loss": 1}', "neither `stage` nor `event`"),
        ("\xff", "not UTF-8"),
    ],
)
def test_another_broken_line_is_named(tmp_path: Path, line: str, told: str) -> None:
    folder = write(tmp_path, lines(), config())
    file = folder / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "stage": "look"}\n' + line.encode("latin-1") + b"\n" + file.read_bytes())
    with pytest.raises(DataError, match=told) as caught:
        training_page(folder)
    assert f"{file}:2 " in str(caught.value)


def test_a_broken_entry_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, lines(), config())
    (folder / "entry" / "entry.json").write_text("{\n]")
    with pytest.raises(DataError, match=r"entry\.json:2  not JSON"):
        training_page(folder)


def test_a_training_that_was_stopped(tmp_path: Path) -> None:
    history = read_history(write(tmp_path / "no-entry", lines(), None))
    assert [(s.name, s.begin, s.end) for s in history.stages] == [("look", 0, 100), ("rl", 100, 200)]
    assert "is running, or was stopped" in " ".join(history.notes)
    html = training_page(tmp_path / "no-entry")
    assert "<h1>no-entry</h1>" in html and "n is not known" in html
    short = training_page(write(tmp_path / "short", lines()[:5], config()))
    assert "ends at step 50 of 200" in short


def test_an_entry_of_another_training_is_not_believed(tmp_path: Path) -> None:
    told = [line | {"stage": "other"} if "stage" in line else line for line in lines()]
    history = read_history(write(tmp_path, told, config()))
    assert not history.entry and "of another training" in " ".join(history.notes)


def test_nothing_logged_yet(tmp_path: Path) -> None:
    assert "Nothing has been logged yet" in training_page(write(tmp_path, [], None))


def test_time_is_that_of_the_steps(finished: Path) -> None:
    assert seconds(read_history(finished)) == pytest.approx(100 / 4)


# --- figures ---


def test_a_figure_is_a_whole_picture_and_the_same_twice() -> None:
    chart = Chart("one", (Curve("a", ((1.0, 2.0), (2.0, float("nan")), (3.0, 4.0)), "blue"),), 3)
    svg = draw(chart)
    assert svg == draw(chart) and svg.startswith("<?xml") and COLOURS["blue"] in svg
    assert svg.count("<use") >= 2, "points without a neighbour are marked"
    assert 'aria-label="a &lt;b&gt;"' in inline(svg, "a <b>")


@pytest.mark.parametrize(
    ("value", "told"),
    [(0.0, "0"), (0.0005, "0.0005"), (2e-5, "2e-5"), (1234.5, "1,234"), (1e6, "1,000,000"), (0.98765, "0.9877")],
)
def test_numbers_are_short(value: float, told: str) -> None:
    assert number(value) == told


# --- the command ---


def test_the_command_writes_and_names_the_page(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.invoke(["report", str(finished)]) == 0
    assert capsys.readouterr().out == f"{finished / 'training.html'}\n"
    assert cli.invoke(["report", str(finished), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"kind": "training", "page": str(finished / "training.html")}


def test_the_command_says_what_it_cannot_report(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for folder, told in (
        (tmp_path / "empty", "holds neither metrics.jsonl (a training) nor records.jsonl (a run)"),
        (finished.with_name("toi"), f"no such folder. Did you mean '{finished}'?"),
    ):
        assert cli.invoke(["report", str(folder)]) == 2
        captured = capsys.readouterr()
        assert told in captured.err and not captured.out


def test_a_folder_without_metrics_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not the folder of a training"):
        training_page(tmp_path)
