"""What storing and sending does to a picture. Levels are MedMNIST-C's."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image as Pillow

from .base import Corruption, Image


class Jpeg(Corruption):
    """The level is the quality of Pillow's encoder."""

    levels = (50, 30, 15, 10, 7)

    def apply(self, image: Image, level: float, draw: np.random.Generator) -> Image:
        out = io.BytesIO()
        _picture(image).save(out, format="JPEG", quality=int(level))
        with Pillow.open(out) as read:
            return np.asarray(read) / 255.0


class Pixelate(Corruption):
    """The level is the side of the small copy as a part of the picture's."""

    levels = (0.6, 0.5, 0.4, 0.3, 0.25)

    def apply(self, image: Image, level: float, draw: np.random.Generator) -> Image:
        height, width = image.shape[:2]
        size = max(1, round(width * level)), max(1, round(height * level))
        small = _picture(image).resize(size, Pillow.Resampling.BOX)
        return np.asarray(small.resize((width, height), Pillow.Resampling.NEAREST)) / 255.0


def _picture(image: Image) -> Pillow.Image:
    return Pillow.fromarray(np.rint(image * 255).astype(np.uint8))
