"""Drawing on one image: soft shapes in body coordinates, slow fields, grain."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import cos, pi, sin
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .spec import Difficulty

Array = NDArray[np.floating[Any]]
"""float32 throughout; numpy's own annotations cannot say so."""
Level = float | Sequence[float] | NDArray[np.float64]


@lru_cache(maxsize=8)
def _grid(size: int) -> tuple[Array, Array]:
    """(1, W) x and (H, 1) y of pixel centres, [-1, 1]."""
    line = ((np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1).astype(np.float32)
    return line[None, :], line[:, None]


@lru_cache(maxsize=64)
def _smooth(size: int, knots: int) -> Array:
    """(size, knots) weights of a raised-cosine interpolation from `knots` values to `size` pixels."""
    place = np.linspace(0, knots - 1, size)[:, None] - np.arange(knots)[None, :]
    near = np.abs(place) < 1
    return np.where(near, 0.5 + 0.5 * np.cos(pi * place), 0).astype(np.float32)


class Pen:
    """One image being drawn. `image` is (C, H, W) float32, about [0, 1], C = 1 (grey) or 3.

    u, v: (H, W) body coordinates, about [-1, 1], after the image's own shift, rotation and scale; `unit`: body length
    of one pixel of a 64-pixel image; `soft`: body width of a shape's edge.
    """

    def __init__(self, rng: np.random.Generator, size: int, hard: Difficulty, channels: int) -> None:
        self.rng, self.size, self.hard = rng, size, hard
        x, y = _grid(size)
        dx, dy = rng.uniform(-hard.shift, hard.shift, 2)
        turn = rng.uniform(-hard.rotation, hard.rotation)
        scale = 1 + rng.uniform(-hard.scale, hard.scale)
        a, b = np.float32(cos(turn) / scale), np.float32(sin(turn) / scale)
        x, y = x - np.float32(dx), y - np.float32(dy)
        self.u: Array = a * x + b * y
        self.v: Array = a * y - b * x
        self.unit = 2 / 64 / scale
        self.soft = max(1.3 * 2 / size, 0.6 * 2 / 64) / scale
        self.image: Array = np.zeros((channels, size, size), np.float32)

    def near(self, value: float, spread: float) -> float:
        """A draw within `spread` of `value`, uniform."""
        return float(value + spread * (2 * self.rng.random() - 1))

    def side(self) -> int:
        """-1 or 1."""
        return 1 if self.rng.random() < 0.5 else -1

    def edge(self, inside: Array) -> Array:
        """Mask of a signed distance in body units (positive inside), a soft edge wide."""
        return np.clip(inside / np.float32(self.soft) + np.float32(0.5), 0, 1)

    def ellipse(self, cu: float, cv: float, ru: float, rv: float) -> Array:
        """(H, W) mask of an ellipse, half-axes ru and rv."""
        d = np.sqrt(((self.u - cu) / ru) ** 2 + ((self.v - cv) / rv) ** 2)
        return self.edge((1 - d) * min(ru, rv))

    def hoop(self, cu: float, cv: float, ru: float, rv: float, width: float) -> Array:
        """(H, W) mask of an ellipse's outline, `width` wide."""
        d = np.sqrt(((self.u - cu) / ru) ** 2 + ((self.v - cv) / rv) ** 2)
        return self.edge(width / 2 - np.abs(1 - d) * min(ru, rv))

    def box(self, cu: float, cv: float, hu: float, hv: float, round_: float = 0.0) -> Array:
        """(H, W) mask of a box with half-sides hu, hv and rounded corners."""
        du = np.abs(self.u - cu) - (hu - round_)
        dv = np.abs(self.v - cv) - (hv - round_)
        return self.edge(round_ - np.hypot(np.maximum(du, 0), np.maximum(dv, 0)))

    def curve(self, angle: float, offset: float, bend: float, width: float) -> Array:
        """(H, W) mask of a long bent line: a parabola across the image, `width` wide."""
        c, s = cos(angle), sin(angle)
        along, across = c * self.u + s * self.v, c * self.v - s * self.u
        return self.edge(width / 2 - np.abs(across - offset - bend * along * along))

    def paint(self, mask: Array, level: Level, opacity: float = 1.0) -> None:
        """Lay a level (one number, or one per channel) over the image where the mask is."""
        target = np.asarray(level, np.float32).reshape(-1, 1, 1)
        self.image += (opacity * mask) * (target - self.image)

    def add(self, mask: Array, amount: Level) -> None:
        self.image += mask * np.asarray(amount, np.float32).reshape(-1, 1, 1)

    def field(self, knots: int) -> Array:
        """(H, W) slow random field, mean about 0, sigma about 1 at the knots."""
        weights = _smooth(self.size, knots)
        return weights @ self.rng.standard_normal((knots, knots), dtype=np.float32) @ weights.T

    def grain(self) -> Array:
        """(H, W) grain of sigma 1, one pixel of a 64-pixel image high and about two wide."""
        step = max(1, self.size // 64)
        n = -(-self.size // step)
        white = self.rng.standard_normal((n, n + 1), dtype=np.float32)
        grain = (white[:, 1:] + white[:, :-1]) * np.float32(0.5**0.5)
        if step > 1:
            grain = grain.repeat(step, 0).repeat(step, 1)
        return grain[: self.size, : self.size]
