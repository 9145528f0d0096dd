"""Blur: of a coarse detector, of a lens, of movement."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, signal

from .base import Corruption, Image, in_pixels

OVERSAMPLED = 9
"""Points per pixel and side from which a kernel's weights are counted, so that its size can be any fraction."""


class GaussianBlur(Corruption):
    """The level is the standard deviation, in pixels at 224."""

    levels = (1.5, 2.5, 3.5, 5.0, 7.0)

    def apply(self, image: Image, level: float, draw: np.random.Generator) -> Image:
        sigma = in_pixels(level, image)
        return np.asarray(ndimage.gaussian_filter(image, (sigma, sigma, 0), mode="nearest"))


class DefocusBlur(Corruption):
    """Every point becomes a disc; the level is its radius, in pixels at 224."""

    levels = (3.0, 4.5, 6.0, 8.0, 10.0)

    def apply(self, image: Image, level: float, draw: np.random.Generator) -> Image:
        radius = in_pixels(level, image)
        half = math.ceil(radius)
        steps = (np.arange((2 * half + 1) * OVERSAMPLED) + 0.5) / OVERSAMPLED - half - 0.5
        return _spread(image, np.hypot(steps[:, None], steps[None, :]) <= radius)


class MotionBlur(Corruption):
    """Every point becomes a line of a drawn direction; the level is its length, in pixels at 224."""

    levels = (6.0, 10.0, 15.0, 20.0, 28.0)

    def apply(self, image: Image, level: float, draw: np.random.Generator) -> Image:
        length, angle = in_pixels(level, image), draw.uniform(0, math.pi)
        half = math.ceil(length / 2)
        steps = (np.arange((2 * half + 1) * OVERSAMPLED) + 0.5) / OVERSAMPLED - half - 0.5
        along = steps[:, None] * math.sin(angle) + steps[None, :] * math.cos(angle)
        across = steps[:, None] * math.cos(angle) - steps[None, :] * math.sin(angle)
        return _spread(image, (np.abs(along) <= length / 2) & (np.abs(across) <= 0.5))


def _spread(image: Image, shape: NDArray[np.bool_]) -> Image:
    """The image under a kernel whose weights are the parts of its pixels that the oversampled `shape` covers."""
    side = len(shape) // OVERSAMPLED
    kernel = shape.reshape(side, OVERSAMPLED, side, OVERSAMPLED).mean(axis=(1, 3))
    margin = side // 2
    wide = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
    return np.asarray(signal.fftconvolve(wide, (kernel / kernel.sum())[..., None], mode="valid", axes=(0, 1)))


class MotionGhosting(Corruption):
    """The patient moves while k-space is filled line by line: copies beside the picture, along the columns.

    Lines on either side of the middle belong to other positions; the farthest of them is the level, in pixels at 224.
    The middle, which holds the contrast, keeps the first position, so that the picture as a whole stays in its place;
    who moves more also moves sooner, and less of the middle is left still.
    """

    levels = (1.5, 3.0, 5.0, 8.0, 12.0)
    moves = 6
    still = 0.25
    """Part of the lines, about the middle, that is still where the farthest position is a pixel away."""

    def apply(self, image: Image, level: float, draw: np.random.Generator) -> Image:
        height, width = image.shape[:2]
        down, right = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :]
        edges = np.sort(draw.uniform(-0.5, 0.5, self.moves))
        places = draw.uniform(-1, 1, (self.moves + 1, 2))
        places *= in_pixels(level, image) / np.abs(places).max()
        shift = places[np.searchsorted(edges, down[:, 0])]
        shift[np.abs(down[:, 0]) < self.still / level / 2] = 0.0
        phase = np.exp(-2j * math.pi * (down * shift[:, :1] + right * shift[:, 1:]))
        lines = np.fft.fft2(image, axes=(0, 1)) * phase[..., None]
        return np.asarray(np.abs(np.fft.ifft2(lines, axes=(0, 1))))
