"""What a threat model allows, in whole 8-bit levels, and the one audit of saved images. Needs no torch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.types import ThreatModel

LEVELS = 255
# eps such as 4/255 is not exact in binary: times 255 it may fall a hair below the whole level that was meant.
SLACK = 1e-6


def whole_levels(threat: ThreatModel) -> int:
    """The most that one value may move under L∞, in levels."""
    return math.floor(min(threat.eps, 1.0) * LEVELS + SLACK)


def squared_budget(threat: ThreatModel) -> int:
    """The largest sum of squared level differences under L2; a sum of squared integers is itself one."""
    return math.floor((threat.eps * LEVELS) ** 2 + SLACK)


def summed_budget(threat: ThreatModel) -> int:
    """The largest sum of absolute level differences under L1."""
    return math.floor(threat.eps * LEVELS + SLACK)


def level_range(threat: ThreatModel) -> tuple[int, int]:
    """The lowest and the highest level inside the box."""
    low, high = threat.bounds
    return math.ceil(low * LEVELS - SLACK), math.floor(high * LEVELS + SLACK)


def audit(threat: ThreatModel, canvas: NDArray[np.uint8], image: NDArray[Any]) -> str:
    """What the threat model forbids about one `image` of integer levels, "" for nothing. Both of one shape.

    Exact: all comparisons are between integers. Only changed values must lie in the box; the rest is the canvas.
    """
    shift = image.astype(np.int64) - canvas
    size, allowed = _size_and_budget(threat, shift)
    if size > allowed:
        length = (math.sqrt(size) if threat.norm == "l2" else size) / LEVELS
        return f"a perturbation of {length:.6g} leaves the {threat.label} ball"
    low, high = level_range(threat)
    changed = image[shift != 0]
    if changed.size and (changed.min() < low or changed.max() > high):
        return f"levels {changed.min()} to {changed.max()} leave the box, {low} to {high}"
    return ""


def _size_and_budget(threat: ThreatModel, shift: NDArray[np.int64]) -> tuple[int, int]:
    """What the norm counts (for L2 squares), in levels, and how much of it there may be."""
    match threat.norm:
        case "linf":
            return int(np.abs(shift).max(initial=0)), whole_levels(threat)
        case "l2":
            return int(np.square(shift).sum()), squared_budget(threat)
        case "l1":
            return int(np.abs(shift).sum()), summed_budget(threat)
