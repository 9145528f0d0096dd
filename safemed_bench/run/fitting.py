"""Universal perturbations: fitted once for each cell and modality, and kept in the run folder for all of its chunks."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..attacks import build_attack, build_objective
from ..attacks.universal import AT_ONCE, Universal, UniversalAttack, fit_universal
from ..core.errors import DataError
from ..core.journal import write_atomic
from ..core.types import Answer, FitSet, ThreatModel
from ..models.base import VisionLanguageModel
from .artefacts import slug
from .batching import BatchSizer
from .messages import Job

FOLDER = "universal"

Canvases = Callable[[FitSet], NDArray[np.uint8]]
"""The (N, 3, H, W) images of a set's questions."""


def universal(model: VisionLanguageModel, job: Job, folder: Path, canvases: Canvases, sizer: BatchSizer) -> Universal:
    """The perturbations of a job's modalities, from the run folder where they lie there, else fitted and laid there.

    The file's name has the hash of all that can change the fit, so that neither chunks, workers nor interruption do.
    """
    if job.threat is None:
        raise ValueError(f"cell {job.cell} has no threat model")
    deltas, fitted = dict[str, Tensor](), dict[str, int]()
    for part in job.fit:
        path = folder / FOLDER / slug(job.cell) / f"{slug(part.modality)}-{part.key[:16]}.npz"
        held = _read(path) or _fit(model, job, job.threat, part, canvases(part), sizer, path)
        if held[1]:
            deltas[part.modality] = torch.from_numpy(held[0])
        fitted[part.modality] = held[1]
    return Universal(job.threat, deltas, fitted)


def _fit(
    model: VisionLanguageModel,
    job: Job,
    threat: ThreatModel,
    part: FitSet,
    canvas: NDArray[np.uint8],
    sizer: BatchSizer,
    path: Path,
) -> tuple[NDArray[np.float32], int]:
    attack = build_attack(job.attack, dict(job.params))
    if not isinstance(attack, UniversalAttack):
        raise ValueError(f"attack '{job.attack}' is not one that is fitted")
    batch = model.prepare(part.questions, torch.from_numpy(canvas))
    # the run's own batch size must not change a perturbation
    own = BatchSizer(AT_ONCE, sizer.forget, sizer.say, relieve=sizer.relieve)
    answers: list[Answer] = []

    def ask(places: Sequence[int]) -> None:
        chosen = batch.select(places)
        answers.extend(model.answer(chosen, chosen.pixels))

    def in_batches(places: Sequence[int], work: Callable[[Sequence[int]], None]) -> None:
        own.map("fit", places, work)

    own.map("clean answers of the fit", range(len(batch)), ask)
    goal = build_objective(job.objective)
    found = fit_universal(model, batch, answers, goal, threat, steps=attack.steps, in_batches=in_batches)
    none = torch.zeros(batch.canvas.shape[1:])
    delta = found.deltas.get(part.modality, none).detach().cpu().float().numpy()
    fitted = found.fitted.get(part.modality, 0)
    buffer = io.BytesIO()
    ids = np.array([question.id for question in part.questions], dtype=np.str_)
    np.savez_compressed(buffer, delta=delta, fitted=fitted, question_ids=ids)
    write_atomic(path, buffer.getvalue())
    return delta, fitted


def _read(path: Path) -> tuple[NDArray[np.float32], int] | None:
    """A perturbation and the number of questions it was fitted on; None where there is no readable one."""
    try:
        with np.load(path) as file:
            return np.asarray(file["delta"], dtype=np.float32), int(file["fitted"])
    except (OSError, ValueError, KeyError, EOFError):
        return None


def stacked(found: dict[int, NDArray[Any]], problems: dict[int, str]) -> NDArray[Any]:
    """The canvases of a whole set. Raises DataError for the first question whose image cannot be read."""
    if problems:
        raise DataError(f"an image to fit on cannot be read: {next(iter(problems.values()))}")
    return np.stack([found[i] for i in sorted(found)])
