"""A plugin file as a user would write one: toy models for the runner's tests, some of them with a fault.

`toy_slow` sleeps as long as TOY_DELAY says (seconds per call); `toy_deadly` kills its process and `toy_raising` raises
when it meets the question `poison`; `toy_mortal` kills its process once, if the file TOY_KILL_ONCE is there;
`toy_patient` takes TOY_DELAY seconds for every answer and notes in the file TOY_COUNT how many pictures it answered;
`toy_hungry` runs out of memory above two images; `toy_faulty` fails on every blank image; `toy_absent` cannot be
built.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from toy_model import ToyVLM

from safemed_bench.core.errors import ModelError
from safemed_bench.core.registry import models


@models.register("toy")
class Toy(ToyVLM):
    """Answers by letter."""

    def __init__(self, resolution, device):
        super().__init__(resolution=resolution, device=device)
        self.name = "toy"


@models.register("toy_cot")
class ToyCoT(ToyVLM):
    """Writes a rationale first."""

    reasons = True

    def __init__(self, resolution, device):
        super().__init__(reasons=True, resolution=resolution, device=device)


@models.register("toy_slow")
class Slow(Toy):
    """Gives a test time to kill it."""

    def prepare(self, questions, canvas):
        time.sleep(float(os.environ.get("TOY_DELAY", "0")))
        return super().prepare(questions, canvas)


@models.register("toy_patient")
class Patient(Toy):
    """Gives a test time to kill it in the middle of a certificate, and keeps count."""

    def answer(self, batch, pixels, **options):
        time.sleep(float(os.environ.get("TOY_DELAY", "0")))
        if count := os.environ.get("TOY_COUNT"):
            with Path(count).open("a") as file:
                file.write(f"{len(batch)}\n")
        return super().answer(batch, pixels, **options)


@models.register("toy_deadly")
class Deadly(Toy):
    """One question takes the whole process with it."""

    def prepare(self, questions, canvas):
        if any(q.id == "poison" for q in questions):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().prepare(questions, canvas)


@models.register("toy_raising")
class Raising(Toy):
    """One question cannot be prepared."""

    def prepare(self, questions, canvas):
        if any(q.id == "poison" for q in questions):
            raise RuntimeError("cannot digest this")
        return super().prepare(questions, canvas)


@models.register("toy_mortal")
class Mortal(Toy):
    """Dies once, as if somebody had killed it."""

    def prepare(self, questions, canvas):
        trap = Path(os.environ["TOY_KILL_ONCE"])
        if trap.exists():
            trap.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().prepare(questions, canvas)


@models.register("toy_hungry")
class Hungry(Toy):
    """Two images are all it has memory for."""

    def prepare(self, questions, canvas):
        if len(questions) > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().prepare(questions, canvas)


@models.register("toy_faulty")
class Faulty(Toy):
    """What fails on one question fails on all."""

    def answer(self, batch, pixels, **options):
        if pixels.std() == 0:
            raise RuntimeError("broken")
        return super().answer(batch, pixels, **options)


@models.register("toy_absent")
def absent(resolution, device):
    """Cannot be built."""
    raise ModelError("no weights here")
