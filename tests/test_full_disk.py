"""A run on a disk that fills up, from the command line: it says so, ends with 3, and goes on when there is room."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from safemed_bench.core.journal import read

REPO = Path(__file__).parents[1]
PLUGIN = REPO / "tests" / "toy_plugin.py"
SUITE = """\
name: full
data: {name: phantom, resolution: 32, phantom: {test: 6}}
threat: {eps: [8/255]}
models: [toy]
conditions: [clean, blank, {attack: pgd, steps: 2}]
run: {chunk: 4, workers: 1, device: cpu}
"""
PAGE = 4096
"""A tmpfs gives room by pages."""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "full.yaml"
    path.write_text(SUITE)
    return path


@pytest.fixture(scope="module")
def whole(suite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that had room enough."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    done = command(suite, folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 16 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], check=False, capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def command(suite: Path, folder: Path, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """`run`, with files of at most `limit` bytes."""
    return subprocess.run(
        [sys.executable, "-m", "safemed_bench", "run", str(suite), "--plugin", str(PLUGIN), "--output", str(folder)],
        capture_output=True,
        text=True,
        cwd=REPO,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=limit and partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
        check=False,
        timeout=120,
    )


def leave(disk: Path, free: int) -> Path:
    """A file that takes all room but `free` bytes."""
    filler = disk / "filler"
    there = os.statvfs(disk)
    filler.write_bytes(bytes(there.f_bavail * there.f_frsize - free // PAGE * PAGE))
    return filler


def summary(folder: Path) -> Mapping[str, Any]:
    """What a run found, without what says when and on what."""
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return {name: value for name, value in found.items() if name not in ("provenance", "run", "sessions")}


def taken(folder: Path, *names: str) -> int:
    """Bytes of these files, in whole pages."""
    files = [path for name in names for path in folder.glob(name)]
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in files)


def check_goes_on(suite: Path, folder: Path, whole: Path, before: Mapping[str, Any]) -> None:
    """There is room again: nothing that was safe is lost or measured again, and the run ends as any."""
    again = command(suite, folder)
    assert again.returncode == 0, again.stderr
    assert read(folder).items() >= before.items()
    assert not list(folder.rglob(".*.tmp"))
    assert summary(folder) == summary(whole)


def test_a_disk_that_fills_up_in_the_middle(suite: Path, whole: Path, disk: Path) -> None:
    folder = disk / "run"
    filler = leave(disk, taken(whole, "run.json", "suite.yaml", "journal.jsonl") // 2 + 16 * PAGE)
    done = command(suite, folder)
    before = read(folder)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1] == (
        f"disk full: {len(before)} records are safe in {folder}; make room, then run the same command again to go on"
    )
    assert 0 < len(before) < len(read(whole))
    filler.unlink()
    check_goes_on(suite, folder, whole, before)


def test_a_disk_that_has_room_for_the_records_but_not_for_the_report(suite: Path, whole: Path, disk: Path) -> None:
    folder = disk / "run"
    files = ("*.json", "*.jsonl", "suite.yaml", "worker*.log", "artefacts/*/*")
    filler = leave(disk, taken(whole, *files) + taken(whole, "report.html") // 2)
    done = command(suite, folder)
    before = read(folder)
    assert done.returncode == 3, done.stderr
    assert done.stderr.splitlines()[-1].startswith("disk full")
    assert len(before) == len(read(whole))
    filler.unlink()
    check_goes_on(suite, folder, whole, before)


def test_files_that_may_not_grow_are_as_good_as_a_full_disk(suite: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = command(suite, folder, limit=(whole / "journal.jsonl").stat().st_size // 2)
    before = read(folder)
    assert done.returncode == 3
    assert f"disk full: {len(before)} records are safe in {folder}" in done.stderr
    check_goes_on(suite, folder, whole, before)
