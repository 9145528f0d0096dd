"""What a gate says, as Markdown, JUnit XML and GitHub annotations."""

from __future__ import annotations

from collections.abc import Iterator
from xml.etree import ElementTree as Xml

from .compare import ALL
from .gate import EACH, VERDICTS, Outcome, Rule, Test

WORDS = {
    "pass": "PASS: no drop beyond what is allowed",
    "improved": "PASS: nothing dropped beyond what is allowed, and something improved",
    "regressed": "REGRESSED",
    "inconclusive": "INCONCLUSIVE: too few questions to tell",
}

HEAD = (
    *("verdict", "rule", "model", "condition", "slice", "n", "before", "after", "drop, pp", "bounds"),
    *("lost / gained", "smallest detectable drop"),
)


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def points(share: float) -> str:
    """A difference in percentage points, with its sign."""
    return f"{100 * share:+.1f}"


def rule_text(rule: Rule) -> str:
    """`accuracy of all models, worst@headline, each modality: may drop 15 pp (alpha 0.05)`."""
    models = "all models" if rule.model == ALL else rule.model
    where = {ALL: "all questions", EACH: "each modality"}.get(rule.slice, rule.slice)
    verb = "rise" if rule.rate else "drop"
    margin = f"may {verb} {rule.allowed_drop:g} pp (alpha {rule.alpha:g})"
    return f"{rule.metric} of {models}, {rule.condition}, {where}: {margin}"


def change(test: Test) -> str:
    """`84.0 → 71.5, drop +12.5 pp [+8.1, +16.9]`."""
    bounds = f"[{points(test.low)}, {points(test.high)}]"
    return f"{percent(test.before)} → {percent(test.after)}, drop {points(test.drop)} pp {bounds}"


def detectable(test: Test, rule: Rule) -> str:
    """`8.7 pp at power 80%`, or that there is none."""
    if test.detectable is None:
        return f"none at power {100 * rule.power:g}%"
    return f"{percent(test.detectable)} pp at power {100 * rule.power:g}%"


def to_markdown(outcome: Outcome) -> str:
    """A summary for people: verdict, rules, and a table of every test. Deterministic."""
    lines = [f"# Robustness gate: {WORDS[outcome.verdict]}", "", f"Data: **{outcome.stamp or 'unknown'}**", ""]
    for number, rule in enumerate(outcome.rules):
        lines += [f"{number + 1}. {rule_text(rule)}"]
    lines += ["", f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    lines += [f"| {' | '.join(map(_cell, row))} |" for row in _rows(outcome)]
    lines += ["", *(f"- {note}" for note in outcome.notes), *([""] if outcome.notes else [])]
    lines += [
        "drop: how much worse, paired by question. bounds: its lower and upper confidence bound, each one-sided at "
        "1 - alpha, clustered by image. regressed: the drop is shown to be larger than allowed (Holm across models and "
        "slices of a rule). pass: it is shown to be smaller. smallest detectable drop: what these questions would have "
        "shown, Holm included.",
        "",
    ]
    return "\n".join(lines)


def _rows(outcome: Outcome) -> Iterator[list[str]]:
    for t in sorted(outcome.tests, key=lambda t: (VERDICTS.index(t.verdict), t.rule)):
        rule = outcome.rules[t.rule]
        verdict = f"**{t.verdict}**" if t.verdict == "regressed" else t.verdict
        row = [verdict, f"{t.rule + 1}", t.model, t.condition, t.slice, f"{t.n:,}"]
        row += [percent(t.before), percent(t.after), points(t.drop), f"[{points(t.low)}, {points(t.high)}]"]
        yield [*row, f"{t.lost} / {t.gained}", detectable(t, rule)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def to_junit(outcome: Outcome, *, strict: bool = False) -> str:
    """One test case per test; a regression is a failure, and so is an inconclusive test where the gate is strict."""
    root = Xml.Element("testsuites", name="safemed-bench gate")
    for number, rule in enumerate(outcome.rules):
        tests = [t for t in outcome.tests if t.rule == number]
        failed = sum(t.verdict == "regressed" or (strict and t.verdict == "inconclusive") for t in tests)
        skipped = sum(not strict and t.verdict == "inconclusive" for t in tests)
        counts = {"tests": str(len(tests)), "failures": str(failed), "skipped": str(skipped), "errors": "0"}
        suite = Xml.SubElement(root, "testsuite", {"name": rule_text(rule), **counts})
        for t in tests:
            case = Xml.SubElement(suite, "testcase", classname=f"gate.{t.model}", name=f"{t.condition} {t.slice}")
            text = f"{t.verdict}: {change(t)}; smallest detectable drop {detectable(t, rule)}"
            if t.verdict == "regressed" or (strict and t.verdict == "inconclusive"):
                Xml.SubElement(case, "failure", type=t.verdict, message=text)
            elif t.verdict == "inconclusive":
                Xml.SubElement(case, "skipped", message=text)
            else:
                Xml.SubElement(case, "system-out").text = text
    Xml.indent(root)
    return Xml.tostring(root, encoding="utf-8", xml_declaration=True).decode() + "\n"


def to_annotations(outcome: Outcome) -> list[str]:
    """Workflow commands of GitHub Actions: an error per regression, a warning per inconclusive test, one notice."""
    kinds = {"regressed": "error", "inconclusive": "warning"}
    lines = []
    for t in outcome.tests:
        if t.verdict in kinds:
            rule = outcome.rules[t.rule]
            text = f"{change(t)}, allowed {rule.allowed_drop:g} pp; smallest detectable drop {detectable(t, rule)}"
            title = f"{t.verdict}: {t.model}, {t.condition}, {t.slice}"
            lines.append(f"::{kinds[t.verdict]} title={_property(title)}::{_data(text)}")
    return [*lines, f"::notice title=Robustness gate::{_data(WORDS[outcome.verdict])}"]


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
