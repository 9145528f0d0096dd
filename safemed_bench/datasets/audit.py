"""What a data folder holds and what is wrong with it: `safemed-bench data check`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from ..core.errors import Problem
from ..core.types import Question
from . import splits
from .base import SPLITS, Contents, Entry
from .images import FileFacts, Progress, image_cache, inspect_files
from .modalities import is_known, rank
from .omnimedvqa import read
from .prior import letter_hits, lookup_hits

SHOWN = 10
"""Problems that `render` prints; all of them are in `to_dict`."""


@dataclass(frozen=True)
class SchemeAudit:
    """One way to split these data.

    by_modality: questions per split for each modality. shared_by_path, shared_by_content: distinct images with
    questions in test and also in train or validation, told by file name and by file content. shared_share: part of the
    test images that these are, by content. blind: accuracy in [0, 1] on test of the text-only lookup learnt on train
    (prior.Lookup), blind_told of the same when it is also told the modality, blind_letter of the commonest letter,
    blind_by_modality of the plain lookup; None where train or test is empty. left_out: questions in no split.
    """

    scheme: str
    questions: dict[str, int]
    left_out: int
    by_modality: dict[str, dict[str, int]]
    shared_by_path: int
    shared_by_content: int
    shared_share: float
    chance: float
    blind: float | None
    blind_told: float | None
    blind_letter: float | None
    blind_by_modality: dict[str, float]


@dataclass(frozen=True)
class Audit:
    """All counts are of usable questions unless they say records. `images` are distinct paths, `distinct_images`
    distinct contents, `duplicate_images` the difference over the files that are there. `images_absent` is set where no
    image is there at all: then each is not named one by one. `auto` is the scheme that `auto` stands for, and the one
    whose problems count; how many questions another scheme leaves out is in its `left_out`."""

    root: str
    layout: str
    files: tuple[str, ...]
    records: int
    questions: int
    images: int
    images_found: int
    images_absent: bool
    images_broken: int
    distinct_images: int
    duplicate_images: int
    chance: float
    by_modality: dict[str, int]
    images_by_modality: dict[str, int]
    chance_by_modality: dict[str, float]
    by_type: dict[str, int]
    by_options: dict[str, int]
    types_by_modality: dict[str, dict[str, int]]
    options_by_modality: dict[str, dict[str, int]]
    by_source: dict[str, int]
    repeated_options: int
    comma_options: int
    modality_key: int
    unknown_modalities: dict[str, int]
    auto: str
    schemes: tuple[SchemeAudit, ...]
    problems: tuple[Problem, ...]

    @property
    def usable(self) -> bool:
        """Whether a run can use every question: no broken file, record or image."""
        return not self.problems and not self.images_absent

    def scheme(self, name: str) -> SchemeAudit:
        return next(s for s in self.schemes if s.scheme == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self) | {"usable": self.usable}


def audit(root: str | Path, *, progress: Progress | None = None) -> Audit:
    """Read all questions and every image below `root` and count. DataError where there is nothing to read at all."""
    contents = read(root, strict=False)
    entries = contents.entries
    facts = _inspect(contents, progress)
    found = {path: f for path, f in facts.items() if f.sha256}
    questions = [entry.question for entry in entries]
    hashes = {f.sha256 for f in found.values()}
    schemes, scheme_problems = _schemes(contents, facts)
    return Audit(
        root=str(contents.root),
        layout=contents.layout,
        files=contents.files,
        records=contents.records,
        questions=len(questions),
        images=len(facts),
        images_found=len(found),
        images_absent=bool(questions) and not found,
        images_broken=sum(bool(f.error) for f in found.values()),
        distinct_images=len(hashes),
        duplicate_images=len(found) - len(hashes),
        chance=_mean(q.chance for q in questions),
        by_modality=_counts((q.modality for q in questions), rank),
        images_by_modality=_counts(dict((q.image, q.modality) for q in questions).values(), rank),
        chance_by_modality=_means((q.modality, q.chance) for q in questions),
        by_type=_counts(q.question_type for q in questions),
        by_options=_counts((str(len(q.options)) for q in questions), str),
        types_by_modality=_crossed((q.modality, q.question_type) for q in questions),
        options_by_modality=_crossed(((q.modality, str(len(q.options))) for q in questions), str),
        by_source=_counts(q.source for q in questions),
        repeated_options=sum(len({o.casefold() for o in q.options}) < len(q.options) for q in questions),
        comma_options=sum(any("," in o for o in q.options) for q in questions),
        modality_key=sum(entry.modality_key == "modality" for entry in entries),
        unknown_modalities=_counts(q.modality for q in questions if not is_known(q.modality)),
        auto=splits.resolve(contents, "auto"),
        schemes=schemes,
        problems=(*contents.problems, *scheme_problems, *(_image_problems(facts) if found else ())),
    )


def _inspect(contents: Contents, progress: Progress | None) -> dict[str, FileFacts]:
    paths = {entry.question.image for entry in contents.entries}
    return inspect_files(paths, cache=image_cache(contents.root), progress=progress)


def _image_problems(facts: dict[str, FileFacts]) -> list[Problem]:
    return [Problem(path, 0, 0, "", f.error) for path, f in facts.items() if f.error]


def _schemes(contents: Contents, facts: dict[str, FileFacts]) -> tuple[tuple[SchemeAudit, ...], tuple[Problem, ...]]:
    """`auto`'s scheme, `medr1` where the data carry its marks, and the two that any data can have."""

    def identity(entry: Entry) -> str:
        return facts[entry.question.image].sha256 or entry.image_key

    content_of = {entry.question.id: identity(entry) for entry in contents.entries}
    marked = ["medr1"] if any(entry.medr1 for entry in contents.entries) else []
    names = [splits.resolve(contents, "auto"), *marked, "image_disjoint", "rebalanced"]
    audits, problems = [], {}
    for name in dict.fromkeys(names):
        questions, problems[name] = splits.assign(contents, name, identity)
        audits.append(_audit_scheme(name, questions, content_of))
    return tuple(audits), problems[names[0]]


def _audit_scheme(name: str, questions: Sequence[Question], content_of: dict[str, str]) -> SchemeAudit:
    test = [q for q in questions if q.split == "test"]
    train = [q for q in questions if q.split == "train"]
    seen = [q for q in questions if q.split in ("train", "validation")]
    shared = {content_of[q.id] for q in test} & {content_of[q.id] for q in seen}
    counts: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(SPLITS, 0))
    for question in sorted(questions, key=lambda q: rank(q.modality)):
        if question.split:
            counts[question.modality][question.split] += 1
    hits = lookup_hits(train, test) if train and test else []
    return SchemeAudit(
        scheme=name,
        questions={split: sum(q.split == split for q in questions) for split in SPLITS},
        left_out=sum(not q.split for q in questions),
        by_modality=dict(counts),
        shared_by_path=len({q.image for q in test} & {q.image for q in seen}),
        shared_by_content=len(shared),
        shared_share=len(shared) / max(1, len({content_of[q.id] for q in test})),
        chance=_mean(q.chance for q in test),
        blind=_mean(hits) if hits else None,
        blind_told=_mean(lookup_hits(train, test, modality=True)) if hits else None,
        blind_letter=_mean(letter_hits(train, test)) if hits else None,
        blind_by_modality=_means((q.modality, hit) for q, hit in zip(test, hits, strict=False)),
    )


def _counts(names: Iterable[str], key: Callable[[str], Any] | None = None) -> dict[str, int]:
    """Names with their counts, commonest first or in the order of `key`."""
    counts = Counter(names)
    return {name: counts[name] for name in sorted(counts, key=key or (lambda n: (-counts[n], n)))}


def _crossed(pairs: Iterable[tuple[str, str]], key: Callable[[str], Any] | None = None) -> dict[str, dict[str, int]]:
    """Counts of pairs, row by row in the order of modalities; every row has every column, ordered as `_counts` does."""
    held = list(pairs)
    counts = Counter(held)
    rows, columns = _counts((row for row, _ in held), rank), _counts((column for _, column in held), key)
    return {row: {column: counts[row, column] for column in columns} for row in rows}


def _mean(values: Iterable[float]) -> float:
    held = list(values)
    return sum(held) / len(held) if held else 0.0


def _means(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for name, value in pairs:
        groups[name].append(value)
    return {name: _mean(groups[name]) for name in sorted(groups, key=rank)}


def render(result: Audit) -> RenderableType:
    """The audit for a terminal: modalities, splits, what is wrong."""
    parts: list[RenderableType] = [_headline(result), _modality_table(result), _kind_table(result)]
    parts.append(_scheme_table(result))
    parts.append(
        f"Repeated options {result.repeated_options:,} · commas in options {result.comma_options:,} · "
        f"records with the key `modality` {result.modality_key:,} · duplicate images {result.duplicate_images:,}"
    )
    if result.images_absent:
        parts.append(f"No image is there: none of {result.images:,} below {result.root}. Text can be audited, not run.")
    parts += [f"  {problem}" for problem in result.problems[:SHOWN]]
    if len(result.problems) > SHOWN:
        parts.append(f"  … and {len(result.problems) - SHOWN:,} more (all with --json)")
    parts.append(f"{len(result.problems):,} problems" if result.problems else "No broken file, record or image.")
    return Group(*parts)


def _headline(result: Audit) -> str:
    return (
        f"{result.root} ({result.layout}): {result.questions:,} questions of {result.records:,} records, "
        f"{result.images:,} images ({result.images_found:,} found, {result.images_broken:,} broken), "
        f"chance {result.chance:.3f}, scheme auto = {result.auto}"
    )


def _modality_table(result: Audit) -> Table:
    auto = result.scheme(result.auto)
    table = Table("modality", title=f"Questions per modality, split {result.auto}", title_justify="left")
    for name in ("questions", "images", *SPLITS, "chance", "blind"):
        table.add_column(name, justify="right")
    for modality, n in result.by_modality.items():
        held = auto.by_modality.get(modality, {})
        table.add_row(
            modality,
            f"{n:,}",
            f"{result.images_by_modality[modality]:,}",
            *(f"{held.get(split, 0):,}" for split in SPLITS),
            f"{result.chance_by_modality[modality]:.3f}",
            _share(auto.blind_by_modality.get(modality)),
        )
    return table


def _kind_table(result: Audit) -> Table:
    """Modality against question type, and against the number of options."""
    table = Table("modality", title="Questions per modality, question type and number of options", title_justify="left")
    for name in (*result.by_type, *(f"{n} options" for n in result.by_options)):
        table.add_column(name, justify="right")

    def add(name: str, types: dict[str, int], options: dict[str, int]) -> None:
        table.add_row(name, *(f"{n:,}" for n in (*types.values(), *options.values())))

    for modality, types in result.types_by_modality.items():
        add(modality, types, result.options_by_modality[modality])
    table.add_section()
    add("all", result.by_type, result.by_options)
    return table


_SCHEMES_TITLE = "Ways to split (shared: test images also in train; blind: text-only lookup; told: with the modality)"


def _scheme_table(result: Audit) -> Table:
    table = Table("scheme", title=_SCHEMES_TITLE, title_justify="left")
    for name in (*SPLITS, "left out", "shared", "of test", "chance", "blind", "told", "letter"):
        table.add_column(name, justify="right")
    for s in result.schemes:
        table.add_row(
            s.scheme,
            *(f"{s.questions[split]:,}" for split in SPLITS),
            f"{s.left_out:,}",
            f"{s.shared_by_content:,}",
            f"{s.shared_share:.1%}",
            f"{s.chance:.3f}",
            _share(s.blind),
            _share(s.blind_told),
            _share(s.blind_letter),
        )
    return table


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
