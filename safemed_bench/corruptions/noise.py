"""Noise of sensors and of waves. Levels are MedMNIST-C's and ImageNet-C's."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from .base import Corruption, Image, in_pixels


class GaussianNoise(Corruption):
    """Additive, of the same standard deviation (the level, [0, 1] pixel scale) at every pixel and colour."""

    levels = (0.04, 0.08, 0.12, 0.18, 0.26)

    def apply(self, image: Image, level: float, draw: np.random.Generator) -> Image:
        return image + level * draw.standard_normal(image.shape)


class ShotNoise(Corruption):
    """Poisson noise; the level is the number of photons behind a white pixel. All colours count the same photons."""

    levels = (60, 25, 12, 6, 3)

    def apply(self, image: Image, level: float, draw: np.random.Generator) -> Image:
        brightness = image.mean(axis=2, keepdims=True)
        return image + (draw.poisson(brightness * level) / level - brightness)


class RicianNoise(Corruption):
    """The magnitude of a complex signal with Gaussian noise (the level is its standard deviation) in both parts.

    Unlike additive noise it brightens the black background (Gudbjartsson and Patz 1995).
    """

    levels = (0.04, 0.08, 0.12, 0.18, 0.26)

    def apply(self, image: Image, level: float, draw: np.random.Generator) -> Image:
        real, imaginary = level * draw.standard_normal((2, *image.shape[:2], 1))
        return np.hypot(image + real, imaginary)


class SpeckleNoise(Corruption):
    """Multiplicative grains, a pixel wide at 224; the level is their standard deviation as a part of the signal."""

    levels = (0.15, 0.3, 0.4, 0.5, 0.6)

    def apply(self, image: Image, level: float, draw: np.random.Generator) -> Image:
        grains = ndimage.gaussian_filter(draw.standard_normal(image.shape[:2]), in_pixels(0.7, image), mode="wrap")
        return image * (1 + level * grains / grains.std())[..., None]
