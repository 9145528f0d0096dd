"""Is a number to be believed? Small checks on what one model answered, each with its rule and its evidence.

A check takes the `Verdicts` of one model and gives a `Diagnostic`, or None where the run has nothing to check. A new
one is a function in CHECKS and a paragraph in docs/diagnostics.md; what they say stands in summary.json under
`diagnostics`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from ..frames import Verdicts
from .answers import constraint_audit, coverage, image_reliance, readable, repeat_run, zero_eps
from .ascent import (
    budget_used,
    convergence,
    dead_gradients,
    finite_difference,
    loss_noise,
    silent_success,
    unseen_success,
)
from .base import Diagnostic, Status
from .certified import certified_below_empirical
from .strength import (
    iterative_against_fgsm,
    monotone_effort,
    monotone_eps,
    unbounded_reaches_floor,
    white_box_against_black,
)

__all__ = ["CHECKS", "Diagnostic", "Status", "certified_below_empirical", "diagnose"]

Check = Callable[[Verdicts], Diagnostic | None]
CHECKS: Mapping[str, Check] = {
    "coverage": coverage,
    "constraint-audit": constraint_audit,
    "zero-eps-equals-clean": zero_eps,
    "repeat-run": repeat_run,
    "readable-answers": readable,
    "image-reliance": image_reliance,
    "gradient-is-slope": finite_difference,
    "loss-noise": loss_noise,
    "dead-gradients": dead_gradients,
    "budget-used": budget_used,
    "convergence": convergence,
    "silent-success": silent_success,
    "unseen-success": unseen_success,
    "iterative-not-weaker-than-fgsm": iterative_against_fgsm,
    "white-box-not-weaker": white_box_against_black,
    "monotone-in-eps": monotone_eps,
    "monotone-in-effort": monotone_effort,
    "unbounded-reaches-floor": unbounded_reaches_floor,
    "certified-below-empirical": certified_below_empirical,
}
"""By the id that each gives its Diagnostic."""


def diagnose(verdicts: Verdicts) -> Iterator[dict[str, Any]]:
    """What every check says of one model, in the order of CHECKS, as plain values for the summary."""
    for check in CHECKS.values():
        if (found := check(verdicts)) is not None:
            yield {"model": verdicts.model, **asdict(found)}
