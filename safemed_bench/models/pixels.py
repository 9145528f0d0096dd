"""The pixel map: what an image processor does to an image of its native size, recovered by probing it.

At its native size every Hugging Face image processor is a gather plus an affine,
`pixel_values = pixels.flatten()[index] * scale + shift`. Two constant images give scale and shift, images
that spell each pixel's position in base 256 give index, and three random images verify the whole. Where some tiles
hold a resampled view of the canvas, what is gathered from is the canvas and those views (resize.py). The map is
differentiable, so one piece of code attacks every family; the deployed path calls the real processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import ModelError
from .processors import image_settings
from .resize import Resize, Tape

Image = NDArray[np.uint8]
ProcessorCall = Callable[[list[Image]], Mapping[str, Any]]
"""(H, W, 3) uint8 images -> `pixel_values` and the extras that belong to them (`image_grid_thw`, ...)."""

TOLERANCE = 1e-5
"""Largest difference between map and processor, in the processor's normalised units (about -2 to 2)."""

IMAGE_ERRORS = (ValueError, TypeError, KeyError, RuntimeError, IndexError)
"""What image processors raise at images that they do not take."""

INDEX_TOLERANCE = 0.05
"""How far from a whole 8-bit level a probed value may be. A resampling processor misses by far more."""


@dataclass(frozen=True)
class PixelMap:
    """`pixel_map(pixels)`: (B, C, H, W) floats in [0, 1] -> pixel_values, laid out as the processor does it.

    N values per image are gathered from M = C * H * W (and what `resizes` append) in runs of `run` neighbouring values,
    which is about as fast as a copy; the backward pass is the inverse gather, hence deterministic on every device.

    resolution: (H, W). shape: of one image's pixel_values; a batch concatenates its first dimension (the number
    of patches for Qwen, 1 for LLaVA and Gemma). source: (N / run,) the image run that each output run copies.
    scale, shift: (N,) float32. inverse: (m, M / run) the output runs that copy each image run, m the largest
    number of copies. inverse_scale: (m, M / run, run) their scales, 0 where a run has fewer than m copies.
    resizes: the resampled views, each appended to what the next one reads; empty for most families. constants: the
    other tensors of one image. error: largest difference from the processor when verified.
    """

    resolution: tuple[int, int]
    channels: int
    shape: tuple[int, ...]
    run: int
    source: Tensor
    scale: Tensor
    shift: Tensor
    inverse: Tensor
    inverse_scale: Tensor
    constants: Mapping[str, Tensor]
    error: float
    resizes: tuple[Resize, ...] = ()

    @classmethod
    def probe(cls, processor_call: ProcessorCall, resolution: tuple[int, int], channels: int = 3) -> PixelMap:
        """Recover the map of an image processor for canvases of `resolution` (height, width), on the CPU.

        Raises:
            ModelError: the processor fails at this size, or is no gather plus affine there (it resizes or
                equalises); names the worst error and, where it can be found, a resolution that would do.
        """
        try:
            return _probe(processor_call, resolution, channels)
        except ModelError as error:
            side = _native_side(processor_call, resolution, channels)
            hint = f". It takes {side}x{side} as it is: set the resolution to {side}" if side else ""
            raise ModelError(f"{error}{hint}") from error

    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) -> (B * shape[0], *shape[1:]), in the dtype of `pixels` and on the map's device.

        Raises:
            ModelError: `pixels` is not of the map's resolution.
        """
        if pixels.ndim != 4 or pixels.shape[1:] != (self.channels, *self.resolution):
            expected = (self.channels, *self.resolution)
            raise ModelError(f"pixels must be (B, {', '.join(map(str, expected))}), not {tuple(pixels.shape)}")
        tables = (self.source, self.scale, self.shift, self.inverse, self.inverse_scale)
        buffer = pixels.flatten(1)
        for resize in self.resizes:
            buffer = torch.cat([buffer, resize(buffer)], 1)
        values: Tensor = _GatherAffine.apply(buffer, self.run, *tables)
        return values.reshape(len(pixels) * self.shape[0], *self.shape[1:])

    def extras(self, batch_size: int) -> dict[str, Tensor]:
        """The processor's other tensors (`image_grid_thw`, ...) for a batch of that many canvases."""
        return {k: v.repeat(batch_size, *[1] * (v.ndim - 1)) for k, v in self.constants.items()}

    def smooth(self) -> PixelMap:
        """The same map without the rounding inside its resizes: what a finite difference can be taken of."""
        return replace(self, resizes=tuple(replace(resize, rounds=False) for resize in self.resizes))

    def to(self, device: torch.device | str) -> PixelMap:
        names = ("source", "scale", "shift", "inverse", "inverse_scale")
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in names}
        moved["resizes"] = tuple(resize.to(device) for resize in self.resizes)
        return replace(self, **moved, constants={k: v.to(device) for k, v in self.constants.items()})


class _GatherAffine(torch.autograd.Function):
    """Gather by runs, times scale, plus shift. Autograd's own backward would scatter, which is slower."""

    @staticmethod
    def forward(
        ctx: Any,
        buffer: Tensor,
        run: int,
        source: Tensor,
        scale: Tensor,
        shift: Tensor,
        inverse: Tensor,
        inverse_scale: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(inverse, inverse_scale)
        ctx.shape = buffer.shape
        values = buffer.reshape(len(buffer), -1, run).index_select(1, source).flatten(1)
        return torch.addcmul(shift.to(values.dtype), values, scale.to(values.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inverse, inverse_scale = ctx.saved_tensors
        runs = gradients[0].reshape(len(gradients[0]), -1, inverse_scale.shape[-1])
        total = runs.new_zeros(())
        for rows, scale in zip(inverse, inverse_scale, strict=True):
            total = torch.addcmul(total, runs.index_select(1, rows), scale.to(runs.dtype))
        return total.reshape(ctx.shape), None, None, None, None, None, None


def image_processor_call(processor: Any) -> ProcessorCall:
    """The image half of a Hugging Face processor, as `PixelMap.probe` and the deployed path want it.

    Each image is processed as the only one of its prompt. Some processors take a list for one prompt's many: images are
    given together only where the first batch was the same, bit for bit, as its images one by one. What the model's
    forward does not take is dropped (`num_crops` of Gemma 3, `num_patches` of InternVL).
    """
    unused = getattr(processor, "unused_input_names", ())
    settings = image_settings(processor) | {"return_tensors": "pt"}
    names = [name for name in processor.model_input_names if name not in unused]

    agreed: list[bool] = []

    def together(images: list[Image]) -> dict[str, Tensor]:
        output = processor.image_processor(images, **settings)
        return {name: output[name] for name in names if name in output}

    def call(images: list[Image]) -> dict[str, Tensor]:
        if len(images) == 1 or agreed == [True]:
            return together(images)
        outputs = [together([image]) for image in images]
        apart = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
        if not agreed:
            agreed.append(_same(together, images, apart))
        return apart

    return call


def _same(together: ProcessorCall, images: list[Image], apart: Mapping[str, Tensor]) -> bool:
    try:
        found = together(images)
    except IMAGE_ERRORS:
        return False
    return found.keys() == apart.keys() and all(
        isinstance(value, Tensor) and torch.equal(value, apart[name]) for name, value in found.items()
    )


def _probe(processor_call: ProcessorCall, resolution: tuple[int, int], channels: int) -> PixelMap:
    def output_of(tape: Tape, levels: Image) -> tuple[NDArray[np.float64], list[NDArray[np.int64]]]:
        output, seen = tape.play(levels)
        return _split(output)[0].double().flatten().numpy(), seen

    with _model_errors(resolution):
        tape = Tape.record(processor_call, resolution, channels)
        output, low = tape.play(np.zeros(tape.size, np.uint8))
        first, extras = _split(output)
        shift = first.double().flatten().numpy()
        high, top = output_of(tape, np.full(tape.size, 255, np.uint8))
        scale = high - shift
        index, sources = np.zeros(shift.size, np.int64), [np.zeros(part.size, np.int64) for part in low]
        for digit in range(_digits(tape.size)):
            position = np.arange(tape.size) >> (8 * digit) & 255
            values, seen = output_of(tape, position.astype(np.uint8))
            index += _levels(values, scale, shift, resolution) << (8 * digit)
            for source, part in zip(sources, seen, strict=True):
                source += part << (8 * digit)
    if index.size and index.max() >= tape.size:
        raise ModelError(f"{_refusal(resolution)}: it mixes pixels")
    if tape.asked and not (index[scale != 0] < channels * resolution[0] * resolution[1]).any():
        raise ModelError(f"{_refusal(resolution)}: it resizes all of it")
    draft = _assemble(resolution, channels, tuple(first.shape), tape.size, index, scale, shift, extras)
    views = zip(tape.inside, tape.asked, sources, low, top, strict=True)
    resizes = tuple(
        Resize.of(inside, asked, np.where(bottom != upper, source, 0), bottom != upper, bottom)
        for inside, asked, source, bottom, upper in views
    )
    draft = replace(draft, resizes=resizes)
    return replace(draft, error=_verify(draft, processor_call))


@contextmanager
def _model_errors(resolution: tuple[int, int]) -> Iterator[None]:
    """What an image processor raises at a size that it does not take, as a ModelError that names the size."""
    try:
        yield
    except IMAGE_ERRORS as error:
        size = "x".join(map(str, resolution))
        raise ModelError(f"the image processor fails on a {size} image: {error}") from error


def _split(output: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """pixel_values and the extras that are tensors."""
    extras = {k: v for k, v in output.items() if k != "pixel_values" and isinstance(v, Tensor)}
    return torch.as_tensor(output["pixel_values"]), extras


def _digits(size: int) -> int:
    """Base-256 digits that number `size` values."""
    return max(1, -(-(size - 1).bit_length() // 8))


def _levels(
    values: NDArray[np.float64],
    scale: NDArray[np.float64],
    shift: NDArray[np.float64],
    resolution: tuple[int, int],
) -> NDArray[np.int64]:
    """The 8-bit levels that were copied to each output; 0 where an output is constant (padding)."""
    if values.shape != shift.shape:
        raise ModelError(f"{_refusal(resolution)}: the shape of its output depends on the content of the image")
    live = scale != 0
    levels = np.where(live, (values - shift) / np.where(live, scale, 1) * 255, 0)
    whole = np.round(levels).clip(0, 255)
    worst = float(np.abs(levels - whole).max(initial=0))
    if not worst <= INDEX_TOLERANCE:
        raise ModelError(f"{_refusal(resolution)}: it mixes pixels (worst error {worst:.3g} of an 8-bit level)")
    return whole.astype(np.int64)


def _refusal(resolution: tuple[int, int]) -> str:
    size = "x".join(map(str, resolution))
    return f"the image processor does more than copy and normalise the pixels of a {size} image"


def _assemble(
    resolution: tuple[int, int],
    channels: int,
    shape: tuple[int, ...],
    size: int,
    index: NDArray[np.int64],
    scale: NDArray[np.float64],
    shift: NDArray[np.float64],
    extras: dict[str, Tensor],
) -> PixelMap:
    run = _run_length(index, size)
    source = index[::run] // run
    inverse, inverse_scale = _invert(source, scale.reshape(-1, run), size // run)
    return PixelMap(
        resolution=resolution,
        channels=channels,
        shape=shape,
        run=run,
        source=torch.from_numpy(source.copy()),
        scale=torch.from_numpy(scale).float(),
        shift=torch.from_numpy(shift).float(),
        inverse=torch.from_numpy(inverse),
        inverse_scale=torch.from_numpy(inverse_scale).float(),
        constants=extras,
        error=float("nan"),
    )


def _run_length(index: NDArray[np.int64], size: int) -> int:
    """The longest r such that each aligned block of r outputs copies an aligned block of r image values."""
    common = int(np.gcd(index.size, size))
    divisors = {d for k in range(1, isqrt(common) + 1) if common % k == 0 for d in (k, common // k)}
    for run in sorted(divisors, reverse=True):
        blocks = index.reshape(-1, run)
        if (blocks[:, 0] % run == 0).all() and (blocks == blocks[:, :1] + np.arange(run)).all():
            return run
    return 1


def _invert(
    source: NDArray[np.int64], scale: NDArray[np.float64], runs: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(m, runs) output runs that copy each image run, (m, runs, run) their scales; padding copies nothing."""
    live = np.flatnonzero(scale.any(axis=1))
    order = live[np.argsort(source[live], kind="stable")]
    copies = np.bincount(source[live], minlength=runs)
    rank = np.arange(order.size) - np.repeat(np.cumsum(copies) - copies, copies)
    inverse = np.zeros((max(1, int(copies.max(initial=0))), runs), np.int64)
    inverse_scale = np.zeros((*inverse.shape, scale.shape[1]))
    inverse[rank, source[order]] = order
    inverse_scale[rank, source[order]] = scale[order]
    return inverse, inverse_scale


def _verify(draft: PixelMap, processor_call: ProcessorCall) -> float:
    """Largest difference from the processor on a batch of three random images; ModelError beyond TOLERANCE.

    Three, because one random image was seen to let a map with 0.4% wrong elements through.
    """
    draw = np.random.default_rng(20_251_219)
    images = list(draw.integers(0, 256, (3, *draft.resolution, draft.channels), dtype=np.uint8))
    with _model_errors(draft.resolution):
        expected, extras = _split(processor_call(images))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    values = draft(pixels)
    if values.shape != expected.shape:
        raise ModelError(
            f"the image processor does not concatenate a batch: {tuple(expected.shape)} for three images, "
            f"{draft.shape} for one"
        )
    worst = float((values - expected.float()).abs().max())
    if not worst <= TOLERANCE:
        raise ModelError(
            f"{_refusal(draft.resolution)}: worst error {worst:.3g} in normalised units, {TOLERANCE:g} allowed"
        )
    for name, value in draft.extras(3).items():
        if name not in extras or not torch.equal(value, extras[name]):
            raise ModelError(f"'{name}' of the image processor depends on the content of the image")
    return worst


def _native_side(processor_call: ProcessorCall, resolution: tuple[int, int], channels: int) -> int | None:
    """The side of a square image that the processor takes as it is, or None: what it resizes this one to, tried."""
    try:
        with _model_errors(resolution):
            tape = Tape.record(processor_call, resolution, channels)
    except ModelError:
        return None
    for height, width in dict.fromkeys((height, width) for (width, height), _ in tape.asked):
        if height != width:
            continue
        try:
            _probe(processor_call, (height, width), channels)
        except ModelError:
            continue
        return height
    return None
