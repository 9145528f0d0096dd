"""Validation during training: accuracy of the deployed path on held-out questions."""

from __future__ import annotations

import torch

from ..datasets.splits import stratified
from ..models.huggingface import HuggingFaceVLM
from .config import TrainConfig
from .data import Corpus

CHUNK = 64


def validate(vlm: HuggingFaceVLM, corpus: Corpus, config: TrainConfig) -> dict[str, float]:
    """Accuracy and invalid rate, overall and per question type, on a fixed sample of the validation split."""
    rows = sample(corpus, config)
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


def sample(corpus: Corpus, config: TrainConfig) -> list[int]:
    """Rows of `eval_questions` questions, balanced over modalities, with each one's question types in proportion."""
    row = {question.id: i for i, question in enumerate(corpus.questions)}
    return [row[q.id] for q in stratified(corpus.questions, len(corpus), config.seed)[: config.eval_questions]]
