"""What every data set gives: questions, their fingerprint, and the stamp that is printed on every result."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..core.errors import Problem
from ..core.types import Question

if TYPE_CHECKING:
    import datasets as hf

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Dataset:
    """Questions ready to be asked.

    stamp: the words that stand on every table, e.g. "OmniMedVQA at mini, split test (file)".
    fingerprint: `fingerprint(questions)`, 32 hex digits.
    problems: all that is wrong with the data; a question whose image is missing or broken is still in `questions`,
    with `image_error` set, and a record that is no usable question stands only here.
    """

    name: str
    stamp: str
    fingerprint: str
    questions: tuple[Question, ...]
    problems: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.questions)

    def to_hf(self) -> hf.Dataset:
        """The same questions as a Hugging Face `datasets.Dataset`; `image` decodes to a PIL image."""
        return to_hf(self.questions)


def fingerprint(questions: Iterable[Question]) -> str:
    """32 hex digits over what is asked and of which image; the order of the questions does not matter."""
    rows = sorted(
        json.dumps([q.id, q.image_sha256, q.question, q.options, q.answer], ensure_ascii=False) for q in questions
    )
    return hashlib.blake2b("\n".join(rows).encode(), digest_size=16).hexdigest()


def to_hf(questions: Iterable[Question]) -> hf.Dataset:
    """Questions as rows of one fixed schema, 2 to 4 options in one list; images that cannot be read are None."""
    import datasets as hf

    text = hf.Value("string")
    names = ("id", "question", "modality", "question_type", "source", "split", "image_sha256", "image_error")
    features = hf.Features(
        {name: text for name in names} | {"image": hf.Image(), "options": hf.List(text), "answer": hf.Value("int64")}
    )
    rows = [
        {name: getattr(q, name) for name in names}
        | {"image": None if q.image_error else q.image, "options": list(q.options), "answer": q.answer}
        for q in questions
    ]
    return hf.Dataset.from_list(rows, features=features)


def hash_order(*parts: object) -> int:
    """A 64-bit number that depends on every part: how questions and images are ordered and split, always."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def cache_folder() -> Path:
    """Where generated sets and image hashes are kept: $SAFEMED_CACHE, else ~/.cache/safemed-bench."""
    return Path(os.environ.get("SAFEMED_CACHE") or Path.home() / ".cache" / "safemed-bench").expanduser()
