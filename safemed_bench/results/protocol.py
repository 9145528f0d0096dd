"""With what a model was measured, and why two measurements do not compare.

All of it is read from what a run keeps of itself: `run.json` and the resolved `suite.yaml`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .certified import titles
from .frames import Condition

OWN = ("prompt", "extraction", "objectives", "certificates")
"""Checks that can be waived: these belong to an entry, and two different entries may well differ in them."""


@dataclass(frozen=True)
class Protocol:
    """data: fingerprint of the questions asked. threat: norm and sizes. canvas: what the image was drawn on.

    extraction: how an answer is read from the model. attacks: condition -> the attack behind it with its parameters.
    code: versions of the code behind the records, {} where the run is too old to say. certificates: what tables call a
    certify condition -> its certifier with all that bears on a verdict, and how many questions it was asked for.
    """

    data: str
    stamp: str
    threat: str
    canvas: str
    prompt: str
    extraction: str
    attacks: Mapping[str, str]
    code: Mapping[str, int] = field(default_factory=dict)
    certificates: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing in which two protocols differ: the check's name, and what each side has."""

    check: str
    message: str

    def __str__(self) -> str:
        return f"{self.check}: {self.message}"


def protocol_of(model: str, info: Mapping[str, Any], settings: Mapping[str, Any]) -> Protocol:
    """The protocol of one model of a run. info: its run.json. settings: its suite.yaml."""
    card = _named(model, info)
    spec = _named(model, settings)
    data, threat = settings.get("data", {}), settings.get("threat", {})
    conditions = [c["condition"] for c in info.get("cells", ()) if c["model"] == model]
    attacks = {name: attack_of(Condition.parse(name), settings) for name in conditions}
    return Protocol(
        data=info.get("data", {}).get("fingerprint", ""),
        stamp=info.get("data", {}).get("stamp", ""),
        threat=f"{threat.get('norm', 'unknown')} at {', '.join(map(str, threat.get('eps', ('unknown',))))}",
        canvas=f"{spec.get('resolution') or data.get('resolution')} px, {data.get('fit')}",
        prompt=str(card.get("prompt", "")),
        extraction=f"{card.get('decode')}, at most {card.get('max_new_tokens')} new tokens",
        attacks={name: attack for name, attack in attacks.items() if attack},
        code=_code(card, info),
        certificates=_certificates(model, info),
    )


def _code(card: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, int]:
    """An entry that is not smoothed has nothing of the code that smooths."""
    return {part: version for part, version in info.get("code", {}).items() if part != "smooth" or card.get("smooth")}


def _certificates(model: str, info: Mapping[str, Any]) -> dict[str, str]:
    cells = {c["condition"]: c for c in info.get("cells", ()) if c["model"] == model}
    return {title: _certificate(cells[name]) for name, title in titles(cells).items()}


def _certificate(cell: Mapping[str, Any]) -> str:
    """`sequential (n 1000, n0 32, sigma 0.25), 32 questions`; which radii share the samples changes no verdict."""
    facts = {key: value for key, value in cell.get("certifier", {}).items() if key not in ("name", "values", "radii")}
    asked = f"{len(cell['questions'])} questions" if "questions" in cell else "all questions"
    parameters = ", ".join(f"{name} {value}" for name, value in sorted(facts.items()))
    return f"{cell.get('certifier', {}).get('name', 'unknown')} ({parameters}), {asked}"


def _named(model: str, source: Mapping[str, Any]) -> Mapping[str, Any]:
    return next((m for m in source.get("models", ()) if m.get("name") == model), {})


def attack_of(condition: Condition, settings: Mapping[str, Any]) -> str:
    """The attack behind a condition in words, `pgd (restarts 1, steps 20)`; "" where there is none."""
    spec = spec_of(condition, settings)
    if spec is None:
        return ""
    parameters = ", ".join(f"{name} {value}" for name, value in sorted(parameters_of(spec).items()))
    return f"{spec['attack']} ({parameters})" if parameters else str(spec["attack"])


def spec_of(condition: Condition, settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The suite's condition that an attack's cell came from, None for anything but an attack."""
    headline = settings.get("threat", {}).get("headline")
    at_headline = (condition.threat or "").partition(":")[2] == str(headline)
    for spec in settings.get("conditions", ()):
        if isinstance(spec, Mapping) and condition.attack in (spec.get("name"), spec.get("attack")):
            named = spec.get("name") or spec.get("attack")
            if (named, spec.get("transfer") or "") != (condition.attack, condition.source):
                continue
            if spec.get("at", "all") in ("all", "headline" if at_headline else "other"):
                return spec
    return None


def parameters_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the suite says of how an attack is made, beside its name and objectives."""
    plain = {key: spec[key] for key in ("steps", "restarts", "step_size", "rel_step") if spec.get(key) is not None}
    return plain | dict(spec.get("params") or {})


def differences(a: Protocol, b: Protocol, names: tuple[str, str] = ("A", "B")) -> list[Difference]:
    """Why two measurements do not compare, in the order of METHOD's list; [] where they do."""
    kinds = (_plain_differences, _attack_differences, _certificate_differences, _code_differences)
    return [difference for kind in kinds for difference in kind(a, b, names)]


def _plain_differences(a: Protocol, b: Protocol, names: Sequence[str]) -> Iterator[Difference]:
    one, two = names
    if not a.data or not b.data:
        unknown = " and ".join(name for name, side in ((one, a), (two, b)) if not side.data)
        yield Difference("data", f"{unknown} does not say which questions were asked (no run.json beside the records)")
    elif a.data != b.data:
        yield Difference(
            "data", f"other questions were asked: {a.stamp} ({a.data}) in {one}, {b.stamp} ({b.data}) in {two}"
        )
    for check, left, right in (
        ("threat model", a.threat, b.threat),
        ("canvas", a.canvas, b.canvas),
        ("prompt", a.prompt, b.prompt),
        ("extraction", a.extraction, b.extraction),
    ):
        if left != right:
            yield Difference(check, f"{left} in {one}, {right} in {two}")


def _attack_differences(a: Protocol, b: Protocol, names: Sequence[str]) -> Iterator[Difference]:
    one, two = names
    changed: dict[str, list[str]] = {}
    for name in a.attacks.keys() & b.attacks.keys():
        if a.attacks[name] != b.attacks[name]:
            changed.setdefault(f"{a.attacks[name]} in {one}, {b.attacks[name]} in {two}", []).append(name)
    for message, where in sorted(changed.items()):
        yield Difference("attack strength", f"{_listed(sorted(where))}: {message}")
    for name, mine, other in ((one, a, b), (two, b, a)):
        if only := sorted(mine.attacks.keys() - other.attacks.keys()):
            yield Difference(_kind_of_gap(only, other), f"{_listed(only)} only in {name}")


def _kind_of_gap(only: Sequence[str], other: Protocol) -> str:
    """`objectives` where the other side was attacked in the same way at the same sizes, by other objectives."""
    made = {(c.kind, c.threat) for c in map(Condition.parse, other.attacks)}
    same = all((c.kind, c.threat) in made for c in map(Condition.parse, only))
    return "objectives" if same else "attack strength"


def _certificate_differences(a: Protocol, b: Protocol, names: Sequence[str]) -> Iterator[Difference]:
    """Certificates under one title that were not made alike; one that only one side has is no difference."""
    one, two = names
    for title in a.certificates:
        if (mine := a.certificates[title]) != (other := b.certificates.get(title, mine)):
            yield Difference("certificates", f"{title}: {mine} in {one}, {other} in {two}")


def _code_differences(a: Protocol, b: Protocol, names: Sequence[str]) -> Iterator[Difference]:
    one, two = names
    for part in sorted(a.code.keys() & b.code.keys()):
        if a.code[part] != b.code[part]:
            yield Difference("code", f"'{part}' is version {a.code[part]} in {one}, {b.code[part]} in {two}")


def _listed(names: Sequence[str], shown: int = 4) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
