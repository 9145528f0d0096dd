"""The default suite with the shipped entries, through the command line, as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from safemed_bench.core.types import LETTERS
from safemed_bench.datasets import load
from safemed_bench.datasets.images import load_canvas
from safemed_bench.models import load_model
from safemed_bench.suite import load_suite

SUITE = Path(__file__).parent.parent / "suites" / "omnimed_pgd.yaml"
ENTRIES = ("sft", "instruct", "cot", "safemed-r1")
CLI = (sys.executable, "-m", "safemed_bench")


def command(output, *flags):
    return [*CLI, "run", str(SUITE), "--output", str(output), "--limit", "2", "--quiet", *flags]


def run(output, *flags, expect=0):
    done = subprocess.run(command(output, *flags), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == expect, done.stderr
    return done


def estimates(output):
    return json.loads((output / "summary.json").read_text())["estimates"]


def records(output):
    lines = (output / "records.jsonl").read_text().splitlines()
    return {(r["cell"], r["question_id"]): r for r in map(json.loads, lines)}


def verdicts(output):
    return {key: (r["answer"], r["status"], r["correct"]) for key, r in records(output).items()}


@pytest.fixture(scope="module")
def suite():
    return load_suite(SUITE, ("data.per_modality=4",), {})


@pytest.fixture(scope="module")
def questions(suite):
    return load(suite.data).questions


@pytest.mark.parametrize("name", ENTRIES)
def test_an_entry_loads_checks_itself_and_beats_chance(name, suite, questions):
    spec = next(m for m in suite.models if m.name == name)
    model = load_model(spec, suite.data.resolution, device="cpu")
    canvas = torch.stack([torch.from_numpy(load_canvas(q.image, 64)).permute(2, 0, 1) for q in questions])
    batch = model.prepare(questions, canvas)
    answers = model.answer(batch, batch.pixels)
    assert sum(a.index == q.answer for a, q in zip(answers, questions, strict=True)) > 0.8 * len(questions)
    for answer, question in zip(answers, questions, strict=True):
        assert len(answer.option_logprobs) == len(question.options)  # both ways of answering are on record
        assert answer.text and (answer.letter is None or LETTERS[answer.letter] in answer.text)
    assert model.reasons == (name in ("cot", "safemed-r1"))
    assert sum(file.stat().st_size for file in Path(model.card.path).iterdir()) < 5e6


def test_eps_zero_gives_the_clean_verdicts_bit_for_bit(tmp_path):
    run(tmp_path / "run", "--set", "threat.eps=[0]", "--set", "threat.headline=0")
    by_cell = records(tmp_path / "run")
    attacked = [key for key in by_cell if "@linf:0" in key[0]]
    assert attacked
    for cell, question in attacked:
        clean = by_cell[cell.split("/")[0] + "/clean", question]
        here = by_cell[cell, question]
        for field in ("answer", "status", "correct", "text", "option_logprobs"):
            assert here[field] == clean[field], (cell, question, field)
        assert not here["linf"]


def test_a_killed_run_and_any_number_of_workers_give_the_same_estimates(tmp_path):
    flags = ("--model", "sft", "--set", "run.chunk=4")
    run(tmp_path / "whole", *flags, "--workers", "1")
    killed = subprocess.Popen(
        command(tmp_path / "cut", *flags, "--workers", "2"), start_new_session=True, stderr=subprocess.DEVNULL
    )
    journal = tmp_path / "cut" / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.is_file() and "pgd" in journal.read_text()):
        assert killed.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "cut" / "summary.json").exists()
    before = journal.read_text().splitlines()
    run(tmp_path / "cut", *flags, "--workers", "2")
    assert json.dumps(estimates(tmp_path / "cut")) == json.dumps(estimates(tmp_path / "whole"))
    after = journal.read_text().splitlines()
    whole_lines = [line for line in before if line in set(after)]
    assert after[: len(whole_lines)] == whole_lines and len(before) - len(whole_lines) <= 1  # at most one torn line
    keys = [json.loads(line)["key"] for line in after]
    assert len(keys) == len(set(keys)), "finished work was repeated"


def test_batch_size_changes_no_verdict_beyond_floating_point(tmp_path):
    flags = ("--model", "sft", "--model", "instruct", "--set", "threat.eps=[4/255]")
    for size in ("1", "7", "64"):
        run(tmp_path / size, *flags, "--batch-size", size)
    one = verdicts(tmp_path / "1")
    for size in ("7", "64"):
        other = verdicts(tmp_path / size)
        assert one.keys() == other.keys()
        assert sum(one[k] == other[k] for k in one) >= 0.98 * len(one)  # 16 questions a cell: one flip may happen
    clean = {k: v for k, v in records(tmp_path / "1").items() if k[0].endswith("/clean")}
    for size in ("7", "64"):
        far = records(tmp_path / size)
        for key, record in clean.items():
            for a, b in zip(record["option_logprobs"], far[key]["option_logprobs"], strict=True):
                assert abs(a - b) < 1e-3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--set", "threat.epss=[1]"), "epss"),
        (("--set", "conditions=[{attack: pgdd}]"), "Did you mean 'pgd'"),
        (("--set", "data.root=/no/such/folder"), "/no/such/folder"),
        (("--set", "models=[{name: x, path: /no/such/model}]"), "/no/such/model"),
        (("--set", "models=[sftt]"), "Did you mean 'sft'"),
        (("--set", "threat.eps=[4]"), "4/255"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(tmp_path, flags, message):
    done = run(tmp_path / "run", *flags, expect=2)
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "journal.jsonl").exists()
