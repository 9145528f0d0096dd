"""Which questions an attack is fitted on before it is shown any: of another split, and of no image that is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..core.types import FitSet, Question


def choose_fit(pool: Sequence[Question], count: int, asked: Sequence[Question]) -> dict[str, tuple[Question, ...]]:
    """Modality -> its first `count` questions in `pool` that are not asked, nor any other one of their image.

    Where splits are by question an image may be in several of them; one that cannot be read is left out as well.
    """
    ids, images = {q.id for q in asked}, {q.image_sha256 for q in asked}
    chosen: dict[str, tuple[Question, ...]] = {}
    for question in pool:
        new = question.id not in ids and question.image_sha256 not in images and not question.image_error
        if new and len(held := chosen.get(question.modality, ())) < count:
            chosen[question.modality] = (*held, question)
    return chosen


def unfitted(fits: Sequence[Mapping[str, FitSet]], asked: Sequence[Question]) -> list[str]:
    """A note for each modality whose images stay clean in some of the fits, since it has no question to fit on."""
    modalities = dict.fromkeys(question.modality for question in asked)
    lacking = [name for name in modalities if any(name not in fit for fit in fits)]
    return [
        f"no question of {name} is there to fit a universal perturbation on: its images stay clean" for name in lacking
    ]
