"""Whose image a question is shown under `shuffled`: another question's, of the same modality."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from ..core.seeds import derive_seed
from ..core.types import Question


def choose_donors(questions: Sequence[Question], seed: int) -> dict[str, str]:
    """Question id -> id of the question whose image it is shown; depends on the questions and the seed only.

    Within a modality this is a derangement in which no question sees its own image content, as long as no image is
    shared by more than half of them. Beyond that the donor is any other image of the modality, then any other image of
    the data set, then the question itself. Unreadable images are given to nobody where that can be helped.
    """
    by_modality: dict[str, list[Question]] = defaultdict(list)
    for question in sorted(questions, key=lambda q: derive_seed("shuffle", seed, q.id)):
        by_modality[question.modality].append(question)
    everyone = [q for group in by_modality.values() for q in group if not q.image_error]
    donors: dict[str, str] = {}
    for group in by_modality.values():
        good = [q for q in group if not q.image_error]
        donors |= _rotation(good)
        for question in group:
            if question.id not in donors:
                donors[question.id] = _any_other(question, good) or _any_other(question, everyone) or question.id
    return donors


def _rotation(group: Sequence[Question]) -> dict[str, str]:
    """Rotate by the size of the largest set that shares an image: then nobody meets an image of its own."""
    if not group:
        return {}
    first = {_image(q): place for place, q in reversed(list(enumerate(group)))}
    ordered = sorted(group, key=lambda q: first[_image(q)])
    shift = max(Counter(map(_image, ordered)).values())
    rotated = ordered[shift % len(ordered) :] + ordered[: shift % len(ordered)]
    return {q.id: d.id for q, d in zip(ordered, rotated, strict=True) if _image(q) != _image(d)}


def _any_other(question: Question, group: Sequence[Question]) -> str:
    others = [q.id for q in group if _image(q) != _image(question)]
    return others[derive_seed("donor", question.id) % len(others)] if others else ""


def _image(question: Question) -> str:
    return question.image_sha256 or question.image
