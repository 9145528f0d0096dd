"""From a YAML file to validated suites.

Precedence: command line > --set > SAFEMED_* > suite > extends > defaults. All that is wrong is said at once.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..core.errors import Problem, SuiteError, did_you_mean
from .checks import name_problems, schema_problems
from .document import Document, Key, Place, merge, parse_path, read
from .schema import Suite

ENVIRONMENT: Mapping[str, str] = {
    "SAFEMED_OMNIMEDVQA": "data.root",
    "SAFEMED_DEVICE": "run.device",
    "SAFEMED_WORKERS": "run.workers",
    "SAFEMED_BATCH_SIZE": "run.batch_size",
    "SAFEMED_SEED": "run.seed",
    "SAFEMED_DTYPE": "run.dtype",
    "SAFEMED_OUTPUT": "run.output",
}
"""Environment variable -> the key it sets, where it is set and not empty."""

EPS, HEADLINE = ("threat", "eps"), ("threat", "headline")


@dataclass(frozen=True, slots=True)
class Override:
    """A value from outside the file. `origin` is where the user wrote it: `--set`, `--seed`, `$SAFEMED_SEED`."""

    path: Key
    value: Any
    origin: str


def load_suite(
    path: str | Path,
    overrides: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    flags: Sequence[Override] = (),
) -> Suite:
    """The one suite in a file. Raises SuiteError with every problem, also where the file sweeps over several."""
    suites = load_suites(path, overrides, env, flags)
    if len(suites) > 1:
        raise SuiteError([Problem(str(path), 0, 0, "sweep", f"gives {len(suites)} suites where one is wanted")])
    return suites[0]


def load_suites(
    path: str | Path,
    overrides: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    flags: Sequence[Override] = (),
) -> list[Suite]:
    """The suites of a file or shipped name: one, or one for each point of its `sweep`.

    `overrides` are `key.path=value` with YAML values; `flags` come after them. Raises SuiteError with every problem.
    """
    env = os.environ if env is None else env
    problems: list[Problem] = []
    file = find_suite(str(path))
    document = _with_bases(file, env, problems, ())
    document.value.setdefault("name", file.stem)
    outside = [*_from_environment(env), *_from_set(overrides, problems), *flags]
    axes = _axes(document, [override.path for override in outside], problems)
    _apply(document, outside, problems)
    suites = [_validated(variant, problems) for variant in _variants(document, axes, problems)]
    if problems:
        raise SuiteError(sorted(set(problems), key=lambda p: (p.file, p.line, p.column, p.key)))
    return [suite for suite in suites if suite is not None]


def dump_suite(suite: Suite) -> str:
    """YAML that loads as the same suite; what a run keeps as its resolved suite."""
    return yaml.safe_dump(suite.to_dict(), sort_keys=False, allow_unicode=True, width=110)


def suite_folders() -> list[Path]:
    """Where suites are looked up by name: `suites/` here, then beside the package."""
    return [Path("suites"), Path(__file__).resolve().parents[2] / "suites"]


def shipped_suites() -> dict[str, Path]:
    """Name -> file of every suite in the suite folders; the nearer folder wins."""
    return {p.stem: p for folder in reversed(suite_folders()) for p in sorted(folder.glob("*.yaml"))}


def find_suite(reference: str, beside: Path | None = None) -> Path:
    """A path (also relative to `beside`), with or without .yaml, or a shipped name. Raises SuiteError."""
    written = Path(reference).expanduser()
    for candidate in (written, written.with_name(written.name + ".yaml")):
        at = candidate if beside is None else beside / candidate
        if at.is_file():
            return at
    shipped = shipped_suites()
    if reference in shipped:
        return shipped[reference]
    close = did_you_mean(written.stem, [*shipped])
    raise SuiteError([Problem(reference, 0, 0, "", f"no such suite, neither a file nor a shipped name.{close}")])


def _with_bases(file: Path, env: Mapping[str, str], problems: list[Problem], below: tuple[Path, ...]) -> Document:
    """The file over everything it extends. A suite's name is its own: it is not inherited."""
    document = read(file, _shown(file), env, problems)
    reference = document.value.pop("extends", None)
    if reference is None:
        return document
    place = document.place(("extends",))
    chain = (*below, file.resolve())
    result = Document()
    for name in reference if isinstance(reference, list) else [reference]:
        if not isinstance(name, str):
            raise SuiteError([Problem(*place, "extends", f"must be a file or suite name, not {name!r}")])
        try:
            base = find_suite(name, file.parent)
        except SuiteError as error:
            raise SuiteError([Problem(*place, "extends", f"'{name}': {error.problems[0].message}")]) from error
        if base.resolve() in chain:
            ring = " -> ".join(p.name for p in (*chain[chain.index(base.resolve()) :], base))
            raise SuiteError([Problem(*place, "extends", f"goes in a circle: {ring}")])
        inherited = _with_bases(base, env, problems, chain)
        inherited.value.pop("name", None)
        result = merge(result, inherited)
    threat = document.value.get("threat")
    if isinstance(threat, dict) and "eps" in threat:
        result.drop(HEADLINE)  # it belonged to the other list of eps
    return merge(result, document)


def _from_environment(env: Mapping[str, str]) -> Iterable[Override]:
    return [Override(parse_path(key), env[name], f"${name}") for name, key in ENVIRONMENT.items() if env.get(name)]


def _from_set(items: Sequence[str], problems: list[Problem]) -> list[Override]:
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


def _apply(document: Document, overrides: Sequence[Override], problems: list[Problem]) -> None:
    paths = [override.path for override in overrides]
    if EPS in paths and HEADLINE not in paths:
        document.drop(HEADLINE)
    for override in overrides:
        try:
            document.set(override.path, override.value, Place(override.origin))
        except KeyError as error:
            problems.append(Problem(override.origin, 0, 0, ".".join(map(str, override.path)), error.args[0]))


def _axes(document: Document, fixed: Sequence[Key], problems: list[Problem]) -> dict[str, list[Any]]:
    """The sweep's key -> values, without the keys that were given a value from outside."""
    sweep = document.value.pop("sweep", None) or {}
    if not isinstance(sweep, dict):
        problems.append(Problem(*document.place(("sweep",)), "sweep", "must be a mapping of key paths to lists"))
        return {}
    axes = {}
    for key, values in sweep.items():
        if not isinstance(values, list) or not values:
            place = document.place(("sweep", key))
            problems.append(Problem(*place, f"sweep.{key}", "must be a list of values, at least one"))
        elif parse_path(key) not in fixed:
            axes[key] = values
    return axes


def _variants(document: Document, axes: Mapping[str, list[Any]], problems: list[Problem]) -> Iterable[Document]:
    if not axes:
        return [document]
    variants = []
    for point in itertools.product(*(range(len(values)) for values in axes.values())):
        variant = merge(Document(), document)
        suffix = ""
        for (key, values), index in zip(axes.items(), point, strict=True):
            if parse_path(key) == EPS and "threat.headline" not in axes:
                variant.drop(HEADLINE)
            place = document.place(("sweep", key, index))
            try:
                variant.set(parse_path(key), values[index], place)
            except KeyError as error:
                problems.append(Problem(*place, f"sweep.{key}", error.args[0]))
            suffix += f"-{key.rsplit('.', 1)[-1]}={_plain(values[index])}"
        variant.value["name"] = f"{document.value['name']}{suffix}"
        variants.append(variant)
    return variants


def _plain(value: Any) -> str:
    """`[2/255, 4/255]` -> `2-255+4-255`: a value as part of a folder name."""
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")


def _validated(document: Document, problems: list[Problem]) -> Suite | None:
    told = {(p.file, p.line, p.column) for p in problems if p.line}
    try:
        suite = Suite.model_validate(document.value)
    except ValidationError as error:
        found = schema_problems(error, document)
        problems += [p for p in found if (p.file, p.line, p.column) not in told or p.line <= 1]
        return None
    problems += [p for p in name_problems(suite, document) if (p.file, p.line, p.column) not in told]
    return suite


def _shown(path: Path) -> str:
    """Relative to the working folder where it lies in it."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
