"""Entries of a run in rows, or means and spread over their training seeds: `python benchmarks/seeds.py RUN [--each]`.

RUN is the folder of a run in which entries of one kind differ in their training seed alone and are named so: NAME for
seed 0, NAME-s1 for seed 1, and so on (suites/omnimed_seeds.yaml). A run's intervals say how far a number may be off
because of the questions; the spread here says how far because of the training.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SEED = re.compile(r"-s\d+$")
METRICS = (("clean", "accuracy"), ("clean", "image_gain"), ("worst", "accuracy"))


def by_kind(models: Sequence[str]) -> dict[str, list[str]]:
    """Entry without its seed -> its entries, in the run's order."""
    kinds: dict[str, list[str]] = {}
    for model in models:
        kinds.setdefault(SEED.sub("", model), []).append(model)
    return kinds


def rows(estimates: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One per kind, condition and metric: n, mean, standard deviation of the seeds (n - 1), values in [0, 1]."""
    found = {
        (e["model"], e["condition"], e["metric"]): e
        for e in estimates
        if e["modality"] == "all" and (e["condition"].split("@")[0], e["metric"]) in METRICS
    }
    kinds = by_kind(list(dict.fromkeys(model for model, _, _ in found)))
    lines = []
    for kind, names in kinds.items():
        for condition, metric in dict.fromkeys((c, m) for _, c, m in found):
            seen = [found[name, condition, metric] for name in names if (name, condition, metric) in found]
            if not seen:
                continue
            values = [e["value"] for e in seen]
            lines.append(
                {
                    "entry": kind,
                    "condition": condition,
                    "metric": metric,
                    "n": min(e["n"] for e in seen),
                    "seeds": len(values),
                    "mean": round(statistics.fmean(values), 6),
                    "sd": round(statistics.stdev(values), 6) if len(values) > 1 else None,
                    "values": values,
                }
            )
    return lines


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, in %."""
    text = [
        "| entry | condition | metric | n | mean | sd | each seed |",
        "| --- | --- | --- | ---: | ---: | ---: | --- |",
    ]
    for line in lines:
        spread = "–" if line["sd"] is None else f"{100 * line['sd']:.1f}"
        each = ", ".join(f"{100 * value:.1f}" for value in line["values"])
        text.append(
            f"| {line['entry']} | {line['condition']} | {line['metric']} | {line['n']} | {100 * line['mean']:.1f} | "
            f"{spread} | {each} |"
        )
    return "\n".join(text)


def each(estimates: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, in %: a row for every entry, with the 95% intervals of the run."""
    found = {
        (e["model"], f"{e['condition']} {e['metric']}".removesuffix(" accuracy")): e
        for e in estimates
        if e["modality"] == "all" and (e["condition"].split("@")[0], e["metric"]) in METRICS
    }
    heads = list(dict.fromkeys(head for _, head in found))
    text = [f"| entry | n | {' | '.join(heads)} |", f"| --- | ---: |{' ---: |' * len(heads)}"]
    for model in dict.fromkeys(model for model, _ in found):
        cells = [found.get((model, head)) for head in heads]
        shown = [f"{100 * e['value']:.1f} [{100 * e['low']:.1f}, {100 * e['high']:.1f}]" if e else "–" for e in cells]
        text.append(f"| {model} | {min(e['n'] for e in cells if e)} | {' | '.join(shown)} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--each", action="store_true", help="every entry with its intervals, no means")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    given = parser.parse_args()
    try:
        summary = json.loads((given.run / "summary.json").read_text(encoding="utf-8"))
    except OSError as error:
        parser.error(f"{given.run} is not the folder of a run: {error.strerror}: {error.filename}")
    lines = rows(summary["estimates"])
    if given.json:
        print(json.dumps({"suite": summary["suite"], "data": summary["data"], "rows": lines}))
        return
    shown = each(summary["estimates"]) if given.each else table(lines)
    print(f"{summary['suite']}: {summary['data'].get('stamp', summary['data'])}\n\n{shown}")


if __name__ == "__main__":
    main()
