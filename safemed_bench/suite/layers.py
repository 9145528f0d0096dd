"""A YAML file over what it extends, and values from outside over both: what suites and training configs share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import Problem, SuiteError, did_you_mean
from .document import Document, Key, Place, merge, parse_path, read

SHARE = Path("share", "safemed-bench")
"""Below sys.prefix: what pyproject.toml installs as data files."""


@dataclass(frozen=True, slots=True)
class Override:
    """A value from outside the file. `origin` is where the user wrote it: `--set`, `--seed`, `$SAFEMED_SEED`."""

    path: Key
    value: Any
    origin: str


@dataclass(frozen=True)
class Kind:
    """A kind of file: what it is called, where those are that ship, and how one is laid over its base."""

    word: str
    folder: Path
    over: Callable[[Document, Document], Document] = merge

    def shipped(self) -> dict[str, Path]:
        """Name -> file in `folder`: here, beside the package, or where a wheel puts them; the nearer one wins."""
        folders = (
            Path(sys.prefix) / SHARE / self.folder,
            Path(__file__).resolve().parents[2] / self.folder,
            self.folder,
        )
        return {p.stem: p for folder in folders for p in sorted(folder.glob("*.yaml"))}

    def find(self, reference: str, beside: Path | None = None) -> Path:
        """A path (also relative to `beside`), with or without .yaml, or a shipped name. Raises SuiteError."""
        written = Path(reference).expanduser()
        for candidate in (written, written.with_name(written.name + ".yaml")):
            at = candidate if beside is None else beside / candidate
            if at.is_file():
                return at
        shipped = self.shipped()
        if reference in shipped:
            return shipped[reference]
        close = did_you_mean(written.stem, [*shipped])
        raise SuiteError(
            [Problem(reference, 0, 0, "", f"no such {self.word}, neither a file nor a shipped name.{close}")]
        )

    def read(self, reference: str, env: Mapping[str, str], problems: list[Problem]) -> Document:
        """The file over everything it extends; its `name` is the file's own where it gives none, never inherited."""
        file = self.find(reference)
        document = self._over_bases(file, env, problems, ())
        document.value.setdefault("name", file.stem)
        return document

    def _over_bases(
        self, file: Path, env: Mapping[str, str], problems: list[Problem], below: tuple[Path, ...]
    ) -> Document:
        document = read(file, _shown(file), env, problems)
        reference = document.value.pop("extends", None)
        if reference is None:
            return document
        place = document.place(("extends",))
        chain = (*below, file.resolve())
        result = Document()
        for name in reference if isinstance(reference, list) else [reference]:
            base = self._base(name, file.parent, place, chain)
            inherited = self._over_bases(base, env, problems, chain)
            inherited.value.pop("name", None)
            result = self.over(result, inherited)
        return self.over(result, document)

    def _base(self, name: Any, beside: Path, place: Place, chain: tuple[Path, ...]) -> Path:
        if not isinstance(name, str):
            raise SuiteError([Problem(*place, "extends", f"must be a file or {self.word} name, not {name!r}")])
        try:
            base = self.find(name, beside)
        except SuiteError as error:
            raise SuiteError([Problem(*place, "extends", f"'{name}': {error.problems[0].message}")]) from error
        if base.resolve() in chain:
            ring = " -> ".join(p.name for p in (*chain[chain.index(base.resolve()) :], base))
            raise SuiteError([Problem(*place, "extends", f"goes in a circle: {ring}")])
        return base


def parse_sets(items: Sequence[str], problems: list[Problem]) -> list[Override]:
    """`key.path=value` with YAML values, as `--set` takes them."""
    result = []
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            problems.append(Problem("--set", 0, 0, item, "must be written key.path=value"))
            continue
        try:
            value = yaml.safe_load(text) if text else ""
        except yaml.YAMLError as error:
            what = getattr(error, "problem", None) or error
            problems.append(Problem("--set", 0, 0, key, f"the value is not YAML: {what}"))
            continue
        result.append(Override(parse_path(key.strip()), value, "--set"))
    return result


def apply(document: Document, overrides: Iterable[Override], problems: list[Problem]) -> None:
    """Put every override into the document, the later over the earlier."""
    for override in overrides:
        try:
            document.set(override.path, override.value, Place(override.origin))
        except KeyError as error:
            problems.append(Problem(override.origin, 0, 0, ".".join(map(str, override.path)), error.args[0]))


def in_order(problems: Iterable[Problem]) -> list[Problem]:
    """Each problem once, by file and place."""
    return sorted(set(problems), key=lambda p: (p.file, p.line, p.column, p.key))


def _shown(path: Path) -> str:
    """Relative to the working folder where it lies in it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
