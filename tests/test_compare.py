"""Comparisons worked out by hand, and every reason why two runs do not compare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import statsmodels.api as sm
import yaml
from scipy.stats import binomtest
from small_runs import CLEAN, PGD, SETTINGS, WORST, write

from safemed_bench import cli
from safemed_bench.core.errors import DataError, UsageError
from safemed_bench.results.compare import Row, compare, pair_up, unmatched
from safemed_bench.results.protocol import differences, protocol_of
from safemed_bench.results.sources import load_measured

A = {CLEAN: "1111111111110000", PGD: "1111110011100000"}
B = {CLEAN: "1111111111100001", PGD: "0000010011111000"}


def rows(a: Path, b: Path, *wanted: str, allow: tuple[str, ...] = ()) -> dict[tuple[str, str], Row]:
    pairs = pair_up(load_measured(a), load_measured(b), wanted, allow)
    return {(row.condition, row.slice): row for row in compare(pairs)}


def refusal(a: Path, b: Path) -> str:
    with pytest.raises(DataError, match="do not compare") as caught:
        pair_up(load_measured(a), load_measured(b))
    return str(caught.value)


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "a", A), write(tmp_path / "b", B)


def test_a_difference_is_paired_by_question(runs: tuple[Path, Path]) -> None:
    found = rows(*runs)
    assert set(found) == {(c, s) for c in (CLEAN, PGD, "pgd@linf:4/255", WORST) for s in ("all", "CT", "MRI")}
    row = found[PGD, "all"]
    difference = np.array([int(y) - int(x) for x, y in zip(A[PGD], B[PGD], strict=True)])
    assert (row.a, row.b, row.lost, row.gained) == (9 / 16, 6 / 16, 5, 2)
    assert row.difference.value == pytest.approx(-3 / 16) and row.difference.n == 16
    assert (row.difference.low, row.difference.high) == pytest.approx(sm.stats.DescrStatsW(difference).tconfint_mean())
    assert row.p == pytest.approx(binomtest(5, 7, 0.5).pvalue)


def test_holm_spans_the_slices_of_a_condition(runs: tuple[Path, Path]) -> None:
    found = rows(*runs)
    p = sorted(found[PGD, s].p for s in ("all", "CT", "MRI"))
    adjusted = sorted(found[PGD, s].p_holm for s in ("all", "CT", "MRI"))
    assert adjusted[0] == pytest.approx(3 * p[0]) and adjusted[1] == pytest.approx(min(1, max(2 * p[1], adjusted[0])))


def test_questions_of_one_image_widen_the_interval(tmp_path: Path) -> None:
    outcomes = {CLEAN: "1" * 16}, {CLEAN: "1111000011110000"}
    alone = rows(*(write(tmp_path / f"a{i}", o) for i, o in enumerate(outcomes)))[CLEAN, "all"].difference
    shared = rows(*(write(tmp_path / f"b{i}", o, per_image=4) for i, o in enumerate(outcomes)))[CLEAN, "all"].difference
    assert (shared.value, shared.method) == (alone.value, "paired-t-clustered")
    assert shared.high - shared.low > 1.5 * (alone.high - alone.low)


def test_a_question_without_a_verdict_is_in_neither(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", {CLEAN: "1111"}), write(tmp_path / "b", {CLEAN: "0e.1"})
    row = rows(a, b)[CLEAN, "all"]
    assert (row.difference.n, row.missing, row.lost, row.a) == (2, 2, 1, 1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"info": {"data": {"fingerprint": "bad", "stamp": "others"}}}, "data: other questions were asked"),
        ({"info": {"code": {"attack": 2}}}, "code: 'attack' is version 1 in A, 2 in B"),
        ({"card": {"prompt": "think"}}, "prompt: bare in A, think in B"),
        ({"card": {"decode": "generate"}}, "extraction: logprob, at most 4 new tokens in A, generate, at most 4"),
        ({"card": {"max_new_tokens": 9}}, "extraction: logprob, at most 4 new tokens in A, logprob, at most 9"),
        (
            {"settings": {"threat": {"norm": "l2", "eps": ["4/255"], "headline": "4/255"}}},
            "threat model: linf at 4/255 in A, l2 at 4/255 in B",
        ),
        ({"settings": {"data": {"resolution": 32, "fit": "pad"}}}, "canvas: 64 px, pad in A, 32 px, pad in B"),
        (
            {"settings": {"conditions": ["clean", {"attack": "pgd", "steps": 5, "restarts": 1}]}},
            f"attack strength: {PGD}: pgd (restarts 1, steps 20) in A, pgd (restarts 1, steps 5) in B",
        ),
        (
            {
                "settings": {
                    "conditions": ["clean", {"attack": "pgd", "steps": 20, "restarts": 1, "params": {"keep": "last"}}]
                }
            },
            "pgd (keep last, restarts 1, steps 20) in B",
        ),
    ],
)
def test_what_does_not_compare_is_refused_and_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    message = refusal(write(tmp_path / "a", A), write(tmp_path / "b", B, **change))
    assert words in message and message.count("\n") == 1


def test_all_reasons_are_said_at_once(tmp_path: Path) -> None:
    other = write(tmp_path / "b", B, card={"prompt": "think", "decode": "generate"}, info={"code": {"attack": 3}})
    assert refusal(write(tmp_path / "a", A), other).count("\n") == 3


def test_another_objective_is_a_difference_that_can_be_waived(tmp_path: Path) -> None:
    a = write(tmp_path / "a", A)
    b = write(tmp_path / "b", {**B, "pgd[no_think]@linf:4/255": B[PGD]}, card={"prompt": "think"})
    assert "objectives: pgd[no_think]@linf:4/255 only in B" in refusal(a, b)
    left, right = load_measured(a), load_measured(b)
    pairs = pair_up(left, right, allow=("prompt", "objectives"))
    assert (WORST, "all") in {(row.condition, row.slice) for row in compare(pairs)}
    assert any("differs all the same" in note and "prompt" in note for note in unmatched(left, right, pairs))


def test_an_attack_at_another_size_is_no_matter_of_objectives(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", A), write(tmp_path / "b", {**B, "pgd[answer]@linf:8/255": B[PGD]})
    assert "attack strength: pgd[answer]@linf:8/255 only in B" in refusal(a, b)


def test_two_settings_of_one_attack_are_told_apart_by_their_size(tmp_path: Path) -> None:
    """`at: headline` and `at: other`: only the other size's steps differ."""
    weak = {"attack": "pgd", "steps": 3, "at": "other"}
    at = [{"attack": "pgd", "steps": 20, "at": "headline"}, {"attack": "pgd", "steps": 20, "at": "other"}]
    threat = {"norm": "linf", "eps": ["4/255", "8/255"], "headline": "4/255"}
    outcomes = {**A, "pgd[answer]@linf:8/255": A[PGD]}
    a = write(tmp_path / "a", outcomes, settings={"threat": threat, "conditions": at})
    b = write(tmp_path / "b", outcomes, settings={"threat": threat, "conditions": [at[0], weak]})
    message = refusal(a, b)
    assert "pgd[answer]@linf:8/255: pgd (steps 20) in A, pgd (steps 3) in B" in message and PGD not in message


def test_models_of_two_names_are_paired_when_asked(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a", A), write(tmp_path / "b", B, model="n")
    with pytest.raises(UsageError, match="no model is in both: m in A, n in B"):
        rows(a, b)
    assert rows(a, b, "m=n")[CLEAN, "all"].model == "m = n"
    with pytest.raises(UsageError, match="B has no model 'x'"):
        rows(a, b, "m=x")


def test_a_file_of_a_run_stands_for_it_and_a_lone_one_is_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = runs
    assert rows(a / "records.jsonl", b / "run.json") == rows(a, b)
    lone = tmp_path / "alone" / "summary.json"
    lone.parent.mkdir()
    lone.write_text("{}")
    with pytest.raises(DataError, match="question by question"):
        load_measured(lone)
    (lone.parent / "records.jsonl").write_bytes((a / "records.jsonl").read_bytes())
    message = refusal(a, lone.parent)
    assert "data: B does not say which questions were asked" in message


def test_on_the_command_line(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    a, b = map(str, runs)
    assert cli.invoke(["compare", a, b, "--condition", WORST]) == 0
    shown = capsys.readouterr().out
    assert "phantom (small)" in shown and "-31.2 [" in shown and PGD not in shown
    assert cli.invoke(["compare", a, b, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (row,) = [r for r in told["rows"] if (r["condition"], r["slice"]) == (PGD, "all")]
    assert row["difference"] == -3 / 16 and row["low"] < -3 / 16 < row["high"] and row["method"] == "paired-t"
    assert cli.invoke(["compare", a, b, "--condition", "claen"]) == 2
    assert "Did you mean 'clean'?" in capsys.readouterr().err
    assert cli.invoke(["compare", a, b, "--allow", "data"]) == 2
    assert "cannot be waived" in capsys.readouterr().err


def test_the_settings_read_here_are_what_a_run_writes() -> None:
    from safemed_bench.suite.schema import Suite

    written = Suite.model_validate(SETTINGS).to_dict()
    assert written["threat"]["eps"] == ["4/255"] and written["conditions"][1]["steps"] == 20
    assert yaml.safe_load(yaml.safe_dump(written)) == written


def test_the_code_that_smooths_is_behind_smoothed_entries_alone() -> None:
    info = {"models": [{"name": "m"}, {"name": "s", "smooth": {"sigma": 0.25}}], "code": {"attack": 1, "smooth": 2}}
    newer = info | {"code": {"attack": 1, "smooth": 3}}
    assert differences(protocol_of("m", info, {}), protocol_of("m", newer, {})) == differences(
        protocol_of("m", info, {}), protocol_of("m", info, {})
    )
    (found,) = (d for d in differences(protocol_of("s", info, {}), protocol_of("s", newer, {})) if d.check == "code")
    assert "'smooth' is version 2 in A, 3 in B" in found.message
