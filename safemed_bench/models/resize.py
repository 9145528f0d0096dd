"""Resampling inside an image processor: recorded while it is probed, then replayed to the 8-bit level.

Tiling processors (LLaVA-NeXT, LLaVA-OneVision, InternVL, Idefics3, SmolVLM) copy the canvas into tiles and add one
resampled view of the whole. Pillow resamples 8-bit images in two passes, along the rows and then along the columns.
Each is a matrix of fixed-point weights whose result is rounded and clipped to 0..255; here it is that matrix, and the
rounding is straight-through: the value is Pillow's, the gradient is the one of the matrix.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import ModelError

BITS = 22
"""Pillow's weights are whole numbers of 2**-22 where the image has 8 bits (`PRECISION_BITS` in its Resample.c)."""

Asked = tuple[tuple[int, int], int]
"""Size (width, height) and filter of one call of Pillow's `resize`."""

_LOCK = threading.RLock()


@contextmanager
def intercepted(answer: Callable[[PIL.Image.Image, Asked], PIL.Image.Image]) -> Iterator[None]:
    """Within, `answer` stands in for `PIL.Image.Image.resize` in this thread; what leaves the size is not asked.

    Raises ModelError within where the call is one that `Resize` does not reproduce: not RGB, a box, a reducing gap.
    """
    own, thread = PIL.Image.Image.resize, threading.get_ident()

    def resize(
        image: PIL.Image.Image, size: Any, resample: int | None = None, box: Any = None, reducing_gap: Any = None
    ) -> PIL.Image.Image:
        if threading.get_ident() != thread:
            return own(image, size, resample, box, reducing_gap)
        if box is None and tuple(size) == image.size:
            return image.copy()
        if image.mode != "RGB" or box is not None or reducing_gap is not None:
            raise ModelError(f"the image processor resizes in a way that is not reproduced (mode {image.mode})")
        width, height = size
        return answer(image, ((int(width), int(height)), int(3 if resample is None else resample)))

    with _LOCK:
        PIL.Image.Image.resize = resize  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            PIL.Image.Image.resize = own  # type: ignore[method-assign]


@dataclass(frozen=True)
class Resize:
    """One resampling of h x w pixels to H x W ones: (B, M) buffer of levels / 255 -> (B, 3 * H * W) of the same.

    source: (3 * h * w,) where in the buffer each of its input's values stands, in (3, h, w) order. live, shift: of the
    same shape, False and the level where the input is padding instead. across: (W, w) and down: (H, h) float64 weights,
    None where the pass changes no size. rounds: whether each pass rounds to whole levels, as Pillow does.
    """

    inside: tuple[int, int]
    source: Tensor
    live: Tensor
    shift: Tensor
    across: Tensor | None
    down: Tensor | None
    rounds: bool = True

    @classmethod
    def of(
        cls, inside: tuple[int, int], asked: Asked, source: NDArray[Any], live: NDArray[Any], shift: NDArray[Any]
    ) -> Resize:
        """inside: (h, w) of the input; the arrays are as the class says, shift in levels."""
        (width, height), filter_ = asked
        arrays = (torch.from_numpy(np.ascontiguousarray(array)) for array in (source, live, shift))
        across, down = _weights(inside[1], width, filter_), _weights(inside[0], height, filter_)
        return cls(inside, next(arrays), next(arrays), next(arrays), across, down)

    def __call__(self, buffer: Tensor) -> Tensor:
        levels = buffer.index_select(1, self.source).double() * 255
        levels = torch.where(self.live, levels, self.shift.double()).unflatten(1, (-1, *self.inside))
        levels = _whole(levels) if self.rounds else levels
        if self.across is not None:
            levels = self._clipped(levels @ self.across.T)
        if self.down is not None:
            levels = self._clipped(self.down @ levels)
        return (levels / 255).flatten(1).to(buffer.dtype)

    def _clipped(self, levels: Tensor) -> Tensor:
        return (_whole(levels) if self.rounds else levels).clamp(0, 255)

    def to(self, device: torch.device | str) -> Resize:
        tables: dict[str, Any] = {name: getattr(self, name) for name in ("source", "live", "shift", "across", "down")}
        moved: dict[str, Any] = {name: t if t is None else t.to(device) for name, t in tables.items()}
        return replace(self, **moved)


def _whole(levels: Tensor) -> Tensor:
    """The nearest whole level, halves up as in Pillow, with the gradient of the identity."""
    return levels + (torch.floor(levels.detach() + 0.5) - levels.detach())


def _weights(old: int, new: int, filter_: int) -> Tensor | None:
    """(new, old) weights of Pillow's own filter: the identity matrix, resized as 32-bit integers of 2**-22."""
    if old == new:
        return None
    identity = PIL.Image.fromarray(np.eye(old, dtype=np.int32) << BITS)
    resized = np.asarray(identity.resize((new, old), PIL.Image.Resampling(filter_)))
    return torch.from_numpy(resized.T.astype(np.float64) / 2**BITS)


@dataclass(frozen=True)
class Tape:
    """What an image processor resizes of one canvas, so that chosen levels can be played to it at every such place.

    The buffer is the canvas in (C, H, W) order followed by the result of each resizing. inside: (h, w) of each one's
    input.
    """

    call: Callable[[list[NDArray[np.uint8]]], Any]
    canvas: tuple[int, int, int]
    inside: tuple[tuple[int, int], ...]
    asked: tuple[Asked, ...]

    @classmethod
    def record(
        cls, call: Callable[[list[NDArray[np.uint8]]], Any], resolution: tuple[int, int], channels: int = 3
    ) -> Tape:
        inside, asked = [], []

        def answer(image: PIL.Image.Image, one: Asked) -> PIL.Image.Image:
            inside.append((image.height, image.width))
            asked.append(one)
            return PIL.Image.new("RGB", one[0])

        with intercepted(answer):
            call([np.zeros((*resolution, channels), np.uint8)])
        return cls(call, (channels, *resolution), tuple(inside), tuple(asked))

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """(C, H, W) of the canvas and of what each resizing gives."""
        return [self.canvas, *((3, height, width) for (width, height), _ in self.asked)]

    @property
    def size(self) -> int:
        """Length of the buffer."""
        return sum(int(np.prod(shape)) for shape in self.shapes)

    def play(self, levels: NDArray[np.uint8]) -> tuple[Any, list[NDArray[np.int64]]]:
        """What the processor makes of a buffer of `levels`, and the levels of each resizing's input, (3 * h * w,).

        Raises ModelError where it resizes otherwise than when it was recorded: then its ways depend on the content.
        """
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes])[:-1]
        images = [_image(part, s) for part, s in zip(np.split(levels, ends), self.shapes, strict=True)]
        seen: list[NDArray[np.int64]] = []

        def answer(image: PIL.Image.Image, one: Asked) -> PIL.Image.Image:
            k = len(seen)
            if k >= len(self.asked) or (self.asked[k], self.inside[k]) != (one, (image.height, image.width)):
                raise ModelError("how the image processor resizes depends on the content of the image")
            seen.append(np.asarray(image).transpose(2, 0, 1).astype(np.int64).ravel())
            return PIL.Image.fromarray(images[k + 1])

        with intercepted(answer):
            output = self.call([images[0]])
        return output, seen


def _image(part: NDArray[np.uint8], shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(part.reshape(shape).transpose(1, 2, 0))
