"""What carries out a run's jobs: processes of this machine, or actors of a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from ..core.errors import UsageError
from .devices import choose_devices
from .dispatch import Event
from .engine import LocalEngine
from .messages import Job, Settings


class Engine(AbstractContextManager[Any], Protocol):
    """Leaving it ends its workers."""

    @property
    def devices(self) -> tuple[str, ...]:
        """What each of its workers runs on."""

    def run(self, jobs: Iterable[Job]) -> Iterator[Event]:
        """Do all jobs; every job ends as one or more `Done`, or with its model's `ModelFailed`. `Fatal` is the last."""


@dataclass(frozen=True, slots=True)
class Means:
    """engine: local or ray. address: of a Ray cluster. workers, device: as the suite's `run` has them."""

    engine: str
    address: str | None
    workers: int | str
    device: str


def open_engine(settings: Settings, means: Means, jobs: int) -> Engine:
    """The engine for that many jobs. Raises UsageError where there is none of the kind, or no such device."""
    if means.engine == "local":
        if means.address:
            raise UsageError(f"address {means.address} is that of a Ray cluster: say --engine ray")
        return LocalEngine(settings, choose_devices(means.device, means.workers, jobs))
    try:
        from .ray_engine import RayEngine
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise UsageError("engine ray needs the extra of that name: pip install 'safemed-bench[ray]'") from error
    return RayEngine(settings, means.address, None if means.workers == "auto" else int(means.workers), means.device)
