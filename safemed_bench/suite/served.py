"""What a suite can measure of entries that a server answers for, and how many requests that takes at most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..attacks import ATTACKS, black_box
from ..certify import build_certifier
from ..core.types import ATTACK_DRAWS, JUDGE_DRAWS
from .conditions import Condition
from .document import Key
from .schema import ConditionSpec, ModelSpec, Suite

if TYPE_CHECKING:
    from .plan import Cell


def refused(condition: ConditionSpec, suite: Suite) -> Iterator[tuple[Key, str]]:
    """The first attack on an entry behind an API that needs more than its answers: where it stands, and what to do."""
    from ..core import registry

    if condition.attack is None or condition.attack not in registry.attacks:
        return
    for model in suite.models:
        if model.api is None or not _made_against(condition, model):
            continue
        if not black_box(condition.attack):
            yield ("transfer" if condition.transfer else "attack",), _needs_gradient(condition, model, suite)
            return
        if _wants_scores(condition) and not model.api.logprobs:
            given = "feedback" in condition.params
            yield ("params", "feedback") if given else ("attack",), _needs_scores(condition, model)
            return


def _made_against(condition: ConditionSpec, model: ModelSpec) -> bool:
    if condition.transfer:
        return model.name == condition.transfer
    return condition.is_for(model.name, model.smooth is not None)


def _wants_scores(condition: ConditionSpec) -> bool:
    if condition.attack == "square":
        return condition.params.get("feedback", "scores") != "verdict"
    return condition.attack == "art:Square"


def _needs_gradient(condition: ConditionSpec, model: ModelSpec, suite: Suite) -> str:
    here = [other.name for other in suite.models if other.api is None]
    why = (
        f"attack '{condition.attack}' needs gradients or logits, and entry '{model.name}' is an API: a server shows "
        "its answers alone."
    )
    instead = "`attack: square` with `params: {feedback: verdict}`, or `attack: external`, work on it"
    if not here:
        return f"{why} {instead[0].upper()}{instead[1:]}, and so do corruptions, noise, blank and shuffled images"
    if condition.transfer:
        return f"{why} Make the images against an entry that runs here: `transfer: {here[0]}`"
    listed = ", ".join(name for name in here if condition.is_for(name))
    keep = f"Say `models: [{listed or here[0]}]` here; "
    return f"{why} {keep}images made against one of these (`transfer: {here[0]}`), {instead}"


def _needs_scores(condition: ConditionSpec, model: ModelSpec) -> str:
    why = f"attack '{condition.attack}' climbs the options' scores, and entry '{model.name}' is an API that shows none."
    verdicts = "Say `params: {feedback: verdict}`, or, " if condition.attack == "square" else "Use `square`, or, "
    return f"{why} {verdicts}where its server gives log-probabilities, `logprobs: true` under its `api`"


@dataclass(frozen=True, slots=True)
class Requests:
    """What an entry may be asked. most: requests without retries. unknown: attacks, of plugins, that do not say how
    often they ask; they are not in `most`. limit: the suite's `max_requests`."""

    most: int
    unknown: tuple[str, ...] = ()
    limit: int | None = None

    def __str__(self) -> str:
        beside = f", beside what {', '.join(self.unknown)} asks" if self.unknown else ""
        beyond = self.limit is not None and self.most > self.limit
        stop = f"; the run stops at max_requests = {self.limit:,}" if beyond else ""
        return f"at most {self.most:,} requests{beside}{stop}"


def requests_of(cells: Sequence[Cell], counts: Counter[str]) -> dict[str, Requests]:
    """Entry -> its requests, for each entry behind an API. counts: cell name -> questions.

    What is asked twice is answered once (models/api_calls.py), so that clean images cost nothing a second time; of a
    black box the bound is reached only where it never succeeds.
    """
    found: dict[str, Requests] = {}
    for name in dict.fromkeys(cell.model.name for cell in cells if cell.model.api):
        own = [cell for cell in cells if cell.model.name == name]
        asked = {cell.condition.name: counts[cell.name] for cell in own}
        clean = 0 if "clean" in asked else max((asked[c.condition.name] for c in own if _needs_clean(c)), default=0)
        each = {cell.condition.name: _each(cell) for cell in own}
        most = sum(times * asked[condition] for condition, times in each.items() if times is not None)
        unknown = tuple(condition for condition, times in each.items() if times is None)
        api = own[0].model.api
        found[name] = Requests(most + clean * _votes(own[0].model), unknown, api.max_requests if api else None)
    return found


def served_notes(cells: Sequence[Cell], requests: Mapping[str, Requests]) -> Iterator[str]:
    """What the reader of a run should know of its entries behind an API."""
    for name, count in requests.items():
        yield f"{name} is answered by a server, whose weights cannot be fingerprinted: {count}"
    attacked = dict.fromkeys(c.model.name for c in cells if c.model.api and c.condition.kind == "attack")
    for name in attacked:
        yield (
            f"{name} is attacked by black boxes and other entries' images alone, so that its worst case is no match "
            "for that of an entry whose gradient was climbed"
        )


def _needs_clean(cell: Cell) -> bool:
    return cell.condition.kind == "attack"


def _votes(model: ModelSpec) -> int:
    return model.smooth.n if model.smooth else 1


def _each(cell: Cell) -> int | None:
    """Requests per question of one cell, at most; None where nobody knows."""
    condition, votes = cell.condition, _votes(cell.model)
    if condition.kind == "certify":
        certifier = build_certifier(condition.certifier, dict(condition.params))
        return int(certifier.n0 + certifier.n)
    if condition.kind != "attack":
        return 2 * votes + (votes > 1) if condition.kind == "repeat" else votes
    queries = 1 if condition.source else _queries(condition)
    randomised = cell.model.smooth is not None or bool(cell.model.api and cell.model.api.temperature)
    if queries is None:
        return None
    return votes * (ATTACK_DRAWS * queries + JUDGE_DRAWS if randomised else queries)


def _queries(condition: Condition) -> int | None:
    info, given = ATTACKS.get(condition.attack), dict(condition.params).get("queries")
    return int(given) if given is not None else info.queries if info else None
