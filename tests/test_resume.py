"""A run that is killed, interrupted or out of disk goes on where it stopped and ends with the same records."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from toy_run import PGD, records, toy_dataset, toy_execute, toy_plan

from safemed_bench.core import journal
from safemed_bench.core.errors import DataError, IncompleteError, UsageError
from safemed_bench.core.types import Record
from safemed_bench.datasets.base import Dataset
from safemed_bench.run.progress import QuietReporter
from safemed_bench.suite.plan import Plan

SCRIPT = Path(__file__).parent / "toy_run.py"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def dataset(images: Path) -> Dataset:
    return toy_dataset(images)


@pytest.fixture(scope="module")
def plan(dataset: Dataset) -> Plan:
    """The plan of `toy_run.py` as a script: three chunks of clean, then three of PGD."""
    return toy_plan(dataset, ("toy_slow",), ("clean", PGD))


@pytest.fixture(scope="module")
def whole(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    toy_execute(plan, folder)
    return folder


@pytest.fixture
def started(images: Path, dataset: Dataset, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the script in a process group of its own and wait for `lines` lines in its journal."""
    processes: list[subprocess.Popen[str]] = []

    def start(lines: int, workers: int = 1, delay: float = 0.4) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(images), str(tmp_path), str(workers)],
            env=os.environ | {"TOY_DELAY": str(delay)},
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        deadline = time.monotonic() + 60
        while len(journal.read(tmp_path)) < lines:
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stderr:
            process.stderr.close()


def test_a_run_killed_in_the_middle_of_pgd_goes_on(
    plan: Plan, whole: Path, tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    process = started(lines=16)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = (tmp_path / "journal.jsonl").read_bytes()
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("artefacts/*/*.npz")}
    assert 16 <= len(journal.read(tmp_path)) < 24
    assert json.loads((tmp_path / "run.json").read_text())["provenance"]["sessions"][0]["outcome"] == "running"

    outcome = toy_execute(plan, tmp_path)
    assert (outcome.done, outcome.errors, outcome.missing) == (24, 0, 0)
    assert records(tmp_path) == records(whole)
    after = (tmp_path / "journal.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == 24
    named = {str(tmp_path / r["artefact"].split("#")[0]) for r in map(json.loads, before.splitlines()) if r["artefact"]}
    assert named
    assert all(Path(name).stat().st_mtime_ns == finished[Path(name)] for name in named)
    assert len(json.loads((tmp_path / "run.json").read_text())["provenance"]["sessions"]) == 2


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path, started: Callable[..., subprocess.Popen[str]]) -> None:
    process = started(lines=4, workers=2)
    group = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit() and _group(p) == process.pid]
    assert len(group) >= 3
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(_group(Path(f"/proc/{pid}")) == process.pid for pid in group):
        assert time.monotonic() < deadline, "a worker is still alive"
        time.sleep(0.05)


def _group(entry: Path) -> int | None:
    """Process group of a /proc entry that is alive; None where it has ended."""
    try:
        state, _, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == "Z" else int(group)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 3)])
def test_a_polite_stop_says_how_to_go_on(
    plan: Plan,
    whole: Path,
    tmp_path: Path,
    started: Callable[..., subprocess.Popen[str]],
    number: signal.Signals,
    code: int,
) -> None:
    process = started(lines=8)
    # Ctrl-C on a terminal reaches the whole group, a scheduler's SIGTERM the process alone
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == code
    safe = len(journal.read(tmp_path))
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert f"{word}: {safe} of 24 units are safe in {tmp_path}; go on with" in said
    assert "toy_run.py" in said.rsplit("go on with", 1)[1]
    assert "Traceback" not in said
    assert "Traceback" not in (tmp_path / "workers.log").read_text()
    toy_execute(plan, tmp_path)
    assert records(tmp_path) == records(whole)


def test_a_finished_run_starts_no_worker(plan: Plan, whole: Path) -> None:
    before = (whole / "journal.jsonl").read_bytes()
    log = (whole / "workers.log").stat().st_mtime_ns
    outcome = toy_execute(plan, whole)
    assert (outcome.done, outcome.missing) == (24, 0)
    assert outcome.seconds < 1
    assert (whole / "journal.jsonl").read_bytes() == before
    assert (whole / "workers.log").stat().st_mtime_ns == log


def test_a_journal_cut_anywhere_gives_the_same_records(plan: Plan, whole: Path, tmp_path: Path) -> None:
    """A crash in the middle of a write leaves some lines of a chunk and a part of one more."""
    data = (whole / "journal.jsonl").read_bytes()
    starts = [i + 1 for i, byte in enumerate(data) if byte == 10]
    (tmp_path / "journal.jsonl").write_bytes(data[: starts[13] + 40])
    assert toy_execute(plan, tmp_path).done == 24
    assert records(tmp_path) == records(whole)
    assert (tmp_path / "journal.jsonl").read_bytes().count(b"\n") == 24


def test_a_changed_line_is_named(plan: Plan, whole: Path, tmp_path: Path) -> None:
    data = (whole / "journal.jsonl").read_bytes()
    (tmp_path / "journal.jsonl").write_bytes(b"oops\n" + data)
    with pytest.raises(DataError, match=r"journal\.jsonl:1: not a record"):
        toy_execute(plan, tmp_path)


def test_no_resume_starts_again_and_keeps_the_old_journal(plan: Plan, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_bytes((whole / "journal.jsonl").read_bytes())
    toy_execute(plan, tmp_path, resume=False)
    assert records(tmp_path) == records(whole)
    (old,) = tmp_path.glob("journal.2*.jsonl")
    assert old.read_bytes() == (whole / "journal.jsonl").read_bytes()


def test_retry_errors_measures_only_chunks_with_errors(plan: Plan, whole: Path, tmp_path: Path) -> None:
    lines = [Record.from_dict(json.loads(line)) for line in (whole / "records.jsonl").read_text().splitlines()]
    lost = replace(lines[5], error="boom", correct=None, answer=None, status=None)
    (tmp_path / "journal.jsonl").write_bytes(b"".join(map(journal.to_line, [*lines[:5], lost, *lines[6:]])))
    outcome = toy_execute(plan, tmp_path)
    assert (outcome.done, outcome.errors) == (23, 1)
    outcome = toy_execute(plan, tmp_path, retry_errors=True)
    assert (outcome.done, outcome.errors) == (24, 0)
    assert records(tmp_path) == records(whole)
    assert (tmp_path / "journal.jsonl").read_bytes().count(b"\n") == 25


def test_a_full_disk_stops_the_run_and_loses_nothing(plan: Plan, whole: Path, tmp_path: Path) -> None:
    """The file size limit is inherited by the workers, so that it hits journal and artefacts alike."""
    size = (whole / "journal.jsonl").stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    try:
        with pytest.raises(IncompleteError, match=r"disk full: \d+ records are safe in .*run the same command again"):
            toy_execute(plan, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert toy_execute(plan, tmp_path).done == 24
    assert records(tmp_path) == records(whole)


def test_no_room_for_artefacts_stops_the_run_too(plan: Plan, whole: Path, tmp_path: Path) -> None:
    """The artefacts' folder is a file system of its own without any room left."""
    (tmp_path / "artefacts").mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(tmp_path / "artefacts")], check=False
        ).returncode
    ):
        pytest.skip("needs the right to mount a small file system")
    try:
        (tmp_path / "artefacts" / "filler").write_bytes(b"x" * 4096)
        with pytest.raises(IncompleteError, match="disk full: 12 records are safe"):
            toy_execute(plan, tmp_path)
    finally:
        subprocess.run(["umount", str(tmp_path / "artefacts")], check=True)
    toy_execute(plan, tmp_path)
    assert records(tmp_path) == records(whole)


def test_two_runs_in_one_folder_and_folders_that_cannot_be(plan: Plan, tmp_path: Path) -> None:
    with journal.Journal(tmp_path / "run"), pytest.raises(UsageError, match="another run is writing"):
        toy_execute(plan, tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot make the folder"):
        toy_execute(plan, tmp_path / "file" / "run")


def test_another_plan_in_the_folder_disturbs_nothing(dataset: Dataset, whole: Path, tmp_path: Path) -> None:
    class Listener(QuietReporter):
        said: list[str] = []  # noqa: RUF012

        def say(self, message: str) -> None:
            self.said.append(message)

    (tmp_path / "journal.jsonl").write_bytes((whole / "journal.jsonl").read_bytes())
    smaller = toy_plan(replace(dataset, questions=dataset.questions[:4]), ("toy_slow",), ("clean",))
    outcome = toy_execute(smaller, tmp_path, reporter=Listener())
    assert (outcome.total, outcome.done) == (4, 4)
    assert records(tmp_path) == records(whole)[:4]
    assert any("20 records of another plan" in line for line in Listener.said)
