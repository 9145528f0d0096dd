"""How long a plan takes: rates and their intervals, a probe, an earlier run, and what fits in a budget."""

from __future__ import annotations

import json
import random
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from toy_run import PGD, PLUGIN, toy_dataset, toy_execute, toy_plan

from safemed_bench import cli
from safemed_bench.commands.plan import parse_budget
from safemed_bench.core.errors import UsageError
from safemed_bench.core.journal import read
from safemed_bench.datasets.base import Dataset
from safemed_bench.datasets.splits import stratified
from safemed_bench.run.earlier import earlier
from safemed_bench.run.estimate import Crew, Rate, Sample, at_high, at_low, rate_of, sampled, units_of_sample
from safemed_bench.run.plans import jobs_of
from safemed_bench.run.probe import probe
from safemed_bench.suite.plan import Plan

FULL = 61.0
"""Passes of an attack of twenty steps on a question that stands."""

DELAY = 0.1
"""Seconds that the toy's `prepare` takes: far more than all else, so that a busy machine changes little."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return toy_dataset(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def plan(dataset: Dataset) -> Plan:
    return toy_plan(dataset, ("toy", "toy_cot"), ("clean", "blank", PGD))


@pytest.fixture(scope="module")
def finished(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    toy_execute(plan, folder)
    return folder


def rate(seconds: float, once: float = 0.0) -> Rate:
    return Rate(seconds, seconds / 2, seconds * 2, 8, "by hand", once)


# -- rates


def test_the_interval_of_an_attack_is_that_of_the_share_that_stands() -> None:
    samples = [Sample(0.1, FULL, True)] * 4 + [Sample(0.1, 3.0, False)] * 3 + [Sample(0.1, 1.0)]
    found = rate_of(samples, "x", FULL)
    least, mean = 2.5, (4 * FULL + 3 * 3 + 1) / 8
    bounds = [0.1 * (least + (FULL - least) * share) / mean for share in (0.15701, 0.84299)]  # 4 of 8, Clopper-Pearson
    assert (found.low, found.high) == pytest.approx(tuple(bounds), rel=1e-3)
    assert (found.seconds, found.n) == (pytest.approx(0.1), 8)


def test_where_none_stood_the_slow_end_is_that_some_take_all_steps() -> None:
    found = rate_of([Sample(0.1, 4.0, False)] * 8, "x", FULL)
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1 * (4 + (FULL - 4) * 0.36942) / 4, rel=1e-3)  # 0 of 8


def test_conditions_that_ask_the_same_of_every_question_have_no_interval() -> None:
    found = rate_of([Sample(0.2, 1.0)] * 3, "x", 1.0)
    assert found.low == found.high == found.seconds


def test_the_interval_covers_the_mean_of_all_questions() -> None:
    draw, hits = random.Random(0), 0
    for _ in range(400):
        share = draw.uniform(0.1, 0.9)
        stands = [draw.random() < share for _ in range(16)]
        samples = [Sample(0.0, FULL if s else 3.0, s) for s in stands]
        mean = statistics.fmean(sample.passes for sample in samples)
        found = rate_of([replace(sample, seconds=mean) for sample in samples], "x", FULL)  # a second a pass
        hits += found.low <= share * FULL + (1 - share) * 3.0 <= found.high
    assert hits >= 0.95 * 400


# -- schedules


def test_one_worker_takes_the_sum_and_two_no_more_than_it(plan: Plan) -> None:
    jobs = jobs_of(plan)
    rates = {cell.name: rate(1.0 + place) for place, cell in enumerate(plan.cells)}
    rates[plan.cells[0].name] = rate(1.0, once=5.0)
    work = sum(rates[cell.name].seconds * 12 for cell in plan.cells) + 5.0
    one = Crew(1, load=2.0).schedule(jobs, rates)
    assert one.seconds == pytest.approx(work + 2 * 2.0)
    assert one.done[plan.cells[-1].name] == one.seconds and list(one.done) == [cell.name for cell in plan.cells]
    two = Crew(2).schedule(jobs, rates)
    assert work / 2 <= two.seconds < work
    assert Crew(1).schedule(jobs, at_low(rates)).seconds == pytest.approx((work - 5) / 2 + 5)
    assert Crew(1).schedule(jobs, at_high(rates)).seconds == pytest.approx((work - 5) * 2 + 5)


def test_cells_without_a_rate_are_left_out(plan: Plan) -> None:
    found = Crew(1).schedule(jobs_of(plan), {plan.cells[1].name: rate(1.0)})
    assert found.done == {plan.cells[1].name: pytest.approx(12.0)}


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6])
def test_a_smaller_sample_is_the_plan_of_a_smaller_limit(dataset: Dataset, count: int) -> None:
    conditions = ("clean", PGD, {"certify": "cohen", "sigma": 0.25, "n": 100, "per_modality": 4})
    smaller = replace(dataset, questions=stratified(dataset.questions, count))
    plans = [toy_plan(each, ("toy",), conditions, chunk=5) for each in (dataset, smaller)]
    cut = sampled(jobs_of(plans[0]), units_of_sample(plans[0], count))
    assert [(job.cell, len(job.units)) for job in cut] == [(job.cell, len(job.units)) for job in jobs_of(plans[1])]


def test_the_largest_sample_fits_and_one_more_does_not(plan: Plan) -> None:
    jobs, crew = jobs_of(plan), Crew(2, load=1.0)
    rates = {cell.name: rate(1.0) for cell in plan.cells}

    def seconds(count: int) -> float:
        return crew.schedule(sampled(jobs, units_of_sample(plan, count)), rates).seconds

    for budget in (seconds(3), seconds(4) - 0.01):
        assert crew.largest_sample(plan, jobs, rates, budget) == 3
    assert crew.largest_sample(plan, jobs, rates, 1e9) == 6
    assert crew.largest_sample(plan, jobs, rates, 0.5) == 0


@pytest.mark.parametrize(("text", "seconds"), [("8h", 28800), ("90m", 5400), ("1d12h", 129600), ("0.5h", 1800)])
def test_budgets(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["8", "h", "", "-3h", "8 hours", "0h"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(UsageError, match="such as 8h, 90m or 1d12h"):
        parse_budget(text)


# -- a probe


def test_a_probe_finds_what_a_run_takes(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = toy_plan(dataset, ("toy_slow",), ("clean", "blank", PGD))
    monkeypatch.setenv("TOY_DELAY", str(DELAY))
    found = probe(plan, [cell.name for cell in plan.cells], 4, [PLUGIN])
    assert set(found.rates) == {cell.name for cell in plan.cells} and not found.missing
    toy_execute(plan, tmp_path)
    for name, each in found.rates.items():
        taken = statistics.fmean(record.seconds for record in read(tmp_path).values() if record.cell == name)
        assert taken >= DELAY / 4 and taken / 2 < each.seconds < taken * 2
        assert each.n == 4 and each.basis == "a probe"
    assert 0 < found.load < 60


def test_a_probe_says_why_a_cell_has_no_rate_and_asks_no_other(dataset: Dataset) -> None:
    plan = toy_plan(dataset, ("toy_absent", "toy_faulty", "toy"), ("clean", "blank"))
    names = ["toy_absent/clean", "toy_faulty/clean", "toy_faulty/blank"]
    found = probe(plan, names, 2, [PLUGIN])
    assert list(found.rates) == ["toy_faulty/clean"]
    assert found.missing["toy_absent/clean"] == "toy_absent: no weights here"
    assert "RuntimeError: broken" in found.missing["toy_faulty/blank"]
    assert set(found.missing) == {"toy_absent/clean", "toy_faulty/blank"}


def test_a_server_is_not_asked_for_a_probe(dataset: Dataset) -> None:
    served = {"name": "gpt", "prompt": "bare", "api": {"base_url": "http://127.0.0.1:9/v1", "model": "m"}}
    plan = toy_plan(dataset, (served, "toy"), ("clean",))
    found = probe(plan, ["gpt/clean", "toy/clean"], 2, [PLUGIN])
    assert list(found.rates) == ["toy/clean"]
    assert found.missing == {"gpt/clean": "its server is not asked for a probe"}


def test_a_poisonous_question_does_not_end_a_probe(dataset: Dataset) -> None:
    first = replace(dataset.questions[0], id="poison")
    plan = toy_plan(replace(dataset, questions=(first, *dataset.questions[1:])), ("toy_deadly",))
    found = probe(plan, ["toy_deadly/clean"], 12, [PLUGIN])
    assert found.rates["toy_deadly/clean"].n == 11


def test_what_is_fitted_once_is_no_part_of_every_question(tmp_path: Path) -> None:
    whole = toy_dataset(tmp_path, 28)
    pool = tuple(replace(question, split="validation") for question in whole.questions[12:])
    universal = {"attack": "universal", "steps": 300, "objectives": ["answer"], "params": {"questions": 6}}
    asked = replace(whole, questions=whole.questions[:12])
    plan = toy_plan(asked, ("toy",), ("clean", universal), pools={"validation": pool})
    name = plan.cells[1].name
    found = probe(plan, [name], 4, [PLUGIN]).rates[name]
    assert found.once > 4 * found.seconds


# -- an earlier run


def test_an_earlier_run_gives_its_means(plan: Plan, finished: Path, dataset: Dataset) -> None:
    costs = {job.cell: job.cost for job in jobs_of(plan)}
    found = earlier(finished, plan, "cpu", costs)
    assert list(found) == [cell.name for cell in plan.cells]
    records = [record for record in read(finished).values() if record.cell == "toy/clean"]
    assert found["toy/clean"].seconds == pytest.approx(statistics.fmean(record.seconds for record in records))
    assert (found["toy/clean"].n, found["toy/clean"].basis) == (12, f"records in {finished}")
    fewer = replace(dataset, questions=dataset.questions[:3])
    assert earlier(finished, toy_plan(fewer, ("toy",), ("clean",)), "cpu", costs) == {"toy/clean": found["toy/clean"]}


@pytest.mark.parametrize(
    ("conditions", "run", "kind", "expected"),
    [
        (("clean", PGD | {"steps": 6}), {}, "cpu", ["toy/clean"]),
        (("clean", PGD), {}, "cuda", []),
        (("clean", PGD), {"batch_size": 2}, "cpu", []),
        (("clean", PGD), {"dtype": "bf16"}, "cpu", []),
    ],
)
def test_other_work_is_not_taken_for_the_same(
    finished: Path, dataset: Dataset, conditions: Any, run: dict[str, Any], kind: str, expected: list[str]
) -> None:
    other = toy_plan(dataset, ("toy",), conditions, **run)
    costs = {job.cell: job.cost for job in jobs_of(other)}
    assert list(earlier(finished, other, kind, costs)) == expected


def test_a_folder_that_holds_no_run_tells_nothing(plan: Plan, tmp_path: Path) -> None:
    assert earlier(tmp_path, plan, "cpu", {}) == {}
    (tmp_path / "run.json").write_text("torn")
    assert earlier(tmp_path, plan, "cpu", {}) == {}


# -- the command

SUITE = """\
name: toy
data: {name: phantom, resolution: 32, phantom: {test: 6}}
threat: {eps: [8/255]}
models: [toy_slow]
conditions: [clean, blank, {attack: pgd, steps: 2}]
run: {chunk: 8, workers: 2, device: cpu}
"""


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("TOY_DELAY", "0.02")
    (tmp_path / "toy.yaml").write_text(SUITE)
    return [str(tmp_path / "toy.yaml"), "--plugin", str(PLUGIN), "--output", str(tmp_path / "out")]


def estimate(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> dict[str, Any]:
    assert cli.invoke(["plan", *arguments, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["plans"][0]["estimate"]
    return found


def test_plan_says_what_fits_and_what_it_costs(suite: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    found = estimate(capsys, [*suite, "--probe", "4", "--budget", "1h", "--price", "3600"])
    names = ["toy_slow/clean", "toy_slow/blank", "toy_slow/pgd[answer]@linf:8/255"]
    assert [cell["cell"] for cell in found["cells"]] == names and found["budget"]["fits"] == names
    assert (found["workers"], found["device"], found["missing"]) == (2, "cpu", {})
    assert found["cost"] == pytest.approx(2 * found["seconds"]["value"])
    for cell in found["cells"]:
        assert cell["cost"] == pytest.approx(cell["worker_s"])
        assert cell["worker_s"] == pytest.approx(cell["units"] * cell["seconds_a_unit"]["value"])
    assert not Path(suite[-1]).exists(), "a probe leaves nothing behind"


def test_half_of_the_time_is_enough_for_fewer_questions(suite: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """By the records of a run: two probes may measure twice as much one time as the other."""
    out = Path(suite[-1])
    assert cli.invoke(["run", *suite, "--quiet"]) == 0
    capsys.readouterr()
    new = [*suite[:-1], f"{out}2", "--probe", "0", "--earlier", str(out)]
    whole = estimate(capsys, new)["seconds"]["value"]
    assert cli.invoke(["plan", *new, "--budget", f"{whole / 2:.3f}s"]) == 0
    said = capsys.readouterr()
    assert "of 3 cells fit" in said.out and "every cell fits with --limit" in said.out and "cost" not in said.out
    assert cli.invoke(["plan", *new[:-4], "--probe", "4"]) == 0
    assert "probe: 4 questions of each of 3 cells" in capsys.readouterr().err


def test_plan_learns_from_the_run_itself_and_from_others(suite: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(suite[-1])
    assert cli.invoke(["run", *suite, "--set", "conditions=[clean]", "--quiet"]) == 0
    capsys.readouterr()
    found = estimate(capsys, [*suite, "--probe", "0"])
    assert [cell["cell"] for cell in found["cells"]] == [], "what is done takes no time"
    assert set(found["missing"]) == {"toy_slow/blank", "toy_slow/pgd[answer]@linf:8/255"}
    found = estimate(capsys, [*suite[:-1], f"{out}2", "--probe", "0", "--earlier", str(out)])
    assert [(cell["cell"], cell["basis"]) for cell in found["cells"]] == [("toy_slow/clean", f"records in {out}")]
    assert cli.invoke(["plan", *suite, "--set", "conditions=[clean]", "--budget", "1h"]) == 0
    assert "nothing is left to do" in capsys.readouterr().out


def test_plan_without_a_wish_measures_nothing(suite: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.invoke(["plan", *suite, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["plans"][0]["estimate"] is None and "probe" not in said.err


def test_wrong_wishes_end_with_2(suite: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.invoke(["plan", *suite, "--budget", "soon"]) == 2
    assert "--budget soon: a time with its unit was meant, such as 8h" in capsys.readouterr().err
    assert cli.invoke(["plan", *suite, "--earlier", str(tmp_path)]) == 2
    assert "not the folder of a run" in capsys.readouterr().err


def test_where_there_is_no_gpu_an_earlier_run_must_tell(
    suite: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = estimate(capsys, [*suite, "--device", "cuda", "--workers", "32", "--budget", "1h"])
    assert (found["device"], found["workers"], len(found["missing"])) == ("cuda", 32, 3)
