"""The journal of a run: one JSON record a line, append-only and fsynced, so that a killed run loses nothing.

Rules, in one place:

- One `append` is one write and one fsync; a record is safe when `append` returns.
- One rule merges lines of the same key: the first record with a verdict wins; where there is none, the last error.
- A torn last line (the machine died in the middle of a write) is cut off when the journal is next opened for writing
  and ignored by readers. Any other unreadable line is an error that names its line number: it is not a crash's doing.
- A lock beside the journal keeps two runs from writing into one folder; it dies with its process.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from .errors import DataError, IncompleteError, UsageError
from .types import Record

JOURNAL = "journal.jsonl"
LOCK = ".journal.lock"
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What the system says when there is no more room: disk, quota, or file size limit."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What a journal holds.

    records: key -> the record that counts, in order of first appearance. lines: full lines read.
    size: bytes of those lines. torn: bytes after the last full line, 0 where the journal is whole.
    """

    records: dict[str, Record]
    lines: int
    size: int
    torn: int


def read(folder: Path) -> Contents:
    """The records in `folder`, which may have no journal yet. Raises DataError naming a line that is not a record."""
    path = folder / JOURNAL
    data = path.read_bytes() if path.is_file() else b""
    size = data.rfind(b"\n") + 1
    lines = data[:size].splitlines()
    records: dict[str, Record] = {}
    for number, line in enumerate(lines, 1):
        merge(records, _parse(path, number, line))
    return Contents(records, len(lines), size, len(data) - size)


def merge(records: dict[str, Record], record: Record) -> None:
    """Add one record by the journal's rule: the first verdict wins; without a verdict, the last error."""
    if record.key not in records or records[record.key].error:
        records[record.key] = record


def _parse(path: Path, number: int, line: bytes) -> Record:
    try:
        return Record.from_dict(json.loads(line))
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}:{number}: not a record ({error}). Only the last line may be torn by a crash; this one was changed"
            " by something else. Remove the line to have its questions measured again, or start with --no-resume."
        ) from error


def to_line(record: Record) -> bytes:
    """One record as a JSON line; keys in the order of the dataclass, so that equal records give equal bytes."""
    return json.dumps(record.to_dict(), ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def disk_full(error: OSError) -> bool:
    return error.errno in FULL


def full_message(folder: Path, safe: int) -> str:
    return f"disk full: {safe} records are safe in {folder}; make room, then run the same command again to go on"


def move_aside(folder: Path) -> Path | None:
    """Rename the journal of `folder` to `journal.<time>.jsonl`, never deleting it; None where there is none."""
    path = folder / JOURNAL
    if not path.exists():
        return None
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    return path.rename(folder / f"journal.{stamp}.jsonl")


class Journal:
    """The one writer of a folder's journal, as a context manager: locks, reads, repairs, then appends.

    `records` is what counts so far; `repaired` the bytes of a torn last line that were cut off; `aside` the place an
    old journal was moved to when `resume` is false.
    """

    def __init__(self, folder: Path, *, resume: bool = True) -> None:
        """Raises UsageError where another run holds the folder, DataError for a bad line, OSError otherwise."""
        self.folder = folder
        self.path = folder / JOURNAL
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder)
        try:
            self.aside = None if resume else move_aside(folder)
            contents = read(folder)
            self.records, self.repaired, self._size = contents.records, contents.torn, contents.size
            self._file = self.path.open("ab", buffering=0)
            if self.repaired:
                self._cut()
            _sync_folder(folder)
        except BaseException:
            self._lock.close()
            raise

    def append(self, records: Iterable[Record]) -> int:
        """Write the records that add something, in one write and one fsync; returns how many were written.

        Raises IncompleteError when the disk is full: the journal is then as it was before the call.
        """
        new = [r for r in records if r.key not in self.records or self.records[r.key].error]
        data = b"".join(map(to_line, new))
        try:
            _write(self._file, data)
        except OSError as error:
            self._cut()
            if disk_full(error):
                raise IncompleteError(full_message(self.folder, len(self.records))) from error
            raise
        self._size += len(data)
        for record in new:
            merge(self.records, record)
        return len(new)

    def _cut(self) -> None:
        """Back to the last whole `append`. Needs no room on the disk."""
        os.ftruncate(self._file.fileno(), self._size)
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _write(file: BinaryIO, data: bytes) -> None:
    """All of `data` to disk. A raw write may take less than it was given; the next one then says why."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
    if data:
        os.fsync(file.fileno())


def _lock(folder: Path) -> BinaryIO:
    """An open file that holds the folder's lock until it is closed or its process ends."""
    handle = (folder / LOCK).open("ab")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.close()
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UsageError(
                f"another run is writing into {folder}; wait for it to end or give another --output"
            ) from error
        raise
    return handle


def _sync_folder(folder: Path) -> None:
    """Make a file's creation or renaming itself durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` as a whole or not at all, durably. Raises OSError; the old file then stands."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
