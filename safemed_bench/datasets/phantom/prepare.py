"""A phantom set on disk, in OmniMedVQA's own layout, or in memory for training."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...core.errors import DataError
from .catalogue import MODALITIES
from .questions import image_path, questions_for
from .render import render
from .spec import SPLITS, PhantomSpec, check_split

MANIFEST = "phantom.json"
CHUNK = 256
Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""


def prepare(
    root: Path | str,
    spec: PhantomSpec,
    splits: Sequence[str] = SPLITS,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the splits of a set below `root`; goes on where it stopped, does nothing where all is there.

    `QA_information/Open-access/Phantom-<modality>.json` holds the records of all splits written so far. Files appear
    whole or not at all. DataError where `root` holds a phantom set of other parameters.
    """
    root = Path(root)
    done = _read_manifest(root, spec)
    wanted = [split for split in splits if split not in done]
    for split in wanted:
        check_split(split)
    if not wanted:
        return
    root.mkdir(parents=True, exist_ok=True)
    _write_manifest(root, spec, done)
    _write_images(root, spec, wanted, workers, progress)
    done = [split for split in SPLITS if split in done or split in wanted]
    _write_records(root, spec, done)
    _write_manifest(root, spec, done)


def generate_arrays(
    spec: PhantomSpec, split: str, n: int, workers: int | None = None
) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """The first n images of a split, (n, H, W, 3) uint8, and the records of all of them in the order of images.

    A record's image is found by `index_of(record)`.
    """
    check_split(split)
    images = np.empty((n, spec.size, spec.size, 3), np.uint8)
    at = 0
    with _pool(workers, n) as pool:
        for block in pool(partial(_render_block, spec, split), _blocks(n)):
            images[at : at + len(block)] = block
            at += len(block)
    return images, [record for index in range(n) for record in questions_for(spec.seed, split, index)]


def index_of(record: dict[str, Any]) -> int:
    """The index, within its split, of the image a record asks about."""
    return int(Path(record["image_path"]).stem)


def _blocks(n: int) -> list[range]:
    return [range(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK)]


def _render_block(spec: PhantomSpec, split: str, indices: Sequence[int]) -> NDArray[np.uint8]:
    return np.stack([render(spec, split, index).image for index in indices])


def _write_images(
    root: Path, spec: PhantomSpec, splits: Sequence[str], workers: int | None, progress: Progress | None
) -> None:
    for split in splits:
        for modality in MODALITIES:
            (root / "Images" / f"Phantom-{modality.name}" / split).mkdir(parents=True, exist_ok=True)
    total, done = sum(spec.count(split) for split in splits), 0
    blocks = [(split, block) for split in splits for block in _blocks(spec.count(split))]
    with _pool(workers, total) as pool:
        for count in pool(partial(_write_block, root, spec), blocks):
            done += count
            if progress is not None:
                progress(done, total)


def _write_block(root: Path, spec: PhantomSpec, block: tuple[str, Sequence[int]]) -> int:
    split, indices = block
    for index in indices:
        path = root / image_path(split, index)
        if not path.exists():
            partial_path = path.with_suffix(f".{os.getpid()}.tmp")
            Image.fromarray(render(spec, split, index).image).save(partial_path, format="png", compress_level=1)
            partial_path.replace(path)
    return len(indices)


def _write_records(root: Path, spec: PhantomSpec, splits: Sequence[str]) -> None:
    folder = root / "QA_information" / "Open-access"
    folder.mkdir(parents=True, exist_ok=True)
    step = len(MODALITIES)
    for m, modality in enumerate(MODALITIES):
        records = [
            record
            for split in splits
            for index in range(m, spec.count(split), step)
            for record in questions_for(spec.seed, split, index)
        ]
        _write_whole(folder / f"Phantom-{modality.name}.json", json.dumps(records, indent=1))


def _read_manifest(root: Path, spec: PhantomSpec) -> list[str]:
    """The splits already complete below `root`."""
    path = root / MANIFEST
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text("utf-8"))
        fingerprint, complete = found["fingerprint"], list(found["complete"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a phantom manifest ({error}); remove the folder to make it anew") from error
    if fingerprint != spec.fingerprint():
        raise DataError(
            f"{root} holds a phantom set of other parameters ({fingerprint}, asked for {spec.fingerprint()}); "
            "name another folder or remove this one"
        )
    return complete


def _write_manifest(root: Path, spec: PhantomSpec, complete: Sequence[str]) -> None:
    content = {"fingerprint": spec.fingerprint(), "complete": list(complete), "spec": spec.to_dict()}
    _write_whole(root / MANIFEST, json.dumps(content, indent=1))


def _write_whole(path: Path, text: str) -> None:
    partial_path = path.with_suffix(f".{os.getpid()}.tmp")
    partial_path.write_text(text, "utf-8")
    partial_path.replace(path)


def _cpus() -> int:
    """Processors this process may use; the affinity mask is not known on every system."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _pool(workers: int | None, images: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` over worker processes, or the plain one where there is little to do."""
    count = workers if workers is not None else _cpus()
    if count <= 1 or images <= 4 * CHUNK:
        yield map
        return
    executor: Executor = ProcessPoolExecutor(count)
    try:
        yield executor.map
    finally:
        executor.shutdown(cancel_futures=True)
