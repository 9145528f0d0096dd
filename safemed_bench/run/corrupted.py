"""The condition `corruption`: the canvases as a fault of the camera, the scanner or the mail would leave them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..core.seeds import derive_seed
from ..corruptions import build_corruption

if TYPE_CHECKING:
    from .conditions import Scene


def show(scene: Scene) -> NDArray[np.uint8]:
    """(N, 3, H, W) uint8. Each question has a random stream of its own per kind, the same at every severity and for
    every model, whatever batch it is in."""
    job, corrupt = scene.job, build_corruption(scene.job.corruption)
    seeds = (derive_seed(unit.seed, "corruption", job.corruption) for unit in scene.units)
    return np.stack([corrupt(canvas, job.severity, seed) for canvas, seed in zip(scene.canvas, seeds, strict=True)])
