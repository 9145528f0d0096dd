"""Certificates through the runner: the same records however they are drawn, and no sample drawn twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_model import ToyVLM
from toy_run import COHEN, SIDE, records, toy_dataset, toy_execute, toy_plan

from safemed_bench.certify import build_certifier
from safemed_bench.core import journal
from safemed_bench.core.seeds import derive_seed
from safemed_bench.datasets.base import Dataset
from safemed_bench.datasets.images import load_canvas
from safemed_bench.results import load_run, summarise
from safemed_bench.results.diagnostics import certified_below_empirical
from safemed_bench.run import partial
from safemed_bench.run.batching import BatchSizer
from safemed_bench.run.conditions import Bench
from safemed_bench.run.messages import Job, Settings
from safemed_bench.run.plans import jobs_of
from safemed_bench.run.reading import Images
from safemed_bench.suite.plan import Plan

SCRIPT = Path(__file__).parent / "toy_run.py"
SEQUENTIAL = {"certify": "sequential", "sigma": 0.25, "radii": [0.1, 0.3], "n": 300, "n0": 20, "alpha": 0.01}
PART = {"certify": "sequential", "name": "few", "sigma": 0.5, "n": 60, "n0": 10, "per_modality": 2}
SMOOTHED = {"name": "toy-smoothed", "entry": "toy", "smooth": {"sigma": 0.25, "n": 20}}
FIELDS = ("key", "answer", "status", "correct", "radius", "abstain", "samples", "extra")
TOTAL = 12 * (COHEN["n0"] + COHEN["n"])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def dataset(images: Path) -> Dataset:
    return toy_dataset(images)


@pytest.fixture(scope="module")
def plan(dataset: Dataset) -> Plan:
    conditions = ({**SEQUENTIAL, "models": ["toy"]}, {**PART, "models": ["toy"]}, {**COHEN, "name": "c"})
    return toy_plan(dataset, ("toy", SMOOTHED), conditions)


@pytest.fixture(scope="module")
def finished(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    outcome = toy_execute(plan, folder, batch_size=64)
    assert (outcome.total, outcome.done, outcome.errors) == (12 + 4 + 12 + 12, 40, 0)
    return folder


def facts(folder: Path) -> list[dict[str, Any]]:
    return [{name: record[name] for name in FIELDS} for record in records(folder)]


def test_a_record_is_the_certificate_of_its_question(plan: Plan, finished: Path) -> None:
    """Drawn again one picture at a time, without runner, panel or batches."""
    model, found = ToyVLM(resolution=(SIDE, SIDE)), records(finished)
    cells = {cell.name: cell.condition for cell in plan.cells}
    seeds = {unit.key: unit.seed for unit in plan.units}
    for record in [r for r in found if r["question_id"] in ("q1", "q2")]:
        condition, question = cells[record["cell"]], plan.questions[record["question_id"]]
        canvas = torch.from_numpy(load_canvas(Path(question.image), SIDE)).permute(2, 0, 1)[None]
        one = model.prepare([question], canvas)
        certifier = build_certifier(condition.certifier, dict(condition.params))
        proof = certifier(
            lambda noisy, one=one: [a.index for a in model.answer(one.repeat(len(noisy)), noisy)],
            one.pixels[0],
            seed=derive_seed(seeds[record["key"]], "certificate"),
        )
        assert (record["answer"], record["radius"]) == (proof.answer, pytest.approx(proof.radius))
        assert record["abstain"] == (proof.answer is None) and record["samples"] == certifier.n0 + proof.n
        assert record["status"] == ("abstain" if proof.answer is None else "valid")
        assert record["correct"] == (proof.answer == question.answer)
        assert record["extra"] == {
            "candidate": proof.candidate,
            "counts": {str(label): count for label, count in proof.counts.items()},
            "p_low": pytest.approx(proof.p_low),
            "decisions": [[d.radius, d.verdict, d.n] for d in proof.decisions],
        }


def test_the_run_holds_what_its_tables_need(finished: Path) -> None:
    info = json.loads((finished / "run.json").read_text())
    cells = {(c["model"], c["condition"]): c for c in info["cells"]}
    few = cells["toy", "certify[few sigma=0.5]"]
    assert few["certifier"] == {"name": "sequential", "values": 3 * SIDE * SIDE, "sigma": 0.5, "n": 60, "n0": 10}
    assert few["questions"] == ["q0", "q1", "q2", "q3"]
    assert "questions" not in cells["toy-smoothed", "certify[c sigma=0.25]"]
    found = records(finished)
    assert {v for r in found if r["extra"]["decisions"] for _, v, _ in r["extra"]["decisions"]} >= {
        "certified",
        "refuted",
    }
    assert Counter(r["abstain"] for r in found).keys() == {True, False}
    ours, theirs = ([r for r in found if r["cell"] == f"{m}/certify[c sigma=0.25]"] for m in ("toy", "toy-smoothed"))
    assert [r["extra"] for r in ours] == [r["extra"] for r in theirs], "smoothed entries are certified by their base"
    assert not (finished / partial.FOLDER).exists()


@pytest.mark.parametrize(("workers", "size"), [(2, 7), (1, 1)])
def test_neither_workers_nor_batch_size_change_a_record(
    plan: Plan, finished: Path, tmp_path: Path, workers: int, size: int
) -> None:
    toy_execute(plan, tmp_path, workers=workers, batch_size=size)
    assert facts(tmp_path) == facts(finished)
    assert not (tmp_path / partial.FOLDER).exists()


# -- a run that is killed


def drawn(count: Path) -> int:
    return sum(map(int, count.read_text().split())) if count.exists() else 0


def held(folder: Path) -> int:
    """Samples that the partial files know of, of units without a record."""
    settled = journal.read(folder)
    states = [state for path in folder.glob("partial/*/*.jsonl") for state in partial.read(path).items()]
    return sum(sum({**s["selection"], "": sum(s["test"].values())}.values()) for k, s in states if k not in settled)


def test_a_certificate_that_is_killed_goes_on_where_it_was(
    images: Path, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = toy_plan(dataset, ("toy_patient",), (COHEN,), batch_size=16)
    toy_execute(plan, tmp_path / "whole", batch_size=64)
    cut, count = tmp_path / "cut", tmp_path / "count"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(images), str(cut), "1", "certify"],
        env=os.environ | {"TOY_DELAY": "0.2", "TOY_COUNT": str(count)},
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while not held(cut):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before, settled = held(cut), len(journal.read(cut))
    assert 0 < before <= drawn(count) and settled < 12, "in the middle of a chunk"
    (torn,) = cut.glob(f"partial/*/000{settled // 4}-*.jsonl")
    with torn.open("ab") as file:
        file.write(b'{"key": "to')

    count.write_text("")
    monkeypatch.setenv("TOY_COUNT", str(count))
    outcome = toy_execute(plan, cut)
    assert (outcome.done, outcome.errors) == (12, 0)
    assert drawn(count) == TOTAL - settled * TOTAL / 12 - before, (
        "no sample that was noted is drawn again, and none is left out"
    )
    assert facts(cut) == facts(tmp_path / "whole")
    ours, theirs = (json.dumps(summarise(folder)["estimates"]) for folder in (cut, tmp_path / "whole"))
    assert ours == theirs
    assert not (cut / partial.FOLDER).exists()


# -- without processes


class Counting(ToyVLM):
    """Fails once it has given `limit` answers."""

    def __init__(self, limit: int | None = None) -> None:
        super().__init__(resolution=(SIDE, SIDE))
        self.limit = limit

    def answer(self, batch, pixels, *, generator=None):
        if self.limit is not None and self.deployed + len(batch) > self.limit:
            raise RuntimeError("broken")
        return super().answer(batch, pixels, generator=generator)


def bench(folder: Path, limit: int | None = None) -> Bench:
    settings = Settings(folder, SIDE, "pad", "fp32", 20)
    return Bench(Counting(limit), settings, BatchSizer(20), Images(settings))


@pytest.fixture
def job(dataset: Dataset) -> Job:
    return jobs_of(toy_plan(dataset, ("toy",), (COHEN,)))[0]


def test_the_parts_of_a_chunk_go_on_from_the_whole_and_leave_nothing(job: Job, tmp_path: Path) -> None:
    """As the engine does it: the chunk fails, its halves are tried instead."""
    honest = bench(tmp_path / "honest").run(job)
    worker = bench(tmp_path, 300)
    with pytest.raises(RuntimeError, match="broken"):
        worker.run(job)
    before = held(tmp_path)
    assert 270 < before == worker.model.deployed
    found, again = [], 0
    for part in (job.part(0, 2), job.part(2, 4)):
        worker = bench(tmp_path)
        found += worker.run(part)
        again += worker.model.deployed
        partial.discard(tmp_path, part)
    strip = [replace(record, seconds=0.0) for record in found]
    assert strip == [replace(record, seconds=0.0) for record in honest]
    assert again == 4 * TOTAL / 12 - before
    assert partial.path_of(tmp_path, job).is_file()
    partial.sweep(tmp_path, {unit.key for unit in job.units[:2]})
    assert partial.path_of(tmp_path, job).is_file(), "one of its units has no record"
    partial.sweep(tmp_path, {unit.key for unit in job.units})
    assert not (tmp_path / partial.FOLDER).exists()


def test_a_worker_at_the_next_chunk_does_not_miss_its_folder(dataset: Dataset, tmp_path: Path) -> None:
    """It is given its next chunk before the parent has dealt with the last one's records."""
    first, second, _ = jobs_of(toy_plan(dataset, ("toy",), (COHEN,)))
    file = partial.PartialFile(partial.path_of(tmp_path, first))
    file.note({first.units[0].key: {"selection": {}, "test": {}}})
    file.flush()
    following = partial.PartialFile(partial.path_of(tmp_path, second))
    partial.discard(tmp_path, first)
    assert not partial.path_of(tmp_path, first).exists()
    following.note({second.units[0].key: {"selection": {"0": 1}, "test": {}}})
    following.flush()
    assert held(tmp_path) == 1


@pytest.mark.parametrize("damage", ["cut", "garbled", "not a state", "empty"])
def test_a_damaged_file_costs_samples_and_nothing_else(job: Job, tmp_path: Path, damage: str) -> None:
    honest = bench(tmp_path / "honest").run(job)
    with pytest.raises(RuntimeError):
        bench(tmp_path, 300).run(job)
    path = partial.path_of(tmp_path, job)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        {
            "cut": b"".join(lines)[:-9],
            "garbled": b"\x00\xff\x00\n" + b"".join(lines[1:]),
            "not a state": b'[1]\n{"key": 3}\n' + b"".join(lines[1:]),
            "empty": b"",
        }[damage]
    )
    worker = bench(tmp_path)
    assert [replace(r, seconds=0.0) for r in worker.run(job)] == [replace(r, seconds=0.0) for r in honest]
    assert worker.model.deployed >= 4 * TOTAL / 12 - 300
    assert (worker.model.deployed == 4 * TOTAL / 12) == (damage == "empty")


# -- certified accuracy is a floor


def test_no_attack_goes_below_what_is_certified_of_a_shipped_entry(tmp_path: Path) -> None:
    from safemed_bench.datasets import load
    from safemed_bench.models.card import resolve
    from safemed_bench.suite.plan import build_plan
    from safemed_bench.suite.schema import Suite

    suite = Suite.model_validate(
        {
            "name": "floor",
            "data": {"name": "phantom", "per_modality": 1},
            "threat": {"norm": "l2", "eps": [0.1]},
            "models": [{"name": "smooth", "entry": "sft", "smooth": {"sigma": 0.12, "n": 20}}],
            "conditions": [
                {"certify": "sequential", "radii": [0.1], "n": 100, "n0": 20, "alpha": 0.01},
                {"attack": "pgd", "steps": 3},
                {"attack": "smoothadv", "steps": 3, "params": {"draws": 2}},
            ],
            "run": {"workers": 1, "device": "cpu"},
        }
    )
    outcome = toy_execute(build_plan(suite, load(suite.data), [resolve(m) for m in suite.models]), tmp_path)
    assert (outcome.done, outcome.errors) == (24, 0)
    summary = summarise(tmp_path)
    value = {(r["condition"], r["metric"], r["modality"]): r["value"] for r in summary["estimates"]}
    floor = value["certified@l2:0.1", "certified_accuracy", "all"]
    assert floor > 0.2, "nothing to hold it to"
    for attack in ("pgd", "smoothadv", "worst"):
        assert value[f"{attack}@l2:0.1", "accuracy", "all"] >= floor
    (said,) = (row for row in summary["diagnostics"] if row["id"] == "certified-below-empirical")
    assert (said["model"], said["id"], said["status"]) == ("smooth", "certified-below-empirical", "pass")
    assert "0 changed" in said["evidence"] and "2 comparisons" in said["evidence"]
    (verdicts,) = load_run(tmp_path).verdicts
    found = certified_below_empirical(verdicts)
    assert found is not None and found.status == "pass"
