"""What is wrong with a suite, in plain words: the schema's complaints, and names that nothing answers to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..core.errors import Problem, UsageError, did_you_mean
from .document import Document, Key
from .schema import ConditionSpec, DataSpec, ModelSpec, RunSpec, Suite, ThreatSpec

_SECTIONS: dict[str, type[BaseModel]] = {
    "data": DataSpec,
    "threat": ThreatSpec,
    "models": ModelSpec,
    "conditions": ConditionSpec,
    "run": RunSpec,
}


def schema_problems(error: ValidationError, document: Document) -> list[Problem]:
    """pydantic's errors, each at the place of its key or value."""
    details = error.errors(include_url=False)
    parents = {tuple(d["loc"][:stop]) for d in details for stop in range(len(d["loc"]))}
    # a list whose items are all wrong is also called too short
    wanted = [d for d in details if d["type"] != "too_short" or tuple(d["loc"]) not in parents]
    return [_problem(detail, document) for detail in wanted]


def _problem(detail: Any, document: Document) -> Problem:
    path: Key = tuple(detail["loc"])
    unknown = detail["type"] == "extra_forbidden"
    place = document.place(path, of_key=unknown)
    return Problem(*place, ".".join(map(str, path)), _message(detail, path))


def _message(detail: Any, path: Key) -> str:
    given = detail.get("input")
    match detail["type"]:
        case "extra_forbidden":
            return _unknown_key(path)
        case "missing":
            return "is missing"
        case "value_error":
            return str(detail["ctx"]["error"])
        case "literal_error":
            words = detail["ctx"]["expected"].replace("'", "")
            known = [word.strip() for word in words.replace(" or ", ",").split(",")]
            close = did_you_mean(str(given), known)
            return f"must be {words}, not {given!r}.{'' if close.startswith(' Known') else close}"
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"must be a mapping of keys, not {given!r}"
        case "tuple_type" | "list_type":
            return f"must be a list, not {given!r}"
        case "too_short":
            return "must not be empty"
        case "string_pattern_mismatch":
            return f"must be a plain word of letters, digits and . _ = + -, not {given!r}"
    return detail["msg"].replace("Input should be", "must be").replace("Input should", "must") + f", not {given!r}"


def _unknown_key(path: Key) -> str:
    section = _SECTIONS.get(str(path[0])) if len(path) > 1 else Suite
    known = [*section.model_fields] if section else []
    if len(path) == 1:
        known += ["extends", "sweep"]
    more = " Further parameters of an attack stand under `params`." if path[0] == "conditions" else ""
    return f"unknown key.{did_you_mean(str(path[-1]), known)}{more}"


def name_problems(suite: Suite, document: Document) -> Iterator[Problem]:
    """Unknown data sets, models, prompts, attacks and objectives, and a data folder that is not there. No torch."""

    def problem(path: Key, message: str) -> Problem:
        return Problem(*document.place(path), ".".join(map(str, path)), message)

    from ..core import registry
    from ..models.prompts import PROMPTS

    if suite.data.name != "auto" and suite.data.name not in registry.datasets:
        yield problem(("data", "name"), _unknown("data set", suite.data.name, ["auto", *registry.datasets]))
    used = suite.data.name != "phantom"  # which is generated, whatever the environment names
    if used and suite.data.root and not Path(suite.data.root).expanduser().is_dir():
        yield problem(("data", "root"), f"no such folder: {suite.data.root}")
    if message := _phantom_problem(suite.data.phantom):
        yield problem(("data", "phantom"), message)
    for i, model in enumerate(suite.models):
        if model.path is None and model.name not in registry.models:
            more = "" if "/" not in model.name else " A folder or hub id is written as `path`."
            yield problem(("models", i, "name"), _unknown("model", model.name, [*registry.models]) + more)
        if model.prompt is not None and model.prompt not in PROMPTS:
            yield problem(("models", i, "prompt"), _unknown("prompt", model.prompt, [*PROMPTS]))
    for i, condition in enumerate(suite.conditions):
        for key, message in _attack_problems(condition):
            yield problem(("conditions", i, *key), message)


def _phantom_problem(parameters: dict[str, Any]) -> str:
    """What the generator says of its parameters, "" where they are good."""
    if not parameters.keys() - {"seed"}:
        return ""
    from ..datasets.phantom import PhantomSpec

    try:
        PhantomSpec.from_mapping(parameters)
    except (UsageError, TypeError, ValueError) as error:
        return str(error)
    return ""


def _attack_problems(condition: ConditionSpec) -> Iterator[tuple[Key, str]]:
    from ..attacks import ATTACKS
    from ..core import registry

    if condition.attack is None:
        return
    if condition.attack not in registry.attacks:
        yield ("attack",), _unknown("attack", condition.attack, [*registry.attacks])
    elif condition.attack in ATTACKS:  # a plugin's parameters are checked when it is built
        known = ATTACKS[condition.attack].parameters
        for key in condition.parameters:
            if key not in known:
                path: Key = ("params", key) if key in condition.params else (key,)
                takes = did_you_mean(key, known) if known else " It takes none."
                yield path, f"attack '{condition.attack}' has no parameter '{key}'.{takes}"
    if condition.objectives != "all":
        for j, name in enumerate(condition.objectives):
            if name not in registry.objectives:
                yield ("objectives", j), _unknown("objective", name, [*registry.objectives])


def _unknown(kind: str, name: str, known: Sequence[str]) -> str:
    hint = did_you_mean(name, known) if known else f" No {kind} is registered in this installation."
    return f"unknown {kind} '{name}'.{hint}"
