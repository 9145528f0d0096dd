"""Training and validation questions with their canvases in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import UsageError, did_you_mean
from ..core.types import LETTERS, Question
from ..datasets.base import cache_folder
from .config import DataConfig


@dataclass(frozen=True)
class Corpus:
    """questions[i] asks about images[image_of[i]] ((n, H, W, 3) uint8); rationales[i] is its chain of thought and
    captions[i] says what its image shows. `fingerprint` changes whenever the questions or images do."""

    questions: tuple[Question, ...]
    rationales: tuple[str, ...]
    captions: tuple[str, ...]
    images: NDArray[np.uint8]
    image_of: NDArray[np.int64]
    words: tuple[str, ...]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.questions)

    def rows_of(self, question_types: Sequence[str]) -> NDArray[np.int64]:
        """Rows of the questions of these types, in order; all where none is named. UsageError on an unknown one."""
        if unknown := [name for name in question_types if name not in self._rows]:
            raise UsageError(f"no question of type '{unknown[0]}'.{did_you_mean(unknown[0], list(self._rows))}")
        if not question_types:
            return np.arange(len(self))
        return np.sort(np.concatenate([self._rows[name] for name in dict.fromkeys(question_types)]))

    @cached_property
    def _rows(self) -> dict[str, NDArray[np.int64]]:
        """Rows by question type."""
        types = np.array([question.question_type for question in self.questions])
        return {str(name): np.flatnonzero(types == name) for name in np.unique(types)}

    @cached_property
    def _of_modality(self) -> dict[str, NDArray[np.int64]]:
        """Rows by modality."""
        names = np.array([question.modality for question in self.questions])
        return {str(name): np.flatnonzero(names == name) for name in np.unique(names)}

    def another_image(self, row: int, rng: np.random.Generator) -> int:
        """A random row that asks about another image of the same modality; of any, where the modality has but one."""
        among = self._of_modality[self.questions[row].modality]
        others = among[self.image_of[among] != self.image_of[row]]
        others = others if len(others) else np.flatnonzero(self.image_of != self.image_of[row])
        return int(rng.choice(others)) if len(others) else row

    def canvases(self, rows: Sequence[int] | NDArray[np.int64]) -> NDArray[np.uint8]:
        """(len(rows), 3, H, W) uint8."""
        return np.ascontiguousarray(self.images[self.image_of[np.asarray(rows)]].transpose(0, 3, 1, 2))


def load_corpus(config: DataConfig, split: str, cache: Path | None = None) -> Corpus:
    """The questions of a split, in a fixed order; phantom images are rendered once and kept in the cache folder."""
    if config.name == "phantom":
        return _phantom(config, split, cache or cache_folder())
    return _folder(config, split)


def _phantom(config: DataConfig, split: str, cache: Path) -> Corpus:
    from ..datasets.phantom import WORDS, PhantomSpec, generate_arrays, index_of, rationale

    spec = PhantomSpec.from_mapping({"size": config.resolution, **config.phantom})
    count = config.images if split == "train" else spec.count(split)
    name = cache / f"phantom-arrays-{spec.fingerprint()}-{split}-{count}"
    if not (done := name.with_suffix(".json")).is_file():
        cache.mkdir(parents=True, exist_ok=True)
        images, records = generate_arrays(spec, split, count)
        scratch = name.with_suffix(f".{os.getpid()}.npy")
        np.save(scratch, images)
        scratch.replace(name.with_suffix(".npy"))
        scratch.write_text(json.dumps(records))
        scratch.replace(done)
    records = json.loads(done.read_text())
    return Corpus(
        questions=tuple(_question(r) for r in records),
        rationales=tuple(rationale(r["facts"], r) for r in records),
        captions=tuple(
            rationale(r["facts"], r | {"question_type": "Disease Diagnosis"}).split(" . ")[0] for r in records
        ),
        images=np.load(name.with_suffix(".npy"), mmap_mode="r"),
        image_of=np.array([index_of(r) for r in records]),
        words=tuple(w for w in WORDS if w.isalpha() and len(w) > 1),
        fingerprint=spec.fingerprint(),
    )


def _question(record: dict[str, Any]) -> Question:
    options = tuple(record[k] for k in (f"option_{letter}" for letter in LETTERS) if k in record)
    return Question(
        id=record["question_id"],
        image=record["image_path"],
        image_sha256="",
        question=record["question"],
        options=options,
        answer=LETTERS.index(record["gt_letter"]),
        modality=record["dataset"].removeprefix("Phantom-"),
        question_type=record["question_type"],
        source=record["dataset"],
        split=record["split"],
    )


def _folder(config: DataConfig, split: str) -> Corpus:
    from ..datasets import load
    from ..datasets.images import load_canvas
    from ..datasets.phantom import WORDS

    spec = SimpleNamespace(
        name="omnimedvqa",
        root=config.root,
        split=split,
        scheme=config.scheme,
        split_file=config.split_file,
        per_modality="all",
        resolution=config.resolution,
        fit=config.fit,
        phantom={},
    )
    dataset = load(spec)
    questions = tuple(q for q in dataset.questions if not q.image_error)
    paths = sorted({q.image for q in questions})
    row = {path: i for i, path in enumerate(paths)}
    images = np.stack([load_canvas(path, config.resolution, config.fit) for path in paths])
    return Corpus(
        questions=questions,
        rationales=tuple(stated_rationale(q) for q in questions),
        captions=tuple(stated_rationale(q).split(" . ")[0] for q in questions),
        images=images,
        image_of=np.array([row[q.image] for q in questions]),
        words=tuple(w for w in WORDS if w.isalpha() and len(w) > 1),
        fingerprint=dataset.fingerprint,
    )


def stated_rationale(question: Question) -> str:
    """A chain of thought for data without one, in the phantom's form: what kind of image, then answer and letter."""
    answer = question.options[question.answer]
    return f"this image is {question.modality} . so {answer} {LETTERS[question.answer]}"


def shuffled_options(question: Question, rng: np.random.Generator) -> Question:
    """The same question with its options in another order, so that letters carry no prior."""
    order = rng.permutation(len(question.options))
    options = tuple(question.options[i] for i in order)
    return replace(question, options=options, answer=int(np.flatnonzero(order == question.answer)[0]))


def augmented(canvas: NDArray[np.uint8], rng: np.random.Generator, reach: int = 4) -> NDArray[np.uint8]:
    """Each of the (B, 3, H, W) images flipped left-right with probability 1/2 and shifted by up to `reach` pixels."""
    out = np.zeros_like(canvas)
    _, _, height, width = canvas.shape
    for i, image in enumerate(canvas):
        if rng.random() < 0.5:
            image = image[:, :, ::-1]
        dy, dx = (int(d) for d in rng.integers(-reach, reach + 1, size=2))
        ys, xs = slice(max(dy, 0), height + min(dy, 0)), slice(max(dx, 0), width + min(dx, 0))
        yt, xt = slice(max(-dy, 0), height + min(-dy, 0)), slice(max(-dx, 0), width + min(-dx, 0))
        out[i, :, ys, xs] = image[:, yt, xt]
    return out
