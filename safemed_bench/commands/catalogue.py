"""list, show: what there is to measure with, and one of it in full."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from ..core import registry
from ..core.errors import SafeMedError, SuiteError, UsageError, did_you_mean
from . import output as out

Row = dict[str, Any]


def models() -> list[Row]:
    """Registered entries; one that cannot be read says why instead of hiding the others."""
    from ..models.card import resolve
    from ..suite.schema import ModelSpec

    rows: list[Row] = []
    for name in registry.models:
        try:
            card = resolve(ModelSpec(name=name))
        except SafeMedError as error:
            rows.append({"name": name, "summary": f"unusable: {error}"})
        else:
            about = f"prompt {card.prompt}, {card.decode}{', reasons' if card.reasons else ''}"
            rows.append({"name": name, "summary": f"{card.description} ({about})" if card.description else about})
    return rows


def attacks() -> list[Row]:
    from ..attacks import ATTACKS

    rows = []
    for name in registry.attacks:
        info = ATTACKS.get(name)
        parameters = f"; {', '.join(info.parameters)}" if info and info.parameters else ""
        rows.append({"name": name, "summary": f"{info.summary}{parameters}" if info else "plugin"})
    return rows


def objectives() -> list[Row]:
    from ..attacks import OBJECTIVES

    rows = []
    for name in registry.objectives:
        info = OBJECTIVES.get(name)
        limits = (", reasoning entries only" if info.reasoning_only else "") if info else ""
        rows.append({"name": name, "summary": f"{info.summary}{limits}" if info else "plugin"})
    return rows


def certifiers() -> list[Row]:
    from ..certify import CERTIFIERS

    rows = []
    for name in registry.certifiers:
        info = CERTIFIERS.get(name)
        rows.append({"name": name, "summary": f"{info.summary}; {', '.join(info.parameters)}" if info else "plugin"})
    return rows


def corruptions() -> list[Row]:
    from ..corruptions import CORRUPTIONS, known, modalities_of

    rows = []
    for name in known():
        about = CORRUPTIONS[name].summary if name in CORRUPTIONS else "plugin"
        rows.append({"name": name, "summary": f"{about}; {', '.join(modalities_of(name)) or 'every modality'}"})
    return rows


def datasets() -> list[Row]:
    return [{"name": name, "summary": _first_line(registry.datasets.get(name))} for name in registry.datasets]


def suites() -> list[Row]:
    from ..suite.loader import load_suites, shipped_suites

    rows = []
    for name, path in sorted(shipped_suites().items()):
        try:
            summary = "; ".join(suite.title or suite.name for suite in load_suites(path))
        except SuiteError as error:
            summary = f"not valid here: {error.problems[0]}"
        rows.append({"name": name, "summary": f"{summary} ({path})"})
    return rows


KINDS: dict[str, Callable[[], list[Row]]] = {
    "models": models,
    "attacks": attacks,
    "objectives": objectives,
    "certifiers": certifiers,
    "corruptions": corruptions,
    "datasets": datasets,
    "suites": suites,
}


def list_kind(kind: str, *, as_json: bool) -> None:
    if kind not in KINDS:
        raise UsageError(f"nothing is called '{kind}'.{did_you_mean(kind, [*KINDS])}")
    rows = KINDS[kind]()
    if as_json:
        out.print_json({kind: rows})
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        print(f"{row['name']:<{width}}  {row['summary']}")


def show(name: str, *, as_json: bool) -> None:
    """A suite as it resolves, a model's card, or what an attack, objective, certifier, corruption or data set says."""
    from ..suite.loader import shipped_suites

    coded = (registry.attacks, registry.objectives, registry.certifiers, registry.corruptions, registry.datasets)
    known = {*shipped_suites(), *registry.models, *(name for kind in coded for name in kind)}
    if name in shipped_suites() or Path(name).is_file():
        _show_suites(name, as_json)
    elif name in registry.models or (Path(name) / "config.json").is_file():
        _show_model(name, as_json)
    else:
        for kind in coded:
            if name in kind:
                return _show_code(kind.kind, name, kind.get(name), as_json)
        raise UsageError(f"nothing is called '{name}'.{did_you_mean(name, sorted(known))}")


def _show_suites(name: str, as_json: bool) -> None:
    from ..suite.loader import dump_suite, load_suites

    found = load_suites(name)
    if as_json:
        out.print_json({"suites": [suite.to_dict() for suite in found]})
    else:
        print("---\n".join(dump_suite(suite) for suite in found), end="")


def _show_model(name: str, as_json: bool) -> None:
    from ..models.card import resolve
    from ..models.prompts import get_prompt
    from ..suite.schema import ModelSpec

    spec = {"name": name} if name in registry.models else {"path": name}
    card = resolve(ModelSpec.model_validate(spec))
    facts = card.to_dict() | {"template": get_prompt(card.prompt).template}
    if as_json:
        out.print_json(facts)
        return
    for key, value in facts.items():
        print(f"{key}: {value}")


def _show_code(kind: str, name: str, item: Any, as_json: bool) -> None:
    text = inspect.getdoc(item) or ""
    declared = fields(item) if is_dataclass(item) else ()
    parameters = {f.name: "required" if f.default is MISSING else repr(f.default) for f in declared if f.init}
    if levels := getattr(item, "levels", ()):
        parameters["levels"] = ", ".join(f"{level:g}" for level in levels)
    if as_json:
        out.print_json({"kind": kind, "name": name, "text": text, "parameters": parameters})
        return
    print(f"{name} ({kind})\n\n{text}")
    if parameters:
        print("\n" + "\n".join(f"  {key} = {value}" for key, value in parameters.items()))


def _first_line(item: Any) -> str:
    return (inspect.getdoc(item) or "").partition("\n")[0]
