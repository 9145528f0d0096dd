"""Validation during training: accuracy of the deployed path on held-out questions."""

from __future__ import annotations

import torch

from ..attacks.objectives import AnswerToken, RationaleAnswer
from ..attacks.pgd import PGD
from ..datasets.splits import stratified
from ..models.huggingface import HuggingFaceVLM
from .adversary import attack_of, generators
from .config import TrainConfig
from .data import Corpus
from .policy import evaluating
from .settings import AdversarySettings

CHUNK = 64


def validate(vlm: HuggingFaceVLM, corpus: Corpus, config: TrainConfig) -> dict[str, float]:
    """Accuracy and invalid rate, overall and per question type, on a fixed sample of the validation split."""
    rows = sample(corpus, config)
    correct: dict[str, list[float]] = {"all": []}
    invalid = 0
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        questions = [corpus.questions[i] for i in part]
        batch = vlm.prepare(questions, torch.from_numpy(corpus.canvases(part)))
        with evaluating(vlm.model):
            answers = vlm.answer(batch, batch.pixels)
        for question, answer in zip(questions, answers, strict=True):
            right = float(answer.index == question.answer)
            correct["all"].append(right)
            correct.setdefault(question.question_type.split()[0].lower(), []).append(right)
            invalid += answer.status != "valid"
    rates = {f"accuracy/{name}": sum(v) / len(v) for name, v in correct.items()}
    return rates | {"invalid_rate": invalid / len(rows)}


def overfitting(
    vlm: HuggingFaceVLM, corpus: Corpus, config: TrainConfig, adversary: AdversarySettings
) -> dict[str, float]:
    """Robust accuracy under the attack that is trained against, and under PGD-20: a gap says that the model has learnt
    to mislead the weak attack, not to withstand a strong one (catastrophic overfitting, 2001.03994).

    At the full eps, on the first CHUNK questions of the validation sample, judged on the deployed path.
    """
    rows = sample(corpus, config)[:CHUNK]
    batch = vlm.prepare([corpus.questions[i] for i in rows], torch.from_numpy(corpus.canvases(rows)))
    objective = RationaleAnswer() if vlm.reasons else AnswerToken()
    threat, found = adversary.threat(adversary.eps), {}
    with evaluating(vlm.model):
        clean = vlm.answer(batch, batch.pixels)
        for name, attack in (("train_attack", attack_of(adversary)), ("pgd20", PGD(steps=20))):
            draws = generators(range(len(rows)), "overfitting", config.seed, name)
            result = attack(vlm, batch, objective, threat, generators=draws, clean_answers=clean)
            right = [a.index == q.answer for a, q in zip(result.answers, batch.questions, strict=True)]
            found[f"robust/{name}"] = sum(right) / len(right)
    return found | {"robust/gap": found["robust/train_attack"] - found["robust/pgd20"]}


def sample(corpus: Corpus, config: TrainConfig) -> list[int]:
    """Rows of `eval_questions` questions, balanced over modalities, with each one's question types in proportion."""
    row = {question.id: i for i, question in enumerate(corpus.questions)}
    return [row[q.id] for q in stratified(corpus.questions, len(corpus), config.seed)[: config.eval_questions]]
