"""Did a model get weaker? Rules, the tests they stand for, and a verdict on each.

regressed      the drop is shown to be larger than the rule allows (Holm across the models and slices of the rule)
improved       a gain is shown (Holm likewise)
pass           the drop is shown to be smaller than the rule allows: non-inferior. Not adjusted: a gate passes only
               where every test does, which keeps the chance of a false pass at alpha (intersection-union, Berger 1982)
inconclusive   none of these: the questions do not suffice

Alpha is thus the chance that a rule fails a model that dropped by no more than it allows, however many slices it has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ..core.errors import DataError, IncompleteError, UsageError, did_you_mean
from .certified import held
from .compare import ALL, Pair, Slice, holm, paired, slices
from .noninferiority import PairedDrop, paired_drop
from .sources import Measured

Metric = Literal["accuracy", "certified_accuracy", "invalid_rate", "truncated_rate"]
Verdict = Literal["pass", "regressed", "improved", "inconclusive"]

VERDICTS: tuple[Verdict, ...] = ("regressed", "inconclusive", "improved", "pass")
"""The worst first."""
EACH = "each"
HEADLINE = "@headline"
REGRESSED, INCONCLUSIVE = 4, 5
"""Exit codes; the second only where the gate is strict."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What must not get worse, and by how much it may.

    condition: of the suite, or `worst@headline`; of metric certified_accuracy `certified@l2:R`. model: a name or `all`.
    slice: a modality, `all` questions together, or `each` modality. allowed_drop: the margin in percentage points, of
    accuracy or, for a rate of unreadable answers, of its rise. alpha: chance of a false alarm. power: at which the
    smallest detectable drop is stated.
    """

    metric: Metric = "accuracy"
    condition: str = "worst@headline"
    model: str = ALL
    slice: str = ALL
    allowed_drop: float = 5.0
    alpha: float = 0.05
    power: float = 0.8

    @property
    def margin(self) -> float:
        return self.allowed_drop / 100

    @property
    def rate(self) -> bool:
        """Whether the metric is a share of what should not be: it may rise, not drop."""
        return self.metric.endswith("_rate")


DEFAULT_RULES = (
    Rule(condition="clean", allowed_drop=3),
    Rule(condition="worst@headline", allowed_drop=5),
    Rule(condition="worst@headline", slice=EACH, allowed_drop=15),
)
"""Where a suite has none. A margin is what one is willing to lose; these suit a suite of some hundred questions."""


@dataclass(frozen=True, slots=True)
class Test:
    """One rule on one model and slice. Shares are in [0, 1].

    before, after: the metric in the baseline and in the run, over the n paired questions. drop: how much worse it got,
    low and high its one-sided bounds at 1 - alpha each, with the added flips of noninferiority.py. p_regressed and
    p_improved are adjusted, p_pass is not. detectable: the smallest drop that these questions would have shown with the
    rule's power, were it the only one of the rule's tests; None where there is no such drop.
    """

    rule: int
    model: str
    condition: str
    slice: str
    verdict: Verdict
    n: int
    images: int
    before: float
    after: float
    drop: float
    low: float
    high: float
    lost: int
    gained: int
    p_regressed: float
    p_improved: float
    p_pass: float
    detectable: float | None


@dataclass(frozen=True)
class Outcome:
    """What a gate says. notes: what the reader should know, such as models that are in one side only."""

    verdict: Verdict
    rules: tuple[Rule, ...]
    tests: tuple[Test, ...]
    stamp: str
    notes: tuple[str, ...] = ()

    def exit_code(self, strict: bool) -> int:
        if self.verdict == "regressed":
            return REGRESSED
        return INCONCLUSIVE if strict and self.verdict == "inconclusive" else 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "data": self.stamp,
            "rules": [asdict(rule) for rule in self.rules],
            "tests": [asdict(test) for test in self.tests],
            "notes": list(self.notes),
        }


def gate(pairs: Sequence[Pair], rules: Sequence[Rule], notes: Sequence[str] = ()) -> Outcome:
    """Hold every rule against every pair (a: baseline, b: run) that it is about.

    Raises UsageError for a rule that is about nothing here, IncompleteError where more verdicts are missing than the
    suite of the run allows (run.fail_on_error): what was not measured is not taken to be as good as it was.
    """
    tests: list[Test] = []
    for number, rule in enumerate(rules):
        found = [(pair, name, part) for pair in pairs for name, part in _about(pair, rule)]
        if not found:
            raise UsageError(_nothing(number, rule, pairs))
        _check_complete(found)
        tests += _tests(number, rule, found)
    stamp = pairs[0].b.protocol.stamp
    return Outcome(overall([t.verdict for t in tests]), tuple(rules), tuple(tests), stamp, tuple(notes))


def overall(verdicts: Sequence[Verdict]) -> Verdict:
    """The gate's verdict: the worst of its tests'; `improved` where one is and all others pass."""
    return min(verdicts, key=VERDICTS.index)


def resolve(condition: str, info: Mapping[str, Any]) -> str:
    """`worst@headline` with the headline of a run in place of the word."""
    headline = info.get("headline")
    return condition.replace(HEADLINE, f"@{headline}") if headline else condition


def _about(pair: Pair, rule: Rule) -> list[tuple[str, Slice]]:
    """The condition and the slices of one pair that a rule tests."""
    name = resolve(rule.condition, pair.b.info)
    before, after = (_measured(side, rule) for side in (pair.a, pair.b))
    if rule.model not in (ALL, pair.a.model, pair.b.model) or name not in before:
        return []
    if name not in after:
        raise DataError(f"{pair.label}: the run has no {name}, which the baseline has and a rule asks for")
    if rule.metric == "certified_accuracy":
        parts = paired(pair.a.verdicts, *(held(side.verdicts)[name] for side in (pair.a, pair.b)))
    else:
        status = rule.metric.removesuffix("_rate") if rule.rate else ""
        parts = slices(pair.a.verdicts, pair.b.verdicts, name, status=status)
    return [(name, s) for s in parts if rule.slice == s.name or (rule.slice == EACH and s.name != ALL)]


def _measured(side: Measured, rule: Rule) -> list[str]:
    """The conditions that a rule's metric can be about."""
    return list(held(side.verdicts)) if rule.metric == "certified_accuracy" else side.conditions


def _nothing(number: int, rule: Rule, pairs: Sequence[Pair]) -> str:
    names = list(dict.fromkeys(p.b.model for p in pairs))
    if rule.model not in (ALL, *names):
        return f"gate.{number}.model: no model '{rule.model}' is compared.{did_you_mean(rule.model, names)}"
    conditions = list(dict.fromkeys(c for p in pairs for c in _measured(p.b, rule)))
    name = resolve(rule.condition, pairs[0].b.info)
    if name not in conditions:
        return f"gate.{number}.condition: '{name}' was not measured.{did_you_mean(name, conditions)}"
    known = sorted({str(m) for p in pairs for m in p.b.verdicts.questions["modality"].dropna()})
    return f"gate.{number}.slice: no question is of '{rule.slice}'.{did_you_mean(rule.slice, known)}"


def _check_complete(found: Sequence[tuple[Pair, str, Slice]]) -> None:
    for pair, name, part in found:
        lost = part.planned - len(part.a)
        allowed = float(pair.b.settings.get("run", {}).get("fail_on_error", 0.0))
        if lost > allowed * part.planned:
            raise IncompleteError(
                f"{pair.label}, {name}, {part.name}: {lost:,} of {part.planned:,} questions have no verdict in the "
                f"run or in the baseline ({lost / part.planned:.2%}, allowed {allowed:.2%}); nothing is said of what "
                "was not measured"
            )


def _tests(number: int, rule: Rule, found: Sequence[tuple[Pair, str, Slice]]) -> list[Test]:
    drops = [paired_drop(part.a, part.b, part.images) for _, _, part in found]
    worse = holm([d.p_above(rule.margin) for d in drops])
    better = holm([d.p_below(0.0) for d in drops])
    level = rule.alpha / len(drops)

    def shown(values: Any) -> float:
        share = float(values.mean()) if len(values) else float("nan")
        return 1 - share if rule.rate else share

    tests = []
    for (pair, name, part), drop, p_worse, p_better in zip(found, drops, worse, better, strict=True):
        low, high = drop.bounds(rule.alpha)
        tests.append(
            Test(
                rule=number,
                model=pair.label,
                condition=name,
                slice=part.name,
                verdict=_verdict(rule, drop, p_worse, p_better),
                n=drop.n,
                images=drop.images,
                before=shown(part.a),
                after=shown(part.b),
                drop=drop.drop,
                low=low,
                high=high,
                lost=drop.lost,
                gained=drop.gained,
                p_regressed=p_worse,
                p_improved=p_better,
                p_pass=drop.p_below(rule.margin),
                detectable=drop.detectable(rule.margin, level, rule.power),
            )
        )
    return tests


def _verdict(rule: Rule, drop: PairedDrop, worse: float, better: float) -> Verdict:
    if worse <= rule.alpha:
        return "regressed"
    if better <= rule.alpha:
        return "improved"
    return "pass" if drop.p_below(rule.margin) <= rule.alpha else "inconclusive"
