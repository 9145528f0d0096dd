"""Entries for benchmarks/engine.py: `bench_idle` answers at once, `bench_busy` after BENCH_SECONDS on the processor."""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from safemed_bench.core.registry import models
from safemed_bench.core.types import Answer
from safemed_bench.models.base import Batch


@models.register("bench_idle")
class Idle:
    """Says A."""

    reasons, decode, prompt, fingerprint = False, "logprob", "instruct", "bench"

    def __init__(self, resolution: tuple[int, int], device: str) -> None:
        self.name, self.resolution, self.device = "bench", resolution, torch.device(device)

    def prepare(self, questions: Any, canvas: torch.Tensor) -> Batch:
        return Batch(tuple(questions), canvas, {})

    def answer(self, batch: Batch, pixels: torch.Tensor, *, generator: Any = None) -> list[Answer]:
        return [Answer(0, "valid", "A", (-0.1, -2.3)) for _ in range(len(batch))]

    def self_check(self, batch: Batch) -> dict[str, Any]:
        return {}


@models.register("bench_busy")
class Busy(Idle):
    """Keeps one core busy for a known time, however fast it is and whoever else wants it."""

    def answer(self, batch: Batch, pixels: torch.Tensor, *, generator: Any = None) -> list[Answer]:
        end = time.thread_time() + float(os.environ["BENCH_SECONDS"]) * len(batch)
        while time.thread_time() < end:
            pass
        return super().answer(batch, pixels)
