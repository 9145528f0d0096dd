"""Image files: the canvas a model is given, and what is known of a file (its hash, whether it can be read)."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..core.errors import DataError
from .base import cache_folder

Progress = Callable[[int, int], None]
"""Called with (files done, files in all)."""

_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def load_canvas(path: str | Path, resolution: int, fit: str = "pad") -> NDArray[np.uint8]:
    """The image as an RGB canvas, (resolution, resolution, 3) uint8. DataError names a file that cannot be read.

    `pad` keeps the aspect ratio on a black canvas, centred; `stretch` does not. Resizing is Pillow's bicubic, which
    low-passes when it shrinks; an RGB image of that very size is returned with its values untouched. EXIF rotation is
    applied, transparency laid over black, 16-bit grey scaled from its full range, the first frame of several taken.
    """
    if fit not in ("pad", "stretch"):
        raise ValueError(f"fit must be pad or stretch, not {fit!r}")
    image = _open(path)
    size = (resolution, resolution)
    if image.size == size:
        return np.array(image)
    if fit == "stretch":
        return np.array(image.resize(size, Image.Resampling.BICUBIC))
    scale = resolution / max(image.size)
    width, height = (max(1, min(resolution, round(side * scale))) for side in image.size)
    small = image if image.size == (width, height) else image.resize((width, height), Image.Resampling.BICUBIC)
    canvas = Image.new("RGB", size)
    canvas.paste(small, ((resolution - width) // 2, (resolution - height) // 2))
    return np.array(canvas)


def _open(path: str | Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise DataError(f"{path}: image file not found") from None
    except _UNREADABLE as error:
        raise DataError(f"{path}: image cannot be read ({_reason(error)})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_to_eight_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, (0, 0, 0, 255)), over).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Grey of more than 8 bits: 16-bit integers by their full range, anything wider by its own minimum and maximum.

    Pillow's own conversion clips at 255, which turns a 16-bit radiograph white.
    """
    exact = values.astype(np.float64)
    low, high = float(exact.min()), float(exact.max())
    if np.issubdtype(values.dtype, np.integer) and low >= 0 and high <= 65535:
        low, high = 0.0, 65535.0 if values.dtype.itemsize == 2 or high > 255 else 255.0
    return np.rint((exact - low) / max(high - low, 1e-12) * 255).astype(np.uint8)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@dataclass(frozen=True, slots=True)
class FileFacts:
    """sha256: of the file's bytes, "" where there are none to be had. error: why it cannot be used, "" if it can."""

    sha256: str
    error: str = ""


def inspect_files(
    paths: Iterable[str],
    *,
    decode: bool = True,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, FileFacts]:
    """Hash image files and, with `decode`, open and decode each once; threads, as both release the interpreter lock.

    What was found is kept in `cache`, a JSON file keyed by path, size and time of change, so that a set of 10^5 files
    is read once; without `decode` an earlier verdict still counts. Missing files are told by name, never raised.
    """
    unique = sorted(set(paths))
    known = _read_cache(cache)
    found: dict[str, FileFacts] = {}
    fresh: dict[str, list[Any]] = {}

    def look(path: str) -> tuple[str, list[Any] | None, FileFacts]:
        try:
            status = Path(path).stat()
        except OSError as error:
            return path, None, FileFacts("", f"image file {_why_absent(path, error)}")
        stamp = [status.st_size, status.st_mtime_ns]
        row = known.get(path)
        if row and row[:2] == stamp and (row[3] is not None or not decode):
            return path, row, FileFacts(row[2], row[3] or "")
        facts = _read_facts(path, decode)
        return path, [*stamp, facts.sha256, facts.error if decode else None], facts

    with ThreadPoolExecutor(min(8, (os.cpu_count() or 1) + 1)) as pool:
        for done, (path, row, facts) in enumerate(pool.map(look, unique), 1):
            found[path] = facts
            if row is not None and facts.sha256:
                fresh[path] = row
            if progress is not None:
                progress(done, len(unique))
    if cache is not None and any(known.get(path) != row for path, row in fresh.items()):
        _write_cache(cache, known | fresh)
    return found


def _read_facts(path: str, decode: bool) -> FileFacts:
    try:
        with Path(path).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return FileFacts("", f"image file {_why_absent(path, error)}")
    if decode:
        try:
            with Image.open(path) as image:
                image.load()
        except _UNREADABLE as error:
            return FileFacts(digest, f"image cannot be read: {_reason(error).replace(path, Path(path).name)}")
    return FileFacts(digest)


def _why_absent(path: str, error: OSError) -> str:
    return f"not found: {path}" if isinstance(error, FileNotFoundError) else f"cannot be opened: {error}"


def image_cache(root: str | Path) -> Path:
    """The file that keeps what is known of the images below `root`."""
    name = hashlib.blake2b(str(Path(root).resolve()).encode(), digest_size=8).hexdigest()
    return cache_folder() / f"images-{name}.json"


def _read_cache(path: Path | None) -> dict[str, list[Any]]:
    """Rows of [size, mtime in ns, sha256, error or None where not decoded]; what is no cache counts as empty."""
    if path is None:
        return {}
    try:
        rows = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in rows.items() if isinstance(v, list) and len(v) == 4} if isinstance(rows, dict) else {}


def _write_cache(path: Path, rows: dict[str, list[Any]]) -> None:
    # A cache that cannot be written costs time only.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}.tmp")
        part.write_text(json.dumps(rows), "utf-8")
        part.replace(path)
