"""Work of the host that a GPU would wait for, done by several threads: reading images, and the image processor.

A worker on a CPU has one core, on which threads would only take turns.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch

from .pixels import Image, ProcessorCall

MOST = 8


def host_threads(device: torch.device) -> int:
    """Threads beside a model on this device: 1 on a CPU, on a GPU its share of the host's cores, at most `MOST`."""
    if device.type != "cuda":
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST, cores // max(1, torch.cuda.device_count())))


def in_threads(call: ProcessorCall, threads: int) -> ProcessorCall:
    """The same image processor on slices of a batch at once.

    Its output for a batch is that of its images, one after the other: what `PixelMap.probe` has verified.
    """
    if threads == 1:
        return call
    pool = ThreadPoolExecutor(threads, thread_name_prefix="processor")

    def sliced(images: list[Image]) -> dict[str, Any]:
        count = min(threads, len(images))
        bounds = [len(images) * i // count for i in range(count + 1)]
        parts = list(pool.map(call, [images[a:b] for a, b in pairwise(bounds)]))
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return sliced
