"""The journal: what is appended survives crashes, torn lines, full disks and second writers."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from safemed_bench.core.errors import DataError, IncompleteError, UsageError
from safemed_bench.core.journal import Journal, read, scan, to_line, write_atomic
from safemed_bench.core.types import Record


def record(key: str, *, error: str = "", answer: int | None = 1, text: str = "") -> Record:
    verdict = None if error else answer == 1
    return Record(
        key=key,
        cell="toy/clean",
        model="toy",
        condition="clean",
        question_id=f"q-{key}",
        modality="CT",
        question_type="modality",
        image_sha256="0" * 8,
        n_options=4,
        target=1,
        answer=None if error else answer,
        status=None if error else "valid",
        correct=verdict,
        option_logprobs=(-0.1, -2.5),
        text=text,
        error=error,
    )


def test_what_is_appended_is_read_back(tmp_path: Path) -> None:
    records = [record("a", text="Größe \u2028 two\nlines"), record("b", error="boom")]
    with Journal(tmp_path) as journal:
        assert journal.append(records) == 2
    assert list(read(tmp_path).values()) == records
    found = scan(tmp_path)
    assert list(found.index) == ["a", "b"]
    assert (found.lines, found.torn) == (2, 0)


def test_an_empty_folder_reads_as_no_records(tmp_path: Path) -> None:
    assert read(tmp_path) == {}
    assert len(scan(tmp_path).index) == 0


def test_first_verdict_wins_and_an_error_gives_way_to_a_verdict(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.append([record("a"), record("b", error="one")])
        assert journal.append([record("a", answer=0), record("b", error="two")]) == 1
        assert journal.append([record("b")]) == 1
        assert journal.append([record("b", answer=0)]) == 0
        assert journal.append([record("c", error="three")]) == 1
        live = journal.index
        assert list(live) == ["a", "b", "c"]
        assert [live.failed(key) for key in live] == [False, False, True]
        lines = list(journal.lines(["c", "absent", "b", "a"]))
    assert read(tmp_path) == {"a": record("a"), "b": record("b"), "c": record("c", error="three")}
    assert lines == [to_line(record("c", error="three")), to_line(record("b")), to_line(record("a"))]
    again = scan(tmp_path).index
    assert [(key, again.failed(key), again.offset(key)) for key in again] == [
        (key, live.failed(key), live.offset(key)) for key in live
    ]


@pytest.mark.parametrize("tail", [b'{"key": "c", "ce', b"\x00\x00\x00", b"{}", b"\xff\xfe"])
def test_a_torn_last_line_is_cut_off_on_resume(tmp_path: Path, tail: bytes) -> None:
    with Journal(tmp_path) as journal:
        journal.append([record("a"), record("b")])
    whole = (tmp_path / "journal.jsonl").read_bytes()
    (tmp_path / "journal.jsonl").write_bytes(whole + tail)
    assert set(read(tmp_path)) == {"a", "b"}
    with Journal(tmp_path) as journal:
        assert journal.repaired == len(tail)
        journal.append([record("c")])
    assert (tmp_path / "journal.jsonl").read_bytes() == whole + to_line(record("c"))


def test_a_record_with_a_field_missing_is_as_bad_as_one_that_is_no_json(tmp_path: Path) -> None:
    data = to_line(record("a"))
    for bad in (b"not json\n", b'{"key": "x"}\n', b"[1]\n", b"\n"):
        (tmp_path / "journal.jsonl").write_bytes(data + bad + to_line(record("b")))
        with pytest.raises(DataError, match=r"journal\.jsonl:2: not a record"):
            read(tmp_path)
        with pytest.raises(DataError, match=r"journal\.jsonl:2: not a record"):
            Journal(tmp_path)


def test_a_bad_line_leaves_the_folder_unlocked(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b"bad\n")
    with pytest.raises(DataError):
        Journal(tmp_path)
    path.unlink()
    Journal(tmp_path).close()


def test_no_resume_moves_the_old_journal_aside(tmp_path: Path) -> None:
    with Journal(tmp_path) as journal:
        journal.append([record("a")])
    with Journal(tmp_path, resume=False) as journal:
        assert not len(journal.index)
        assert journal.aside is not None
        assert journal.aside.read_bytes() == to_line(record("a"))


def hold(folder: Path, ready: str) -> None:
    journal = Journal(folder)
    Path(ready).touch()
    signal.pause()
    journal.close()


def test_two_writers_are_refused_and_a_dead_one_holds_nothing(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    other = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path / "run", str(ready)), daemon=True)
    other.start()
    while not ready.exists():
        assert other.is_alive()
        other.join(0.02)
    with pytest.raises(UsageError, match="another run is writing"):
        Journal(tmp_path / "run")
    other.kill()
    other.join()
    Journal(tmp_path / "run").close()


def test_a_full_disk_loses_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel take part of a write and refuse the rest, as a full disk does."""
    first, many = [record("a"), record("b")], [record(f"x{i}", text="y" * 400) for i in range(20)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Journal(tmp_path) as journal:
        journal.append(first)
        before = (tmp_path / "journal.jsonl").read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 3000, limits[1]))
        try:
            with pytest.raises(IncompleteError, match="disk full: 2 records are safe") as caught:
                journal.append(many)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.exit_code == 3
        assert (tmp_path / "journal.jsonl").read_bytes() == before
        assert journal.append(many) == 20
    assert len(read(tmp_path)) == 22


def test_records_of_older_versions_with_unknown_fields_are_read(tmp_path: Path) -> None:
    line = json.dumps(record("a").to_dict() | {"phase": 0.5}) + "\n"
    (tmp_path / "journal.jsonl").write_text(line)
    assert read(tmp_path)["a"] == record("a")


def test_equal_records_give_equal_bytes() -> None:
    assert to_line(record("a")) == to_line(replace(record("a"), seconds=0.0))


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomic(target, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="large"):
            write_atomic(target, os.urandom(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
