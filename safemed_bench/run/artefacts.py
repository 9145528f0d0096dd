"""Adversarial images on disk: per chunk one compressed file of 8-bit differences to the clean canvas.

A difference compresses several times better than the picture it makes, and picture = canvas + difference, exactly.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..attacks.audit import LEVELS, audit
from ..core.errors import DataError
from ..core.journal import write_atomic
from ..core.types import ThreatModel

if TYPE_CHECKING:
    from .messages import Job

FOLDER = "artefacts"


@dataclass(frozen=True, slots=True)
class Measured:
    """One artefact as read back: norms on the [0, 1] scale, and what is wrong with it, "" for nothing."""

    linf: float
    l2: float
    l1: float
    problem: str


def artefact_name(cell: str, chunk: str, keys: Sequence[str]) -> str:
    """`artefacts/<cell>/<chunk>-<hash of the unit keys>.npz`, relative to the run folder.

    With the keys in the name, another plan in the same folder never overwrites what an older record points to.
    """
    digest = hashlib.blake2b("\x1f".join(keys).encode(), digest_size=4).hexdigest()
    return f"{FOLDER}/{slug(cell)}/{slug(chunk)}-{digest}.npz"


def made_by(job: Job) -> str:
    """The file that holds the images of a job's readable questions, whether it is there or not."""
    keys = [unit.key for unit, question in zip(job.units, job.questions, strict=True) if not question.image_error]
    return artefact_name(job.cell, job.chunk, keys)


def slug(text: str) -> str:
    """`text` as a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("_")


def save(
    folder: Path, name: str, canvas: NDArray[np.uint8], adversarial: NDArray[np.uint8], ids: Sequence[str]
) -> None:
    """Write the (N, 3, H, W) differences of two uint8 stacks, whole or not at all. Raises OSError."""
    delta = adversarial.astype(np.int16) - canvas
    if np.abs(delta).max(initial=0) <= 127:
        delta = delta.astype(np.int8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, delta=delta, question_ids=np.array(ids, dtype=np.str_))
    write_atomic(folder / name, buffer.getvalue())


def load(folder: Path, reference: str, canvas: NDArray[np.uint8]) -> NDArray[np.int16]:
    """The (3, H, W) adversarial image, on the 8-bit grid, that a record's `artefact` (`file#index`) names.

    canvas: the (3, H, W) uint8 clean image. Values outside [0, 255] mean a broken artefact; `measure` reports them.
    """
    name, _, index = reference.partition("#")
    return read(folder, name)[int(index)] + canvas


def read(folder: Path, name: str) -> NDArray[np.int16]:
    """All (N, 3, H, W) differences of one file, in 8-bit levels. Raises DataError naming an unreadable file."""
    path = folder / name
    try:
        with np.load(path) as file:
            return np.asarray(file["delta"], dtype=np.int16)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(f"{path}: not a readable artefact ({error})") from error


def measure(canvas: NDArray[np.uint8], delta: NDArray[np.int16], threat: ThreatModel) -> Measured:
    """Norms of one (3, H, W) difference, in 8-bit levels, and whether ball and box hold."""
    linf = float(np.abs(delta).max(initial=0)) / LEVELS
    l2 = float(np.sqrt(np.square(delta.astype(np.float64)).sum())) / LEVELS
    l1 = float(np.abs(delta).sum(dtype=np.int64)) / LEVELS
    return Measured(linf, l2, l1, audit(threat, canvas, canvas.astype(np.int16) + delta))
