"""What a GPU waits for on the host, by threads against one: reading images, and the model's own image processor."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from safemed_bench.models.parallel import host_threads, in_threads
from safemed_bench.models.pixels import image_processor_call
from safemed_bench.run.reading import read_canvases

if TYPE_CHECKING:
    from gpu import Bench


def cases(bench: Bench) -> list[dict[str, Any]]:
    """As many threads as beside this device, at least two."""
    threads = max(2, host_threads(bench.meter.device))
    return [reading(bench, threads), processing(bench, threads)]


def reading(bench: Bench, threads: int) -> dict[str, Any]:
    """PNG files of the canvas's size."""
    with tempfile.TemporaryDirectory() as folder:
        asked = [replace(q, image=f"{folder}/{q.id}.png") for q in bench.questions[: bench.size.questions]]
        for question, canvas in zip(asked, bench.canvas, strict=False):
            Image.fromarray(canvas.permute(1, 2, 0).numpy()).save(question.image)

        def read(readers: int) -> list[Any]:
            return list(read_canvases(asked, bench.shape.side, "pad", readers)[0].values())

        same = all(np.array_equal(a, b) for a, b in zip(read(threads), read(1), strict=True))
        return row(bench, "reading an image", lambda: read(threads), lambda: read(1), same)


def processing(bench: Bench, threads: int) -> dict[str, Any]:
    images = list(bench.canvas[: bench.size.questions].permute(0, 2, 3, 1).numpy())
    one = image_processor_call(bench.vlm.processor)
    many = in_threads(one, threads)
    same = torch.equal(many(images)["pixel_values"], one(images)["pixel_values"])
    return row(bench, "image processor, an image", lambda: many(images), lambda: one(images), same)


def row(bench: Bench, name: str, ours: Callable[[], Any], theirs: Callable[[], Any], same: bool) -> dict[str, Any]:
    count, rounds = bench.size.questions, bench.size.rounds
    each, other = ([s / count for s in bench.meter.seconds(work, rounds, warm=1)] for work in (ours, theirs))
    return bench.row(name, each, "one thread", other, same, float(same))
