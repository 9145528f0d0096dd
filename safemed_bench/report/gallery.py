"""Pictures of attacks: clean, adversarial, and what lies between, magnified. Made from artefacts, without a model."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..core.errors import DataError
from ..core.types import Record, format_eps
from ..datasets.images import load_canvas
from ..results.frames import Condition
from ..results.tables import condition_label
from ..run import artefacts
from .source import Source, attacks_at
from .words import Piece, compare, option, verdict

LIMIT = 8
"""Most examples of a page, shared out among the models."""
BUDGET = 2_000_000
"""Most bytes of embedded pictures; further examples are left out, so that large images do not make a large page."""
GREY = 128
NO_PICTURES = "No picture is shown: the saved images of this run, or the files they were made from, are not here."


@dataclass(frozen=True)
class Example:
    """One question under one attack. The three pictures are PNG data URIs; `factor` magnifies the third."""

    model: str
    condition: str
    question: Mapping[str, Any]
    options: tuple[tuple[str, bool], ...]
    clean: str
    adversarial: str
    difference: str
    side: int
    factor: int
    norms: str
    held: bool
    before: tuple[str, bool, list[Piece]]
    after: tuple[str, bool, list[Piece]]

    @property
    def size(self) -> int:
        return len(self.clean) + len(self.adversarial) + len(self.difference)


def examples(source: Source) -> list[Example]:
    """A few attacked questions of every model, the first in the plan's order that can be shown.

    Of each model, under the attack that leaves it least right: questions that were right and turned wrong, each of
    another modality, and one that was attacked and held. Empty where no picture can be made.
    """
    models = [v.model for v in source.run.verdicts if attacks_at(v, source.numbers.headline)]
    shown, used, each = list[Example](), 0, max(1, LIMIT // max(1, len(models)))
    for place, model in enumerate(models[:LIMIT]):
        there = {example.question["id"] for example in shown}
        for example in _of_model(source, model, place * each, each, there):
            if shown and used + example.size > BUDGET:
                return shown
            shown.append(example)
            used += example.size
    return shown


def _of_model(source: Source, model: str, rotate: int, limit: int, there: Container[str]) -> list[Example]:
    """Examples of one model; questions that are `there` already come last."""
    condition = _strongest(source, model)
    records = source.records.get((model, condition.name), {})
    tried = [r for id in source.questions if (r := records.get(id)) and r.artefact and r.linf and r.clean_correct]
    tried.sort(key=lambda record: record.question_id in there)
    turned = _mixed([r for r in tried if r.correct is False], rotate)
    held = _mixed([r for r in tried if r.correct is True], rotate + limit - 1)
    wanted = min(limit - 1, len(turned)) if held and limit > 1 else limit
    found = _shown(source, turned, condition, wanted)
    return found + _shown(source, held, condition, limit - len(found))


def _shown(source: Source, records: Sequence[Record], condition: Condition, limit: int) -> list[Example]:
    found = list[Example]()
    for record in records:
        if len(found) == limit:
            break
        if example := _example(source, record, condition):
            found.append(example)
    return found


def _strongest(source: Source, model: str) -> Condition:
    """The attack at the headline threat that leaves least right; the first of several."""
    verdicts = next(v for v in source.run.verdicts if v.model == model)

    def left(condition: Condition) -> float:
        return float(np.nan_to_num(verdicts.correct[condition.name].mean(), nan=1.0))

    return min(attacks_at(verdicts, source.numbers.headline), key=left)


def _mixed(records: Sequence[Record], rotate: int) -> list[Record]:
    """The same, taking turns between modalities, the turns beginning with the `rotate`-th."""
    by: dict[str, list[Record]] = {}
    for record in records:
        by.setdefault(record.modality, []).append(record)
    names = list(by)
    names = names[rotate % len(names) :] + names[: rotate % len(names)] if names else []
    rounds = range(max(map(len, by.values()), default=0))
    return [by[name][i] for i in rounds for name in names if i < len(by[name])]


def _example(source: Source, record: Record, condition: Condition) -> Example | None:
    """None where the picture cannot be made, or the image file is no longer the one that was measured."""
    question = source.questions.get(record.question_id, {})
    pictures = _pictures(source, record, question.get("image") or "")
    if pictures is None:
        return None
    canvas, delta = pictures
    factor = max(1, (GREY - 1) // max(1, int(np.abs(delta).max())))
    options = tuple(question.get("options") or ())
    clean = source.records.get((record.model, "clean"), {}).get(record.question_id)
    before, after = compare(clean.text if clean else "", record.text)
    return Example(
        model=record.model,
        condition=condition_label(condition.name),
        question=question,
        options=tuple((option(i, options), i == record.target) for i in range(len(options))),
        clean=_png(canvas),
        adversarial=_png(canvas + delta),
        difference=_png(np.clip(GREY + factor * delta, 0, 255)),
        side=canvas.shape[1],
        factor=factor,
        norms=_norms(record),
        held=bool(record.correct),
        before=(verdict(clean, options), bool(clean and clean.correct), before),
        after=(verdict(record, options), bool(record.correct), after),
    )


def _norms(record: Record) -> str:
    linf = f"L∞ {format_eps(round(255 * (record.linf or 0)) / 255)}"
    return linf + (f", L2 {record.l2:.2f}" if record.l2 is not None else "")


def _pictures(source: Source, record: Record, image: str) -> tuple[NDArray[np.int16], NDArray[np.int16]] | None:
    """The (3, H, W) clean canvas as run/conditions.py makes it, and the difference, both in 8-bit levels."""
    name, _, index = record.artefact.partition("#")
    data = source.suite.get("data") or {}
    side = _side(source, record.model) or data.get("resolution")
    if not (image and side and index.isdigit() and _same_file(image, record.image_sha256)):
        return None
    try:
        canvas = load_canvas(image, int(side), data.get("fit", "pad")).transpose(2, 0, 1).astype(np.int16)
        delta = artefacts.read(source.folder, name)[int(index)]
    except (DataError, OSError, IndexError, ValueError):
        return None
    return (canvas, delta) if canvas.shape == delta.shape else None


def _side(source: Source, model: str) -> int | None:
    models = [m for m in source.suite.get("models") or () if isinstance(m, Mapping)]
    return next((m.get("resolution") for m in models if m.get("name") == model), None)


def _same_file(image: str, sha256: str) -> bool:
    try:
        return bool(sha256) and hashlib.sha256(Path(image).read_bytes()).hexdigest() == sha256
    except OSError:
        return False


def _png(levels: NDArray[np.int16]) -> str:
    """A (3, H, W) image of 8-bit levels as a PNG data URI."""
    buffer = io.BytesIO()
    picture = np.clip(levels, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
