"""What a run keeps of its requests to one server: replies, how many were sent, and how many may be under way.

`<run>/api/<entry>/replies.jsonl` has a line per answered request: a run that was stopped, or a chunk that is tried
again, asks nothing twice, and a question's clean image has one answer wherever it is needed. `requests` has one byte
per request sent. Both are shared by all workers of a run, and hold no key and no image.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from ..core.errors import IncompleteError

FOLDER = "api"
REPLIES, REQUESTS, CLAIMS = "replies.jsonl", "requests", ".claims"
POLL = 0.005


@dataclass(frozen=True, slots=True)
class Reply:
    """text: of the message. finish: why it ended, in the server's words. letters: log-probabilities of A to D at the
    answer's letter, () where they were not asked for or not shown. served: what the server says it answered with."""

    text: str
    finish: str
    letters: tuple[float, ...] = ()
    served: str = ""

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Reply:
        return cls(str(data["text"]), str(data["finish"]), tuple(data["letters"]), str(data["served"]))


class Calls:
    """folder: of this entry, made where it is not there. limit: requests in all, None for any number. at_once: under
    way at a time, over all processes that share the folder. Keys of requests are hexadecimal."""

    def __init__(self, folder: Path, limit: int | None, at_once: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._limit, self._at_once = folder, limit, at_once
        self._held: dict[str, Reply] = {}
        self._read, self._lock = 0, threading.Lock()
        self._claims = (folder / CLAIMS).open("ab")

    def held(self, key: str) -> Reply | None:
        """The reply to a request that this run has had an answer to, by whichever worker."""
        with self._lock:
            if key not in self._held:
                self._catch_up()
            return self._held.get(key)

    def keep(self, key: str, reply: Reply) -> None:
        """Raises OSError, as on a full disk."""
        # A line feed on either side: what a crash left unfinished spoils no other line.
        line = "\n" + json.dumps({"key": key} | asdict(reply), ensure_ascii=False) + "\n"
        with self._lock:
            _append(self._folder / REPLIES, line.encode())
            self._held[key] = reply

    def _catch_up(self) -> None:
        path = self._folder / REPLIES
        if not path.is_file() or path.stat().st_size == self._read:
            return
        with path.open("rb") as file:
            file.seek(self._read)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        self._read += whole
        for key, reply in _lines(data[:whole]):
            self._held.setdefault(key, reply)

    @contextmanager
    def claimed(self, key: str) -> Iterator[Reply | None]:
        """While one worker asks for a reply no other does; it waits, and is given what the first was told."""
        place = int(key[:8], 16)
        while not self._claim(place):
            time.sleep(POLL)
        try:
            yield self.held(key)
        finally:
            fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, place)

    def _claim(self, place: int) -> bool:
        """One byte of a file, a lock of the process: its own threads never want the same reply. Never waited for in the
        kernel, which would take two processes of several threads for a deadlock."""
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except (BlockingIOError, PermissionError):
            return False
        return True

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """One request: waits for its turn, and counts it. Raises IncompleteError where no more may be sent."""
        with self._turn():
            self._spend()
            yield

    @contextmanager
    def _turn(self) -> Iterator[None]:
        held = None
        while held is None:
            held = next(filter(None, map(self._locked, range(self._at_once))), None)
            if held is None:
                time.sleep(POLL)
        with held:
            yield

    def _locked(self, place: int) -> BinaryIO | None:
        """A lock is the open file's own, so that it parts threads as well as processes, and dies with them."""
        file = (self._folder / f".turn-{place}").open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file

    def _spend(self) -> None:
        with (self._folder / REQUESTS).open("ab", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            sent = os.fstat(file.fileno()).st_size
            if self._limit is not None and sent >= self._limit:
                told = f"{sent:,} requests were sent, and max_requests is {self._limit:,}; raise it to go on"
                raise IncompleteError(f"{self._folder.name}: {told}")
            file.write(b".")


def _append(path: Path, data: bytes) -> None:
    """In one write, so that lines of several processes do not mix."""
    with path.open("ab", buffering=0) as file:
        file.write(data)


def _lines(data: bytes) -> Iterator[tuple[str, Reply]]:
    for line in filter(None, data.split(b"\n")):
        try:
            entry = json.loads(line)
            found = str(entry["key"]), Reply.from_dict(entry)
        except (ValueError, KeyError, TypeError):
            continue  # torn by a crash: asked again
        yield found


def sent(run: Path) -> dict[str, dict[str, Any]]:
    """Entry's folder -> requests sent, and the names that the server gave its model, for a run's folder."""
    found = {}
    for folder in sorted((run / FOLDER).glob("*/")):
        file, replies = folder / REQUESTS, folder / REPLIES
        count = file.stat().st_size if file.is_file() else 0
        served = {reply.served for _, reply in _lines(replies.read_bytes() if replies.is_file() else b"")}
        found[folder.name] = {"requests": count, "served": sorted(served - {""})}
    return found


def move_aside(run: Path) -> None:
    """A run that starts over asks everything again; what was answered is kept beside, as `api.<time>`."""
    if (run / FOLDER).is_dir():
        (run / FOLDER).rename(run / f"{FOLDER}.{datetime.now(UTC):%Y%m%dT%H%M%S%f}")
