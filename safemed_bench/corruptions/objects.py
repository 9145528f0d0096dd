"""Things that lie on the picture: hairs, bubbles, reflections. More of them at every severity, the first in place."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from PIL import ImageDraw

from .base import REFERENCE, Corruption, Image, grid

FINE = 4
"""Pixels drawn per pixel and side, so that a hair thinner than a pixel is a faint one."""


class Hair(Corruption):
    """Dark curved strands from edge to edge, about two pixels wide at 224; the level is how many."""

    levels = (4, 8, 14, 22, 32)

    def apply(self, image: Image, level: float, draw: np.random.Generator) -> Image:
        height, width = image.shape[:2]
        sheet = Pillow.new("L", (width * FINE, height * FINE))
        pen = ImageDraw.Draw(sheet)
        colour = draw.uniform(0.02, 0.18) * np.array([1.0, 0.75, 0.6])
        t = np.linspace(0, 1, 48)[:, None]
        for _ in range(int(level)):
            side, bend, broad = draw.uniform(-0.1, 1.1, 2), draw.uniform(-0.25, 0.25, 2), draw.uniform(1.2, 2.8)
            ends = np.array([[side[0], -0.05], [side[1], 1.05]])
            ends = ends[:, ::-1] if draw.random() < 0.5 else ends
            middle = ends.mean(axis=0) + bend
            path = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * middle + t**2 * ends[1]
            points = [(float(x * width * FINE), float(y * height * FINE)) for x, y in path]
            pen.line(points, fill=255, width=max(1, round(broad * max(height, width) * FINE / REFERENCE)))
        cover = np.asarray(sheet.resize((width, height), Pillow.Resampling.BOX))[..., None] / 255.0
        return image * (1 - cover) + colour * cover


class Bubbles(Corruption):
    """Round bubbles with a dark rim and a bright spot, 3 to 9% of the side in radius; the level is how many."""

    levels = (2, 4, 7, 11, 16)

    def apply(self, image: Image, level: float, draw: np.random.Generator) -> Image:
        made = image.copy()
        for _ in range(int(level)):
            at, radius = draw.uniform(-0.95, 0.95, 2), draw.uniform(0.06, 0.18)
            part, down, right = _around(image, at, 1.4 * radius)
            rim = np.exp(-(((np.hypot(down, right) / radius - 0.9) / 0.12) ** 2))[..., None]
            inside = (np.hypot(down, right) < 0.9 * radius)[..., None]
            spot = np.exp(-((down / radius + 0.35) ** 2 + (right / radius + 0.35) ** 2) / 0.05)[..., None]
            under = made[part] * (1 - 0.65 * rim)
            made[part] = 1 - (1 - under) * (1 - 0.2 * inside) * (1 - 0.9 * spot)
        return made


class Glare(Corruption):
    """Saturated spots with a soft edge, 4 to 12% of the side in radius; the level is how many."""

    levels = (1, 2, 4, 6, 9)

    def apply(self, image: Image, level: float, draw: np.random.Generator) -> Image:
        dark = 1 - image
        for _ in range(int(level)):
            at, radius, stretch = draw.uniform(-0.8, 0.8, 2), draw.uniform(0.08, 0.24), draw.uniform(0.7, 1.4)
            part, down, right = _around(image, at, 2 * radius)
            far = np.hypot(down * stretch, right / stretch) / radius
            dark[part] *= (1 - np.exp(-(far**4)))[..., None]
        return 1 - dark


Place = tuple[slice, slice]


def _around(
    image: Image, at: NDArray[np.float64], reach: float
) -> tuple[Place, NDArray[np.float64], NDArray[np.float64]]:
    """The part of the image that is at most `reach` from `at` (half a side is 1) along either axis, and its pixels'
    distances from there: (h, 1) down and (1, w) right."""
    down, right = (axis - place for axis, place in zip(grid(image), at, strict=True))
    near = [np.flatnonzero(np.abs(axis) <= reach) for axis in (down, right)]
    rows, columns = (slice(found[0], found[-1] + 1) if len(found) else slice(0) for found in near)
    return (rows, columns), down[rows], right[:, columns]
