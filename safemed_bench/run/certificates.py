"""The condition `certify`: a certificate for every question of a chunk, resumable to the sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..certify import build_certifier
from ..certify.base import INVALID, Certificate, State
from ..certify.panel import certify_many
from ..core.seeds import derive_seed
from ..core.types import Record
from ..models.base import VisionLanguageModel
from ..models.smoothed import Smoothed, labels
from . import partial
from .batching import BatchSizer

if TYPE_CHECKING:
    from .conditions import Scene

SAMPLES_AT_ONCE = 256


def measure(model: VisionLanguageModel, sizer: BatchSizer, folder: Path, scene: Scene) -> list[Record]:
    """A record per question of the scene. A smoothed entry is certified by what it is the smoothed version of."""
    base = model.base if isinstance(model, Smoothed) else model
    certifier = build_certifier(scene.job.certifier, dict(scene.job.params))
    whole = base.prepare(scene.questions, torch.from_numpy(scene.canvas))
    path = partial.path_of(folder, scene.job)
    keys = [unit.key for unit in scene.units]
    held, file = partial.read(path), partial.PartialFile(path)

    def predict(noisy: Tensor, owners: Sequence[int]) -> list[int]:
        found: list[int] = []

        def ask(rows: Sequence[int]) -> None:
            batch = whole.select([owners[row] for row in rows])
            found.extend(labels(base, batch, noisy[rows[0] : rows[-1] + 1]))

        sizer.map("certify", range(len(owners)), ask)
        return found

    try:
        found = certify_many(
            certifier,
            predict,
            list(whole.pixels),
            seeds=[derive_seed(unit.seed, "certificate") for unit in scene.units],
            batch_size=sizer.start or SAMPLES_AT_ONCE,
            states={place: State.from_dict(held[key]) for place, key in enumerate(keys) if key in held},
            save=lambda moved: file.note({keys[place]: state.to_dict() for place, state in moved.items()}),
        )
    finally:
        file.flush()
    return [scene.record(k, **_values(scene, k, certificate, certifier.n0)) for k, certificate in enumerate(found)]


def _values(scene: Scene, k: int, certificate: Certificate, selected: int) -> dict[str, Any]:
    """What the record says. `decisions`: [radius, verdict, test samples] for every radius that was asked for."""
    unread = certificate.candidate == INVALID
    return {
        "answer": certificate.answer,
        "status": "valid" if certificate.answer is not None else "invalid" if unread else "abstain",
        "correct": certificate.answer == scene.questions[k].answer,
        "radius": certificate.radius,
        "abstain": certificate.answer is None,
        "samples": selected + certificate.n,
        "extra": {
            "candidate": certificate.candidate,
            "counts": {str(label): count for label, count in certificate.counts.items()},
            "p_low": certificate.p_low,
            "decisions": [[d.radius, d.verdict, d.n] for d in certificate.decisions],
        },
    }
