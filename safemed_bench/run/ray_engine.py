"""The Ray engine: one actor per device of a cluster, this machine's own or one that is there already.

Which node an actor runs on, and whether one is still there, is for Ray to say; an actor that died, with its node or
alone, is replaced by a new one, wherever there is room. What becomes of their jobs is dispatch.py's, as with the local
engine. So are the records: an actor is the same worker.
All nodes must see the run's folder, the data and the models at the same paths.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ray
from ray.exceptions import RayActorError, RayError

from ..core.errors import UsageError
from ..core.journal import LOCK
from . import worker
from .dispatch import Dispatch, Event, Member
from .messages import Done, Failed, Fatal, Job, ModelFailed, Note, Order, Ready, Settings

TICK = 0.25
PATIENCE = 60.0
"""Seconds without a single worker until the user is told that the cluster has no room."""

START_FAILURES = 3
"""Actors that die before they are up, one after the other, until the run is given up."""

Said = tuple[list[Note], Done | Failed | ModelFailed | Fatal | Ready]


class RemoteWorker:
    """Body of an actor. `folder` of the settings must be the coordinator's own, on a file system that both share."""

    def __init__(self, settings: Settings, device: str, home: str) -> None:
        self._settings, self._device, self._home = settings, device, home
        self._notes: list[Note] = []

    def start(self) -> Said:
        node = socket.gethostname()
        if not (self._settings.folder / LOCK).exists():  # the coordinator holds it
            return [], Fatal(
                f"node {node} does not see {self._settings.folder}: a run through Ray wants a file system that all "
                "nodes share, for --output, data and models alike"
            )
        if Path(self._home).is_dir():
            os.chdir(self._home)  # models may be named by relative paths
        up = worker.start(self._settings, self._device)
        if isinstance(up, Fatal):
            return [], Fatal(f"node {node}: {up.error}")
        self._worker = worker.Worker(self._notes.append, self._settings, self._device)
        return [], Ready(up.hardware | {"node": node})

    def answer(self, order: Order) -> Said:
        found = self._worker.answer(order)
        said, self._notes[:] = list(self._notes), []
        return said, found


@dataclass(slots=True, kw_only=True)
class Hand(Member):
    """An actor."""

    actor: Any


class RayEngine:
    """Actors on a Ray cluster, as a context manager: leaving it ends them, and the cluster where it was begun here.

    address: of a cluster ("auto", host:port, ray://...); None is RAY_ADDRESS, or else a cluster of this machine alone.
    workers: actors; None is one per GPU of the cluster, or one per core where it has none. device: auto, cpu or cuda.
    Raises UsageError where there is no such cluster, or no GPU that was asked for.
    """

    def __init__(self, settings: Settings, address: str | None, workers: int | None, device: str) -> None:
        self._settings = settings
        self._hands: list[Hand] = []
        self._pending: dict[Any, Hand] = {}
        self._failed_starts = 0
        self._mine = not ray.is_initialized()
        if self._mine:
            _connect(address)
        try:
            self._gpu, self._count = _places(device, workers)
        except UsageError:
            self.__exit__()
            raise

    @property
    def devices(self) -> tuple[str, ...]:
        """What each worker runs on."""
        return ("cuda" if self._gpu else "cpu",) * self._count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for hand in self._hands:
            ray.kill(hand.actor)
        if self._mine:
            ray.shutdown()

    def run(self, jobs: Iterable[Job]) -> Iterator[Event]:
        """As LocalEngine.run."""
        dispatch, since, told = Dispatch(jobs), time.monotonic(), False
        for _ in range(min(self._count, len(dispatch.waiting))):
            self._hire()
        while dispatch.waiting or any(hand.task for hand in self._hands):
            for hand in self._hands:
                self._deal(hand, dispatch)
            events = [event for ref in self._answered() for event in self._listen(ref, dispatch)]
            yield from events or (None,)
            if any(isinstance(event, Fatal) for event in events):
                return
            if any(hand.ready for hand in self._hands):
                since, told = time.monotonic(), False
            elif not told and time.monotonic() - since > PATIENCE:
                told = True
                yield Note(f"waiting for the cluster: it has no room for a worker ({_needs(self._gpu)})")

    def _hire(self) -> None:
        kind = ray.remote(num_cpus=1, num_gpus=int(self._gpu))(RemoteWorker)
        device = "cuda:0" if self._gpu else "cpu"  # Ray shows an actor no GPU but its own
        hand = Hand(device, actor=kind.remote(self._settings, device, str(Path.cwd())))
        self._hands.append(hand)
        self._pending[hand.actor.start.remote()] = hand

    def _deal(self, hand: Hand, dispatch: Dispatch) -> None:
        if (order := dispatch.deal(hand)) is not None:
            self._pending[hand.actor.answer.remote(order)] = hand

    def _answered(self) -> list[Any]:
        """What has come; all of it, so that no actor waits for another's turn."""
        refs = list(self._pending)
        first, _ = ray.wait(refs, num_returns=1, timeout=TICK)
        return ray.wait(refs, num_returns=len(refs), timeout=0)[0] if first else []

    def _listen(self, ref: Any, dispatch: Dispatch) -> list[Event]:
        hand = self._pending.pop(ref)
        try:
            notes, message = ray.get(ref)
        except RayActorError as error:
            return self._bury(hand, dispatch, _first_line(error))
        except RayError as error:  # the answer was lost, or could not be sent
            notes, message = [], Failed(_first_line(error))
        if isinstance(message, Ready):
            self._failed_starts = 0
        events = [*notes, *dispatch.heard(hand, message)]
        self._deal(hand, dispatch)
        return events

    def _bury(self, hand: Hand, dispatch: Dispatch, cause: str) -> list[Event]:
        """An actor is gone, perhaps with its node: another takes its place."""
        ray.kill(hand.actor)  # one that is merely out of reach must not come back
        self._hands.remove(hand)
        if not hand.ready:
            self._failed_starts += 1
            if self._failed_starts >= START_FAILURES:
                return [Fatal(f"workers die as soon as they start ({cause}); see {worker.LOG}")]
        self._hire()
        return dispatch.lost(hand, cause)


def _connect(address: str | None) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    if address or os.environ.get("RAY_ADDRESS"):
        quiet.pop("include_dashboard")
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"no Ray cluster at {address}: {_first_line(error)}") from error


def _places(device: str, workers: int | None) -> tuple[bool, int]:
    """Whether actors want a GPU each, and how many there shall be."""
    there = ray.cluster_resources()
    gpus, cores = int(there.get("GPU", 0)), max(1, int(there.get("CPU", 1)))
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"device '{device}' cannot be asked of a cluster, which places workers itself; auto, cpu, cuda"
        )
    if device == "cuda" and not gpus:
        raise UsageError("device 'cuda' was asked for, but the cluster has no GPU")
    gpu = device == "cuda" or (device == "auto" and gpus > 0)
    return gpu, workers or (gpus if gpu else cores)


def _needs(gpu: bool) -> str:
    return "one core and one GPU each" if gpu else "one core each"


def _first_line(error: BaseException) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}"[:300]
