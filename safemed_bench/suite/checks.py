"""What is wrong with a suite, in plain words: the schema's complaints, and names that nothing answers to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from ..core.errors import DataError, Problem, UsageError, did_you_mean
from ..core.types import FROM
from .document import Document, Key
from .schema import ConditionSpec, GateRule, Suite
from .served import refused
from .values import check_sigma

Schema = TypeVar("Schema", bound=BaseModel)


def validated(
    schema: type[Schema], document: Document, problems: list[Problem], file_keys: Sequence[str] = ()
) -> Schema | None:
    """The document as `schema` has it; what is wrong goes to `problems`, each at the place of its key or value, unless
    that place was told of already. `file_keys`: top-level keys that the reader takes out, for did-you-mean."""
    told = {(p.file, p.line, p.column) for p in problems if p.line}
    try:
        return schema.model_validate(document.value)
    except ValidationError as error:
        details = error.errors(include_url=False)
    parents = {tuple(d["loc"][:stop]) for d in details for stop in range(len(d["loc"]))}
    # a list whose items are all wrong is also called too short
    wanted = [d for d in details if d["type"] != "too_short" or tuple(d["loc"]) not in parents]
    found = [_problem(schema, detail, document, file_keys) for detail in wanted]
    problems += [p for p in found if (p.file, p.line, p.column) not in told or p.line <= 1]
    return None


def _problem(schema: type[BaseModel], detail: Any, document: Document, file_keys: Sequence[str]) -> Problem:
    path: Key = tuple(detail["loc"])
    unknown = detail["type"] == "extra_forbidden"
    place = document.place(path, of_key=unknown)
    message = _unknown_key(schema, path, file_keys) if unknown else _message(detail)
    return Problem(*place, ".".join(map(str, path)), message)


def _message(detail: Any) -> str:
    given = detail.get("input")
    match detail["type"]:
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


def _unknown_key(schema: type[BaseModel], path: Key, file_keys: Sequence[str]) -> str:
    """What was meant, among the keys of the mapping that the unknown one stands in."""
    section = _section(schema, path[:-1])
    known = [*section.model_fields, *(file_keys if len(path) == 1 else ())] if section else []
    hint = getattr(section, "unknown_key_hint", "")
    return f"unknown key.{did_you_mean(str(path[-1]), known)}{hint}"


def _section(schema: type[BaseModel], path: Key) -> type[BaseModel] | None:
    """The model that `path` leads to; a list is one of one model."""
    here: type[BaseModel] | None = schema
    for part in path:
        if here is not None and isinstance(part, str):
            field = here.model_fields.get(part)
            here = _model_in(field.annotation) if field else None
    return here


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The one model inside `Part`, `Part | None` or `tuple[Part, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def name_problems(suite: Suite, document: Document) -> Iterator[Problem]:
    """Unknown data sets, models, prompts, attacks and objectives, and a data folder that is not there. No torch."""

    def problem(path: Key, message: str) -> Problem:
        return Problem(*document.place(path), ".".join(map(str, path)), message)

    from ..core import registry
    from ..models.prompts import PROMPTS

    if suite.data.name != "auto" and suite.data.name not in registry.datasets:
        yield problem(("data", "name"), _unknown("data set", suite.data.name, ["auto", *registry.datasets]))
    used = suite.data.name != "phantom"  # which is generated, whatever the environment names
    if used and suite.data.root:
        root = Path(suite.data.root).expanduser()
        if not root.is_dir():
            yield problem(("data", "root"), f"no such folder: {suite.data.root}")
        elif suite.data.split_file and not (root / suite.data.split_file).is_file():
            yield problem(("data", "split_file"), f"no such file: {root / suite.data.split_file}")
    if message := _phantom_problem(suite.data.phantom):
        yield problem(("data", "phantom"), message)
    for i, model in enumerate(suite.models):
        if model.path is None and model.api is None and (entry := model.entry or model.name) not in registry.models:
            more = "" if "/" not in entry else " A folder or hub id is written as `path`."
            named = "entry" if model.entry else "name"
            yield problem(("models", i, named), _unknown("model", entry, [*registry.models]) + more)
        if model.prompt is not None and model.prompt not in PROMPTS:
            yield problem(("models", i, "prompt"), _unknown("prompt", model.prompt, [*PROMPTS]))
    for i, condition in enumerate(suite.conditions):
        found = (
            *_scope_problems(condition, suite),
            *_transfer_problems(condition, suite),
            *_attack_problems(condition),
            *_limit_problems(condition, suite),
            *_noise_problems(condition, suite),
            *_certify_problems(condition, suite),
            *_corruption_problems(condition),
            *refused(condition, suite),
        )
        for key, message in found:
            yield problem(("conditions", i, *key), message)
    for i, rule in enumerate(suite.gate):
        for name, message in _gate_problems(suite, rule):
            yield problem(("gate", i, name), message)


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
    from ..attacks import ATTACKS, accepts, needs_objective, unknown_attack
    from ..core import registry

    if condition.attack is None:
        return
    if condition.attack not in registry.attacks:
        yield ("attack",), unknown_attack(condition.attack)
    elif condition.attack in ATTACKS:  # a plugin's parameters are checked when it is built
        known = ATTACKS[condition.attack].parameters
        for key in condition.parameters:
            if key not in known:
                path: Key = ("params", key) if key in condition.params else (key,)
                takes = did_you_mean(key, known) if known else " It takes none."
                yield path, f"attack '{condition.attack}' has no parameter '{key}'.{takes}"
    known_attack = condition.attack in registry.attacks
    if known_attack and "objectives" in condition.model_fields_set and not needs_objective(condition.attack):
        yield ("objectives",), f"attack '{condition.attack}' takes no objectives"
    elif not isinstance(condition.objectives, str):
        for j, name in enumerate(condition.objectives):
            if name not in registry.objectives:
                yield ("objectives", j), _unknown("objective", name, [*registry.objectives])
            elif not accepts(condition.attack, name):
                info = ATTACKS[condition.attack]
                takes = " or ".join(info.accepts)
                yield ("objectives", j), f"attack '{condition.attack}' takes {takes}, not {name}: {info.why}"


def _limit_problems(condition: ConditionSpec, suite: Suite) -> Iterator[tuple[Key, str]]:
    """A norm that the attack does not have, a package that is not there, images that cannot be used."""
    from ..attacks import ATTACKS

    info = ATTACKS.get(condition.attack or "")
    if info is None:
        return
    if suite.threat.norm not in info.norms:
        has = " and ".join(info.norms)
        yield ("attack",), f"attack '{condition.attack}' works in {has}, not in {suite.threat.norm}: {info.why}"
    if (condition.attack or "").startswith("art:") and find_spec("art") is None:
        yield ("attack",), f"'{condition.attack}' needs a package: pip install adversarial-robustness-toolbox"
    if condition.attack == "external":
        yield from _external_problems(condition)
    if condition.attack == "universal":
        yield from _fit_problems(condition, suite)


def _fit_problems(condition: ConditionSpec, suite: Suite) -> Iterator[tuple[Key, str]]:
    """What an attack cannot be fitted on."""
    split, count = condition.params.get("split", "validation"), condition.params.get("questions", 1)
    if split not in ("validation", "train"):
        yield ("params", "split"), f"must be validation or train, not {split!r}"
    elif split == suite.data.split:
        other = "train" if split == "validation" else "validation"
        where: Key = ("params", "split") if "split" in condition.params else ("attack",)
        yield where, f"would be fitted on {split}, whose questions are asked; set `params: {{split: {other}}}`"
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        yield ("params", "questions"), f"must be a whole number from 1, not {count!r}"


def _external_problems(condition: ConditionSpec) -> Iterator[tuple[Key, str]]:
    from ..attacks.supplied import open_supplied

    if not isinstance(path := condition.params.get("path"), str):
        yield ("attack",), "needs `params: {path: ...}`: a folder of pictures named by question id, or an .npz file"
        return
    try:
        open_supplied(path)
    except DataError as error:
        yield ("params", "path"), str(error)


def _noise_problems(condition: ConditionSpec, suite: Suite) -> Iterator[tuple[Key, str]]:
    """A smoothing-aware attack whose noise nobody names, or names on the wrong scale."""
    from ..attacks import ATTACKS

    info = ATTACKS.get(condition.attack or "")
    if info is None or "sigma" not in info.parameters:
        return
    if (sigma := condition.params.get("sigma")) is not None:
        try:
            check_sigma(sigma)
        except (ValueError, TypeError) as error:
            yield (
                ("params", "sigma"),
                str(error) if isinstance(sigma, int | float) else f"must be a number, not {sigma!r}",
            )
        return
    attacked = [m for m in suite.models if condition.attacks(m.name)]
    bare = [m.name for m in attacked if m.smooth is None]
    if info.needs_sigma and bare:
        yield ("attack",), f"needs `params: {{sigma: ...}}`, for entry '{bare[0]}' is not smoothed and brings none"


def _scope_problems(condition: ConditionSpec, suite: Suite) -> Iterator[tuple[Key, str]]:
    names = [model.name for model in suite.models]
    listed = condition.models if isinstance(condition.models, tuple) else ()
    for j, name in enumerate(listed):
        if name not in names:
            yield ("models", j), f"'{name}' is not an entry of this suite.{did_you_mean(name, names)}"


def _transfer_problems(condition: ConditionSpec, suite: Suite) -> Iterator[tuple[Key, str]]:
    """A source that is no entry, that nobody else could be shown, or whose images do not fit the others' canvas."""
    if (source := condition.transfer) is None:
        return
    entries = {model.name: model for model in suite.models}
    shown = [m for m in suite.models if condition.is_for(m.name, m.smooth is not None)]
    if source not in entries:
        yield ("transfer",), f"'{source}' is not an entry of this suite.{did_you_mean(source, [*entries])}"
    elif condition.attack == "external":
        yield ("transfer",), "images made elsewhere are not made against an entry; leave `transfer` out"
    elif any(sign in source for sign in ("[", "]", "@", FROM)):
        yield ("transfer",), f"'{source}' would be misread in a condition's name; give the entry another `name`"
    elif not shown:
        yield ("transfer",), f"no other entry is shown the images made against '{source}'"
    else:
        sides = {m.name: m.resolution or suite.data.resolution for m in (entries[source], *shown)}
        for name, side in sides.items():
            if side != sides[source]:
                yield (
                    ("transfer",),
                    f"'{source}' has a canvas of {sides[source]} pixels and '{name}' one of {side}: nothing is resized",
                )
                return


def _certify_problems(condition: ConditionSpec, suite: Suite) -> Iterator[tuple[Key, str]]:
    """An unknown certifier or parameter, no sigma or two, and what the certifier itself refuses."""
    from ..certify import build_certifier
    from ..core import registry

    if condition.certify is None:
        return
    if condition.certify not in registry.certifiers:
        yield ("certify",), _unknown("certifier", condition.certify, [*registry.certifiers])
        return
    sigmas = set()
    for model in filter(lambda m: condition.is_for(m.name, m.smooth is not None), suite.models):
        own = model.smooth.sigma if model.smooth else None
        if own is None and condition.sigma is None:
            yield ("certify",), f"needs `sigma`, for entry '{model.name}' is not smoothed and brings none of its own"
            return
        if own is not None and condition.sigma not in (None, own):
            yield ("sigma",), f"entry '{model.name}' is smoothed with sigma {own:g}; leave `sigma` out"
            return
        sigmas.add(condition.sigma or own)
    for sigma in sorted(filter(None, sigmas)):
        try:
            build_certifier(condition.certify, condition.parameters | {"sigma": sigma})
        except UsageError as error:
            yield ("certify",), str(error)
            return


def _corruption_problems(condition: ConditionSpec) -> Iterator[tuple[Key, str]]:
    from ..corruptions import known

    for j, name in enumerate(condition.corruption if isinstance(condition.corruption, tuple) else ()):
        if name not in known():
            yield ("corruption", j), _unknown("corruption", name, known())


def _corrupted(suite: Suite) -> Iterator[str]:
    """The cells of all corruptions, as rules of a gate name them."""
    from ..corruptions import chosen

    for spec in (c for c in suite.conditions if c.kind == "corruption"):
        yield from (f"corruption[{name}]@{s}" for name in chosen(spec.corruption or ()) for s in spec.severities)


def _gate_problems(suite: Suite, rule: GateRule) -> Iterator[tuple[str, str]]:
    """A rule about a condition, a size or an entry that the suite does not measure."""
    head, _, size = rule.condition.partition("@")
    kind = head.partition("[")[0]
    attacks = {c.label for c in suite.conditions if c.kind == "attack"}
    sized = {*attacks, *(c.kind for c in suite.conditions if c.kind == "noise"), *({"worst"} if attacks else ())}
    plain = {c.label for c in suite.conditions if c.kind not in ("attack", "noise", "corruption")}
    corrupted = [*_corrupted(suite)]
    labels = ["headline", *(threat.label for threat in suite.threat.models)]
    radii = [f"certified@l2:{r:g}" for c in suite.conditions if c.kind == "certify" for r in c.radii or ()]
    if rule.metric == "certified_accuracy" or kind == "certified":
        if rule.metric != "certified_accuracy":
            yield "condition", f"'{rule.condition}' is of the metric certified_accuracy"
        elif kind != "certified" or f"certified@{size}" not in radii:
            yield (
                "condition",
                f"'{rule.condition}' is no radius that the suite certifies.{did_you_mean(rule.condition, radii)}",
            )
    elif kind not in sized | plain and rule.condition not in corrupted:
        names = [*plain, *(f"{name}@headline" for name in sized), *corrupted]
        yield "condition", _unknown("condition", rule.condition, names)
    elif kind in sized and size not in labels:
        yield "condition", f"'{rule.condition}' names no size of the threat; one of: @{', @'.join(labels)}"
    elif kind in plain and size:
        yield "condition", f"'{kind}' has no size; write `{kind}`"
    names = ["all", *(model.label for model in suite.models)]
    if rule.model not in names:
        yield "model", _unknown("entry", rule.model, names)


def _unknown(kind: str, name: str, known: Sequence[str]) -> str:
    hint = did_you_mean(name, known) if known else f" No {kind} is registered in this installation."
    return f"unknown {kind} '{name}'.{hint}"
