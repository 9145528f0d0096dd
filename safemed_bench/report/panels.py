"""Which figures a training has: a table of what may be drawn, and the curves that its metrics give."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .figures import CYCLE, Chart, Curve, Level, Scale, Span, number
from .history import History, Line, Stage

POINTS, ROWS = 500, 60
"""Most points of a curve, and most rows of a table."""

Lookup = Callable[[History, Stage], float | None]


@dataclass(frozen=True)
class Spec:
    """A figure that may be drawn. metrics: pattern of the metrics that are its curves; its groups are their labels.

    unit: what the numbers are; where it is "k/255" they are on the [0, 1] pixel scale. event: the lines they are from,
    "" for the training steps. also: a metric that is in the table only. level: a value per stage to compare with.
    """

    key: str
    section: str
    title: str
    unit: str
    metrics: str
    scale: Scale = "linear"
    note: str = ""
    event: str = ""
    also: str = ""
    level: tuple[str, Lookup] | None = None

    def label(self, metric: str) -> str | None:
        """The name of a metric's curve, None for a metric of another figure."""
        found = re.fullmatch(self.metrics, metric)
        return " ".join(found.groups()).replace("_", " ") if found else None


def _longest(history: History, stage: Stage) -> float | None:
    return (stage.grpo.get("max_new_tokens") or history.config.get("max_new_tokens")) if stage.grpo else None


SPECS = (
    Spec(
        "validation",
        "Validation",
        "Validation accuracy",
        "share of questions",
        r"accuracy/(.+)",
        "share",
        "Clean images of the validation split, judged on the deployed path; the split of the test is not touched.",
        event="validation",
    ),
    Spec(
        "validation-invalid",
        "Validation",
        "Invalid answers",
        "share of questions",
        r"(invalid)_rate",
        "share",
        "Replies that no answer can be read from. They count as wrong above.",
        event="validation",
    ),
    Spec(
        "robustness",
        "Validation",
        "Accuracy under attack",
        "share of questions",
        r"robust/(train_attack|pgd20)",
        "share",
        "The training attack and PGD-20 at the full radius, on validation questions. A wide gap says that the model "
        "misleads the weak attack it is trained with instead of withstanding a strong one (arXiv 2001.03994).",
        event="robustness",
        also="robust/gap",
    ),
    Spec(
        "loss",
        "Loss",
        "Loss per task",
        "nats per token",
        r"loss/(?!(?:policy|consistency)$)(.+)",
        "log",
        "A batch holds one task, so that tasks are told apart; tokens may be weighted (letter_weight).",
    ),
    Spec(
        "policy-loss",
        "Loss",
        "Policy loss",
        "what is descended",
        r"loss/(policy|consistency)",
        note="The clipped policy gradient hovers about zero by construction; rewards tell whether it learns.",
    ),
    Spec(
        "reward-accuracy",
        "Rewards",
        "Accuracy reward",
        "share of rollouts",
        r"reward/accuracy/(.+)",
        "share",
        "Sampled rollouts on training questions. Right answers on a shuffled image are right without looking.",
    ),
    Spec("reward-format", "Rewards", "Format reward", "share of rollouts", r"reward/format/(.+)", "share"),
    Spec("reward-total", "Rewards", "Total reward", "weighted sum", r"reward/total/(.+)"),
    Spec("reward-other", "Rewards", "Other rewards", "mean", r"reward/(?!(?:accuracy|format|total)/)(.+)/(.+)"),
    Spec(
        "zero-variance",
        "Rewards",
        "Groups that teach nothing",
        "share of groups",
        r"(zero_variance_groups)",
        "share",
        "All rollouts of such a group have one reward, and with it no advantage.",
    ),
    Spec("length", "Rollouts", "Length of rollouts", "tokens", r"length/(.+)", level=("longest rollout", _longest)),
    Spec(
        "invalid",
        "Rollouts",
        "Invalid rollouts",
        "share of rollouts",
        r"invalid_rate/(.+)",
        "rate",
        "No answer can be read from them; they count as wrong.",
    ),
    Spec(
        "truncated",
        "Rollouts",
        "Truncated rollouts",
        "share of rollouts",
        r"truncated_rate/(.+)",
        "rate",
        "Not finished within the limit; they count as wrong.",
    ),
    Spec("entropy", "Rollouts", "Entropy of the policy", "nats per token", r"(entropy)"),
    Spec(
        "kl",
        "Rollouts",
        "KL to the start of the stage",
        "nats per token",
        r"(kl)",
        note="The k3 estimate of arXiv 2402.03300, which is never negative.",
    ),
    Spec("clip", "Rollouts", "Clipped tokens", "share of tokens", r"(clip_fraction)", "rate"),
    Spec(
        "eps",
        "Attack",
        "Radius of the attack",
        "k/255",
        r"attack/(eps)",
        level=("full radius", lambda _, stage: stage.adversary.get("eps")),
    ),
    Spec(
        "dead",
        "Attack",
        "Dead gradients",
        "share of images",
        r"attack/(dead_gradients)",
        "rate",
        "Images on which the attack met a gradient of zero. It is blind there, and the model looks robust.",
    ),
    Spec(
        "gradient",
        "Optimiser",
        "Gradient norm",
        "before clipping",
        r"(gradient_norm)",
        "log",
        level=("clipped to", lambda _, stage: stage.config.get("max_grad_norm")),
    ),
    Spec("rate", "Optimiser", "Learning rate", "AdamW", r"(learning_rate)"),
    Spec("speed", "Optimiser", "Speed", "steps per second", r"(steps_per_second)"),
)

KNOWN_COLOURS = {
    "all": "ink",
    "clean": "blue",
    "adversarial": "vermillion",
    "shuffled": "green",
    "train attack": "blue",
    "pgd20": "vermillion",
    "invalid": "vermillion",
}
"""Colours of what means the same in every figure."""

DASHES = {"shuffled": "dotted", "consistency": "dashed", "pgd20": "dashed"}

ORDER = ("all", "clean", "adversarial", "shuffled", "policy", "consistency")
"""Labels that come first, in this order; the others follow as the trainer names them."""


@dataclass(frozen=True)
class Data:
    """Rows behind a figure; thinned: to so many of how many lines, None where all are there.

    words: places of the columns that hold no numbers.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    thinned: int | None = None
    words: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class Panel:
    """A figure with its words and its table."""

    spec: Spec
    chart: Chart
    data: Data
    notes: tuple[str, ...]
    in_255ths: bool


Bands = Callable[[str, Sequence[Line]], tuple[tuple[float, float, float], ...]]
"""Intervals of a metric's values on some lines; () where none can be given."""


def panels(history: History, bands: Bands) -> list[Panel]:
    """All figures whose metrics there are; a metric that no figure knows has one of its own."""
    events = sorted({line.event for line in history.lines})
    return [panel for spec in (*SPECS, *_strangers(history, events)) if (panel := _panel(spec, history, bands))]


def _strangers(history: History, events: Sequence[str]) -> list[Spec]:
    """A figure for each metric that no figure of SPECS has, such as those of a plugin."""
    specs = list[Spec]()
    for event in events:
        ours = [spec for spec in SPECS if spec.event == event]
        for name in _metrics(history.of(event)):
            if not any(spec.label(name) or spec.also == name for spec in ours):
                title = f"{name} ({event})" if event else name
                key, pattern = f"other-{len(specs)}", f"({re.escape(name)})"
                specs.append(Spec(key, "Other metrics", title, "", pattern, event=event))
    return specs


def _metrics(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line.values))


def _panel(spec: Spec, history: History, bands: Bands) -> Panel | None:
    lines = history.of(spec.event)
    labels = {name: label for name in _metrics(lines) if (label := spec.label(name))}
    labels = dict(sorted(labels.items(), key=lambda item: _place(item[1])))
    if not labels:
        return None
    factor = _factor(spec, lines, labels)
    curves, condensed = list[Curve](), 1
    for place, (name, label) in enumerate(labels.items()):
        points, each = _points(history, lines, name, factor, broken=not spec.event)
        condensed = max(condensed, each)
        words = label.split()
        colour = next((KNOWN_COLOURS[w] for w in (label, *words[::-1]) if w in KNOWN_COLOURS), "")
        dash = next((DASHES[w] for w in words if w in DASHES), "solid" if place < len(CYCLE) else "dashed")
        curves.append(
            Curve(
                label,
                points,
                colour or CYCLE[place % len(CYCLE)],
                dash,
                marked=bool(spec.event),
                bold=label == "all",
                band=bands(name, lines) if spec.event else (),
            )
        )
    spans = tuple(Span(stage.name, stage.begin, stage.end) for stage in history.stages)
    chart = Chart(spec.key, tuple(curves), history.planned, spec.scale, spans, _levels(spec, history, lines, factor))
    notes = [spec.note] if spec.note else []
    notes += [f"Each point is the mean of up to {condensed} lines."] if condensed > 1 else []
    also = (spec.also,) if spec.also and spec.also in _metrics(lines) else ()
    return Panel(spec, chart, _data(spec, history, lines, labels, also, factor), tuple(notes), factor != 1.0)


def _place(label: str) -> int:
    return ORDER.index(label) if label in ORDER else len(ORDER)


def _factor(spec: Spec, lines: Sequence[Line], labels: Mapping[str, str]) -> float:
    """255 where a radius is of the kind that is told in steps of an 8-bit image; an L2 radius is larger and is not."""
    values = [line.values[name] for line in lines for name in labels if name in line.values]
    return 255.0 if spec.unit == "k/255" and max(values) <= 0.25 else 1.0


def _points(
    history: History, lines: Sequence[Line], name: str, factor: float, *, broken: bool
) -> tuple[tuple[tuple[float, float], ...], int]:
    """The curve of a metric, broken between stages where `broken`; and how many lines are one point of it at most."""
    there = [line for line in lines if name in line.values]
    each = math.ceil(len(there) / POINTS)
    points, before = list[tuple[float, float]](), None
    stages = _by_stage(history, there) if broken else [there]
    for part in stages:
        if before is not None:
            points.append((float(before), math.nan))
        for i in range(0, len(part), each):
            some = [line.values[name] * factor for line in part[i : i + each]]
            mean = sum(some) / len(some)
            before = part[min(i + each, len(part)) - 1].step
            points.append((float(before), mean if math.isfinite(mean) else math.nan))
    return tuple(points), each


def _by_stage(history: History, lines: Sequence[Line]) -> list[list[Line]]:
    parts: dict[int, list[Line]] = {}
    for line in lines:
        parts.setdefault(history.stage_at(line.step), []).append(line)
    return list(parts.values())


def _levels(spec: Spec, history: History, lines: Sequence[Line], factor: float) -> tuple[Level, ...]:
    """What the stages' values are compared with; neighbours of one value are one line."""
    levels = list[Level]()
    if spec.level is None:
        return ()
    label, value_of = spec.level
    seen = {history.stage_at(line.step) for line in lines if any(map(spec.label, line.values))}
    for i, stage in enumerate(history.stages):
        value = value_of(history, stage) if i in seen else None
        if value is None:
            continue
        if levels and (levels[-1].value, levels[-1].end) == (value * factor, stage.begin):
            levels[-1] = Level(levels[-1].label, levels[-1].value, levels[-1].begin, stage.end)
        else:
            levels.append(Level(f"{label} {number(value * factor)}", value * factor, stage.begin, stage.end))
    return tuple(levels)


def _data(
    spec: Spec,
    history: History,
    lines: Sequence[Line],
    labels: Mapping[str, str],
    also: Sequence[str],
    factor: float,
) -> Data:
    names = (*labels, *also)
    there = [line for line in lines if any(name in line.values for name in names)]
    kept = there
    if len(there) > ROWS:  # evenly spread, with the first and the last
        kept = [there[round(i * (len(there) - 1) / (ROWS - 1))] for i in range(ROWS)]
    rows = tuple(
        (
            f"{line.step:,}",
            history.stages[history.stage_at(line.step)].name if history.stages else "",
            *(_cell(line.values.get(name), spec.scale, factor) for name in names),
        )
        for line in kept
    )
    header = ("step", "stage", *labels.values(), *(name.rpartition("/")[2] for name in also))
    return Data(header, rows, len(there) if len(there) > ROWS else None)


def _cell(value: float | None, scale: Scale, factor: float) -> str:
    if value is None:
        return "–"
    if not math.isfinite(value):
        return str(value)
    return f"{100 * value:.1f}%" if scale in ("share", "rate") else number(value * factor)
