"""Workers that only keep time: how long a plan takes on so many of them, without doing any of it. Imports no torch.

Jobs are dealt by the dispatcher of every real run (dispatch.py), so that what waits for what, and who stands idle at
the end, is as it will be.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from .dispatch import Dispatch, Event, Member
from .messages import Done, Job, Order, Ready


@dataclass(slots=True, kw_only=True)
class Hand(Member):
    """A worker that is not there. busy: simulated seconds it spent on jobs, loading models not among them."""

    number: int
    busy: float = 0.0


class SimulatedEngine:
    """As LocalEngine, on a clock of its own.

    seconds: what a job takes. load: what a worker takes to load another model. `now` is the simulated time in seconds;
    `finished` says when the last job of each cell was done. A subclass may say what jobs give, and by `clock` and what
    it does in `send` and `receive` what the coordinator itself takes: it does one thing at a time.
    """

    def __init__(self, workers: int, seconds: Callable[[Job], float], load: float = 0.0) -> None:
        self.devices = ("simulated",) * workers
        self.now = 0.0
        self.hands = [Hand("simulated", number=number) for number in range(workers)]
        self.finished: dict[str, float] = {}
        self._seconds, self._load = seconds, load
        self._due: list[tuple[float, int]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._due.clear()

    @property
    def utilisation(self) -> float:
        """Share of the workers' time that went into jobs, in [0, 1]."""
        return sum(hand.busy for hand in self.hands) / (len(self.hands) * self.now) if self.now else 0.0

    def clock(self) -> float:
        """Seconds that the coordinator has worked; by default it takes no time."""
        return 0.0

    def send(self, order: Order) -> None:
        """The coordinator hands a job over."""

    def work(self, job: Job) -> Any:
        """What a worker sends back; its time is `seconds`, whatever making it up takes here."""
        return Done(job, ())

    def receive(self, sent: Any) -> Done:
        """The coordinator takes it."""
        done: Done = sent
        return done

    def run(self, jobs: Iterable[Job]) -> Iterator[Event]:
        """As LocalEngine.run; what the caller does with the events counts as the coordinator's time."""
        dispatch = Dispatch(jobs)
        for hand in self.hands:
            dispatch.heard(hand, Ready({}))
            self._deal(hand, dispatch, self.now)
        while self._due:
            self.now = max(self.now, self._due[0][0])
            sent = [(hand, task.job.cell, self.work(task.job)) for hand in self._heard() if (task := hand.task)]
            began = self.clock()
            events: list[Event] = []
            for hand, cell, message in sent:
                self.finished[cell] = self.now
                events += dispatch.heard(hand, self.receive(message))
                self._deal(hand, dispatch, self.now + self.clock() - began)
            yield from events
            self.now += self.clock() - began

    def _heard(self) -> list[Hand]:
        """Everybody who is done by now."""
        heard = []
        while self._due and self._due[0][0] <= self.now:
            heard.append(self.hands[heapq.heappop(self._due)[1]])
        return heard

    def _deal(self, hand: Hand, dispatch: Dispatch, now: float) -> None:
        held = hand.model
        if (order := dispatch.deal(hand)) is None:
            return
        self.send(order)
        seconds = self._seconds(order.job)
        hand.busy += seconds
        heapq.heappush(self._due, (now + seconds + (self._load if hand.model != held else 0.0), hand.number))
