"""Adversarial images that were made elsewhere, by question id, as they lie on disk. Needs no torch.

A folder of pictures, each named by its question's id (`<id>.png`; where an id holds characters that a file name should
not, these may be `_`), of .npz files, or both; or one .npz with `question_ids` and either `images` (uint8) or `delta`
(differences to the canvas in 8-bit levels), such as a run's own artefacts.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..core.errors import DataError

PICTURES = (".png", ".bmp", ".tif", ".tiff", ".webp", ".jpg", ".jpeg")
BROKEN = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)


@dataclass(frozen=True, slots=True)
class File:
    """A file as it was found; another time or size is another file."""

    path: Path
    changed: int
    size: int


@dataclass(frozen=True)
class Supplied:
    """places: question id -> file and place in it. Ids of pictures are their paths below `root`, without suffix."""

    root: Path
    places: Mapping[str, tuple[File, int]]

    def __contains__(self, question_id: object) -> bool:
        return isinstance(question_id, str) and self._place(question_id) is not None

    def _place(self, question_id: str) -> tuple[File, int] | None:
        plain = re.sub(r"[^A-Za-z0-9._-]+", "_", question_id)
        return self.places.get(question_id) or self.places.get(plain)

    def image(self, question_id: str, canvas: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The (3, H, W) image for a question whose (3, H, W) canvas is given. Raises DataError saying what is wrong."""
        place = self._place(question_id)
        if place is None:
            raise DataError(f"{self.root} has no image for question {question_id}")
        file, index = place
        if file.path.suffix != ".npz":
            return _fitting(_picture(file.path), canvas, file.path.name)
        kind, stack, _ = _arrays(file)
        values = stack[index]
        if kind == "images":
            return _fitting(values, canvas, file.path.name)
        levels = _same_shape(values, canvas, file.path.name).astype(np.int64) + canvas
        if levels.min() < 0 or levels.max() > 255:
            raise DataError(f"levels {levels.min()} to {levels.max()} leave the range of 8-bit images")
        return levels.astype(np.uint8)

    def digest(self) -> str:
        """Hash of all names and contents."""
        found = hashlib.blake2b(digest_size=16)
        for path in sorted({file.path for file, _ in self.places.values()}):
            found.update(f"{path.relative_to(self.root.parent)}\x1f{path.stat().st_size}\x1f".encode())
            found.update(path.read_bytes())
        return found.hexdigest()


def open_supplied(path: str | Path) -> Supplied:
    """What lies at `path`. Raises DataError where it is not there, cannot be read, or names a question twice."""
    root = Path(path).expanduser()
    if root.is_dir():
        paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in (*PICTURES, ".npz"))
    elif root.suffix == ".npz" and root.is_file():
        paths = [root]
    else:
        raise DataError(f"no such folder or .npz file: {root}")
    if not paths:
        raise DataError(f"{root} holds no picture ({', '.join(PICTURES)}) and no .npz file")
    return _opened(root, tuple(File(p, (stat := p.stat()).st_mtime_ns, stat.st_size) for p in paths))


@lru_cache(maxsize=4)
def _opened(root: Path, files: tuple[File, ...]) -> Supplied:
    places: dict[str, tuple[File, int]] = {}
    for file in files:
        if file.path.suffix == ".npz":
            ids = _arrays(file)[2]
        else:
            ids = (file.path.relative_to(root).as_posix().removesuffix(file.path.suffix),)
        for index, question_id in enumerate(ids):
            if question_id in places:
                raise DataError(f"two images for question {question_id}: {places[question_id][0].path} and {file.path}")
            places[question_id] = file, index
    return Supplied(root, places)


@lru_cache(maxsize=8)
def _arrays(file: File) -> tuple[str, NDArray[Any], tuple[str, ...]]:
    """`images` or `delta`, the (N, ...) stack, and the question ids of one .npz."""
    try:
        with np.load(file.path, allow_pickle=False) as held:
            kind = "images" if "images" in held else "delta"
            ids, stack = tuple(map(str, held["question_ids"])), held[kind]
    except BROKEN as error:
        raise DataError(f"{file.path}: needs `question_ids` and `images` or `delta` ({error})") from error
    wanted = np.uint8 if kind == "images" else np.signedinteger
    if stack.ndim != 4 or not np.issubdtype(stack.dtype, wanted):
        type_of = "uint8 levels 0 to 255" if kind == "images" else "whole levels, signed"
        raise DataError(f"{file.path}: `{kind}` must be (N, 3, H, W), {type_of}; it is {stack.dtype} {stack.shape}")
    if len(ids) != len(stack):
        raise DataError(f"{file.path}: {len(ids)} question_ids for {len(stack)} {kind}")
    return kind, stack, ids


def _picture(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except BROKEN as error:
        raise DataError(f"{path}: not a readable picture ({error})") from error


def _fitting(image: NDArray[np.uint8], canvas: NDArray[np.uint8], name: str) -> NDArray[np.uint8]:
    """Channels first; a picture and some .npz have them last."""
    last = image.shape[-1] == 3 and image.shape[0] != 3
    return np.ascontiguousarray(_same_shape(image.transpose(2, 0, 1) if last else image, canvas, name))


def _same_shape(values: NDArray[Any], canvas: NDArray[np.uint8], name: str) -> NDArray[Any]:
    if values.shape != canvas.shape:
        raise DataError(f"{name}: the image has shape {values.shape}, the canvas {canvas.shape}: nothing is resized")
    return values
