"""Data sets: registered loaders, and `load`, which turns a suite's data section into questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from ..core import registry
from ..core.errors import DataError, Problem, UsageError
from ..core.types import Question
from .base import Dataset, cache_folder, fingerprint
from .images import Progress, image_cache, inspect_files
from .modalities import normalise

__all__ = ["DataSpec", "Dataset", "load"]


class DataSpec(Protocol):
    """A suite's data section; suite/schema.py has the one with descriptions. `root` None or "" means none."""

    @property
    def name(self) -> str: ...
    @property
    def root(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def scheme(self) -> str: ...
    @property
    def per_modality(self) -> int | str: ...
    @property
    def resolution(self) -> int: ...
    @property
    def phantom(self) -> Any: ...


def load(spec: DataSpec, cache_dir: str | Path | None = None, *, progress: Progress | None = None) -> Dataset:
    """The questions that a data section asks for, in a fixed order, their images hashed and decoded once.

    `auto` is OmniMedVQA where a root is named, else the phantom. `cache_dir` holds generated sets ($SAFEMED_CACHE or
    ~/.cache/safemed-bench by default). DataError where the folder, the split or a file cannot be used; a single bad
    image or record is in `problems`, and the image's question has `image_error`.
    """
    name = spec.name
    if name == "auto":
        name = "omnimedvqa" if spec.root else "phantom"
    cache = Path(cache_dir) if cache_dir is not None else cache_folder()
    return registry.datasets.get(name)(spec, cache, progress)


@registry.datasets.register("omnimedvqa")
def load_omnimedvqa(spec: DataSpec, cache: Path, progress: Progress | None = None) -> Dataset:
    """OmniMedVQA, Med-R1's split files or anything else in that layout, below `spec.root`."""
    if not spec.root:
        raise DataError("data set omnimedvqa needs a folder: give `data.root` or set SAFEMED_OMNIMEDVQA")
    root = Path(spec.root).expanduser().absolute()
    scheme, questions, problems = _select(spec, root)
    name = root.name or str(root)
    return _checked(
        f"OmniMedVQA at {name}, split {spec.split} ({scheme})", "omnimedvqa", root, questions, problems, progress
    )


@registry.datasets.register("phantom")
def load_phantom(spec: DataSpec, cache: Path, progress: Progress | None = None) -> Dataset:
    """The generated set: made once per parameters and split below `cache`, then read like any other."""
    from .phantom import PhantomSpec, prepare

    file = _split_file(spec)
    if file or spec.scheme not in ("auto", "record", "image_disjoint"):
        key, word = ("split_file", file) if file else ("scheme", spec.scheme)
        raise UsageError(
            f"data.{key} '{word}' does not fit the phantom set: it is generated per split, no image in two. "
            "Use auto, or name a folder with data.root"
        )
    made = PhantomSpec.from_mapping({"size": spec.resolution} | dict(spec.phantom or {}))
    root = cache / f"phantom-{made.fingerprint()}" / spec.split
    try:
        prepare(root, made, splits=(spec.split,), progress=progress)
    except OSError as error:
        raise DataError(f"cannot write the generated images to {root} ({error}); set SAFEMED_CACHE") from error
    _, questions, problems = _select(spec, root, scheme="record")
    stamp = f"phantom (generated images, seed {made.seed}), split {spec.split}"
    return _checked(stamp, "phantom", root, questions, problems, progress)


def _select(
    spec: DataSpec, root: Path, scheme: str | None = None
) -> tuple[str, tuple[Question, ...], tuple[Problem, ...]]:
    """The scheme's name, and the questions of the split that are asked, before any image is looked at."""
    from . import omnimedvqa, splits

    contents = omnimedvqa.read(root)
    file = _split_file(spec)
    scheme = splits.resolve(contents, scheme or spec.scheme, file)
    everything, odd = splits.assign(contents, scheme, wanted=spec.split, split_file=file)
    questions = splits.of_split(everything, spec.split)
    if not questions:
        counts = {s: sum(q.split == s for q in everything) for s in splits.SPLITS}
        raise DataError(f"{root}: no question in split '{spec.split}' of scheme '{scheme}'; it has {counts}")
    wanted = _filtered(questions, getattr(spec, "filter", None) or {})
    if not wanted:
        raise DataError(
            f"{root}: no question of split '{spec.split}' fits data.filter {dict(getattr(spec, 'filter', {}))}"
        )
    n = len(wanted) if spec.per_modality == "all" else int(spec.per_modality)
    named = f"{scheme}, {file}" if file else scheme
    return named, splits.stratified(wanted, n), (*contents.problems, *odd)


def _split_file(spec: DataSpec) -> str | None:
    return getattr(spec, "split_file", None)


def _filtered(questions: Sequence[Question], keep: dict[str, Sequence[str]]) -> tuple[Question, ...]:
    for key, words in keep.items():
        names = {normalise(word) if key == "modality" else word for word in words}
        questions = [q for q in questions if getattr(q, key) in names]
    return tuple(questions)


def _checked(
    stamp: str,
    name: str,
    root: Path,
    questions: tuple[Question, ...],
    problems: tuple[Problem, ...],
    progress: Progress | None,
) -> Dataset:
    """Look at every image that is asked about."""
    facts = inspect_files((q.image for q in questions), cache=image_cache(root), progress=progress)
    if not any(f.sha256 for f in facts.values()):
        raise DataError(
            f"{root}: none of {len(facts):,} images is there, e.g. {questions[0].image}. "
            "Question text alone can be audited, not run"
        )
    asked = tuple(replace(q, image_sha256=facts[q.image].sha256, image_error=facts[q.image].error) for q in questions)
    broken = tuple(Problem(path, 0, 0, "", f.error) for path, f in facts.items() if f.error)
    return Dataset(name, stamp, fingerprint(asked), asked, (*problems, *broken))
