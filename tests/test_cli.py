"""The command line: start-up, exit codes, streams, and the way from a suite to tables with a toy model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from safemed_bench import cli
from safemed_bench.commands.data import parse_images
from safemed_bench.commands.prepare import Request, output_of, parse_filters, resolved_dtype, suites_of
from safemed_bench.core.errors import IncompleteError, UsageError
from safemed_bench.suite import load_suite
from safemed_bench.suite.schema import RunSpec

REPO = Path(__file__).parents[1]
PLUGIN = str(REPO / "tests" / "toy_plugin.py")
TOY = """\
name: toy
title: Toy suite
data: {name: phantom, resolution: 32, phantom: {test: 4}, per_modality: 3}
threat: {eps: [8/255]}
models: [toy, toy_cot]
conditions: [clean, blank, {attack: pgd, steps: 2, objectives: [answer, decision_slot]}]
run: {chunk: 12, workers: 1, device: cpu}
"""


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cache of its own, and none of the variables that may be set where the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith("SAFEMED_")]:
            patch.delenv(name)
        patch.setenv("SAFEMED_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("suites") / "toy.yaml"
    path.write_text(TOY)
    return str(path)


@pytest.fixture(scope="module")
def finished(toy: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A whole run in a process of its own, as a user starts it."""
    output = tmp_path_factory.mktemp("run") / "out"
    return output, command("run", toy, "--plugin", PLUGIN, "--output", str(output))


def command(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "safemed_bench", *arguments],
        capture_output=True,
        text=True,
        cwd=REPO,
        env=os.environ | env,
        check=False,
        timeout=120,
    )


# --- start-up ---


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'pandas', 'pydantic', 'matplotlib', 'datasets'}"
    code = "import sys; from safemed_bench.cli import invoke; invoke(['--help']); "
    code += f"sys.exit(bool({heavy} & set(sys.modules)))"
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=REPO)
        seconds.append(time.perf_counter() - began)
        assert done.returncode == 0 and "validate" in done.stdout
    assert min(seconds) < 0.5


@pytest.mark.parametrize("room", ["core.registry", "suite", "datasets", "results", "run", "cli", "commands.measure"])
def test_rooms_that_import_no_torch(room: str) -> None:
    code = f"import sys, safemed_bench.{room}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=REPO).returncode == 0


def test_the_public_names_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    import safemed_bench

    for name in safemed_bench.__all__:
        assert getattr(safemed_bench, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = safemed_bench.nothing
    assert cli.invoke(["--version"]) == 0
    assert capsys.readouterr().out == f"safemed-bench {safemed_bench.__version__}\n"


# --- exit codes and streams ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu"], "No such command 'rnu'"),
        (["run"], "Missing argument"),
        (["run", "x", "--nope"], "No such option"),
        (["run", "x", "--limit", "0"], "--limit"),
        (["run", "nothing_of_that_name"], "no such suite"),
        (["validate", "omnimed_pgd", "--set", "run.sed=1"], "--set  run.sed: unknown key. Did you mean 'seed'?"),
        (["list", "modls"], "Did you mean 'models'?"),
        (["show", "pdg"], "Did you mean 'pgd'?"),
        (["list", "models", "--plugin", "absent.py"], "plugin file not found"),
        (["train", "absent.yaml"], "no such training config"),
        (["data", "check", "/no/where"], "/no/where"),
        (["data", "prepare", "omnimedvqa", "--output", "x"], "cannot be prepared"),
    ],
)
def test_wrong_usage_ends_with_2_and_a_message(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)
    assert cli.invoke(arguments) == 2
    told = capsys.readouterr()
    assert words in told.err and told.out == "" and "Traceback" not in told.err


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UsageError("wrong"), 2, "wrong"),
        (IncompleteError("stopped"), 3, "stopped"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("deep inside"), 1, "internal error: ZeroDivisionError: deep inside (--verbose shows where)"),
    ],
)
def test_how_errors_end(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr("safemed_bench.commands.doctor.doctor", fail)
    assert cli.invoke(["doctor"]) == code
    told = capsys.readouterr()
    assert told.err == f"{words}\n" and told.out == ""
    if code in (1, 2, 3):
        assert cli.invoke(["doctor", "--verbose"]) == code
        assert "Traceback" in capsys.readouterr().err


def test_a_plugin_that_fails_is_the_users_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin = tmp_path / "broken_plugin.py"
    plugin.write_text("1 / 0\n")
    assert cli.invoke(["list", "attacks", "--plugin", str(plugin)]) == 2
    assert "broken_plugin.py failed: ZeroDivisionError" in capsys.readouterr().err


# --- validate, list, show, doctor, data ---


def test_validate_names_every_problem_of_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text("run: {sed: 1}\nmodels: [{path: /m}]\nconditions: [clean]\n")
    files = [str(tmp_path / f"{name}.yaml") for name in ("a", "b")]
    assert cli.invoke(["validate", *files]) == 2
    assert capsys.readouterr().err == "".join(f"{f}:1:7  run.sed: unknown key. Did you mean 'seed'?\n" for f in files)
    assert cli.invoke(["validate", *files, "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"] and [p["line"] for p in found["problems"]] == [1, 1]


def test_validate_says_what_is_missing_here(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("HF_HUB_CACHE", "/no/where")
    assert cli.invoke(["validate", "suites/omnimed_pgd_real.yaml"]) == 0
    told = capsys.readouterr()
    assert told.out == "omnimed_pgd_real: valid\n"
    for words in ("data.root names no folder", "Qwen/Qwen2.5-VL-3B-Instruct", "google/medgemma-4b-it"):
        assert words in told.err
    assert cli.invoke(["plan", "suites/omnimed_pgd_real.yaml"]) == 2
    assert "google/medgemma-4b-it" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["models", "attacks", "objectives", "corruptions", "datasets", "suites"])
def test_lists(kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    assert cli.invoke(["list", kind, "--plugin", PLUGIN, "--json"]) == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)[kind]}
    expected = {"models": "toy", "attacks": "pgd", "objectives": "decision_slot", "datasets": "phantom"}
    expected["corruptions"] = "motion_ghosting"
    assert expected.get(kind, "omnimed_pgd") in names
    assert cli.invoke(["list", kind]) == 0
    assert expected.get(kind, "omnimed_pgd") in capsys.readouterr().out


def test_show(capsys: pytest.CaptureFixture[str], toy: str) -> None:
    assert cli.invoke(["show", "pgd"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("pgd (attack)") and "steps = 20" in told
    assert cli.invoke(["show", "toy_cot", "--plugin", PLUGIN, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["reasons"] is True
    assert cli.invoke(["show", toy, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["suites"][0]["threat"]["eps"] == ["8/255"]


def test_doctor_reports_and_ends_well(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEMED_OMNIMEDVQA", "/no/where")
    assert cli.invoke(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"]["state"] == "ok" and report["machine"]["cores"] >= 1
    assert "SAFEMED_OMNIMEDVQA names no folder: /no/where" in report["warnings"]


def test_data_prepare_then_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = str(tmp_path / "phantom")
    arguments = ["--output", root, "--seed", "3", "--images", "train=2,test=1", "--size", "32", "--workers", "1"]
    assert cli.invoke(["data", "prepare", "phantom", *arguments]) == 0
    assert "24 images" in capsys.readouterr().err
    assert cli.invoke(["data", "check", root, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["questions"] > 0
    assert cli.invoke(["data", "check", root]) == 0
    assert "Dermoscopy" in capsys.readouterr().out


def test_images_of_data_prepare() -> None:
    assert parse_images("7") == {"train": 0, "validation": 0, "test": 7}
    assert parse_images("train=2, test=3") == {"train": 2, "validation": 0, "test": 3}
    for wrong in ("x", "tset=3", "test=-1", "test="):
        with pytest.raises(UsageError, match="--images"):
            parse_images(wrong)


# --- flags ---


def test_flags_change_the_suite_in_order(toy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFEMED_SEED", "1")

    def seed(**values: Any) -> int:
        return suites_of([toy], Request(plugins=(PLUGIN,), **values))[0].run.seed

    assert seed() == 1
    assert seed(sets=("run.seed=2",)) == 2
    assert seed(sets=("run.seed=2",), flags={"run.seed": ("--seed", 3)}) == 3


def test_limit_never_asks_more_than_the_suite(toy: str) -> None:
    for limit, expected in ((2, 2), (50, 3)):
        suite = suites_of([toy], Request(limit=limit, plugins=(PLUGIN,)))[0]
        assert suite.data.per_modality == expected
    every = suites_of([toy], Request(limit=50, sets=("data.per_modality=all",), plugins=(PLUGIN,)))[0]
    assert every.data.per_modality == 50


def test_model_chooses_among_the_suites_own_and_others(toy: str) -> None:
    def names(*models: str) -> list[tuple[str, str | None]]:
        suite = suites_of([toy], Request(models=models, plugins=(PLUGIN,)))[0]
        return [(model.name, model.path) for model in suite.models]

    assert names("toy_cot") == [("toy_cot", None)]
    assert names("/weights/mine", "toy_slow") == [("mine", "/weights/mine"), ("toy_slow", None)]
    with pytest.raises(UsageError, match=r"--model toy_cto: .*Did you mean 'toy_cot'\?"):
        names("toy_cto")


def test_filters() -> None:
    assert parse_filters(["modality=CT", "modality=MRI", "source=x"]) == {"modality": ["CT", "MRI"], "source": ["x"]}
    with pytest.raises(UsageError, match="Did you mean 'modality'"):
        parse_filters(["modalty=CT"])
    with pytest.raises(UsageError, match="must be written key=value"):
        parse_filters(["modality"])


def test_the_folder_of_a_run(toy: str) -> None:
    suite = suites_of([toy], Request(plugins=(PLUGIN,)))[0]
    assert output_of(suite, None, False) == Path("reports/toy")
    assert output_of(suite, "/x", False) == Path("/x") and output_of(suite, "/x", True) == Path("/x/toy")


def test_what_auto_dtype_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safemed_bench.run.devices.gpu_count", lambda: 1)
    assert resolved_dtype(RunSpec()) == resolved_dtype(RunSpec(device="cuda:0")) == "bf16"
    assert resolved_dtype(RunSpec(device="cpu")) == "fp32"
    assert resolved_dtype(RunSpec(dtype="fp16")) == "fp16"
    monkeypatch.setattr("safemed_bench.run.devices.gpu_count", lambda: 0)
    assert resolved_dtype(RunSpec()) == "fp32"


# --- the whole way ---


def test_a_run_ends_in_tables(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    output, done = finished
    assert done.returncode == 0, done.stderr
    assert "phantom" in done.stdout and "toy_cot" in done.stdout and "\x1b" not in done.stdout + done.stderr
    assert f"report: {output / 'report.html'}" in done.stderr
    summary = json.loads((output / "summary.json").read_text())
    conditions = {e["condition"] for e in summary["estimates"]}
    assert {"clean", "blank", "pgd@linf:8/255", "pgd[decision_slot]@linf:8/255", "worst@linf:8/255"} <= conditions
    assert load_suite(output / "suite.yaml", env={}).title == "Toy suite"


def test_plan_knows_what_is_done_and_run_has_nothing_left(
    finished: tuple[Path, subprocess.CompletedProcess[str]], toy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output, _ = finished
    common = [toy, "--plugin", PLUGIN, "--output", str(output)]
    assert cli.invoke(["plan", *common, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plans"][0]
    assert plan["total"] == {"units": 168, "done": 168, "errors": 0, "chunks": 14}
    assert [c["cell"] for c in plan["cells"]][:3] == ["toy/clean", "toy/blank", "toy/pgd[answer]@linf:8/255"]
    assert cli.invoke(["plan", *common]) == 0
    assert "7 cells, 168 units in 14 chunks, 168 done" in capsys.readouterr().out
    assert cli.invoke(["run", *common, "--json", "--quiet"]) == 0
    told = capsys.readouterr()
    report = json.loads(told.out)["runs"][0]
    assert report["outcome"]["done"] == 168 and report["summary"]["data"]["name"] == "phantom"
    assert told.err == ""


def test_limit_and_filter_stand_in_the_plans_notes(toy: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--plugin", PLUGIN, "--limit", "1", "--filter", "modality=CT", "--filter", "modality=MRI", "--json"]
    assert cli.invoke(["plan", toy, *arguments]) == 0
    plan = json.loads(capsys.readouterr().out)["plans"][0]
    assert plan["questions"] == {"CT": 1, "MRI": 1}
    assert {"limited to 1 questions per modality", "only modality CT or MRI"} <= {*plan["notes"]}


def test_missing_verdicts_end_with_3_unless_allowed(toy: str, tmp_path: Path) -> None:
    images = tmp_path / "data"
    assert cli.invoke(["data", "prepare", "phantom", "--output", str(images), "--images", "2", "--size", "32"]) == 0
    next(images.rglob("*.png")).write_bytes(b"torn")
    common = ["run", toy, "--plugin", PLUGIN, "--model", "toy", "--set", f"data.root={images}", "--set"]
    common += ["data.name=omnimedvqa", "--set", "data.per_modality=all", "--set", "conditions=[clean]"]
    done = command(*common, "--output", str(tmp_path / "out"))
    assert done.returncode == 3, done.stderr
    assert "units have no verdict" in done.stderr and "OmniMedVQA at data" in done.stdout
    assert command(*common, "--output", str(tmp_path / "out"), "--fail-on-error", "0.5").returncode == 0


# --- entries that are not here, or cannot be loaded ---


@pytest.fixture
def gaps(tmp_path: Path) -> str:
    """A folder of two suites: `gaps` has an absent checkpoint and a plugin that cannot be built, `later` neither."""
    text = TOY.replace("name: toy\n", "name: gaps\n").replace(
        "[toy, toy_cot]", "[{name: gone, path: /no/where/gone}, toy_absent, toy]"
    )
    text = text[: text.index("conditions:")] + "conditions: [clean]\n" + text[text.index("run:") :]
    (tmp_path / "gaps.yaml").write_text(text)
    later = TOY.replace("name: toy\n", "name: later\n")
    later = later[: later.index("conditions:")] + "conditions: [blank]\n" + later[later.index("run:") :]
    (tmp_path / "later.yaml").write_text(later)
    return str(tmp_path)


def test_what_is_absent_is_left_out_and_said_and_the_rest_is_measured(gaps: str, tmp_path: Path) -> None:
    files = [f"{gaps}/gaps.yaml", f"{gaps}/later.yaml", "--plugin", PLUGIN]
    done = command("run", *files, "--output", str(tmp_path / "out"))
    assert done.returncode == 2, done.stderr
    assert "note: LEFT OUT gone: model folder not found: /no/where/gone" in done.stderr
    complaint = done.stderr.splitlines()[-2:]
    assert complaint[0].startswith("gaps: gone: model folder not found: /no/where/gone")
    assert complaint[1] == "gaps: toy_absent: no weights here"
    assert done.stderr.count("report.html") == 2
    assert "LEFT OUT gone" in done.stdout and "PARTIAL: 24 of 48 units" in done.stdout
    for name, models in (("gaps", {"toy"}), ("later", {"toy", "toy_cot"})):
        summary = json.loads((tmp_path / "out" / name / "summary.json").read_text())
        assert {c["model"] for c in summary["coverage"]["cells"] if c["done"]} == models
    noted = json.loads((tmp_path / "out" / "gaps" / "run.json").read_text())["notices"]
    assert any("LEFT OUT gone" in line for line in noted)


def test_plan_and_json_speak_before_they_complain(
    gaps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--plugin", PLUGIN, "--output", str(tmp_path / "out"), "--json"]
    assert cli.invoke(["plan", f"{gaps}/gaps.yaml", *common]) == 2
    told = capsys.readouterr()
    assert {c["model"] for c in json.loads(told.out)["plans"][0]["cells"]} == {"toy_absent", "toy"}
    assert told.err.startswith("gaps: gone: ")
    assert cli.invoke(["run", f"{gaps}/gaps.yaml", *common, "--quiet", "--model", "toy_absent"]) == 2
    told = capsys.readouterr()
    (report,) = json.loads(told.out)["runs"]
    assert report["summary"] is None and report["outcome"]["missing"] == 24
    assert told.err == "gaps: toy_absent: no weights here\n"


def test_nothing_is_started_where_no_entry_is_here(
    gaps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [f"{gaps}/gaps.yaml", "--plugin", PLUGIN, "--model", "gone", "--output", str(tmp_path / "out")]
    for word in ("run", "plan"):
        assert cli.invoke([word, *common]) == 2
        told = capsys.readouterr()
        assert told.out == "" and "model folder not found: /no/where/gone" in told.err
    assert not (tmp_path / "out").exists()


def test_mps_is_refused_with_a_reason(toy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", toy, "--plugin", PLUGIN, "--output", str(tmp_path), "--device", "mps", "--quiet"]
    assert cli.invoke(arguments) == 2
    assert "float64" in capsys.readouterr().err
