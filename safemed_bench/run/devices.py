"""Where a run can compute, found without importing torch in the parent process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ..core.errors import UsageError


def usable_cores() -> int:
    """Cores this process may use: its affinity, and its control group's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, _, period = quota.read_text().partition(" ")
        if limit.isdigit() and period.strip().isdigit():
            cores = min(cores, max(1, int(limit) // int(period)))
    return max(1, cores)


def gpu_count() -> int:
    """GPUs torch can use. Torch is asked (in a process of its own) only where the system shows a device."""
    shown = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()
    if not shown or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return 0
    code = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return int(answer.stdout) if answer.returncode == 0 and answer.stdout.strip().isdigit() else 0


def choose_devices(device: str, workers: int | str | None, jobs: int) -> tuple[str, ...]:
    """The device of each worker process, at least one and no more than there are jobs.

    `auto` is one worker per GPU where there are any, else one single-threaded worker per core. A number of `workers`
    is taken at its word and goes round the devices.
    """
    kind, _, number = device.partition(":")
    if kind == "mps":
        raise UsageError(
            "device 'mps' cannot be used: images are rounded into the ball in float64, which it lacks; use cpu"
        )
    if kind not in ("auto", "cpu", "cuda"):
        raise UsageError(f"unknown device '{device}'. Known: auto, cpu, cuda, cuda:N")
    gpus = gpu_count() if kind in ("auto", "cuda") else 0
    if kind == "cuda" and (gpus == 0 or (number and not 0 <= int(number) < gpus)):
        raise UsageError(f"device '{device}' was asked for, but torch sees {gpus} GPU(s) here")
    if number:
        places = [device]
    elif gpus:
        places = [f"cuda:{index}" for index in range(gpus)]
    else:
        places = ["cpu"] * usable_cores()
    count = len(places) if workers in (None, "auto") else int(workers)
    if count < 1:
        raise UsageError(f"workers must be at least 1, not {workers}")
    count = max(1, min(count, jobs))
    return tuple(places[index % len(places)] for index in range(count))
