"""From a YAML file to validated suites.

Precedence: command line > --set > SAFEMED_* > suite > extends > defaults. All that is wrong is said at once.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..core.errors import Problem, SuiteError
from .checks import name_problems, validated
from .document import Document, Key, merge, parse_path
from .layers import Kind, Override, apply, in_order, parse_sets
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
    document = SUITES.read(str(path), env, problems)
    outside = [*_from_environment(env), *parse_sets(overrides, problems), *flags]
    axes = _axes(document, [override.path for override in outside], problems)
    _apply(document, outside, problems)
    suites = [_validated(variant, problems) for variant in _variants(document, axes, problems)]
    if problems:
        raise SuiteError(in_order(problems))
    return [suite for suite in suites if suite is not None]


def dump_suite(suite: Suite) -> str:
    """YAML that loads as the same suite; what a run keeps as its resolved suite."""
    return yaml.safe_dump(suite.to_dict(), sort_keys=False, allow_unicode=True, width=110)


def shipped_suites() -> dict[str, Path]:
    """Name -> file of every suite in `suites/`, here and beside the package; the nearer folder wins."""
    return SUITES.shipped()


def find_suite(reference: str, beside: Path | None = None) -> Path:
    """A path (also relative to `beside`), with or without .yaml, or a shipped name. Raises SuiteError."""
    return SUITES.find(reference, beside)


def _over(base: Document, top: Document) -> Document:
    """`top` over `base`, whose headline belonged to its own eps."""
    threat = top.value.get("threat")
    if isinstance(threat, dict) and "eps" in threat:
        base.drop(HEADLINE)
    return merge(base, top)


SUITES = Kind("suite", Path("suites"), _over)


def _from_environment(env: Mapping[str, str]) -> Iterable[Override]:
    return [Override(parse_path(key), env[name], f"${name}") for name, key in ENVIRONMENT.items() if env.get(name)]


def _apply(document: Document, overrides: Sequence[Override], problems: list[Problem]) -> None:
    paths = [override.path for override in overrides]
    if EPS in paths and HEADLINE not in paths:
        document.drop(HEADLINE)
    apply(document, overrides, problems)


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
    suite = validated(Suite, document, problems, ("extends", "sweep"))
    if suite is not None:
        problems += [p for p in name_problems(suite, document) if (p.file, p.line, p.column) not in told]
    return suite
