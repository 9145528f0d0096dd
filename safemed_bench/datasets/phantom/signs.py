"""The signs of disease: spot, ring, streak, cluster."""

from __future__ import annotations

from math import cos, pi, sin, sqrt

import numpy as np

from .catalogue import Sign
from .pen import Array, Level, Pen

GOLDEN_ANGLE = pi * (3 - sqrt(5))


def draw_sign(pen: Pen, sign: Sign, site: tuple[float, float], radius: float, tint: Level) -> None:
    """Add a sign at `site` (body coordinates) with a radius in pixels of a 64-pixel image.

    tint: what an amplitude of 1 adds to each channel; its sign is the polarity.
    """
    amplitude = pen.rng.uniform(*pen.hard.contrast)
    mask = _SHAPES[sign.shape](pen, sign, site, radius * pen.unit)
    pen.add(np.float32(amplitude) * mask, tint)


def _polar(pen: Pen, site: tuple[float, float]) -> tuple[Array, Array, Array]:
    du, dv = pen.u - np.float32(site[0]), pen.v - np.float32(site[1])
    return du, dv, np.sqrt(du * du + dv * dv)


def _outline(pen: Pen, du: Array, dv: Array, r: Array) -> Array:
    """r, stretched a little along a random axis: no sign is a perfect circle."""
    angle, stretch = pen.rng.uniform(0, pi), pen.rng.uniform(0.0, 0.16)
    along = np.float32(cos(angle)) * du + np.float32(sin(angle)) * dv
    return r + np.float32(stretch) * (along * along / (r + np.float32(1e-3)) - r / 2)


def _spot(pen: Pen, sign: Sign, site: tuple[float, float], radius: float) -> Array:
    return pen.edge(radius - _outline(pen, *_polar(pen, site)))


def _ring(pen: Pen, sign: Sign, site: tuple[float, float], radius: float) -> Array:
    """A rim with its middle along the radius, and a core a little to the other side of the tissue."""
    half = max(0.9 * pen.unit, 0.17 * radius)
    r = _outline(pen, *_polar(pen, site))
    rim = pen.edge(half - np.abs(r - radius))
    return rim - np.float32(0.3) * pen.edge(radius - half - r)


def _streak(pen: Pen, sign: Sign, site: tuple[float, float], radius: float) -> Array:
    angle = pen.rng.uniform(0, pi) if sign.angle is None else pen.near(sign.angle, 0.25)
    bend = pen.near(0.0, 0.25) / radius
    du, dv, _ = _polar(pen, site)
    c, s = np.float32(cos(angle)), np.float32(sin(angle))
    along, across = c * du + s * dv, c * dv - s * du
    across = across - np.float32(bend) * along * along
    half = max(1.45 * pen.unit, 0.28 * radius)
    length = 1.5 * radius - half
    return pen.edge(half - np.hypot(np.maximum(np.abs(along) - length, 0), across))


def _cluster(pen: Pen, sign: Sign, site: tuple[float, float], radius: float) -> Array:
    """Dots in a sunflower pattern, jittered; more of them where the cluster is larger."""
    count = 5 + 2 * int(radius / pen.unit > 4.5) + 3 * int(radius / pen.unit > 6.5)
    dot = max(1.1 * pen.unit, 0.21 * radius)
    k = np.arange(count)
    reach = 1.12 * radius * np.sqrt((k + 0.35) / count) * pen.rng.uniform(0.9, 1.1, count)
    angle = pen.rng.uniform(0, 2 * pi) + k * GOLDEN_ANGLE + pen.rng.uniform(-0.2, 0.2, count)
    du, dv, _ = _polar(pen, site)
    nearest = np.full_like(du, np.inf)
    for x, y in zip(reach * np.cos(angle), reach * np.sin(angle), strict=True):
        np.minimum(nearest, (du - np.float32(x)) ** 2 + (dv - np.float32(y)) ** 2, out=nearest)
    return pen.edge(dot - np.sqrt(nearest))


_SHAPES = {"spot": _spot, "ring": _ring, "streak": _streak, "cluster": _cluster}
