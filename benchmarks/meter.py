"""Time, memory and arithmetic of a piece of work, on a CPU or a CUDA device."""

from __future__ import annotations

import contextlib
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Work = Callable[[], Any]


class _Untracked(contextlib.nullcontext[None]):
    """In place of torch's tracker of modules, whose hooks refuse autograd.grad."""

    parents = frozenset({"Global"})


def flops(work: Work) -> float:
    """Floating-point operations of matrix products, convolutions and attention; a multiply-add is two."""
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Untracked()
    with counter:
        work()
    return float(counter.get_total_flops())


@dataclass(frozen=True)
class Meter:
    """cpu_time: processor seconds, for a machine that is not idle; of no use where a GPU does the work."""

    device: torch.device
    cpu_time: bool = False

    def seconds(self, work: Work, rounds: int = 1, warm: int = 0) -> list[float]:
        """Of each round, after `warm` that are not counted; the device has finished when the clock is read."""
        clock = time.process_time if self.cpu_time else time.perf_counter
        found = []
        for _ in range(warm + rounds):
            self._wait()
            started = clock()
            work()
            self._wait()
            found.append(clock() - started)
        return found[warm:]

    def peak(self, work: Work) -> int:
        """Largest number of bytes allocated on the GPU during the work; on a CPU the process's own so far."""
        if self.device.type != "cuda":
            work()
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        self._wait()
        return int(torch.cuda.max_memory_allocated(self.device))

    def matrix_rate(self, dtype: torch.dtype, rounds: int = 20) -> float:
        """FLOP/s of a large product of random matrices; what a step can at best be held against."""
        size = 8192 if self.device.type == "cuda" else 768
        a, b = (torch.randn(size, size, device=self.device, dtype=dtype) for _ in range(2))
        return 2 * size**3 / statistics.median(self.seconds(lambda: a @ b, rounds, warm=3))

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
