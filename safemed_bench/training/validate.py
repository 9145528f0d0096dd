"""Validation during training: accuracy of the deployed path on held-out questions."""

from __future__ import annotations

import numpy as np
import torch

from ..core.seeds import derive_seed
from ..models.huggingface import HuggingFaceVLM
from .config import TrainConfig
from .data import Corpus

CHUNK = 64


def validate(vlm: HuggingFaceVLM, corpus: Corpus, config: TrainConfig) -> dict[str, float]:
    """Accuracy and invalid rate, overall and per question type, on a fixed sample of the validation split."""
    rng = np.random.default_rng(derive_seed(config.seed, "validation"))
    rows = rng.permutation(len(corpus))[: config.eval_questions]
    correct: dict[str, list[float]] = {"all": []}
    invalid = 0
    vlm.model.eval()
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        questions = [corpus.questions[i] for i in part]
        batch = vlm.prepare(questions, torch.from_numpy(corpus.canvases(part)))
        for question, answer in zip(questions, vlm.answer(batch, batch.pixels), strict=True):
            right = float(answer.index == question.answer)
            correct["all"].append(right)
            correct.setdefault(question.question_type.split()[0].lower(), []).append(right)
            invalid += answer.status != "valid"
    vlm.model.train()
    rates = {f"accuracy/{name}": sum(v) / len(v) for name, v in correct.items()}
    return rates | {"invalid_rate": invalid / len(rows)}
