"""Runs of many units on many workers: the real dispatcher, journal and plan, at a size that a test can afford."""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import simulation

from safemed_bench.core.types import Question
from safemed_bench.run.dispatch import Dispatch, Member
from safemed_bench.run.messages import Done, Job, Ready
from safemed_bench.run.simulate import SimulatedEngine
from safemed_bench.run.waiting import Task, Waiting

ENTRY = ("cot",)
"""Twenty conditions of the default suite."""


def job(model: str, condition: str, chunk: int, source: Job | None = None) -> Job:
    questions = (Question(f"q{chunk}", "", "", "?", ("a", "b"), 0, "CT", "t", "s", "test"),)
    name = f"{model}/{condition}"
    return Job(SimpleNamespace(name=model), name, condition, "clean", f"{chunk:04d}", (), questions, source=source)


# -- the queue


def naive(model: str, seen: set[int], waiting: list[Task], order: list[str]) -> Task:
    """The rule, looking at all that waits."""
    able = [task for task in waiting if task.job.source is None] or waiting
    tasks = [task for task in able if task.job.model.name == model] or able
    first = min(tasks, key=lambda task: order.index(task.job.cell)).job.cell
    cell = [task for task in tasks if task.job.cell == first]
    return next((task for task in cell if task.asked in seen), cell[0])


@pytest.mark.parametrize("seed", range(20))
def test_the_queue_gives_what_a_look_at_all_of_it_would(seed: int) -> None:
    draw = random.Random(seed)
    jobs = [job(model, condition, chunk) for model in "ab" for condition in "xyz" for chunk in range(5)]
    jobs += [job("b", "x<-a", chunk, source=jobs[chunk]) for chunk in range(5)]
    order = list(dict.fromkeys(each.cell for each in jobs))
    queue = Waiting()
    queue.add(jobs)
    plain = [queue.task(each) for each in jobs]
    out = list[Task]()
    while plain:
        if out and draw.random() < 0.3:  # a worker died: its job comes back
            back = out.pop(draw.randrange(len(out)))
            queue.put_back([back])
            plain.insert(0, back)
        model, seen = draw.choice("abc"), set(draw.sample(range(5), 2))
        wanted = naive(model, seen, plain, order)
        task = queue.take(model, seen)
        assert (task.job.cell, task.job.chunk) == (wanted.job.cell, wanted.job.chunk)
        plain.remove(wanted)
        assert len(queue) == len(plain)
        if task.tries < 2:
            task.tries += 1
            out.append(task)


@pytest.mark.parametrize("seed", range(3))
def test_what_a_worker_is_told_to_expect_is_what_it_gets(seed: int) -> None:
    """Workers come free in any order, some die, and every job is done once; only at the ends of models, where one takes
    what another was promised, does something else come."""
    draw = random.Random(seed)
    jobs = [job(model, condition, chunk) for model in "ab" for condition in "xyz" for chunk in range(12)]
    dispatch, crew, done, kept = Dispatch(jobs), [Member("cpu") for _ in range(4)], list[Job](), list[bool]()
    expected: dict[int, Job | None] = {}
    for member in crew:
        dispatch.heard(member, Ready({}))
    while dispatch.waiting or any(member.task for member in crew):
        place = draw.randrange(len(crew))
        member = crew[place]
        if member.task and draw.random() < 0.02:
            dispatch.lost(member, "shot")
            member = crew[place] = Member("cpu", ready=True)
            expected.pop(place, None)
        elif member.task:
            finished = member.task.job
            dispatch.heard(member, Done(finished, ()))
            done.append(finished)
        if order := dispatch.deal(member):
            if told := expected.get(place):
                kept.append(told == order.job.outline())
            expected[place] = order.ahead
    assert sorted((j.cell, j.chunk) for j in done) == sorted((j.cell, j.chunk) for j in jobs)
    assert len(kept) > 50 and sum(kept) >= 0.9 * len(kept)


def test_a_model_and_a_cell_that_are_given_up_leave_the_queue() -> None:
    queue = Waiting()
    queue.add([job(model, condition, chunk) for model in "ab" for condition in "xy" for chunk in range(3)])
    assert [task.job.chunk for task in queue.remove_cell("b/x")] == ["0000", "0001", "0002"]
    queue.remove_model("a")
    assert [queue.take("a", set()).job.cell for _ in range(len(queue))] == ["b/y"] * 3
    with pytest.raises(IndexError):
        queue.take("a", set())


def test_the_next_job_is_found_as_fast_in_a_long_queue() -> None:
    def seconds(chunks: int) -> float:
        queue = Waiting()
        cells = [(model, str(condition)) for model in "ab" for condition in range(20)]
        queue.add(job(model, condition, chunk) for model, condition in cells for chunk in range(chunks))
        began = time.process_time()
        for _ in range(200):
            queue.take("b", {7})
        return time.process_time() - began

    times = {count: min(seconds(count) for _ in range(3)) for count in (20, 400)}
    assert times[400] < 5 * times[20] + 0.01  # 20 times as many wait


# -- simulated workers


def run(engine: SimulatedEngine, jobs: list[Job]) -> list[Any]:
    with engine:
        return [event for event in engine.run(jobs) if event is not None]


def test_simulated_seconds_are_those_of_a_schedule_by_hand() -> None:
    jobs = [job("a", "x", chunk) for chunk in range(4)] + [job("b", "y", 0)]
    engine = SimulatedEngine(2, lambda one: 3.0 if one.cell == "b/y" else 1.0, load=0.5)
    events = run(engine, jobs)
    # both load a (.5), do two chunks each (2.5); one loads b (3.0) and works on it until 6.0
    assert engine.now == pytest.approx(6.0)
    assert engine.finished == pytest.approx({"a/x": 2.5, "b/y": 6.0})
    assert engine.utilisation == pytest.approx(7 / 12)
    assert len(events) == len(jobs)


def test_a_coordinator_that_takes_time_keeps_workers_waiting() -> None:
    class Slow(SimulatedEngine):
        spent = 0.0

        def clock(self) -> float:
            return self.spent

        def receive(self, sent: Any) -> Any:
            self.spent += 0.25
            return sent

    engine = Slow(1, lambda one: 1.0)
    run(engine, [job("a", "x", chunk) for chunk in range(4)])
    assert engine.now == pytest.approx(5.0)


# -- a whole run


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """20,000 units on eight workers, in a process of its own."""
    folder = tmp_path_factory.mktemp("dry") / "run"
    yield folder, simulation.apart(simulation.dry_run, folder, 1000, 8, None, time.process_time, ENTRY)


def test_a_dry_run_keeps_its_workers_busy_and_its_memory_small(dry: tuple[Path, dict[str, Any]]) -> None:
    folder, facts = dry
    assert (facts["cells"], facts["units"], facts["without_a_verdict"]) == (20, 20_000, 0)
    assert 0.95 <= facts["utilisation"] < 1
    assert facts["coordinator_peak_mb"] < 250
    assert (folder / "journal.jsonl").read_bytes().count(b"\n") == 20_000


def test_a_resumed_dry_run_exports_every_unit_once_in_the_plans_order(dry: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = dry
    (folder / "records.jsonl").unlink()
    found = simulation.merge(folder, 1000, time.process_time, ENTRY)
    assert (found["units"], found["missing"]) == (20_000, 0)
    assert found["resume_scan_s"] < 1 and found["merge_s"] < 2  # 100,000: 5 s; a million and a half: a minute
    keys = [json.loads(line)["key"] for line in (folder / "records.jsonl").open()]
    assert keys == [unit.key for unit in simulation.plan_of(1000, ENTRY).units]
    assert Counter(keys).most_common(1)[0][1] == 1


def test_a_plan_of_many_units_is_made_in_no_time() -> None:
    began = time.process_time()
    plan = simulation.plan_of(1000, ENTRY)
    assert sum(1 for _ in plan.units) == 20_000
    assert time.process_time() - began < 2  # 100,000: 10 s


def test_a_scan_keeps_the_same_a_unit_and_needs_no_more_beside_however_long_the_journal(tmp_path: Path) -> None:
    small, large = simulation.memory(tmp_path, 10_000)
    assert large.keys == 2 * small.keys
    assert large.kept < 250 and large.kept < 1.5 * small.kept
    assert large.transient < 1.5 * small.transient < 8 * 2**20


def test_measured_seconds_are_read_from_a_runs_records(tmp_path: Path) -> None:
    plan = simulation.plan_of(16, ENTRY)
    path = tmp_path / "records.jsonl"
    line = {"model": "cot", "condition": "clean", "error": "", "seconds": 0.5}
    lines = [line, line, line | {"seconds": 0.7}, line | {"seconds": 9.0, "error": "boom"}]
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert simulation.measured(path) == {("cot", "clean"): (0.5, 0.7)}
    with pytest.raises(SystemExit, match="another suite"):
        simulation.complete(simulation.measured(path), plan)
    other = replace(plan, cells=tuple(replace(c, card=replace(c.card, name="warm")) for c in plan.cells[:1]))
    assert simulation.complete(simulation.measured(path), other)["warm", "clean"] == (0.5, 0.7)
