"""The normal anatomy of the sixteen regions. Each painter draws on a pen and says where a sign would stand."""

from __future__ import annotations

from collections.abc import Callable
from math import pi

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .pen import Array, Pen

Site = tuple[float, float]
"""Centre of a sign, in body coordinates."""


def _site(pen: Pen, cu: float, cv: float, ru: float, rv: float) -> Site:
    return pen.near(cu, ru), pen.near(cv, rv)


def _vary(pen: Pen, tone: ArrayLike, spread: float) -> NDArray[np.float64]:
    """A colour near `tone`."""
    return np.asarray(tone, float) + pen.rng.uniform(-spread, spread, 3)


def _flood(pen: Pen, tone: NDArray[np.float64]) -> None:
    pen.image += tone.astype(np.float32).reshape(3, 1, 1)


def liver(pen: Pen) -> Site:
    pen.paint(pen.ellipse(0, 0, pen.near(0.92, 0.04), pen.near(0.76, 0.05)), pen.near(0.22, 0.04))
    pen.paint(pen.ellipse(0, 0, 0.84, 0.68), pen.near(0.34, 0.03))
    pen.paint(pen.ellipse(-0.3, -0.06, pen.near(0.50, 0.03), pen.near(0.5, 0.04)), pen.near(0.5, 0.04))
    pen.paint(pen.ellipse(pen.near(0.48, 0.05), pen.near(-0.2, 0.06), 0.24, 0.24), pen.near(0.2, 0.06))
    pen.paint(pen.ellipse(0.05, 0.5, 0.15, 0.13), pen.near(0.85, 0.08))
    pen.paint(pen.ellipse(0.12, 0.27, 0.07, 0.07), pen.near(0.62, 0.05))
    return _site(pen, -0.33, -0.1, 0.14, 0.14)


def lung(pen: Pen) -> Site:
    pen.paint(pen.ellipse(0, 0, pen.near(0.94, 0.03), pen.near(0.76, 0.05)), pen.near(0.5, 0.05))
    level = pen.near(0.2, 0.04)
    for s in (-1, 1):
        pen.paint(pen.ellipse(s * 0.45, -0.03, pen.near(0.36, 0.02), pen.near(0.55, 0.04)), level)
    pen.paint(pen.ellipse(0.1, -0.12, pen.near(0.2, 0.03), pen.near(0.26, 0.03)), pen.near(0.6, 0.05))
    pen.paint(pen.ellipse(0, 0.5, 0.15, 0.14), pen.near(0.88, 0.06))
    for _ in range(3):
        pen.add(pen.curve(pen.near(0, 1.2), pen.near(0, 0.4), pen.near(0, 0.6), 0.03), pen.hard.clutter * 0.5)
    return _site(pen, pen.side() * 0.49, -0.05, 0.07, 0.2)


def brain(pen: Pen) -> Site:
    ru, rv = pen.near(0.76, 0.03), pen.near(0.9, 0.03)
    pen.paint(pen.ellipse(0, 0, ru, rv), pen.near(0.75, 0.06))
    pen.paint(pen.ellipse(0, 0, ru - 0.07, rv - 0.07), 0.08)
    pen.paint(pen.ellipse(0, 0, ru - 0.13, rv - 0.13), pen.near(0.46, 0.04))
    folds = np.sin(14 * pen.u + 2 * pen.field(4)) * np.sin(13 * pen.v + 2 * pen.field(4))
    rim = pen.hoop(0, 0, ru - 0.2, rv - 0.2, 0.14)
    pen.add(rim * folds, pen.hard.clutter * 0.8)
    pen.paint(pen.box(0, 0, 0.012, rv - 0.16), 0.25, 0.7)
    gap = pen.near(0.09, 0.02)
    for s in (-1, 1):
        pen.paint(pen.ellipse(s * gap, -0.04, 0.055, pen.near(0.22, 0.03)), 0.14)
    return _site(pen, pen.side() * 0.37, pen.side() * 0.22, 0.05, 0.14)


def knee(pen: Pen) -> Site:
    pen.paint(pen.box(pen.near(0, 0.04), 0, pen.near(0.78, 0.05), 1.6), pen.near(0.28, 0.04))
    bone, joint = pen.near(0.56, 0.04), pen.near(0.08, 0.03)
    femur = np.maximum(pen.box(-0.02, -0.9, 0.34, 0.6), pen.ellipse(0, joint - 0.42, 0.58, 0.4))
    pen.paint(femur, bone)
    tibia = np.maximum(pen.box(0, joint + 0.36, 0.56, 0.26, 0.12), pen.box(-0.04, 1.0, 0.36, 0.7))
    pen.paint(tibia, bone + pen.near(0, 0.02))
    for s in (-1, 1):
        pen.paint(pen.ellipse(s * 0.42, joint + 0.04, 0.17, 0.06), 0.06)
    pen.paint(pen.box(0, joint + 0.04, 0.26, 0.025), pen.near(0.75, 0.06), 0.8)
    centre = joint - 0.43 if pen.rng.random() < 0.5 else joint + 0.46
    return _site(pen, 0, centre, 0.2, 0.07)


def chest(pen: Pen) -> Site:
    pen.image += np.float32(pen.near(0.55, 0.05))
    level = pen.near(0.24, 0.04)
    for s in (-1, 1):
        lobe = pen.ellipse(s * 0.45, 0.02, pen.near(0.37, 0.02), pen.near(0.82, 0.03))
        pen.paint(lobe * pen.edge(pen.near(0.6, 0.05) - pen.v), level)
    pen.paint(pen.ellipse(0.14, 0.36, pen.near(0.26, 0.04), pen.near(0.28, 0.03)), pen.near(0.7, 0.05))
    pen.paint(pen.box(0, 0, 0.09, 1.5), pen.near(0.72, 0.05), 0.9)
    ribs = np.sin((pen.v + pen.near(0.45, 0.05) * (np.abs(pen.u) - 0.45) ** 2) * pen.near(17, 1) + pen.near(0, pi))
    pen.add(np.maximum(ribs, 0) * (np.abs(pen.u) > 0.1), pen.hard.clutter * 0.55)
    for s in (-1, 1):
        pen.add(pen.curve(s * 0.22, -0.72, 0.1, 0.07) * (s * pen.u > 0.05), pen.hard.clutter)
    return _site(pen, pen.side() * 0.5, -0.05, 0.06, 0.28)


def femur(pen: Pen) -> Site:
    pen.image += np.float32(pen.near(0.07, 0.03))
    pen.paint(pen.box(pen.near(0, 0.06), 0, pen.near(0.74, 0.06), 1.8), pen.near(0.2, 0.03))
    half = pen.near(0.34, 0.02)
    pen.paint(pen.box(0, 0, half, 1.8), pen.near(0.74, 0.04))
    pen.paint(pen.box(0, 0, half - 0.09, 1.8), pen.near(0.48, 0.04))
    end = pen.side()
    for s in (-1, 1):
        pen.paint(pen.ellipse(s * 0.27, end * 0.86, 0.32, pen.near(0.28, 0.03)), pen.near(0.62, 0.03))
    for _ in range(4):
        pen.add(pen.curve(pi / 2 + pen.near(0, 0.1), pen.near(0, 0.25), 0, 0.03), pen.hard.clutter * pen.near(0, 0.5))
    return _site(pen, 0, -end * 0.25, 0.05, 0.22)


def breast(pen: Pen) -> Site:
    depth = pen.v + np.float32(0.05) * pen.field(4)
    pen.image += np.float32(pen.near(0.45, 0.04))
    pen.paint(pen.edge(-0.5 - depth), pen.near(0.26, 0.04))
    pen.paint(pen.edge(0.05 - np.abs(depth + 0.88)), pen.near(0.85, 0.08))
    pen.paint(pen.edge(0.025 - np.abs(depth + 0.5)), pen.near(0.7, 0.06), 0.7)
    pen.paint(pen.edge(depth - 0.56), pen.near(0.22, 0.04))
    pen.paint(pen.edge(0.03 - np.abs(depth - 0.58)), pen.near(0.72, 0.06), 0.8)
    strands = np.sin(16 * depth + 3 * pen.field(5))
    pen.add(strands * (np.abs(depth) < 0.5), pen.hard.clutter * 0.4)
    return _site(pen, 0, 0.03, 0.45, 0.14)


def thyroid(pen: Pen) -> Site:
    pen.image += np.float32(pen.near(0.22, 0.04))
    pen.paint(pen.edge(0.05 - np.abs(pen.v + 0.82)), pen.near(0.7, 0.08))
    level = pen.near(0.48, 0.04)
    for s in (-1, 1):
        pen.paint(pen.ellipse(s * 0.84, 0.12, 0.13, 0.15), 0.04)
        pen.paint(pen.ellipse(s * 0.46, 0.0, pen.near(0.35, 0.02), pen.near(0.42, 0.03)), level)
    pen.paint(pen.box(0, -0.22, 0.3, 0.1, 0.08), level)
    pen.paint(pen.ellipse(0, 0.22, 0.17, 0.26), 0.05)
    pen.paint(pen.hoop(0, 0.22, 0.2, 0.29, 0.06) * (pen.v < 0.2), pen.near(0.85, 0.08))
    return _site(pen, pen.side() * 0.46, 0.0, 0.06, 0.1)


def _skin(pen: Pen) -> NDArray[np.float64]:
    """A skin tone between fair and tanned."""
    fair, tanned = np.array([0.9, 0.7, 0.6]), np.array([0.7, 0.5, 0.38])
    mix = pen.rng.random()
    return _vary(pen, (1 - mix) * fair + mix * tanned, 0.03)


def trunk(pen: Pen) -> Site:
    tone = _skin(pen) - 0.12
    _flood(pen, tone)
    pen.add(np.sin(20 * pen.u + 3 * pen.field(6)) * np.sin(20 * pen.v + 3 * pen.field(6)), 0.02)
    if pen.rng.random() < 0.5:
        lens = pen.ellipse(0, 0, 1.15, 1.15)
        pen.image *= 0.25 + 0.75 * lens
    for _ in range(int(pen.rng.integers(0, 6))):
        hair = pen.curve(pen.near(0, pi), pen.near(0, 0.8), pen.near(0, 0.4), 0.035)
        pen.add(hair, np.array([-1.0, -0.9, -0.8]) * pen.hard.clutter * pen.near(1.2, 0.4))
    return _site(pen, 0, 0, 0.4, 0.4)


def nail(pen: Pen) -> Site:
    tone = _skin(pen)
    _flood(pen, tone - 0.25)
    hu, hv = pen.near(0.54, 0.03), pen.near(0.68, 0.04)
    pen.paint(pen.box(0, 0, hu + 0.07, hv + 0.07, 0.34), tone - 0.4)
    plate = pen.box(0, 0, hu, hv, 0.3)
    pen.paint(plate, _vary(pen, (0.78, 0.56, 0.52), 0.04))
    pen.paint(plate * pen.ellipse(0, hv + 0.08, 0.36, 0.28), (0.9, 0.78, 0.75))
    ridges = np.sin(pen.near(30, 4) * pen.u + pen.near(0, pi))
    pen.add(plate * ridges, pen.hard.clutter * 0.15)
    return _site(pen, 0, -0.1, 0.2, 0.2)


VESSEL = np.array([-0.9, -0.7, -0.3])
"""A vessel takes most from the red of the retina."""


def _retina(pen: Pen) -> None:
    radius = pen.near(0.96, 0.03)
    tone = _vary(pen, (0.72, 0.40, 0.2), 0.05)
    pen.paint(pen.ellipse(0, 0, radius, radius), tone)


def macula(pen: Pen) -> Site:
    _retina(pen)
    s = pen.side()
    field = pen.ellipse(0, 0, 0.93, 0.93)
    for bend, offset in ((0.5, -0.62), (-0.5, 0.62)):
        vessel = pen.curve(pen.near(0, 0.1), pen.near(offset, 0.05), pen.near(bend, 0.15), pen.near(0.06, 0.01))
        pen.add(vessel * field, VESSEL * pen.hard.clutter * 1.3)
    pen.paint(pen.ellipse(s * 0.82, 0, 0.16, 0.2) * field, (0.95, 0.8, 0.5))
    glow = np.exp(-(pen.u**2 + pen.v**2) / np.float32(0.03))
    pen.add(glow, VESSEL * pen.hard.clutter * 0.8)
    return _site(pen, -s * 0.1, 0, 0.2, 0.22)


def disc(pen: Pen) -> Site:
    _retina(pen)
    field = pen.ellipse(0, 0, 0.93, 0.93)
    centre = pen.near(0, 0.08)
    pen.paint(pen.ellipse(centre, 0, pen.near(0.27, 0.02), pen.near(0.3, 0.02)), (0.93, 0.74, 0.45))
    pen.paint(pen.ellipse(centre, 0, 0.12, 0.13), (0.98, 0.9, 0.7))
    for bend, angle in ((0.6, 1.35), (-0.6, 1.75)):
        vessel = pen.curve(pen.near(angle, 0.1), -centre, pen.near(bend, 0.2), pen.near(0.07, 0.01))
        pen.add(vessel * field, VESSEL * pen.hard.clutter * 1.3)
    return _site(pen, centre + pen.side() * 0.55, 0, 0.05, 0.25)


def _layers(pen: Pen, depth: Array, levels: tuple[tuple[float, float, float], ...]) -> None:
    """Bands (from, to, level) of a depth coordinate."""
    for top, bottom, level in levels:
        middle, half = (top + bottom) / 2, (bottom - top) / 2
        pen.paint(pen.edge(half - np.abs(depth - middle)), level)


def fovea(pen: Pen) -> Site:
    pen.image += np.float32(pen.near(0.06, 0.02))
    at = pen.near(0, 0.2)
    depth = pen.v + np.float32(0.04) * pen.field(3)
    pit = pen.near(0.22, 0.03) * np.exp(-((pen.u - at) ** 2) / np.float32(0.06))
    tissue = pen.near(0.46, 0.03)
    pen.paint(pen.edge(depth + 0.45 - pit) * (depth < 0.7), tissue)
    pen.paint(pen.edge(0.05 - np.abs(depth + 0.42 - pit)), pen.near(0.72, 0.05))
    _layers(pen, depth, ((0.3, 0.4, pen.near(0.85, 0.05)), (0.4, 0.75, pen.near(0.34, 0.04)), (0.75, 3, 0.16)))
    return _site(pen, at + pen.side() * pen.near(0.3, 0.12), -0.03, 0.0, 0.07)


def cornea(pen: Pen) -> Site:
    pen.image += np.float32(pen.near(0.06, 0.02))
    bend = pen.near(0.5, 0.06)
    depth = pen.v + 0.3 - np.float32(bend) * pen.u * pen.u
    half = pen.near(0.33, 0.015)
    pen.paint(pen.edge(half - np.abs(depth)), pen.near(0.46, 0.03))
    pen.paint(pen.edge(0.035 - np.abs(depth + half)), pen.near(0.85, 0.05))
    pen.paint(pen.edge(0.025 - np.abs(depth - half)), pen.near(0.65, 0.05))
    pen.paint(pen.edge(0.05 - np.abs(pen.v - pen.near(0.78, 0.05))), pen.near(0.6, 0.06), 0.9)
    at = pen.near(0, 0.4)
    return at, pen.near(-0.3 + bend * at * at, 0.04)


STAIN = np.array([-0.6, -1.0, -0.35])
"""What stain takes from white light: it leaves purple."""


QUARTERS = (-0.75, -0.25, 0.25, 0.75)


def blood(pen: Pen) -> Site:
    _flood(pen, _vary(pen, (0.86, 0.82, 0.86), 0.03))
    red = _vary(pen, (0.84, 0.62, 0.66), 0.03)
    places = [(gu, gv) for gu in QUARTERS for gv in QUARTERS]
    for gu, gv in pen.rng.permutation(places)[: int(pen.rng.integers(8, 14))]:
        cu, cv, r = pen.near(gu, 0.08), pen.near(gv, 0.08), pen.near(0.2, 0.03)
        pen.paint(pen.ellipse(cu, cv, r, r), red, 0.9)
        pen.add(pen.ellipse(cu, cv, r * 0.4, r * 0.4), 0.05)
    return _site(pen, 0, 0, 0.4, 0.4)


def colon(pen: Pen) -> Site:
    _flood(pen, _vary(pen, (0.74, 0.46, 0.62), 0.04))
    fibres = np.sin(18 * pen.v + 5 * pen.field(4))
    pen.add(fibres, 0.02)
    for gu in (-0.66, 0.0, 0.66):
        for gv in (-0.55, 0.55):
            cu, cv = pen.near(gu, 0.08), pen.near(gv, 0.08)
            ru, rv = pen.near(0.26, 0.03), pen.near(0.36, 0.05)
            pen.add(pen.hoop(cu, cv, ru, rv, 0.12), STAIN * pen.hard.clutter * 1.4)
            pen.add(pen.ellipse(cu, cv, ru * 0.35, rv * 0.5), 0.07)
    return _site(pen, 0, 0, 0.4, 0.4)


PAINTERS: dict[str, Callable[[Pen], Site]] = {
    painter.__name__: painter
    for painter in (
        liver, lung, brain, knee, chest, femur, breast, thyroid, trunk, nail, macula, disc, fovea, cornea, blood, colon,
    )
}  # fmt: skip
"""One painter per region of the catalogue."""
