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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from .errors import DataError, IncompleteError, UsageError
from .types import REQUIRED, Record

JOURNAL = "journal.jsonl"
LOCK = ".journal.lock"
BUFFER = 1 << 20
"""Bytes read at a time where a whole journal is."""

CHUNK_BUFFER = 1 << 16
"""Where lines are read in another order than the file's: about a chunk of records, which lie side by side."""

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""What the system says when there is no more room: disk, quota, or file size limit."""


class Index:
    """Where in a journal the record that counts of each key lies, and whether it is an error.

    What a run keeps of its records: less than 250 bytes a key, however much they say. A collection of the keys, in
    order of first appearance.
    """

    __slots__ = ("_places",)

    def __init__(self) -> None:
        self._places: dict[str, int] = {}  # an error's offset is kept as its complement, which is negative

    def __contains__(self, key: object) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def wants(self, key: str) -> bool:
        """Whether one more record of `key` would count: the journal's rule of merging."""
        return self._places.get(key, -1) < 0

    def failed(self, key: str) -> bool:
        """Whether all there is of `key` is an error. Raises KeyError where there is nothing."""
        return self._places[key] < 0

    def offset(self, key: str) -> int:
        """Bytes before its line. Raises KeyError."""
        place = self._places[key]
        return place if place >= 0 else ~place

    def note(self, key: str, failed: bool, offset: int) -> None:
        if self.wants(key):
            self._places[key] = ~offset if failed else offset


@dataclass(frozen=True, slots=True)
class Scan:
    """What a journal holds, without the records themselves.

    lines: full lines. size: bytes of those lines. torn: bytes after the last full line, 0 where the journal is whole.
    """

    index: Index
    lines: int
    size: int
    torn: int


def scan(folder: Path) -> Scan:
    """The index of `folder`, which may have no journal yet: one pass, a line at a time.

    Raises DataError naming a line that is not a record.
    """
    path, index = folder / JOURNAL, Index()
    size = number = 0
    for number, line in enumerate(_whole_lines(path), 1):
        data = _fields(path, number, line)
        index.note(data["key"], bool(data.get("error")), size)
        size += len(line)
    return Scan(index, number, size, path.stat().st_size - size if path.is_file() else 0)


def read(folder: Path) -> dict[str, Record]:
    """Key -> the record that counts, in order of first appearance; {} without a journal. All of it is in memory then.

    Raises DataError naming a line that is not a record.
    """
    records = dict[str, Record]()
    for record in written(folder):
        if record.key not in records or records[record.key].error:
            records[record.key] = record
    return records


def written(folder: Path) -> Iterator[Record]:
    """All records of the journal one by one, as they were written; those that do not count, too. Raises DataError."""
    path = folder / JOURNAL
    for number, line in enumerate(_whole_lines(path), 1):
        yield Record.from_dict(_fields(path, number, line))


def _whole_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that may not be there; a torn last one is left out."""
    if not path.is_file():
        return
    with path.open("rb", buffering=BUFFER) as file:
        for line in file:
            if not line.endswith(b"\n"):  # the end, even where a run is writing the rest of the line by now
                return
            yield line


def _fields(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        data = json.loads(line)
        if missing := REQUIRED - data.keys():
            raise ValueError(f"no {', '.join(sorted(missing))}")
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}:{number}: not a record ({error}). Only the last line may be torn by a crash; this one was changed"
            " by something else. Remove the line to have its questions measured again, or start with --no-resume."
        ) from error
    return data


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

    `index` says what counts so far; `repaired` the bytes of a torn last line that were cut off; `aside` the place an
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
            found = scan(folder)
            self.index, self.repaired, self._size = found.index, found.torn, found.size
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
        new = [record for record in records if self.index.wants(record.key)]
        lines = [to_line(record) for record in new]
        try:
            _write(self._file, b"".join(lines))
        except OSError as error:
            self._cut()
            if disk_full(error):
                raise IncompleteError(full_message(self.folder, len(self.index))) from error
            raise
        for record, line in zip(new, lines, strict=True):
            self.index.note(record.key, bool(record.error), self._size)
            self._size += len(line)
        return len(new)

    def lines(self, keys: Iterable[str]) -> Iterator[bytes]:
        """The lines that count of the keys, in their order; a key without a record is left out."""
        with self.path.open("rb", buffering=CHUNK_BUFFER) as file:
            for key in keys:
                if key in self.index:
                    file.seek(self.index.offset(key))
                    yield file.readline()

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


def write_atomic(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Replace `path` as a whole or not at all, durably; by parts, where it need not be in memory all at once.

    Raises OSError; the old file then stands.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
