"""From an index to its picture: anatomy, sign, then what the machine and the light do to both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...core.seeds import derive_seed
from .anatomy import PAINTERS
from .catalogue import DISEASES
from .design import Slot, slot
from .pen import Level, Pen
from .signs import draw_sign
from .spec import PhantomSpec, check_split

COLOURED = ("dermoscopy", "fundus", "microscopy")
GRAINY = ("ultrasound", "OCT")

MID_GREY = np.float32(0.42)
"""What flat images fade towards."""

TINTS: dict[tuple[str, str], Level] = {
    ("dermoscopy", "dark"): (-1.0, -0.95, -0.8),
    ("dermoscopy", "bright"): (0.75, 1.0, 1.0),
    ("fundus", "dark"): (-1.0, -0.75, -0.35),
    ("fundus", "bright"): (0.6, 1.0, 0.6),
    ("microscopy", "dark"): (-0.85, -1.0, -0.5),
    ("microscopy", "bright"): (0.7, 1.0, 0.8),
}
"""What a sign of amplitude 1 adds to red, green and blue; plain grey where a modality has no colour."""


@dataclass(frozen=True)
class Case:
    """One image and what is true of it, in words. image: (H, W, 3) uint8. grade is None for a normal image."""

    modality: str
    region: str
    condition: str
    grade: str | None
    image: NDArray[np.uint8]


def render(spec: PhantomSpec, split: str, index: int) -> Case:
    """Image `index` (from 0) of a split. Depends on seed, split, index, size and difficulty, and on nothing else."""
    check_split(split)
    rng = np.random.default_rng(derive_seed("phantom", spec.seed, split, index))
    return render_slot(spec, slot(spec.seed, split, index), rng)


def render_slot(spec: PhantomSpec, case: Slot, rng: np.random.Generator) -> Case:
    """An image of the given case, all else drawn from `rng`."""
    name = case.modality.name
    pen = Pen(rng, spec.size, spec.difficulty, 3 if name in COLOURED else 1)
    site = PAINTERS[case.region](pen)
    pen.image = MID_GREY + np.float32(rng.uniform(*spec.difficulty.anatomy)) * (pen.image - MID_GREY)
    pen.image += np.float32(spec.difficulty.texture) * pen.field(9)
    if case.grade is not None:
        sign = DISEASES[case.region][case.condition]
        tint = TINTS.get((name, sign.polarity), 1.0 if sign.polarity == "bright" else -1.0)
        draw_sign(pen, sign, site, rng.uniform(*_radii(spec, case.grade)), tint)
    image = _acquire(pen, grainy=name in GRAINY)
    return Case(name, case.region, case.condition, case.grade, image)


def _radii(spec: PhantomSpec, grade: str) -> tuple[float, float]:
    hard = spec.difficulty
    return {"mild": hard.radius_mild, "moderate": hard.radius_moderate, "severe": hard.radius_severe}[grade]


def _acquire(pen: Pen, grainy: bool) -> NDArray[np.uint8]:
    """Gain, slow bias field, grain and noise, then 8 bits."""
    hard, rng = pen.hard, pen.rng
    gain = 1 + rng.uniform(-hard.gain, hard.gain)
    image = pen.image * (np.float32(gain) + np.float32(hard.bias / 2) * pen.field(3))
    if grainy:
        image *= 1 + np.float32(rng.uniform(*hard.speckle)) * pen.grain()
    image += np.float32(rng.uniform(*hard.noise)) * rng.standard_normal(image.shape, dtype=np.float32)
    image += np.float32(rng.uniform(0, 0.04))
    levels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(levels.transpose(1, 2, 0), (pen.size, pen.size, 3)))
