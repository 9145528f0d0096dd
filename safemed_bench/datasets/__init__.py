"""Data sets: registered loaders, and `load`, which turns a suite's data section into questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ..core import registry
from ..core.errors import DataError, Problem, UsageError
from ..core.types import LETTERS, Question
from .base import Dataset, cache_folder, fingerprint
from .images import Progress, image_cache, inspect_files
from .modalities import normalise
from .prior import hits_by_id

if TYPE_CHECKING:
    from .phantom import PhantomSpec

__all__ = ["DataSpec", "Dataset", "ask", "load"]

PHANTOM_TRAIN = 2000
"""Images of the phantom's train split whose questions the text-only prior learns on; they are not drawn for it."""


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
    choice = _choose(spec, root)
    stamp = f"OmniMedVQA at {root.name or root}, split {spec.split} ({choice.scheme})"
    return _checked(stamp, "omnimedvqa", root, choice, progress)


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
    choice = _choose(spec, root, scheme="record")
    if spec.split != "train":
        choice = replace(choice, train=_phantom_train(made, root))
    stamp = f"phantom (generated images, seed {made.seed}), split {spec.split}"
    return _checked(stamp, "phantom", root, choice, progress)


def _phantom_train(made: PhantomSpec, root: Path) -> tuple[Question, ...]:
    from .omnimedvqa import entry_of
    from .phantom import questions_for

    images = range(min(made.count("train"), PHANTOM_TRAIN))
    records = (record for index in images for record in questions_for(made.seed, "train", index))
    return tuple(entry_of(root, record).question for record in records)


@dataclass(frozen=True)
class _Choice:
    """What of a root is asked, before any image is looked at.

    scheme: as stamps name it. train: questions the text-only prior learns on, of the same data and scheme; () where
    the train split itself is asked. Where test is asked they may include validation (splits.assign).
    """

    scheme: str
    asked: tuple[Question, ...]
    train: tuple[Question, ...]
    problems: tuple[Problem, ...]


def _choose(spec: DataSpec, root: Path, scheme: str | None = None) -> _Choice:
    from . import omnimedvqa, splits

    contents = omnimedvqa.read(root)
    file = _split_file(spec)
    scheme = splits.resolve(contents, scheme or spec.scheme, file)
    everything, odd = splits.assign(contents, scheme, wanted=spec.split, split_file=file)
    asked, train = _wanted(spec, everything, f"{root}, scheme '{scheme}'")
    return _Choice(f"{scheme}, {file}" if file else scheme, asked, train, (*contents.problems, *odd))


def ask(spec: DataSpec, name: str, questions: Sequence[Question], progress: Progress | None = None) -> Dataset:
    """What a suite's data section wants of a plugin's questions: its split, `filter` and `per_modality`.

    questions: of every split there is, each saying its own; those of train teach the text-only prior. Modalities may
    be spelled as OmniMedVQA does, and `image_sha256` may be "": images are looked at here. DataError for a question
    that cannot be asked, where nothing is left, and where no image is there; UsageError for a scheme of other splits.
    """
    if spec.scheme not in ("auto", "record") or _split_file(spec):
        raise UsageError(
            f"data.scheme does not fit data set '{name}': its questions say themselves what split they are of"
        )
    _check_askable(name, questions)
    questions = [replace(q, modality=normalise(q.modality)) for q in questions]
    asked, train = _wanted(spec, questions, f"data set '{name}'")
    root = Path(spec.root).expanduser().absolute() if spec.root else Path.cwd()
    return _checked(f"{name}, split {spec.split}", name, root, _Choice("record", asked, train, ()), progress)


def _check_askable(name: str, questions: Sequence[Question]) -> None:
    """Two to four options, one of them right, and no id twice. Raises DataError."""
    seen: set[str] = set()
    for question in questions:
        where = f"data set '{name}', question '{question.id}'"
        if question.id in seen:
            raise DataError(f"{where}: the id stands twice")
        if not 2 <= len(question.options) <= len(LETTERS):
            raise DataError(f"{where}: {len(question.options)} options; 2 to {len(LETTERS)} can be asked")
        if not 0 <= question.answer < len(question.options):
            raise DataError(f"{where}: answer {question.answer} is none of {len(question.options)} options, from 0")
        seen.add(question.id)


def _wanted(spec: DataSpec, everything: Sequence[Question], where: str) -> tuple[tuple[Question, ...], ...]:
    """The questions that are asked, and those of train where train is not asked itself."""
    from . import splits

    questions = splits.of_split(everything, spec.split)
    if not questions:
        counts = {s: sum(q.split == s for q in everything) for s in splits.SPLITS}
        raise DataError(f"{where}: no question in split '{spec.split}'; it has {counts}")
    keep = getattr(spec, "filter", None) or {}
    wanted = _filtered(questions, keep)
    if not wanted:
        raise DataError(f"{where}: no question of split '{spec.split}' fits data.filter {dict(keep)}")
    n = len(wanted) if spec.per_modality == "all" else int(spec.per_modality)
    return splits.stratified(wanted, n), splits.of_split(everything, "train") if spec.split != "train" else ()


def _split_file(spec: DataSpec) -> str | None:
    return getattr(spec, "split_file", None)


def _filtered(questions: Sequence[Question], keep: dict[str, Sequence[str]]) -> tuple[Question, ...]:
    for key, words in keep.items():
        names = {normalise(word) if key == "modality" else word for word in words}
        questions = [q for q in questions if getattr(q, key) in names]
    return tuple(questions)


def _checked(stamp: str, name: str, root: Path, choice: _Choice, progress: Progress | None) -> Dataset:
    """Look at every image that is asked about."""
    questions = choice.asked
    facts = inspect_files((q.image for q in questions), cache=image_cache(root), progress=progress)
    if not any(f.sha256 for f in facts.values()):
        raise DataError(
            f"{root}: none of {len(facts):,} images is there, e.g. {questions[0].image}. "
            "Question text alone can be audited, not run"
        )
    asked = tuple(replace(q, image_sha256=facts[q.image].sha256, image_error=facts[q.image].error) for q in questions)
    broken = tuple(Problem(path, 0, 0, "", f.error) for path, f in facts.items() if f.error)
    prior = hits_by_id(choice.train, asked)
    return Dataset(name, stamp, fingerprint(asked), asked, (*choice.problems, *broken), prior)
