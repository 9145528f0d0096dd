"""Which questions are for training, which for choosing, which for the reported table.

Every scheme is a function of the data alone: no order of files, no machine and no random state enters. Where a scheme
knows train and test only, validation is a tenth of the train images, picked by image content, so that one image is
never in both. An image is told by the sha256 of its file, so that copies under other names are the same image; where
there is no file, by its path.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from ..core.errors import DataError, Problem, UsageError, did_you_mean
from ..core.seeds import derive_seed
from ..core.types import Question
from .base import SPLITS, Contents, Entry, Split
from .images import FileFacts, Progress, image_cache, inspect_files
from .modalities import rank
from .omnimedvqa import split_word
from .rebalance import rebalance

SPLIT_FILE = "splits.json"
SCHEMES = ("auto", "file", "record", "medr1", "image_disjoint", "rebalanced")
TEST_SHARE, VALIDATION_SHARE = 0.2, 0.1
"""Share of test in all, and of validation in what is left."""

Identity = Callable[[Entry], str]


@dataclass
class ImageIdentity:
    """The identity of an entry's image: its file's sha256, its path where there is no file. Hashes all at first use."""

    contents: Contents
    progress: Progress | None = None
    _facts: dict[str, FileFacts] | None = None

    def __call__(self, entry: Entry) -> str:
        if self._facts is None:
            paths = (e.question.image for e in self.contents.entries)
            cache = image_cache(self.contents.root)
            self._facts = inspect_files(paths, decode=False, cache=cache, progress=self.progress)
        return self._facts[entry.question.image].sha256 or entry.image_key


def resolve(contents: Contents, scheme: str, split_file: str | None = None) -> str:
    """What `auto` means for these data: `file` where a split file is named or splits.json lies there, the records' own
    split where all have one, else `image_disjoint`. Any other known scheme is itself."""
    if scheme not in SCHEMES:
        raise UsageError(f"unknown split scheme '{scheme}'.{did_you_mean(scheme, SCHEMES)}")
    if scheme != "auto":
        return scheme
    if split_file or (contents.root / SPLIT_FILE).is_file():
        return "file"
    if contents.entries and all(entry.split for entry in contents.entries):
        return "record"
    return "image_disjoint"


def assign(
    contents: Contents,
    scheme: str = "auto",
    identity: Identity | None = None,
    *,
    wanted: str | None = None,
    split_file: str | None = None,
    seed: int = 0,
) -> tuple[tuple[Question, ...], tuple[Problem, ...]]:
    """All questions with their split set, "" where the scheme gives none; and what does not fit.

    `file`: the lists of question ids in `split_file`, below the root, by default splits.json. `record`: each record's
    own `split`. `medr1`: by question, from Med-R1's own marks; data without any are split as Med-R1 does, a fifth of
    the questions by hash. `image_disjoint`: by image content, 72/8/20. `rebalanced`: `auto`'s split with the
    distractors redrawn (rebalance.py); `seed` is theirs. Where only `wanted="test"` is, validation is left in train,
    and no train image need be read.
    """
    identity = identity or ImageIdentity(contents)
    name = resolve(contents, scheme, split_file)
    base = resolve(contents, "auto", split_file) if name == "rebalanced" else name
    problems: tuple[Problem, ...] = ()
    if base == "file":
        words, problems = _from_file(contents, contents.root / (split_file or SPLIT_FILE))
    elif base == "record":
        words = [entry.split for entry in contents.entries]
    elif base == "medr1":
        words, problems = _medr1(contents)
    else:
        words = [_by_image(identity(entry)) for entry in contents.entries]
    if wanted != "test":
        words = _with_validation(contents.entries, words, identity)
    pairs = zip(contents.entries, words, strict=True)
    questions = tuple(replace(entry.question, split=word) for entry, word in pairs)
    if name == "rebalanced":
        questions = rebalance(questions, seed)
    return questions, problems


def _below(share: float, *parts: object) -> bool:
    return derive_seed(*parts) < share * 2**63


def _by_question(entry: Entry) -> str:
    return "test" if _below(TEST_SHARE, "medr1", entry.question.id) else "train"


def _medr1(contents: Contents) -> tuple[list[str], tuple[Problem, ...]]:
    """Med-R1's marks. Beside marked questions an unmarked one has no split: it may well be of Med-R1's train set."""
    if not any(entry.medr1 for entry in contents.entries):
        return [_by_question(entry) for entry in contents.entries], ()
    unmarked = [entry.question.id for entry in contents.entries if not entry.medr1]
    words = [entry.medr1 for entry in contents.entries]
    if not unmarked:
        return words, ()
    message = f"{len(unmarked):,} questions have no mark of Med-R1's split and are left out, e.g. {unmarked[0]!r}"
    return words, (Problem(str(contents.root), 0, 0, "", message),)


def _by_image(image: str) -> str:
    return "test" if _below(TEST_SHARE, "image_disjoint", image) else "train"


def _with_validation(entries: Sequence[Entry], words: list[str], identity: Identity) -> list[str]:
    """Carve validation from train where there is none."""
    if "validation" in words or "train" not in words:
        return words
    return [
        "validation" if word == "train" and _below(VALIDATION_SHARE, "validation", identity(entry)) else word
        for entry, word in zip(entries, words, strict=True)
    ]


def _from_file(contents: Contents, path: Path) -> tuple[list[str], tuple[Problem, ...]]:
    split_of: dict[str, str] = {}
    problems = []
    for key, names in _read_lists(path).items():
        word = split_word(key)
        twice = [n for n in names if split_of.get(n, word) != word]
        if twice:
            raise DataError(f"{path}: {len(twice)} questions are in two splits, e.g. {twice[0]!r}")
        split_of.update(dict.fromkeys(names, word))
    known = {entry.question.id for entry in contents.entries}
    for name in sorted(set(split_of) - known):
        problems.append(Problem(str(path), 0, 0, name, "no usable question has this id"))
    left_out = [entry.question.id for entry in contents.entries if entry.question.id not in split_of]
    if left_out:
        message = f"{len(left_out)} questions are in no split and left out, e.g. {left_out[0]!r}"
        problems.append(Problem(str(path), 0, 0, "", message))
    return [split_of.get(entry.question.id, "") for entry in contents.entries], tuple(problems)


def _read_lists(path: Path) -> dict[str, list[str]]:
    try:
        value = json.loads(path.read_text("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}  not valid JSON: {error.msg}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). The `file` scheme needs it") from error
    lists = {k: v for k, v in value.items() if split_word(k)} if isinstance(value, dict) else {}
    if not {"train", "test"} & {split_word(k) for k in lists} or not all(isinstance(v, list) for v in lists.values()):
        raise DataError(f"{path}: expected lists of question ids under `train` and `test`")
    return {k: [str(name) for name in v] for k, v in lists.items()}


def stratified(questions: Iterable[Question], per_modality: int, seed: int = 0) -> tuple[Question, ...]:
    """At most `per_modality` questions of each modality, in the proportions of its question types.

    In a fixed order, by hash, that goes round the modalities: any beginning of it is balanced, and a larger number only
    adds to a smaller one's questions. `per_modality` < 1 gives none.
    """
    by_modality: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_modality[question.modality].append(question)
    ranked = [
        (place, rank(modality), question)
        for modality, held in by_modality.items()
        for place, question in enumerate(_spread(held, seed)[: max(per_modality, 0)])
    ]
    return tuple(question for _, _, question in sorted(ranked, key=lambda row: row[:2]))


def _spread(questions: Sequence[Question], seed: int) -> list[Question]:
    """One modality's questions, types mixed evenly: the i-th of n of a type stands at (i + ½) / n of the way."""

    def by_hash(question: Question) -> int:
        return derive_seed("stratified", seed, question.id)

    places = []
    ordered = sorted(questions, key=lambda q: (q.question_type, by_hash(q)))
    for kind, group in groupby(ordered, key=lambda q: q.question_type):
        held = list(group)
        places += [((i + 0.5) / len(held), kind, q) for i, q in enumerate(held)]
    return [q for _, _, q in sorted(places, key=lambda place: place[:2])]


def of_split(questions: Iterable[Question], split: Split | str) -> tuple[Question, ...]:
    """The questions of one split. UsageError on an unknown one."""
    if split not in SPLITS:
        raise UsageError(f"unknown split '{split}'.{did_you_mean(split, SPLITS)}")
    return tuple(question for question in questions if question.split == split)
