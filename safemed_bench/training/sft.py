"""Supervised fine-tuning of any vision-language model behind the adapter, on clean or on attacked images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..attacks.base import Prepared
from ..core.seeds import derive_seed
from ..models.huggingface import HuggingFaceVLM
from .adversary import Curriculum, Noised, TaughtReply, gaussian, generators, noised, perturb
from .config import TaskConfig, TrainConfig
from .data import Corpus, augmented, shuffled_options
from .sharding import any_process
from .stage import Learner, Step
from .tasks import Example, binding_example, caption_example, open_example, question_example, stated_example


@dataclass(frozen=True)
class Draw:
    """A batch of one task: examples, their canvases (B, 3, H, W) uint8 (None for text alone), and their places in the
    batch of all processes, from which their random streams are derived."""

    kind: str
    examples: tuple[Example, ...]
    canvas: Tensor | None
    places: tuple[int, ...]

    def share(self, rank: int, processes: int) -> Draw:
        """Every `processes`-th row, from row `rank` on: what one of several processes computes."""
        canvas = None if self.canvas is None else self.canvas[rank::processes]
        return Draw(self.kind, self.examples[rank::processes], canvas, self.places[rank::processes])


class SFTLoss(nn.Module):
    """Prompt and reply in one forward, so that data-parallel wrappers see the whole computation."""

    def __init__(self, vlm: HuggingFaceVLM) -> None:
        super().__init__()
        self.vlm, self.model = vlm, vlm.model

    def forward(self, examples: tuple[Example, ...], pixels: Tensor | None) -> Tensor:
        """Mean weighted negative log-likelihood per token, nats; pixels (B, 3, H, W) in [0, 1], None for text alone."""
        reply = taught(self.vlm, examples, image=pixels is not None)
        values = None if pixels is None else self.vlm.pixel_map(pixels)
        return self.vlm.reply_loss(reply.prompts, values, reply.replies, reply.weights).mean()


def attacked_rows(places: Sequence[int], share: float) -> list[int]:
    """The rows of a batch that are attacked, by their places: spread evenly over the batch of all processes."""
    return [row for row, place in enumerate(places) if int((place + 1) * share) > int(place * share)]


def taught(vlm: HuggingFaceVLM, examples: tuple[Example, ...], *, image: bool = True) -> TaughtReply:
    """The loss of the examples' replies as a function of the pixels."""
    prompts = vlm.compose([e.user for e in examples], image=image)
    return TaughtReply(vlm, prompts, tuple(e.reply for e in examples), tuple(e.weights for e in examples))


class SFT:
    """One stage of supervised fine-tuning."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        adversary = learner.stage.adversary
        self.curriculum = Curriculum(adversary) if adversary else None

    def update(self, step: Step) -> dict[str, float]:
        learner = self.learner
        values = learner.shared(self.backward(step)) | learner.descend()
        learner.scheduler.step()
        return values

    def backward(self, step: Step) -> dict[str, float]:
        """Gradients of a step's batch, averaged over all processes; what is to be logged of this one's share."""
        learner = self.learner
        whole = draw(learner.vlm, learner.corpus, learner.config, step)
        batch = whole.share(learner.accelerator.process_index, learner.processes)
        pixels, noted = self._pixels(batch, step)
        loss = learner.module(batch.examples, pixels)
        learner.accelerator.backward(loss)
        return {f"loss/{batch.kind}": float(loss.detach()), **noted}

    def _pixels(self, batch: Draw, step: Step) -> tuple[Tensor | None, dict[str, float]]:
        """The images as this stage shows them, [0, 1] before noise, and what is to be logged of the attack."""
        learner, stage = self.learner, self.learner.stage
        if batch.canvas is None:
            return None, {}
        clean = batch.canvas.to(learner.vlm.device).float() / 255
        seed = (learner.config.seed, step.number)
        noise = gaussian(stage.noise, clean, generators(batch.places, "noise", *seed))
        pixels, noted = clean, {}
        if stage.adversary and self.curriculum:
            eps = self.curriculum.eps(step.in_stage)
            rows = torch.tensor(attacked_rows(batch.places, stage.adversary.share), dtype=torch.long)
            # Where others attack, this process takes their steps too, on a row whose perturbation is not used.
            idle = any_process(learner.vlm.model, len(rows) > 0) and not len(rows)
            taken = torch.zeros(1, dtype=torch.long) if idle else rows
            inner: Prepared = taught(learner.vlm, batch.examples)
            inner = (inner if noise is None else Noised(inner, noise)).select(taken)
            draws = generators([batch.places[i] for i in taken], "pgd", *seed)
            with learner.accelerator.autocast():
                found = perturb(learner.vlm, inner, clean[taken], stage.adversary, eps, draws)
            pixels = clean.index_add(0, rows.to(clean.device), found.delta[: len(rows)])
            dead = float((found.dead > 0).float().mean()) if len(rows) else 0.0
            noted = {"attack/eps": eps, "attack/dead_gradients": dead}
        return noised(pixels, noise), noted

    def state_dict(self) -> dict[str, Any]:
        return {"curriculum": self.curriculum.state_dict()} if self.curriculum else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.curriculum:
            self.curriculum.load_state_dict(state["curriculum"])


def draw(vlm: HuggingFaceVLM, corpus: Corpus, config: TrainConfig, step: Step) -> Draw:
    """The batch of a step over all processes: one task, questions drawn with replacement."""
    rng = np.random.default_rng(derive_seed(config.seed, "batch", step.number))
    tasks = step.stage.tasks
    shares = np.array([t.weight for t in tasks])
    task = tasks[int(rng.choice(len(tasks), p=shares / shares.sum()))]
    places = tuple(range(step.stage.batch_size))
    if task.kind == "binding":
        return Draw(task.kind, tuple(binding_example(vlm, corpus.words, rng) for _ in places), None, places)
    kind = f"{task.kind}_{task.prompts[0]}"
    if task.kind == "stated":
        return Draw(kind, tuple(stated_example(vlm, task, corpus.words, rng) for _ in places), None, places)
    among = corpus.rows_of(task.question_types)
    rows = among[rng.integers(len(among), size=len(places))]
    if task.kind == "caption":
        kind, examples = task.kind, [caption_example(vlm, corpus.captions[row]) for row in rows]
    elif task.kind == "open":
        kind, examples = task.kind, [open_example(vlm, corpus.questions[row]) for row in rows]
    else:
        examples = [_example(vlm, corpus, task, int(row), rng) for row in rows]
    canvas = corpus.canvases(rows)
    canvas = augmented(canvas, rng) if config.data.augment else canvas
    return Draw(kind, tuple(examples), torch.from_numpy(canvas), places)


def _example(vlm: HuggingFaceVLM, corpus: Corpus, task: TaskConfig, row: int, rng: np.random.Generator) -> Example:
    question = shuffled_options(corpus.questions[row], rng)
    return question_example(vlm, task, question, corpus.rationales[row], rng)
