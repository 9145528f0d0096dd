"""compare, gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import UsageError, did_you_mean
from . import output as out

if TYPE_CHECKING:
    from ..results.compare import Pair, Row
    from ..results.gate import Outcome, Rule
    from ..results.sources import Measured


def compare(
    a: str, b: str, *, models: Sequence[str], conditions: Sequence[str], allow: Sequence[str], as_json: bool
) -> None:
    """Two measurements side by side. Raises DataError where they do not compare, UsageError for unknown names."""
    from ..results.compare import compare as work
    from ..results.compare import pair_up, unmatched
    from ..results.protocol import OWN
    from ..results.sources import load_measured

    if unknown := [word for word in allow if word not in OWN]:
        raise UsageError(f"--allow {unknown[0]}: cannot be waived.{did_you_mean(unknown[0], OWN)}")
    left, right = load_measured(a), load_measured(b)
    pairs = pair_up(left, right, models, allow)
    rows = list(work(pairs, conditions))
    notes = unmatched(left, right, pairs)
    stamp = pairs[0].a.protocol.stamp
    if as_json:
        differences = [{"model": p.label, **asdict(d)} for p in pairs for d in p.waived]
        out.print_json({"a": a, "b": b, "data": stamp, "rows": [r.to_dict() for r in rows], "waived": differences})
    else:
        _print_rows(stamp, a, b, rows)
    for line in notes:
        out.note(f"note: {line}")


def _print_rows(stamp: str, a: str, b: str, rows: Sequence[Row]) -> None:
    console = out.results()
    console.print(f"data: {stamp}", markup=False, soft_wrap=True)
    console.print(f"A: {a}\nB: {b}", markup=False, soft_wrap=True)
    header = ("condition", "slice", "n", "A, %", "B, %", "B - A, pp", "lost", "gained", "p", "p Holm")
    for model in dict.fromkeys(row.model for row in rows):
        lines = [
            (
                r.condition,
                r.slice,
                r.difference.n,
                f"{100 * r.a:.1f}",
                f"{100 * r.b:.1f}",
                f"{100 * r.difference.value:+.1f} [{100 * r.difference.low:+.1f}, {100 * r.difference.high:+.1f}]",
                r.lost,
                r.gained,
                f"{r.p:.2g}",
                f"{r.p_holm:.2g}",
            )
            for r in rows
            if r.model == model
        ]
        out.print_table(console, model, header, lines)
    console.print(
        "95% intervals of the paired difference, clustered by image. lost, gained: questions that turned wrong, and "
        "right. p: exact McNemar; p Holm: across the slices of one model and condition.",
        markup=False,
    )


def gate(
    run: str,
    baseline: str,
    *,
    models: Sequence[str],
    suite: str | None,
    strict: bool,
    markdown: str | None,
    junit: str | None,
    github: bool,
    as_json: bool,
) -> int:
    """Hold a run against a baseline; returns the exit code: 0, 4 regressed, 5 inconclusive where strict.

    Raises DataError where the two do not compare, UsageError for a rule about nothing, IncompleteError where verdicts
    are missing.
    """
    from ..core.journal import write_atomic
    from ..results import gate_formats as formats
    from ..results.compare import pair_up, unmatched
    from ..results.gate import gate as work
    from ..results.sources import load_measured

    left, right = load_measured(baseline), load_measured(run)
    pairs = pair_up(left, right, [_turned(word) for word in models], names=("the baseline", "the run"))
    notes = unmatched(left, right, pairs, ("the baseline", "the run"))
    outcome = work(pairs, _rules(suite, pairs, narrowed=bool(models)), notes)
    code = outcome.exit_code(strict)
    if markdown:
        write_atomic(Path(markdown), formats.to_markdown(outcome).encode())
    if junit:
        write_atomic(Path(junit), formats.to_junit(outcome, strict=strict).encode())
    if as_json:
        out.print_json({"run": run, "baseline": baseline, "strict": strict, "exit_code": code, **outcome.to_dict()})
    else:
        _print_outcome(outcome)
    for line in formats.to_annotations(outcome) if github else [f"note: {note}" for note in notes]:
        out.note(line)
    return code


def _turned(word: str) -> str:
    """`--model run=baseline` as the baseline comes first."""
    left, equals, right = word.partition("=")
    return f"{right}={left}" if equals else word


def _rules(suite: str | None, pairs: Sequence[Pair], narrowed: bool) -> tuple[Rule, ...]:
    """The rules of a suite file, else of the run's own suite, else the default ones.

    Where the models were narrowed, rules about others are left out.
    """
    from ..results.gate import DEFAULT_RULES, Rule
    from ..suite import GateRule, load_suite

    if suite is not None:
        specs = load_suite(suite).gate
    else:
        specs = tuple(GateRule.model_validate(rule) for rule in _own(pairs[0].b))
    rules = tuple(Rule(**spec.model_dump()) for spec in specs) or DEFAULT_RULES
    names = {"all", *(p.a.model for p in pairs), *(p.b.model for p in pairs)}
    kept = tuple(rule for rule in rules if not narrowed or rule.model in names)
    if not kept:
        raise UsageError("no rule of the suite is about the chosen models")
    return kept


def _own(run: Measured) -> Sequence[object]:
    return run.settings.get("gate") or ()


def _print_outcome(outcome: Outcome) -> None:
    from ..results import gate_formats as formats

    console = out.results()
    console.print(f"data: {outcome.stamp}", markup=False, soft_wrap=True)
    for number, rule in enumerate(outcome.rules):
        header = ("verdict", "model", "condition", "slice", "n", "before → after, %; drop", "smallest detectable drop")
        lines = [
            (t.verdict, t.model, t.condition, t.slice, t.n, formats.change(t), formats.detectable(t, rule))
            for t in outcome.tests
            if t.rule == number
        ]
        out.print_table(console, f"rule {number + 1}: {formats.rule_text(rule)}", header, lines)
    console.print(formats.WORDS[outcome.verdict], markup=False)
