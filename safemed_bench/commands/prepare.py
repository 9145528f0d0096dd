"""From the command line to plans: flags into overrides, suites, model cards, questions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ModelError, Problem, SuiteError, UsageError, did_you_mean
from ..suite.document import parse_path
from ..suite.loader import Override, load_suites
from ..suite.schema import FILTER_KEYS, ModelSpec, RunSpec, Suite

if TYPE_CHECKING:
    from ..core.types import Question
    from ..models.card import ModelCard
    from ..suite.plan import Plan


@dataclass(frozen=True)
class Request:
    """What the flags of `run`, `plan` and `validate` ask for; None is the suite's own word."""

    limit: int | None = None
    models: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    flags: dict[str, Any] = field(default_factory=dict)
    """Suite key -> (flag, value) for the flags that set one key."""
    offline: bool = False

    @property
    def overrides(self) -> tuple[Override, ...]:
        single = [
            Override(parse_path(key), value, flag) for key, (flag, value) in self.flags.items() if value is not None
        ]
        chosen = parse_filters(self.filters)
        return (*single, *([Override(("data", "filter"), chosen, "--filter")] if chosen else []))


def parse_filters(items: Sequence[str]) -> dict[str, list[str]]:
    """`modality=CT`, several of one key are alternatives. Raises UsageError for an unknown key."""
    chosen: dict[str, list[str]] = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not value:
            raise UsageError(f"--filter {item}: must be written key=value, such as modality=CT")
        if key not in FILTER_KEYS:
            raise UsageError(f"--filter {item}: unknown key '{key}'.{did_you_mean(key, FILTER_KEYS)}")
        chosen.setdefault(key, []).append(value)
    return chosen


def suites_of(references: Sequence[str], request: Request) -> list[Suite]:
    """All suites of all files, as the flags change them. Raises SuiteError with the problems of every file."""
    from ..core.registry import load_plugin_file

    if request.offline:
        os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"
    for plugin in request.plugins:
        load_plugin_file(plugin)
    suites: list[Suite] = []
    problems: list[Problem] = []
    for reference in references:
        try:
            suites += load_suites(reference, request.sets, flags=request.overrides)
        except SuiteError as error:
            problems += [p for p in error.problems if p not in problems]
    if problems:
        raise SuiteError(problems)
    return [_limited(_with_models(suite, request.models), request.limit) for suite in suites]


def _limited(suite: Suite, limit: int | None) -> Suite:
    """--limit asks at most so many questions per modality, and never more than the suite does."""
    if limit is None or (suite.data.per_modality != "all" and suite.data.per_modality <= limit):
        return suite
    return suite.model_copy(update={"data": suite.data.model_copy(update={"per_modality": limit})})


def _with_models(suite: Suite, names: Sequence[str]) -> Suite:
    """--model keeps the suite's entries of these names; a registered entry, folder or hub id may be named as well."""
    if not names:
        return suite
    from ..core import registry

    known = {model.name: model for model in suite.models}
    chosen: list[ModelSpec] = []
    for name in names:
        if name in known:
            chosen.append(known[name])
        elif name in registry.models:
            chosen.append(ModelSpec(name=name))
        elif "/" in name or Path(name).is_dir():
            chosen.append(ModelSpec.model_validate({"path": name}))
        else:
            hint = did_you_mean(name, sorted({*known, *registry.models}))
            raise UsageError(
                f"--model {name}: neither in suite {suite.name}, nor a registered entry, nor a path.{hint}"
            )
    return suite.model_copy(update={"models": tuple({model.name: model for model in chosen}.values())})


def cards_of(suite: Suite) -> tuple[list[ModelCard | None], list[str]]:
    """A card per entry, None for each whose weights are not here; and, of each of these, what is missing where."""
    from ..models.card import resolve

    cards: list[ModelCard | None] = []
    absent = []
    for model in suite.models:
        try:
            cards.append(resolve(model))
        except ModelError as error:
            cards.append(None)
            absent.append(f"{model.name}: {error}")
    return cards, absent


def plans_of(suites: Sequence[Suite], request: Request) -> tuple[list[Plan], list[str]]:
    """The work of every suite with an entry that is here, and what is said of the others.

    Entries whose weights are not here are left out, each with a note. Raises ModelError where no entry is left at all.
    """
    plans: list[Plan] = []
    absent: list[str] = []
    for suite in suites:
        cards, missing = cards_of(suite)
        absent += [f"{suite.name}: {message}" for message in missing]
        if any(cards):
            plans.append(_plan(suite, request, cards, missing))
    if not plans:
        raise ModelError("\n".join(absent))
    return plans, absent


def _plan(suite: Suite, request: Request, cards: Sequence[ModelCard | None], missing: Sequence[str]) -> Plan:
    """The work of one suite; what the flags cut away, and which entries are missing, is in its notes."""
    from .. import datasets
    from ..suite.plan import build_plan

    cut = request.limit is not None and suite.data.per_modality == request.limit
    notes = [f"limited to {request.limit} questions per modality"] if cut else []
    notes += [f"only {key} {' or '.join(values)}" for key, values in suite.data.filter.items()]
    notes += [f"LEFT OUT {' '.join(message.split())}" for message in missing]
    dtype, pools = resolved_dtype(suite.run), fit_pools(suite)
    return build_plan(suite, datasets.load(suite.data), cards, dtype=dtype, notes=notes, pools=pools)


def fit_pools(suite: Suite) -> dict[str, tuple[Question, ...]]:
    """Questions of other splits, for the suite's attacks that are fitted on some before they are shown any."""
    from .. import datasets
    from ..attacks import fitted_on

    wanted: dict[str, int] = {}
    for spec in suite.conditions:
        if found := fitted_on(spec.attack or "", spec.parameters):
            wanted[found[0]] = max(found[1], wanted.get(found[0], 0))
    return {
        split: datasets.load(suite.data.model_copy(update={"split": split, "per_modality": count})).questions
        for split, count in wanted.items()
    }


def resolved_dtype(run: RunSpec) -> str:
    """What `auto` means on this machine, without torch: bf16 where a GPU will be used, else fp32."""
    from ..run.devices import gpu_count

    if run.dtype != "auto":
        return run.dtype
    on_gpu = run.device.startswith("cuda") or (run.device == "auto" and gpu_count() > 0)
    return "bf16" if on_gpu else "fp32"


def data_problems(plan: Plan, shown: int = 10) -> list[str]:
    """What is wrong with a plan's data, at most `shown` lines of it."""
    problems = list(map(str, plan.dataset.problems))
    more = [f"and {len(problems) - shown} more problems in the data; see `data check`"] if len(problems) > shown else []
    return problems[:shown] + more


def output_of(suite: Suite, output: str | None, several: bool) -> Path:
    """--output, or run.output, or reports/<suite>; with several suites a folder for each below --output."""
    given = output or suite.run.output
    if not given:
        return Path("reports") / suite.name
    folder = Path(given).expanduser()
    return folder / suite.name if several else folder
