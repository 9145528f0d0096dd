"""What AT-GRPO learns from: the questions of a step, their images, and what its rollouts are worth.

Rows are prompt-major throughout: P prompts, V images (views) of each, g rollouts of each image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.seeds import derive_seed
from ..core.types import Question
from ..models.answers import extract
from ..models.huggingface import HuggingFaceVLM
from ..models.prompts import Prompt
from .adversary import noised
from .data import Corpus, shuffled_options
from .rewards import total
from .rollout import Rollouts
from .settings import GRPOSettings
from .stage import Step


@dataclass(frozen=True)
class Prompts:
    """P questions of one process: places in the batch of all, composed text, (P, 3, H, W) images in [0, 1]."""

    questions: tuple[Question, ...]
    places: tuple[int, ...]
    inputs: dict[str, Tensor]
    images: dict[str, Tensor]
    noise: Tensor | None

    def seen(self, view: str) -> Tensor:
        """The images of a view as the model gets them, noise included."""
        return noised(self.images[view], self.noise)


@dataclass(frozen=True)
class Experience:
    """What there is to learn from: images (P, V, 3, H, W), tokens and mask (P, V, g, T), advantages
    (P * V * g,) in the same order; log: what the step tells of its rollouts."""

    images: Tensor
    tokens: Tensor
    mask: Tensor
    advantages: Tensor
    log: dict[str, float]


@dataclass(frozen=True)
class Drawn:
    """The whole batch of a step: canvas and shuffled (P, 3, H, W) uint8, the second another image of the modality."""

    questions: tuple[Question, ...]
    canvas: NDArray[np.uint8]
    shuffled: NDArray[np.uint8]


def draw(corpus: Corpus, question_types: tuple[str, ...], step: Step, seed: int) -> Drawn:
    """Questions of a step over all processes, drawn with replacement; a function of seed and step alone."""
    rng = np.random.default_rng(derive_seed(seed, "batch", step.number))
    among = corpus.rows_of(question_types)
    rows = among[rng.integers(len(among), size=step.stage.batch_size)]
    questions = tuple(shuffled_options(corpus.questions[row], rng) for row in rows)
    others = [corpus.another_image(int(row), rng) for row in rows]
    return Drawn(questions, corpus.canvases(rows), corpus.canvases(others))


def judge(
    settings: GRPOSettings, vlm: HuggingFaceVLM, questions: Sequence[Question], rollouts: Rollouts, view: str
) -> tuple[Tensor, dict[str, float]]:
    """(P, g) weighted rewards of a view's rollouts, and their means for the log."""
    prompt, group = vlm.prompt, settings.per_view
    texts = rollouts.texts(vlm.decode_text)
    asked = [questions[i // group] for i in range(len(texts))]
    finished = rollouts.finished.tolist()
    rows = list(zip(texts, finished, asked, strict=True))
    read = [extract(text, prompt, len(q.options), finished=done) for text, done, q in rows]
    log = {
        "length": float(rollouts.lengths.float().mean()),
        "invalid_rate": sum(status == "invalid" for _, status in read) / len(read),
        "truncated_rate": sum(status == "truncated" for _, status in read) / len(read),
    }
    right = [float(index == q.answer) for (index, _), q in zip(read, asked, strict=True)]
    if view == "shuffled":
        values = [-settings.blind_penalty * r for r in right]
        log["reward/accuracy"] = sum(right) / len(right)
    else:
        scores = [total(settings.rewards, text, done, q, prompt) for text, done, q in rows]
        values = [score.total for score in scores]
        log |= {f"reward/{n}": sum(s.values[n] for s in scores) / len(scores) for n in scores[0].values}
        log.setdefault("reward/accuracy", sum(right) / len(right))
    return torch.tensor(values).view(-1, group), log | {"reward/total": sum(values) / len(values)}


def is_right(text: str, finished: bool, question: Question, prompt: Prompt) -> bool:
    return extract(text, prompt, len(question.options), finished=finished)[0] == question.answer


def joined(rollouts: list[Rollouts], count: int) -> tuple[Tensor, Tensor]:
    """(P, V, g, T) tokens and mask of several views, padded to one width."""
    width = max(r.tokens.shape[1] for r in rollouts)
    pads = [width - r.tokens.shape[1] for r in rollouts]
    tokens = [torch.nn.functional.pad(r.tokens, (0, n)) for r, n in zip(rollouts, pads, strict=True)]
    masks = [torch.nn.functional.pad(r.mask, (0, n)) for r, n in zip(rollouts, pads, strict=True)]
    shape = (count, -1, width)
    return torch.stack([t.view(shape) for t in tokens], 1), torch.stack([m.view(shape) for m in masks], 1)
