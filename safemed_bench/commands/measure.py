"""run, validate."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import IncompleteError, ModelError, SuiteError
from . import output as out
from .prepare import Request, cards_of, data_problems, output_of, plans_of, suites_of

if TYPE_CHECKING:
    from ..suite.plan import Plan
    from ..suite.schema import Suite


def run(
    references: Sequence[str],
    request: Request,
    *,
    output: str | None,
    resume: bool,
    retry_errors: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure every suite in turn, as far as it can be measured here.

    Raises at the end, after everything is printed: ModelError where entries are absent or could not be loaded, else
    IncompleteError where more is missing than run.fail_on_error allows.
    """
    from ..results import render
    from ..run.progress import make_reporter

    suites = suites_of(references, request)
    plans, absent = plans_of(suites, request)
    reports: list[dict[str, Any]] = []
    unloaded: list[str] = []
    complaints: list[str] = []
    for plan in plans:
        folder = output_of(plan.suite, output, len(suites) > 1)
        if not quiet:
            _announce(plan)
        report, failed = _measure(plan, folder, request, resume, retry_errors, make_reporter(quiet=quiet))
        reports.append(report)
        unloaded += failed
        complaints += [] if failed else _incomplete(plan, folder, report["outcome"])
        if report["summary"] and not as_json:
            render(report["summary"], out.results())
        if not quiet:
            out.note(f"report: {report['report'] or folder}")
    if as_json:
        out.print_json({"runs": reports})
    if absent or unloaded:
        raise ModelError("\n".join((*absent, *unloaded, *complaints)))
    if complaints:
        raise IncompleteError("\n".join(complaints))


def _announce(plan: Plan) -> None:
    out.note(f"{plan.suite.name}: {plan.dataset.stamp}, {len(plan.dataset.questions):,} questions")
    for message in (*plan.notes, *data_problems(plan)):
        out.note(f"note: {message}")


def _measure(
    plan: Plan, folder: Path, request: Request, resume: bool, retry_errors: bool, reporter: Any
) -> tuple[dict[str, Any], list[str]]:
    """One suite's report, without a summary where nothing was measured; and what is said of models that failed."""
    from ..report.run import write_page
    from ..report.source import read_source
    from ..run import RECORDS, ModelsFailedError, execute

    failed: list[str] = []
    try:
        outcome = execute(
            plan, folder, resume=resume, retry_errors=retry_errors, reporter=reporter, plugins=request.plugins
        )
    except ModelsFailedError as error:
        outcome, failed = error.outcome, [f"{plan.suite.name}: {line}" for line in str(error).splitlines()]
    source = read_source(folder) if (folder / RECORDS).stat().st_size else None
    return {
        "suite": plan.suite.name,
        "output": str(folder),
        "outcome": asdict(outcome),
        "report": str(write_page(source)) if source else None,
        "summary": source.summary if source else None,
    }, failed


def _incomplete(plan: Plan, folder: Path, outcome: dict[str, Any]) -> list[str]:
    """What to say where more is missing than the suite allows."""
    lost, total, allowed = outcome["errors"] + outcome["missing"], outcome["total"], plan.suite.run.fail_on_error
    if lost <= allowed * total:
        return []
    return [
        f"{plan.suite.name}: {lost:,} of {total:,} units have no verdict ({lost / total:.2%}, allowed {allowed:.2%}). "
        f"The reasons are in {folder / 'records.jsonl'}; --retry-errors tries them again"
    ]


def validate(references: Sequence[str], request: Request, *, as_json: bool) -> None:
    """Every problem of every suite. Weights or data that are not on this machine are notes, not problems."""
    try:
        suites = suites_of(references, request)
    except SuiteError as error:
        if as_json:
            out.print_json({"ok": False, "suites": [], "problems": [asdict(p) for p in error.problems]})
        raise
    notes = {suite.name: _absent(suite) for suite in suites}
    if as_json:
        listed = [{"suite": suite.name, "notes": notes[suite.name], "resolved": suite.to_dict()} for suite in suites]
        out.print_json({"ok": True, "suites": listed, "problems": []})
        return
    for suite in suites:
        out.results().print(f"{suite.name}: valid", markup=False)
        for message in notes[suite.name]:
            out.note(f"note: {message}")


def _absent(suite: Suite) -> list[str]:
    missing = []
    if suite.data.name == "omnimedvqa" and not suite.data.root:
        missing.append("data.root names no folder; set SAFEMED_OMNIMEDVQA or --set data.root=FOLDER")
    keys = {model.name: model.api.key_env for model in suite.models if model.api and model.api.key_env}
    missing += [
        f"{name}: ${key} is not set, which holds its key" for name, key in keys.items() if key not in os.environ
    ]
    return missing + cards_of(suite)[1]
