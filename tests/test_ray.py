"""The Ray engine on a real cluster of two nodes: the local engine's records, whatever dies on the way."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from toy_run import COHEN, PGD, PLUGIN, records, toy_dataset, toy_execute, toy_plan

from safemed_bench.core.errors import UsageError
from safemed_bench.core.journal import LOCK
from safemed_bench.datasets.base import Dataset
from safemed_bench.run.engines import Means, open_engine
from safemed_bench.run.messages import Fatal, Settings
from safemed_bench.suite.plan import Plan

ray = pytest.importorskip("ray", reason="the Ray engine wants the extra [ray]")
pytestmark = [pytest.mark.timeout(400), pytest.mark.xdist_group("ray")]

DELAY = "0.3"
"""Seconds a slow toy takes for a batch: time to kill it."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    # Read by the nodes when they start, and by no process of ours.
    said = {"RAY_worker_niceness": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "TOY_DELAY": DELAY}
    before = {key: os.environ.get(key) for key in said}
    os.environ.update(said)
    try:
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        nodes.add_node(num_cpus=1)
    finally:
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.__setitem__(key, value)
    yield nodes
    ray.shutdown()
    nodes.shutdown()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_dataset(tmp_path_factory.mktemp("images"), 16)


def execute(plan: Plan, output: Path, cluster: Any) -> None:
    toy_execute(plan, output, engine="ray", address=cluster.address, workers="auto")


def actors() -> list[int]:
    """Process ids of the actors on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::RemoteWorker"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_two_nodes_give_the_local_engines_records(dataset: Dataset, tmp_path: Path, cluster: Any) -> None:
    plan = toy_plan(dataset, ("toy", "toy_cot"), ("clean", "blank", PGD, COHEN))
    toy_execute(plan, tmp_path / "local")
    execute(plan, tmp_path / "ray", cluster)
    assert records(tmp_path / "ray") == records(tmp_path / "local")
    session = json.loads((tmp_path / "ray" / "run.json").read_text())["provenance"]["sessions"][-1]
    assert session["workers"] == ["cpu", "cpu"] and session["outcome"] == "complete"


def test_a_poisonous_question_costs_one_question(dataset: Dataset, tmp_path: Path, cluster: Any) -> None:
    from dataclasses import replace

    questions = tuple(replace(q, id="poison") if q.id == "q5" else q for q in dataset.questions[:8])
    execute(toy_plan(replace(dataset, questions=questions), ("toy_deadly",)), tmp_path, cluster)
    errors = {r["question_id"]: r["error"] for r in records(tmp_path) if r.get("error")}
    assert list(errors) == ["poison"] and "worker died" in errors["poison"]


def test_killed_workers_and_a_lost_node_change_no_record(dataset: Dataset, tmp_path: Path, cluster: Any) -> None:
    plan = toy_plan(dataset, ("toy_slow",), ("clean", "blank", PGD))
    toy_execute(plan, tmp_path / "local")
    lost = cluster.add_node(num_cpus=1)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            execute(plan, tmp_path / "ray", cluster)
        except BaseException as error:
            failed.append(error)

    run = threading.Thread(target=work)
    run.start()
    killed = 0
    journal = tmp_path / "ray" / "journal.jsonl"
    removed = False
    while run.is_alive():
        time.sleep(0.5)
        if journal.exists() and journal.stat().st_size and killed < 2 and (there := actors()):
            os.kill(there[0], signal.SIGKILL)
            killed += 1
        elif killed == 2 and not removed:
            cluster.remove_node(lost)
            removed = True
    run.join()
    assert not failed, failed
    assert killed == 2 and removed, "the run ended before anything was killed"
    assert records(tmp_path / "ray") == records(tmp_path / "local")
    keys = [line["key"] for line in map(json.loads, journal.read_text().splitlines())]
    assert len(keys) == len(set(keys)) == len(records(tmp_path / "local"))


def test_what_a_cluster_cannot_do_is_said(tmp_path: Path, cluster: Any) -> None:
    settings = Settings(tmp_path, 16, "pad", "auto", None, (str(PLUGIN),))
    with pytest.raises(UsageError, match="places workers itself"):
        open_engine(settings, Means("ray", cluster.address, "auto", "cuda:1"), 1)
    with pytest.raises(UsageError, match="no GPU"):
        open_engine(settings, Means("ray", cluster.address, "auto", "cuda"), 1)
    with pytest.raises(UsageError, match="say --engine ray"):
        open_engine(settings, Means("local", cluster.address, "auto", "cpu"), 1)


def test_a_node_without_the_runs_folder_refuses(tmp_path: Path) -> None:
    from safemed_bench.run.ray_engine import RemoteWorker

    settings = Settings(tmp_path / "elsewhere", 16, "pad", "auto", None)
    _, said = RemoteWorker(settings, "cpu", str(tmp_path)).start()
    assert isinstance(said, Fatal) and "file system that all nodes share" in said.error
    assert LOCK not in said.error
