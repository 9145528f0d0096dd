"""What every data set gives: questions, their fingerprint, and the stamp that is printed on every result."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..core.errors import Problem
from ..core.types import Question

if TYPE_CHECKING:
    import datasets as hf

Layout = Literal["omnimedvqa", "medr1", "text", "table"]
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Dataset:
    """Questions ready to be asked.

    stamp: the words that stand on every table, e.g. "OmniMedVQA at mini, split test (file)".
    fingerprint: `fingerprint(questions)`, 32 hex digits.
    problems: all that is wrong with the data; a question whose image is missing or broken is still in `questions`,
    with `image_error` set, and a record that is no usable question stands only here.
    text_prior: question id -> whether the text-only lookup (prior.py) answers it; {} where there is no train split to
    learn from, or where the questions themselves are of it. It says nothing of what is asked, so no fingerprint has it.
    """

    name: str
    stamp: str
    fingerprint: str
    questions: tuple[Question, ...]
    problems: tuple[Problem, ...] = ()
    text_prior: Mapping[str, bool] = field(default_factory=dict, hash=False)

    def __len__(self) -> int:
        return len(self.questions)

    def to_hf(self) -> hf.Dataset:
        """The same questions as a Hugging Face `datasets.Dataset`; `image` decodes to a PIL image."""
        from .arrow import to_hf

        return to_hf(self.questions)


@dataclass(frozen=True, slots=True)
class Entry:
    """A question as it stands in a file, not yet split; its image is not looked at.

    split, medr1: what the record itself says of the split, and of Med-R1's split; "" where it says nothing.
    image_key: the image's path below the root, or as the file gives it; the same wherever the set lies.
    modality_key: the key the modality stood under. raw_modality: as spelled in the file.
    """

    question: Question
    image_key: str
    split: str = ""
    medr1: str = ""
    modality_key: str = "modality_type"
    raw_modality: str = ""


@dataclass(frozen=True)
class Contents:
    """All that a folder holds. `problems`: files and records that are no usable questions, and what else is odd."""

    root: Path
    layout: Layout
    entries: tuple[Entry, ...]
    problems: tuple[Problem, ...]
    files: tuple[str, ...] = ()
    records: int = 0


def fingerprint(questions: Iterable[Question]) -> str:
    """32 hex digits over what is asked and of which image; the order of the questions does not matter."""
    rows = sorted(
        json.dumps([q.id, q.image_sha256, q.question, q.options, q.answer], ensure_ascii=False) for q in questions
    )
    return hashlib.blake2b("\n".join(rows).encode(), digest_size=16).hexdigest()


def cache_folder() -> Path:
    """Where generated sets and image hashes are kept: $SAFEMED_CACHE, else ~/.cache/safemed-bench."""
    return Path(os.environ.get("SAFEMED_CACHE") or Path.home() / ".cache" / "safemed-bench").expanduser()
