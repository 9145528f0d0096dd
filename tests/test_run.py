"""The runner: conditions, records, artefacts, worker count, batch size, and what a fault costs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from toy_run import PGD, PLUGIN, SIDE, records, toy_dataset, toy_execute, toy_plan

from safemed_bench.core.errors import DataError, UsageError
from safemed_bench.core.types import ThreatModel
from safemed_bench.datasets.base import Dataset
from safemed_bench.datasets.images import load_canvas
from safemed_bench.run import ModelsFailedError, artefacts, devices
from safemed_bench.run.batching import BatchSizer, is_out_of_memory
from safemed_bench.run.dispatch import FAULTS_IN_A_ROW, Brake
from safemed_bench.run.progress import PlainReporter, QuietReporter, clock
from safemed_bench.run.stop import resume_command
from safemed_bench.suite.plan import Plan

EVERYTHING = ("clean", "blank", "shuffled", "noise", {"attack": "fgsm"}, PGD)


@dataclass
class Listener(QuietReporter):
    """Remembers what was said."""

    said: list[str] = field(default_factory=list)

    def say(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_dataset(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def plan(dataset: Dataset) -> Plan:
    return toy_plan(dataset, ("toy", "toy_cot"), EVERYTHING)


@pytest.fixture(scope="module")
def finished(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    outcome = toy_execute(plan, folder)
    assert (outcome.total, outcome.done, outcome.errors, outcome.missing) == (216, 216, 0, 0)
    return folder


def test_importing_the_runner_imports_no_torch() -> None:
    code = "import sys, safemed_bench.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_records_stand_in_the_order_of_the_plan(plan: Plan, finished: Path) -> None:
    assert [r["key"] for r in records(finished)] == [unit.key for unit in plan.units]
    cells = {cell.name: cell for cell in plan.cells}
    for record in records(finished):
        cell = cells[record["cell"]]
        assert (record["model"], record["condition"]) == (cell.model.name, cell.condition.name)


def test_the_folder_says_what_was_run(plan: Plan, finished: Path) -> None:
    info = json.loads((finished / "run.json").read_text())
    assert info["data"] == {"name": "toy", "fingerprint": "f00d", "stamp": "TOY IMAGES"}
    assert len(info["cells"]) == len(plan.cells)
    assert len(info["questions"]) == 12
    assert [card["reasons"] for card in info["models"]] == [False, True]
    (session,) = info["provenance"]["sessions"]
    assert session["outcome"] == "complete"
    assert session["hardware"][0]["device"] == "cpu"
    assert type(plan.suite).model_validate(yaml.safe_load((finished / "suite.yaml").read_text())) == plan.suite


def test_blank_shuffled_and_noise_are_what_they_say(plan: Plan, finished: Path) -> None:
    by_cell: dict[str, list[dict]] = {}
    for record in records(finished):
        by_cell.setdefault(record["cell"], []).append(record)
    questions = plan.questions
    for record in by_cell["toy/blank"]:
        # the toy is blind to the question's words, so that equal options get equal scores from equal images
        same = [r for r in by_cell["toy/blank"] if r["n_options"] == record["n_options"]]
        assert {tuple(r["option_logprobs"]) for r in same} == {tuple(record["option_logprobs"])}
    for record in by_cell["toy/shuffled"]:
        donor = questions[record["extra"]["donor"]]
        assert donor.id != record["question_id"]
        assert donor.modality == record["modality"]
    noise = by_cell["toy/noise@linf:8/255"]
    assert all(0 < r["linf"] <= 8 / 255 + 1e-9 and r["l2"] > 0 for r in noise)
    clean = {r["question_id"]: r["option_logprobs"] for r in by_cell["toy/clean"]}
    assert all(clean[r["question_id"]] != r["option_logprobs"] for r in noise)


def test_only_right_answers_are_attacked(finished: Path) -> None:
    clean = {(r["model"], r["question_id"]): r for r in records(finished) if r["condition"] == "clean"}
    attacked = [r for r in records(finished) if "[" in r["condition"]]
    assert attacked
    for record in attacked:
        before = clean[record["model"], record["question_id"]]
        assert record["clean_correct"] == before["correct"]
        if before["correct"]:
            assert record["steps"] > 0
            assert len(record["loss_trace"]) == record["forwards"] > 0
        else:
            assert (record["correct"], record["steps"], record["linf"]) == (False, 0, 0.0)
            assert record["answer"] == before["answer"]
    assert any(r["clean_correct"] and not r["correct"] for r in attacked)


def test_the_saved_artefact_gives_the_recorded_norms_and_verdict(plan: Plan, finished: Path) -> None:
    import torch
    from toy_model import ToyVLM

    model = ToyVLM()
    rows = [r for r in records(finished) if r["model"] == "toy" and r["condition"].startswith("pgd")]
    for record in rows:
        question = plan.questions[record["question_id"]]
        canvas = load_canvas(Path(question.image), SIDE).transpose(2, 0, 1)
        image = artefacts.load(finished, record["artefact"], canvas)
        assert image.min() >= 0
        assert image.max() <= 255
        shift = (image - canvas).astype(float) / 255
        assert abs(shift).max() == record["linf"] <= 8 / 255 + 1e-9
        assert np.sqrt((shift**2).sum()) == pytest.approx(record["l2"], abs=1e-9)
        batch = model.prepare([question], torch.from_numpy(image.astype(np.uint8))[None])
        (answer,) = model.answer(batch, batch.pixels)
        assert answer.index == record["answer"]
        assert record["correct"] == (answer.index == question.answer)


@pytest.mark.parametrize("options", [{"workers": 2}, {"batch_size": 3}])
def test_workers_change_nothing_and_batch_size_no_verdict(
    plan: Plan, finished: Path, tmp_path: Path, options: dict[str, int]
) -> None:
    toy_execute(plan, tmp_path, **options)
    ours, theirs = records(tmp_path), records(finished)
    if "workers" in options:
        assert ours == theirs
    for name in ("key", "answer", "status", "correct", "steps", "linf"):
        assert [r[name] for r in ours] == [r[name] for r in theirs]


def test_an_image_that_cannot_be_read_is_an_error_record(dataset: Dataset, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    named = replace(dataset.questions[1], image="", image_error="images/1.png: not found")
    late = replace(dataset.questions[2], image=str(broken))
    sick = replace(dataset, questions=(dataset.questions[0], named, late, *dataset.questions[3:]))
    outcome = toy_execute(toy_plan(sick, ("toy",), ("clean", PGD)), tmp_path / "run")
    assert (outcome.errors, outcome.missing) == (4, 0)
    for record in records(tmp_path / "run"):
        assert bool(record["error"]) == (record["question_id"] in ("q1", "q2"))
        if record["error"]:
            assert record["correct"] is record["answer"] is record["status"] is None
            assert ("images/1.png" if record["question_id"] == "q1" else str(broken)) in record["error"]


DEADLY_IMAGE = """
import os, signal
from safemed_bench.run import reading

load = reading.load_canvas

def load_canvas(path, *how):
    if path.name == {name!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return load(path, *how)

reading.load_canvas = load_canvas
"""


@pytest.mark.parametrize("model", ["toy_deadly", "toy_raising"])
def test_a_poisonous_question_costs_one_question(dataset: Dataset, tmp_path: Path, model: str) -> None:
    questions = (*dataset.questions[:2], replace(dataset.questions[2], id="poison"), dataset.questions[3])
    listener = Listener()
    outcome = toy_execute(
        toy_plan(replace(dataset, questions=questions), (model,)), tmp_path, reporter=listener, workers=2
    )
    assert (outcome.done, outcome.errors, outcome.missing) == (3, 1, 0)
    (error,) = [r for r in records(tmp_path) if r["error"]]
    assert error["question_id"] == "poison"
    assert ("SIGKILL" if model == "toy_deadly" else "cannot digest this") in error["error"]
    assert "poison" in error["error"]
    assert any("in halves" in line for line in listener.said)


def test_a_fault_that_hits_every_question_costs_a_few_tries_and_one_cell(dataset: Dataset, tmp_path: Path) -> None:
    listener = Listener()
    plan = toy_plan(dataset, ("toy_faulty",), ("blank", "clean"), chunk=2)
    outcome = toy_execute(plan, tmp_path, reporter=listener)
    assert (outcome.done, outcome.errors, outcome.missing) == (12, 12, 0)
    errors = [r for r in records(tmp_path) if r["error"]]
    assert {r["condition"] for r in errors} == {"blank"}
    given_up = [r for r in errors if "not tried: 5 questions in a row failed with: RuntimeError: broken" in r["error"]]
    assert len(errors) - len(given_up) == FAULTS_IN_A_ROW == 5
    assert all(r["question_id"] in r["error"] for r in errors)
    assert any(line.startswith("toy_faulty/blank: 7 questions not tried") for line in listener.said)


def test_the_brake_wants_one_error_in_a_row() -> None:
    brake = Brake()
    for error in ["a", "a", "b", "a", "a", "a", "a"]:
        brake.failed("cell", error)
    assert not brake.fault("cell")
    brake.worked("cell")
    for _ in range(FAULTS_IN_A_ROW - 1):
        brake.failed("cell", "a")
    assert not brake.fault("cell")
    brake.failed("cell", "a")
    brake.worked("cell")  # a worker that was still at it
    assert "failed with: a" in brake.fault("cell") and not brake.fault("other")


def test_an_image_that_kills_whoever_reads_it_costs_one_question(dataset: Dataset, tmp_path: Path) -> None:
    """Also those who read it ahead, at another job, which is not to blame."""
    deadly = tmp_path / "deadly.py"
    deadly.write_text(DEADLY_IMAGE.format(name=Path(dataset.questions[5].image).name))
    toy_execute(toy_plan(dataset), tmp_path / "run", plugins=[PLUGIN, deadly])
    found = records(tmp_path / "run")
    assert [(r["question_id"], "worker died" in r["error"]) for r in found if r["error"]] == [("q5", True)]
    assert len(found) == len(dataset.questions)


def test_a_file_that_holds_another_image_than_was_judged_gives_errors(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The saved image is within the ball, but not the one that the verdict is of."""
    from safemed_bench.models import load_model
    from safemed_bench.run.conditions import NOT_JUDGED, Bench
    from safemed_bench.run.messages import Settings
    from safemed_bench.run.plans import jobs_of
    from safemed_bench.run.reading import Images

    job = jobs_of(toy_plan(dataset, ("toy",), (PGD,)))[0]
    settings = Settings(tmp_path, SIDE, "pad", "fp32", None)
    bench = Bench(load_model(job.model, SIDE, device="cpu"), settings, BatchSizer(None), Images(settings))
    honest = bench.run(job)
    assert not any(r.error for r in honest) and any(r.linf for r in honest)
    save = artefacts.save
    monkeypatch.setattr(artefacts, "save", lambda folder, name, canvas, _, ids: save(folder, name, canvas, canvas, ids))
    for before, after in zip(honest, bench.run(job), strict=True):
        assert after.error == (NOT_JUDGED if before.linf else "")
        assert (after.correct is None) == bool(before.linf)


def test_a_worker_that_is_killed_is_replaced(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = tmp_path / "trap"
    trap.touch()
    monkeypatch.setenv("TOY_KILL_ONCE", str(trap))
    listener = Listener()
    outcome = toy_execute(toy_plan(dataset, ("toy_mortal",)), tmp_path / "run", reporter=listener)
    assert (outcome.done, outcome.errors) == (12, 0)
    assert any("a worker died (SIGKILL" in line and "replaced" in line for line in listener.said)


def test_out_of_memory_halves_the_batch_and_absent_models_do_not_stop_others(dataset: Dataset, tmp_path: Path) -> None:
    listener = Listener()
    plan = toy_plan(dataset, ("toy_absent", "toy_hungry"), ("clean", "blank"))
    with pytest.raises(ModelsFailedError, match="toy_absent: no weights here") as caught:
        toy_execute(plan, tmp_path, reporter=listener)
    outcome = caught.value.outcome
    assert (outcome.total, outcome.done, outcome.missing) == (48, 24, 24)
    assert {r["model"] for r in records(tmp_path)} == {"toy_hungry"}
    assert len(records(tmp_path)) == 24
    assert "out of memory; batch size for clean is now 2" in listener.said


def test_a_plugin_that_cannot_be_loaded_is_said_at_once(dataset: Dataset, tmp_path: Path) -> None:
    plugin = tmp_path / "bad.py"
    plugin.write_text("import no_such_module_anywhere\n")
    with pytest.raises(Exception, match="no_such_module_anywhere"):
        toy_execute(toy_plan(dataset), tmp_path / "run", plugins=[plugin])


# -- parts, without processes


def test_the_sizer_halves_until_it_fits_and_remembers() -> None:
    sizes: list[int] = []
    said: list[str] = []

    def work(rows: object) -> None:
        sizes.append(len(rows))  # type: ignore[arg-type]
        if len(rows) > 3:  # type: ignore[arg-type]
            raise RuntimeError("CUDA out of memory.")

    sizer = BatchSizer(None, say=said.append)
    sizer.map("pgd", range(10), work)
    assert sizes == [10, 5, 2, 2, 2, 2, 2]
    sizes.clear()
    sizer.map("pgd", range(5), work)
    assert sizes == [2, 2, 1]
    assert len(said) == 2


def test_the_sizer_lets_other_errors_through() -> None:
    def work(rows: object) -> None:
        raise ValueError("out of memory, says a stranger")

    with pytest.raises(ValueError, match="stranger"):
        BatchSizer(None).map("x", range(4), work)
    assert is_out_of_memory(type("OutOfMemoryError", (RuntimeError,), {})())
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_the_sizer_gives_up_on_a_single_item() -> None:
    def work(rows: object) -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        BatchSizer(4).map("x", range(4), work)


def test_artefacts_round_trip_and_name_what_is_wrong(tmp_path: Path) -> None:
    canvas = np.full((2, 3, 4, 4), 250, np.uint8)
    for far in (255, 0):
        adversarial = canvas.copy()
        adversarial[1, 0, 0, 0] = far
        artefacts.save(tmp_path, "a/b.npz", canvas, adversarial, ["x", "y"])
        assert (artefacts.load(tmp_path, "a/b.npz#1", canvas[1]) == adversarial[1]).all()
    deltas = artefacts.read(tmp_path, "a/b.npz")
    measured = artefacts.measure(canvas[1], deltas[1], ThreatModel("linf", 8 / 255))
    assert measured.linf == pytest.approx(250 / 255)
    assert "leaves the linf:8/255 ball" in measured.problem
    over = np.zeros((3, 4, 4), np.int16)
    over[0, 0, 0] = 8
    assert "leave the box" in artefacts.measure(canvas[0], over, ThreatModel("linf", 8 / 255)).problem
    assert artefacts.measure(canvas[0], over // 2, ThreatModel("linf", 4 / 255)).problem == ""
    (tmp_path / "a" / "b.npz").write_bytes(b"PK torn")
    with pytest.raises(DataError, match=r"b\.npz: not a readable artefact"):
        artefacts.read(tmp_path, "a/b.npz")


def test_artefact_names_are_plain_and_tell_plans_apart() -> None:
    name = artefacts.artefact_name("a/b/pgd[answer]@linf:4/255", "0001", ["k1", "k2"])
    assert name.startswith("artefacts/a_b_pgd_answer_linf_4_255/0001-")
    assert name != artefacts.artefact_name("a/b/pgd[answer]@linf:4/255", "0001", ["k1", "k3"])


@pytest.mark.parametrize(
    ("device", "workers", "jobs", "gpus", "expected"),
    [
        ("auto", "auto", 9, 0, ("cpu",) * 3),
        ("auto", "auto", 2, 0, ("cpu",) * 2),
        ("auto", None, 9, 2, ("cuda:0", "cuda:1")),
        ("cpu", 5, 9, 2, ("cpu",) * 5),
        ("cuda", 3, 9, 2, ("cuda:0", "cuda:1", "cuda:0")),
        ("cuda:1", "auto", 9, 2, ("cuda:1",)),
        ("auto", "auto", 0, 0, ("cpu",)),
    ],
)
def test_devices(
    monkeypatch: pytest.MonkeyPatch, device: str, workers: int | str, jobs: int, gpus: int, expected: tuple[str, ...]
) -> None:
    monkeypatch.setattr(devices, "gpu_count", lambda: gpus)
    monkeypatch.setattr(devices, "usable_cores", lambda: 3)
    assert devices.choose_devices(device, workers, jobs) == expected


@pytest.mark.parametrize(("device", "workers"), [("cuda", "auto"), ("cuda:7", 1), ("tpu", 1), ("mps", 1), ("cpu", 0)])
def test_impossible_devices_are_refused(monkeypatch: pytest.MonkeyPatch, device: str, workers: int | str) -> None:
    monkeypatch.setattr(devices, "gpu_count", lambda: 0)
    with pytest.raises(UsageError):
        devices.choose_devices(device, workers, 3)


def test_plain_progress_has_no_control_codes(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = PlainReporter(every=0.0)
    reporter.start("toy", 20, 4, 100.0)
    for errors in (0, 1):
        reporter.advance("toy/clean", 4, errors, 10.0)
        reporter.tick()
    reporter.stop()
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == "toy: 20 units, 4 already in the journal"
    assert lines[-1].startswith("12/20 units")
    assert lines[-1].endswith("1 errors, toy/clean")
    assert "\x1b" not in captured.err


def test_small_words() -> None:
    assert [clock(s) for s in (5, 200, 7500)] == ["5 s", "3 min 20 s", "2 h 05 min"]
    assert resume_command(["/x/bin/safemed-bench", "run", "a b.yaml", "--no-resume"]) == "safemed-bench run 'a b.yaml'"
    assert resume_command(["/x/safemed_bench/__main__.py", "run"]).endswith(" -m safemed_bench run")
