"""The page of a training: `training.html` beside its metrics.jsonl, one file without scripts and without a network."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from ..core.journal import write_atomic
from ..results.intervals import proportion
from ..training.settings import AdversarySettings
from .figures import number
from .history import History, Line, Stage, read_history, seconds
from .jinja import template
from .page import PHANTOM, shown
from .panels import Panel, panels

PAGE = "training.html"
ROBUSTNESS_QUESTIONS = 64
"""Most questions of a look for catastrophic overfitting: CHUNK of training/validate.py, which is not for here."""

ALARM: float = AdversarySettings.model_fields["alarm"].default


def write_training_page(folder: Path) -> Path:
    """Write the page of the training in `folder` into it; returns its path. Raises what `training_page` raises."""
    path = folder / PAGE
    write_atomic(path, training_page(folder).encode())
    return path


def training_page(folder: Path) -> str:
    """The page of the training in `folder` as HTML; the same files give the same bytes.

    Raises UsageError where there is no metrics.jsonl, DataError with file and line where a file is broken.
    """
    history = read_history(folder)
    config = history.config
    return template("training.html.j2").render(
        name=config.get("name") or folder.resolve().name,
        description=history.entry.get("description") or "",
        stamp=stamp(config),
        warnings=_overfitting(history) + _not_finite(history),
        notes=history.notes,
        facts=_facts(history),
        stages=_stages(history),
        panels=figures(history),
        config=yaml.safe_dump(config, sort_keys=False, allow_unicode=True, width=100) if config else "",
    )


# -- what it was trained on, and how -----------------------------------------------------------------------------------


def stamp(config: Mapping[str, Any]) -> tuple[str, str, str]:
    """(kind, name, words) of the data of a training; it stands above everything that is shown of it."""
    data = config.get("data") or {}
    if data.get("name") == "phantom":
        return "phantom", "PHANTOM DATA", PHANTOM
    if data.get("name") == "omnimedvqa":
        root = Path(data.get("root") or "")
        return "real", "OmniMedVQA", f"folder {root.name or root}, split scheme {data.get('scheme', 'auto')}"
    return "unknown", "DATA UNKNOWN", "the files of this training do not say what it was trained on"


def _facts(history: History) -> list[tuple[str, str, str]]:
    """(what, value, small print) for the head of the page."""
    config, entry, steps = history.config, history.entry, history.steps
    facts = []
    looks = [line for line in history.of("validation") if "accuracy/all" in line.values]
    if looks:
        facts.append(("Last validation accuracy", *_share(history, looks[-1], "accuracy/all")))
    attacked = [line for line in history.of("robustness") if "robust/pgd20" in line.values]
    if attacked:
        facts.append(("Last look, PGD-20", *_share(history, attacked[-1], "robust/pgd20")))
    whole = f"of {history.planned:,}" if history.planned > steps else ""
    stages = len(history.stages)
    facts.append(("Steps", f"{steps:,}", ", ".join(filter(None, (whole, f"{stages} stage{'s' * (stages != 1)}")))))
    if spent := seconds(history):
        facts.append(("Time of the steps", _duration(spent), "without validation"))
    if config:
        start = str(config.get("init", "tiny"))
        start = "random weights" if start == "tiny" else start
        facts.append(("Started from", start, f"seed {config.get('seed', '?')}"))
    if entry:
        how = (f"prompt {entry.get('prompt', '?')}", f"at most {entry.get('max_new_tokens', '?')} tokens")
        facts.append(("Verdict read by", str(entry.get("decode") or "default of the prompt"), ", ".join(how)))
    return facts


def _share(history: History, line: Line, metric: str) -> tuple[str, str]:
    """A share with its interval where n is known, for the head of the page."""
    value, n, at = line.values[metric], _questions(history, line), f"at step {line.step:,}"
    if n is None:
        return f"{100 * value:.1f}%", f"{at}; n is not known"
    low, high = _interval(value, n)
    return f"{100 * value:.1f}%", f"[{100 * low:.1f}, {100 * high:.1f}], n ≤ {n}, {at}"


def _duration(spent: float) -> str:
    minutes = round(spent / 60)
    if minutes < 1:
        return f"{spent:.0f} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def _stages(history: History) -> list[dict[str, str]]:
    """The table of stages, without columns that are empty in all of them."""
    rows = [_stage(stage) for stage in history.stages]
    return [{key: row[key] for key in row if any(other[key] != "–" for other in rows)} for row in rows]


def _stage(stage: Stage) -> dict[str, str]:
    """A row of the table of stages."""
    config, adversary = stage.config, stage.adversary
    row = {"stage": stage.name, "steps": f"{stage.end - stage.begin:,}"}
    if not config:
        return row
    grpo = "AT-GRPO" if adversary else "GRPO"
    weights = [task.get("weight", 1.0) for task in config.get("tasks", ())]
    tasks = [
        f"{task.get('kind', '?')}{f' {weight / sum(weights):.0%}' if len(weights) > 1 else ''}"
        for task, weight in zip(config.get("tasks", ()), weights, strict=True)
    ]
    return row | {
        "method": grpo if stage.grpo else "adversarial SFT" if adversary else "SFT",
        "tasks": ", ".join(tasks),
        "batch": str(config.get("batch_size", "?")),
        "learning rate": number(config["learning_rate"]) if "learning_rate" in config else "?",
        "attack": _attack(adversary) if adversary else "–",
        "noise": ", ".join(f"σ {number(sigma)}" for sigma in config.get("noise", ())) or "–",
    }


def _attack(adversary: Mapping[str, Any]) -> str:
    eps, norm = adversary.get("eps", 0.0), adversary.get("norm", "linf")
    steps = round(255 * eps, 6)
    size = f"{number(steps)}/255" if norm == "linf" and steps == int(steps) else number(eps)
    words = [f"PGD-{adversary.get('steps', '?')}", f"{'L∞' if norm == 'linf' else norm.upper()} {size}"]
    words += [f"on {adversary['share']:.0%} of a batch"] if adversary.get("share", 1) < 1 else []
    words += ["growing"] if adversary.get("curriculum") else []
    return ", ".join(words)


# -- what has to be said -----------------------------------------------------------------------------------------------


def _overfitting(history: History) -> list[str]:
    """A sentence where the training attack leaves far more than PGD-20 does."""
    looks = [line for line in history.of("robustness") if {"robust/train_attack", "robust/pgd20"} <= line.values.keys()]
    alarmed = [line for line in looks if _gap(line) > _alarm(history, line)]
    if not alarmed:
        return []
    worst = max(alarmed, key=_gap)
    times = f"{len(alarmed)} of {len(looks)} looks raise the alarm" if len(looks) > 1 else "The only look raises it"
    since = "" if alarmed[-1] is looks[-1] else f"; the last one, at step {looks[-1].step:,}, does not"
    return [
        f"Catastrophic overfitting? At step {worst.step:,} the training attack leaves "
        f"{worst.values['robust/train_attack']:.1%} of the questions right, PGD-20 only "
        f"{worst.values['robust/pgd20']:.1%}: a gap of {100 * _gap(worst):.1f} points, where "
        f"{100 * _alarm(history, worst):.0f} raise the alarm. {times}{since}. The model may have learnt to mislead the "
        "weak attack it is trained with, not to withstand a strong one (arXiv 2001.03994); more attack steps or a "
        "smaller rel_step help."
    ]


def _gap(line: Line) -> float:
    return line.values["robust/train_attack"] - line.values["robust/pgd20"]


def _alarm(history: History, line: Line) -> float:
    at = history.stage_at(line.step)
    adversary = history.stages[at].adversary if history.stages else {}
    return float(adversary.get("alarm", ALARM))


def _not_finite(history: History) -> list[str]:
    for line in history.lines:
        if broken := [name for name, value in line.values.items() if not np.isfinite(value)]:
            return [f"Not a number at step {line.step:,}: {', '.join(broken)}. Gaps in the curves are such values."]
    return []


# -- intervals ---------------------------------------------------------------------------------------------------------


def _questions(history: History, line: Line) -> int | None:
    """How many questions an event was measured on at most, None where nothing tells."""
    asked = history.config.get("eval_questions")
    if not asked:
        return None
    return int(asked) if line.event == "validation" else min(int(asked), ROBUSTNESS_QUESTIONS)


def _band(history: History, name: str, lines: Sequence[Line]) -> tuple[tuple[float, float, float], ...]:
    """95% intervals of a share that all of an event's questions have part in; of a question type n is not known."""
    if name not in ("accuracy/all", "robust/train_attack", "robust/pgd20"):
        return ()
    rows = [(line.step, line.values.get(name), _questions(history, line)) for line in lines]
    return tuple((float(step), *_interval(value, n)) for step, value, n in rows if value is not None and n)


def _interval(value: float, n: int) -> tuple[float, float]:
    right = round(value * n)
    found = proportion((np.arange(n) < right).astype(float), np.arange(n))
    return found.low, found.high


# -- figures -----------------------------------------------------------------------------------------------------------


def figures(history: History, keys: Container[str] | None = None) -> list[dict[str, Any]]:
    """The figures of a training as templates/panel.html.j2 needs them: all of them, or those of `keys`."""
    found = panels(history, lambda name, lines: _band(history, name, lines))
    return [_shown(history, panel) for panel in found if keys is None or panel.spec.key in keys]


def _shown(history: History, panel: Panel) -> dict[str, Any]:
    """A figure as the template needs it."""
    spec, notes = panel.spec, list(panel.notes)
    if any(curve.band for curve in panel.chart.curves):
        n = _questions(history, history.of(spec.event)[-1])
        notes.append(f"Bands: 95% intervals of {n} questions; with fewer in the split they are wider.")
    unit = "pixel scale" if spec.unit == "k/255" and not panel.in_255ths else spec.unit
    return shown(panel.chart, panel.data, key=spec.key, section=spec.section, title=spec.title, unit=unit, notes=notes)
