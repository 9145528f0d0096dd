"""The head of a run's report: what was found in a sentence, the threat model in another, and a tile for each model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..core.types import Estimate
from ..results.formats import cell_parts
from ..results.frames import Condition
from ..results.tables import ALL, Column, Numbers
from .curves import NORMS, colour_of
from .page import PHANTOM, Stamp
from .source import Source, attacks_at
from .words import listed, sentence

OBJECTIVES = {"answer": "answer token", "rationale_answer": "rationale and answer", "no_think": "no-think"}


@dataclass(frozen=True, slots=True)
class Lane:
    """A line of a tile: an estimate drawn on a scale from 0 to 100%."""

    label: str
    estimate: Estimate
    colour: str

    @property
    def value(self) -> str:
        return cell_parts(self.estimate, Column(""))[0]

    @property
    def interval(self) -> str:
        return cell_parts(self.estimate, Column(""))[1]


@dataclass(frozen=True, slots=True)
class Tile:
    """One model at a glance. main: its accuracy under the worst attack, or clean where there was none."""

    name: str
    description: str
    colour: str
    what: str
    main: Estimate
    lanes: tuple[Lane, ...]
    chance: Estimate | None
    gain: tuple[str, str] | None
    small: tuple[str, ...]

    @property
    def value(self) -> str:
        return f"{100 * self.main.value:.1f}" if self.main.n else "–"

    @property
    def interval(self) -> str:
        return cell_parts(self.main, Column(""))[1]


def stamp_of(summary: Mapping[str, Any]) -> Stamp:
    """Loudly, what the numbers are about."""
    data = summary["data"]
    if data["name"] == "phantom":
        return "phantom", "PHANTOM DATA", data["stamp"]
    if data["name"] == "omnimedvqa":
        return "real", "OmniMedVQA", data["stamp"]
    return "unknown", data["name"] if data["name"] != "unknown" else "DATA UNKNOWN", data["stamp"]


def banners(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(kind, text): what a reader must know before any number; `warn` or `phantom`."""
    found = []
    if summary["data"]["name"] == "phantom":
        found.append(("phantom", f"Phantom data: {PHANTOM}. Only differences between models trained alike count."))
    found += [("warn", notice) for notice in summary["notices"]]
    failed = [d["id"] for d in summary.get("diagnostics", ()) if d.get("status") == "fail"]
    if failed:
        found.append(("warn", f"Diagnostics failed: {', '.join(failed)}. The robust accuracies may be too high."))
    return found


def verdict(numbers: Numbers) -> str:
    """What the run found, in one or two sentences with their intervals."""
    threat = threat_words(numbers.headline) if numbers.robust else ""
    rows = [(m, e) for m in numbers.models if (e := numbers.get(m, numbers.robust or "clean")) and e.n]
    if not rows:
        return "No question has a verdict."
    rows.sort(key=lambda row: -row[1].value)
    n = sorted({e.n for _, e in rows})
    asked = f"of {n[0]:,} questions" if len(n) == 1 else f"of {n[0]:,} to {n[-1]:,} questions"
    named = rows if len(rows) <= 3 else [rows[0], rows[-1]]
    said = listed([_said(numbers, model, e) for model, e in named])
    said += f", {len(rows) - 2} others in between" if len(rows) > 3 else ""
    head = f"Under the worst of the attacks at {threat}, still right {asked}" if numbers.robust else f"Right {asked}"
    return f"{head}: {said}.{_floors(numbers)}{'' if numbers.robust else ' No attack was run.'}"


def _said(numbers: Numbers, model: str, estimate: Estimate) -> str:
    clean = numbers.get(model, "clean") if numbers.robust else None
    return f"{model} {sentence(estimate)}" + (f" (clean {sentence(clean)})" if clean and clean.n else "")


def _floors(numbers: Numbers) -> str:
    """What a model can get right without looking at the image."""
    chance = [e for m in numbers.models if (e := numbers.get(m, "clean", "chance")) and e.n]
    blind = [e for m in numbers.models if (e := numbers.blind(m, ALL)) and e.n]
    said = [f"chance is {100 * chance[0].value:.1f}%"] if chance else []
    if blind:
        most = max(blind, key=lambda e: e.value)
        said.append(f"without the image {'up to ' if len(blind) > 1 else ''}{sentence(most)} are right")
    return f" For comparison, {listed(said)}." if said else ""


def threat_words(label: str | None) -> str:
    """`L∞ 4/255` of `linf:4/255`."""
    norm, _, eps = (label or "").partition(":")
    return f"{NORMS.get(norm, norm)} {eps}".strip()


def threat_sentence(source: Source) -> str:
    """Who the adversary is, what it may do, what it tried, and who judges."""
    numbers = source.numbers
    if not numbers.robust:
        return "No attack was run: nothing here is about an adversary."
    side = (source.suite.get("data") or {}).get("resolution")
    picture = f"the {side} × {side} image" if side else "the image"
    norm, _, eps = (numbers.headline or "").partition(":")
    may = (
        f"may change every 8-bit value of {picture} by up to {eps}"
        if norm == "linf"
        else f"may change {picture} by up to {eps} in L2 norm"
    )
    tried = listed(_attacks(source))
    return (
        f"The adversary knows the model and its gradients and {may} ({NORMS.get(norm, norm)}) before the model's own "
        f"processor sees it. It tried {tried}. Success is judged on the deployed path alone: saved 8-bit image, "
        "processor, decoded reply, extracted answer. A question counts as robust where it is right on the clean image "
        "and under every one of these attacks."
    )


def _attacks(source: Source) -> list[str]:
    """`PGD (20 steps; answer token, decision slot)` for every attack at the headline."""
    found: dict[str, dict[str, None]] = {}
    for verdicts in source.run.verdicts:
        for condition in attacks_at(verdicts, source.numbers.headline):
            names = found.setdefault(condition.kind, {})
            if condition.objective:
                names[OBJECTIVES.get(condition.objective, condition.objective.replace("_", " "))] = None
    return [f"{c.words} ({'; '.join(filter(None, (_steps(source, c), ', '.join(names))))})"
            for c, names in ((Condition.parse(kind), names) for kind, names in found.items())]  # fmt: skip


def _steps(source: Source, attack: Condition) -> str:
    for condition in source.suite.get("conditions") or ():
        if not isinstance(condition, dict) or (condition.get("transfer") or "") != attack.source:
            continue
        if condition.get("attack") == attack.attack and "steps" in condition:
            restarts = condition.get("restarts", 1)
            return f"{condition['steps']} steps" + (f", {restarts} restarts" if restarts != 1 else "")
    return ""


def tiles(source: Source) -> list[Tile]:
    numbers = source.numbers
    described = {card["name"]: card.get("description", "") for card in source.cards}
    return [
        tile
        for place, model in enumerate(numbers.models)
        if (tile := _tile(numbers, model, described.get(model, ""), place))
    ]


def _tile(numbers: Numbers, model: str, description: str, place: int) -> Tile | None:
    clean, blind = numbers.get(model, "clean"), numbers.blind(model, ALL)
    robust = numbers.get(model, numbers.robust) if numbers.robust else None
    main = robust or clean or next((e for c in numbers.conditions if (e := numbers.get(model, c.name))), None)
    if main is None:
        return None
    lanes = [("clean", clean, "blue"), ("attacked", robust, "vermillion"), ("blind", blind, "grey")]
    gain = numbers.get(model, "clean", "image_gain")
    unread = numbers.get(model, numbers.robust or "clean", "invalid_rate")
    chance = numbers.get(model, "clean", "chance")
    small = [f"n = {main.n:,}"]
    small += [f"chance {100 * chance.value:.1f}"] if chance and chance.n else []
    small += [f"unreadable {100 * unread.value:.1f}%"] if unread and unread.n else []
    return Tile(
        model,
        description,
        colour_of(place),
        f"worst attack, {threat_words(numbers.headline)}" if robust else "clean",
        main,
        tuple(Lane(label, e, colour) for label, e, colour in lanes if e is not None and e.n),
        chance if chance and chance.n else None,
        cell_parts(gain, Column("", "points")) if gain else None,
        tuple(word.replace(" ", "\u00a0") for word in small),
    )
