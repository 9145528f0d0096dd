"""Brightness and contrast, of the whole picture and across it."""

from __future__ import annotations

import numpy as np

from .base import Corruption, Image, grid


class Contrast(Corruption):
    """Values drawn towards the mean of their colour; the level is the part of the contrast that is left."""

    levels = (0.75, 0.6, 0.45, 0.3, 0.2)

    def apply(self, image: Image, level: float, draw: np.random.Generator) -> Image:
        mean = image.mean(axis=(0, 1), keepdims=True)
        return mean + level * (image - mean)


class Exposure(Corruption):
    """Brighter or darker, which is drawn; the level is in stops, powers of two."""

    levels = (0.3, 0.5, 0.8, 1.1, 1.5)

    def apply(self, image: Image, level: float, draw: np.random.Generator) -> Image:
        sign = 1 if draw.random() < 0.5 else -1
        return image * 2.0 ** (sign * level)


class BiasField(Corruption):
    """A smooth gain that multiplies the picture (Van Leemput 1999): the exponential of a cubic polynomial.

    The level is the largest logarithm of the gain, in either direction.
    """

    levels = (0.2, 0.4, 0.6, 0.9, 1.2)
    degree = 3

    def apply(self, image: Image, level: float, draw: np.random.Generator) -> Image:
        down, right = grid(image)
        powers = [(i, j) for i in range(self.degree + 1) for j in range(self.degree + 1 - i) if i + j]
        field = sum(c * down**i * right**j for (i, j), c in zip(powers, draw.uniform(-1, 1, len(powers)), strict=True))
        field = field - np.mean(field)
        return image * np.exp(level * field / np.abs(field).max())[..., None]


class Vignetting(Corruption):
    """Light falls off with the square of the distance from a drawn point near the centre.

    The level is the part of the light that is lost at a distance of half the diagonal.
    """

    levels = (0.3, 0.45, 0.6, 0.8, 1.0)

    def apply(self, image: Image, level: float, draw: np.random.Generator) -> Image:
        down, right = grid(image)
        at = draw.uniform(-0.3, 0.3, 2)
        distance = ((down - at[0]) ** 2 + (right - at[1]) ** 2) / 2
        return image * np.clip(1 - level * distance, 0, 1)[..., None]
