"""The gate's verdicts, what it promises (by simulation), its outputs, and its rules in a suite."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree as Xml

import numpy as np
import pytest
import statsmodels.api as sm
import yaml
from scipy.stats import t as student
from small_runs import CLEAN, PGD, SETTINGS, WORST, write

from safemed_bench import cli
from safemed_bench.core.errors import IncompleteError, SuiteError, UsageError
from safemed_bench.results import gate_formats as formats
from safemed_bench.results.compare import pair_up
from safemed_bench.results.gate import DEFAULT_RULES, Outcome, Rule, gate, overall
from safemed_bench.results.noninferiority import paired_drop
from safemed_bench.results.sources import load_measured
from safemed_bench.suite import load_suite
from safemed_bench.suite.schema import Suite

REPO = Path(__file__).parents[1]
RULE = Rule(condition="worst@headline", allowed_drop=5)


def outcome(baseline: Path, run: Path, *rules: Rule) -> Outcome:
    return gate(pair_up(load_measured(baseline), load_measured(run)), rules or (RULE,))


def pair(folder: Path, before: str, after: str, **more: Any) -> tuple[Path, Path]:
    """A baseline and a run with these verdicts under PGD; clean is right throughout."""
    clean = "1" * len(before)
    return (
        write(folder / "baseline", {CLEAN: clean, PGD: before}, **more),
        write(folder / "run", {CLEAN: clean, PGD: after}, **more),
    )


# --- the statistics ---


def test_the_error_is_that_of_a_cluster_robust_mean_with_one_flip_added_each_way() -> None:
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(80), 3)
    fate = np.repeat(rng.choice([1.0, 0.0, -1.0], 80, p=[0.2, 0.7, 0.1]), 3)
    before = np.where(fate == 0, 1.0, fate == 1).astype(float)
    found = paired_drop(before, before - fate, images)
    assert found.weight == pytest.approx(3, rel=0.02)  # all three of an image go together
    values, weights = np.append(fate, [1, -1]), np.append(np.ones(240), [found.weight] * 2)
    groups = np.append(images, [80, 81])
    fit = sm.WLS(values, np.ones(242), weights=weights).fit(cov_type="cluster", cov_kwds={"groups": groups})
    assert found.centre == pytest.approx(np.average(values, weights=weights))
    assert found.error == pytest.approx(fit.bse[0])
    assert found.drop == pytest.approx(fate.mean()) and found.images == 80
    assert found.p_above(0.02) == pytest.approx(student.sf((found.centre - 0.02) / fit.bse[0], 79))
    assert found.p_below(0.02) == pytest.approx(1 - found.p_above(0.02))


def test_one_question_per_image_is_bonett_and_price() -> None:
    before, after = np.array([1, 1, 1, 0, 1, 1, 1, 1.0]), np.array([0, 1, 0, 1, 1, 1, 1, 1.0])
    found = paired_drop(before, after, np.arange(8))
    p_lost, p_gained = 3 / 10, 2 / 10  # two and one of eight, one more each
    assert found.centre == pytest.approx(p_lost - p_gained)
    variance = (p_lost + p_gained - (p_lost - p_gained) ** 2) / 10
    assert found.error == pytest.approx(np.sqrt(variance * 10 / 9))  # statsmodels divides by n - 1


def test_opposite_fates_within_an_image_are_no_bonus() -> None:
    before, after = np.tile([1.0, 0.0], 20), np.tile([0.0, 1.0], 20)
    together, apart = paired_drop(before, after, np.arange(40) // 2), paired_drop(before, after, np.arange(40))
    assert together.effect == 1.0 and together.error == pytest.approx(apart.error)


def test_the_detectable_drop_has_the_power_it_names_and_shrinks_with_n() -> None:
    rng = np.random.default_rng(1)
    drops = []
    for n in (64, 256, 2000, 17662):
        fate = rng.permutation(np.repeat([1.0, -1.0, 0.0], [round(0.05 * n), round(0.05 * n), n - 2 * round(0.05 * n)]))
        before = np.where(fate == 0, 1.0, fate == 1)
        found = paired_drop(before, before - fate, np.arange(n))
        drop = found.detectable(0.0, 0.05, 0.8)
        assert drop is not None and found.power(drop, 0.0, 0.05) == pytest.approx(0.8, abs=1e-3)
        drops.append(100 * drop)
        wider = found.detectable(0.02, 0.05, 0.8)
        assert wider is not None and wider > drop + 0.02 and wider < found.detectable(0.02, 0.01, 0.8)
    assert drops == sorted(drops, reverse=True)
    for n, drop in ((2000, drops[2]), (17662, drops[3])):  # the normal approximation, with the drop among the flips
        reach = 1.6449 + 0.8416
        assert drop == pytest.approx(100 * reach * np.sqrt((0.1 + drop / 100) / n), rel=0.02)


def test_one_image_or_none_says_nothing() -> None:
    for n in (0, 4):
        found = paired_drop(np.ones(n), np.zeros(n), np.zeros(n, dtype=int))
        assert found.p_above(0.0) == found.p_below(0.5) == 1.0 and found.detectable(0.0, 0.05, 0.8) is None


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_gate", REPO / "benchmarks" / "gate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("n", "noise"), [(200, 0.1), (1000, 0.2)])
def test_simulated_runs_keep_the_promises(benchmark: ModuleType, n: int, noise: float) -> None:
    """False alarms, false passes and the printed power, on clustered images; benchmarks/gate.py has the whole grid."""
    rng = np.random.default_rng(7)
    sims = 600
    null = benchmark.sample(rng, benchmark.World(n, noise, 0.02), sims)
    assert benchmark.kept(sum(run.p_above(0.02) <= 0.05 for run in null), sims)
    assert benchmark.kept(sum(run.p_below(0.02) <= 0.05 for run in null), sims)
    pilots = benchmark.sample(rng, benchmark.World(n, noise), 100)
    printed = float(np.median([pilot.detectable(0.02, 0.05, 0.8) for pilot in pilots]))
    weak = benchmark.sample(rng, benchmark.World(n, noise, printed), sims)
    assert 0.72 < np.mean([run.p_above(0.02) <= 0.05 for run in weak]) < 0.88  # 5 pp, and two standard errors


def test_the_whole_gate_is_simulated(benchmark: ModuleType) -> None:
    """The benchmark's own cases, a few runs of each: nothing that lost nothing is called regressed by all of them."""
    found = list(benchmark.gate_cases(3, np.random.default_rng(7)))
    quiet = [case for case in found if "no drop" in case["name"]]
    assert len(quiet) == 5 and all(case["regressed"] < 1 for case in quiet)
    assert len(found) == len(quiet) + 1


def test_a_rate_that_is_too_high_is_noticed(benchmark: ModuleType) -> None:
    assert benchmark.kept(100, 2000) and not benchmark.kept(140, 2000)
    assert benchmark.close(1620, 2000, 0.8) and not any(benchmark.close(k, 2000, 0.8) for k in (1400, 1800))
    assert benchmark.close(261, 300, 0.8), "87% in 300 may well be the 81.7% that it is in 6,000"


# --- verdicts ---


@pytest.mark.parametrize(
    ("before", "after", "rule", "verdict"),
    [
        ("1" * 200, "1" * 200, RULE, "pass"),
        ("1" * 200, "0" * 40 + "1" * 160, RULE, "regressed"),
        ("0" * 40 + "1" * 160, "1" * 200, RULE, "improved"),
        ("1" * 200, "0" * 12 + "1" * 188, RULE, "inconclusive"),
        ("1" * 200, "0" * 40 + "1" * 160, replace(RULE, allowed_drop=40), "pass"),
        ("1" * 200, "1" * 200, replace(RULE, allowed_drop=0), "inconclusive"),
        ("1" * 10, "0" * 3 + "1" * 7, RULE, "inconclusive"),
    ],
)
def test_the_four_verdicts(tmp_path: Path, before: str, after: str, rule: Rule, verdict: str) -> None:
    found = outcome(*pair(tmp_path, before, after), rule)
    assert found.verdict == verdict and [t.verdict for t in found.tests] == [verdict]
    assert found.exit_code(strict=False) == (4 if verdict == "regressed" else 0)
    assert found.exit_code(strict=True) == {"regressed": 4, "inconclusive": 5}.get(verdict, 0)


def test_a_drop_of_questions_on_few_images_is_less_certain(tmp_path: Path) -> None:
    before, after = "1" * 60, "0" * 10 + "1" * 50
    assert outcome(*pair(tmp_path / "a", before, after)).verdict == "regressed"
    assert outcome(*pair(tmp_path / "b", before, after, per_image=10)).verdict == "inconclusive"


def test_holm_spans_the_slices_and_lowers_what_can_be_detected(tmp_path: Path) -> None:
    runs = pair(tmp_path, "1" * 100, "0" * 10 + "1" * 90)
    alone = outcome(*runs, replace(RULE, slice="CT", allowed_drop=8)).tests
    each = outcome(*runs, replace(RULE, slice="each", allowed_drop=8)).tests
    assert [t.slice for t in each] == ["CT", "MRI"]
    assert each[0].p_regressed == pytest.approx(2 * alone[0].p_regressed)
    assert (alone[0].verdict, each[0].verdict) == ("regressed", "inconclusive")
    assert each[0].detectable is not None and each[0].detectable > alone[0].detectable
    assert each[1].verdict == "pass" and outcome(*runs, replace(RULE, slice="each", allowed_drop=8)).verdict != "pass"


def test_the_worst_test_decides() -> None:
    assert overall(["pass", "improved"]) == "improved"
    assert overall(["pass", "inconclusive", "improved"]) == "inconclusive"
    assert overall(["improved", "regressed", "inconclusive"]) == "regressed"


def test_more_unreadable_answers_are_a_regression_of_their_rate(tmp_path: Path) -> None:
    baseline, run = pair(tmp_path, "0" * 100, "i" * 30 + "0" * 70)
    found = outcome(baseline, run, Rule("invalid_rate", condition=PGD), replace(RULE, condition=PGD))
    rate, accuracy = found.tests
    assert rate.verdict == "regressed" and (rate.before, rate.after, rate.drop) == pytest.approx((0.0, 0.3, 0.3))
    assert accuracy.verdict == "pass"


def test_what_was_not_measured_does_not_pass(tmp_path: Path) -> None:
    baseline, run = pair(tmp_path, "1" * 100, "1" * 95 + "eeee.")
    with pytest.raises(IncompleteError, match=r"5 of 100 questions have no verdict .* \(5.00%, allowed 0.00%\)"):
        outcome(baseline, run)
    allowed = write(
        tmp_path / "b", {CLEAN: "1" * 100, PGD: "1" * 95 + "eeee."}, settings={"run": {"fail_on_error": 0.05}}
    )
    assert outcome(baseline, allowed).tests[0].n == 95


def test_the_default_rules_hold_clean_and_worst_case(tmp_path: Path) -> None:
    found = outcome(*pair(tmp_path, "1" * 200, "0" * 60 + "1" * 140), *DEFAULT_RULES)
    assert {(t.condition, t.slice): t.verdict for t in found.tests} == {
        (CLEAN, "all"): "pass",
        (WORST, "all"): "regressed",
        (WORST, "CT"): "regressed",
        (WORST, "MRI"): "pass",
    }


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (replace(RULE, model="x"), "gate.0.model: no model 'x' is compared"),
        (replace(RULE, condition="claen"), "'claen' was not measured. Did you mean 'clean'?"),
        (replace(RULE, slice="MRT"), "no question is of 'MRT'. Did you mean 'MRI'?"),
    ],
)
def test_a_rule_about_nothing_is_no_pass(tmp_path: Path, rule: Rule, words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("?", r"\?")):
        outcome(*pair(tmp_path, "1" * 10, "1" * 10), rule)


# --- outputs ---


@pytest.fixture
def regressed(tmp_path: Path) -> Outcome:
    rules = (replace(RULE, slice="each"), Rule(condition=CLEAN, allowed_drop=0))
    return outcome(*pair(tmp_path, "1" * 200, "0" * 40 + "1" * 160), *rules)


def test_markdown_names_verdicts_and_what_could_have_been_seen(regressed: Outcome) -> None:
    text = formats.to_markdown(regressed)
    assert text.startswith("# Robustness gate: REGRESSED\n\nData: **phantom (small), split test**")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert "**regressed** | 1 | m | worst@linf:4/255 | CT | 100 | 100.0 | 60.0 | +40.0 |" in lines[1]
    assert all("pp at power 80%" in line for line in lines[1:]) and len(lines) == 4
    assert text == formats.to_markdown(regressed)


def test_junit_counts_failures_and_is_xml(regressed: Outcome) -> None:
    for strict, failures, skipped in ((False, 1, 1), (True, 2, 0)):
        root = Xml.fromstring(formats.to_junit(regressed, strict=strict).encode())
        assert len(root.findall(".//testcase")) == 3
        assert len(root.findall(".//failure")) == failures and len(root.findall(".//skipped")) == skipped
        assert sum(int(suite.get("failures", "")) for suite in root) == failures
    (failure, _) = root.findall(".//failure")
    assert failure.get("type") == "regressed" and "100.0 → 60.0" in failure.get("message", "")


def test_annotations_are_workflow_commands(regressed: Outcome) -> None:
    error, warning, notice = formats.to_annotations(regressed)
    assert error.startswith("::error title=regressed%3A m%2C worst@linf%3A4/255%2C CT::100.0 → 60.0")
    assert "%25" in error and warning.startswith("::warning title=inconclusive")
    assert notice == "::notice title=Robustness gate::REGRESSED"


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    baseline, run = map(str, pair(tmp_path, "1" * 200, "0" * 60 + "1" * 140))
    files = ["--markdown", str(tmp_path / "gate.md"), "--junit", str(tmp_path / "gate.xml")]
    assert cli.invoke(["gate", run, "--baseline", baseline, *files]) == 4
    told = capsys.readouterr()
    assert "smallest detectable drop" in told.out and told.out.rstrip().endswith("REGRESSED") and told.err == ""
    assert (tmp_path / "gate.md").read_text().startswith("# Robustness gate") and (tmp_path / "gate.xml").is_file()
    assert cli.invoke(["gate", run, "--baseline", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "pass"
    assert cli.invoke(["gate", run, "--baseline", baseline, "--github"]) == 4
    assert "::error" in capsys.readouterr().err


def test_strict_ends_with_5_only_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline, run = map(str, pair(tmp_path, "1" * 20, "0" * 2 + "1" * 18))
    assert cli.invoke(["gate", run, "--baseline", baseline]) == 0
    assert cli.invoke(["gate", run, "--baseline", baseline, "--strict", "--json"]) == 5
    assert '"verdict": "inconclusive"' in capsys.readouterr().out


def test_the_rules_of_the_runs_suite_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loose = {"gate": [{"condition": "worst@headline", "allowed_drop": 60}]}
    baseline, _ = pair(tmp_path, "1" * 200, "1" * 200)
    run = write(tmp_path / "loose", {CLEAN: "1" * 200, PGD: "0" * 80 + "1" * 120}, settings=loose)
    assert cli.invoke(["gate", str(run), "--baseline", str(baseline), "--json"]) == 0
    assert [r["allowed_drop"] for r in json.loads(capsys.readouterr().out)["rules"]] == [60]
    tight = tmp_path / "tight.yaml"
    tight.write_text(
        "name: t\nmodels: [{name: m, path: /w}]\nconditions: [clean]\ngate: [{condition: clean, allowed_drop: 1}]"
    )
    assert cli.invoke(["gate", str(run), "--baseline", str(baseline), "--suite", str(tight), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rules"][0]["condition"] == "clean"


# --- rules in a suite ---

GATED = """\
name: gated
models: [{name: m, path: /w}]
conditions: [clean, noise, {attack: pgd, steps: 3}]
gate:
  - {metric: accuracy, condition: worst@linf:4/255, model: m, slice: each, allowed_drop: 3, alpha: 0.1, power: 0.9}
  - condition: clean
"""


def test_a_suite_says_its_rules_and_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(GATED)
    suite = load_suite(path, env={})
    assert Rule(**suite.gate[0].model_dump()) == Rule("accuracy", WORST, "m", "each", 3.0, 0.1, 0.9)
    assert Rule(**suite.gate[1].model_dump()) == Rule(condition="clean")
    assert Suite.model_validate(suite.to_dict()) == suite
    assert "gate" not in Suite.model_validate(SETTINGS).to_dict()


@pytest.mark.parametrize(
    ("old", "new", "place", "words"),
    [
        ("allowed_drop: 3", "alowed_drop: 3", "5:76", "gate.0.alowed_drop: unknown key. Did you mean 'allowed_drop'?"),
        ("allowed_drop: 3", "allowed_drop: -1", "5:90", "greater than or equal to 0"),
        ("alpha: 0.1", "alpha: 2", "5:100", "less than 0.5"),
        ("metric: accuracy", "metric: acuracy", "5:14", "Did you mean 'accuracy'?"),
        ("model: m,", "model: n,", "5:60", "unknown entry 'n'"),
        ("worst@linf:4/255", "wrost@linf:4/255", "5:35", "unknown condition 'wrost@linf:4/255'"),
        ("worst@linf:4/255", "worst@linf:5/255", "5:35", "names no size of the threat; one of: @headline, @linf:2/255"),
        ("condition: clean", "condition: clean@headline", "6:16", "'clean' has no size; write `clean`"),
        ("condition: clean", "condition: fgsm@headline", "6:16", "unknown condition 'fgsm@headline'"),
    ],
)
def test_what_is_wrong_with_a_rule_is_said_with_its_place(
    tmp_path: Path, old: str, new: str, place: str, words: str
) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(GATED.replace(old, new))
    with pytest.raises(SuiteError) as caught:
        load_suite(path, env={})
    (problem,) = caught.value.problems
    assert words in str(problem) and f"suite.yaml:{place}" in str(problem)


def test_rules_change_no_unit(tmp_path: Path) -> None:
    from toy_run import toy_dataset, toy_plan

    plan = toy_plan(toy_dataset(tmp_path, 4), conditions=("clean", {"attack": "pgd", "steps": 2}))
    from safemed_bench.suite.plan import build_plan

    gated = Suite.model_validate({**plan.suite.to_dict(), "gate": [{"condition": "clean", "alpha": 0.01}]})
    assert gated.gate and [u.key for u in build_plan(gated, plan.dataset, plan.cards).units] == [
        u.key for u in plan.units
    ]


def test_a_gate_needs_no_torch() -> None:
    code = (
        "import sys, safemed_bench.commands.gate as g, safemed_bench.results.gate, safemed_bench.results.gate_formats"
    )
    code += ", safemed_bench.suite; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=REPO).returncode == 0


def test_the_workflow_is_yaml_and_calls_what_exists() -> None:
    workflow = yaml.safe_load((REPO / ".github" / "workflows" / "robustness.yml").read_text())
    steps = "\n".join(step.get("run", "") for step in workflow["jobs"]["gate"]["steps"])
    for words in ("leaderboard check", "run", "gate"):
        assert f"safemed-bench {words}" in steps
    flags = set(re.findall(r"--[a-z]+", steps.partition("safemed-bench gate")[2]))
    told = subprocess.run(
        [sys.executable, "-m", "safemed_bench", "gate", "--help"], capture_output=True, text=True, check=True, cwd=REPO
    )
    assert flags and flags <= set(re.findall(r"--[a-z]+", told.stdout))
    assert workflow["env"]["SUITE"] in {path.stem for path in (REPO / "suites").glob("*.yaml")}


def test_the_documented_rule_is_valid_and_the_defaults_are_as_documented() -> None:
    text = (REPO / "docs" / "ci.md").read_text()
    blocks = re.findall(r"```yaml\n(gate:.*?)```", text, re.DOTALL)
    suites = [Suite.model_validate({**SETTINGS, **yaml.safe_load(block)}) for block in blocks]
    assert [Rule(**suite.gate[0].model_dump()) for suite in suites] == [
        Rule(slice="each"),
        Rule("certified_accuracy", condition="certified@l2:0.25", allowed_drop=5),
    ]
    assert [rule.allowed_drop for rule in DEFAULT_RULES] == [3, 5, 15]
    assert "clean accuracy may drop 3 pp, the worst case at the headline eps 5 pp, and in\neach modality 15 pp" in text
