"""The frame of every corruption: an 8-bit canvas in, one of the same shape out, the same for the same seed.

Lengths are told in pixels of a canvas of 224 and grow with it, so that a severity means the same at every size. Noise
is of the pixel and JPEG's blocks are of 8 pixels at every size: that is what sensor and codec do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, final

import numpy as np
from numpy.typing import NDArray

from . import SEVERITIES

REFERENCE = 224
"""Side in pixels of the canvas that lengths are told for, MedMNIST-C's."""

Image = NDArray[np.float64]
"""(H, W, 3), in [0, 1]."""


class Corruption(ABC):
    """One kind of corruption. A subclass names its `levels` and writes one hook, `apply`.

    modalities: whose pictures it happens to, () for every one; of ours the catalogue tells. levels: what `apply` is
    given at severity 1 to 5.
    """

    modalities: ClassVar[tuple[str, ...]] = ()
    levels: ClassVar[tuple[float, float, float, float, float]]

    @abstractmethod
    def apply(self, image: Image, level: float, draw: np.random.Generator) -> Image:
        """The corrupted image, (H, W, 3); what lies outside [0, 1] is clipped afterwards.

        `draw` begins alike at every severity, so that the same hairs come back and more of them.
        """

    @final
    def __call__(self, canvas: NDArray[np.uint8], severity: int, seed: int) -> NDArray[np.uint8]:
        """(3, H, W) uint8 to the same. Raises ValueError for a severity outside 1 to 5, or where the hook gives another
        shape or numbers that are not finite."""
        if severity not in SEVERITIES:
            raise ValueError(f"severity must be one of {', '.join(map(str, SEVERITIES))}, not {severity!r}")
        image = canvas.transpose(1, 2, 0) / 255.0
        made: Any = np.asarray(self.apply(image, self.levels[severity - 1], np.random.default_rng(seed)))
        if made.shape != image.shape or not np.isfinite(made).all():
            raise ValueError(f"{type(self).__name__} made of {image.shape} an image of {made.shape}, or not all finite")
        eight_bits = np.rint(np.clip(made, 0, 1) * 255).astype(np.uint8)
        return np.ascontiguousarray(eight_bits.transpose(2, 0, 1))


def in_pixels(length: float, image: Image) -> float:
    """A length in pixels of a canvas of REFERENCE, in pixels of this one."""
    return length * max(image.shape[:2]) / REFERENCE


def grid(image: Image) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(H, 1) and (1, W) places of the pixels' centres, -1 to 1 from edge to edge."""
    height, width = image.shape[:2]
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    return (2 * rows / height - 1)[:, None], (2 * columns / width - 1)[None, :]
