"""Supervised fine-tuning of any vision-language model behind the adapter: reads top to bottom.

Batches are a function of (seed, step) alone, so a resumed run sees the same data; model, optimiser, schedule and
random states come from the checkpoint, so on CPU it continues bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from ..core.seeds import derive_seed
from ..models.huggingface import HuggingFaceVLM
from .checkpoint import Checkpoints, load_start, save_entry
from .config import StageConfig, TaskConfig, TrainConfig
from .data import Corpus, augmented, load_corpus, shuffled_options
from .log import TrainLog
from .tasks import Example, binding_example, caption_example, open_example, question_example, stated_example
from .validate import validate


@dataclass(frozen=True)
class Step:
    """One optimiser step of the schedule: which stage, and how far into it."""

    number: int
    stage: StageConfig
    in_stage: int


class SFTLoss(nn.Module):
    """Prompt and reply in one forward, so that data-parallel wrappers see the whole computation."""

    def __init__(self, vlm: HuggingFaceVLM) -> None:
        super().__init__()
        self.vlm, self.model = vlm, vlm.model

    def forward(self, examples: list[Example], canvas: Tensor | None) -> Tensor:
        """Mean weighted negative log-likelihood per token, nats; canvas is (B, 3, H, W) uint8, None for text alone."""
        prompts = self.vlm.compose([e.user for e in examples], image=canvas is not None)
        values = None if canvas is None else self.vlm.pixel_map(canvas.to(self.vlm.device).float() / 255)
        replies, weights = [e.reply for e in examples], [e.weights for e in examples]
        return self.vlm.reply_loss(prompts, values, replies, weights).mean()


def train(config: TrainConfig, *, resume: bool = True, quiet: bool = False) -> Path:
    """Run all stages of `config` and save the finished entry; returns its folder.

    With `resume` it goes on from the last checkpoint in the output folder. Raises UsageError where that checkpoint
    belongs to another config.
    """
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    corpus = load_corpus(config.data, "train")
    held_out = load_corpus(config.data, "validation") if config.eval_questions else None
    torch.manual_seed(derive_seed(config.seed, "weights"))
    vlm = load_start(config, corpus.words, accelerator.device)
    loss_of = accelerator.prepare(SFTLoss(vlm))
    checkpoints = Checkpoints(config, accelerator)
    begun = checkpoints.latest_step() if resume else 0
    with TrainLog(config.folder, config.total_steps, begun, quiet or not accelerator.is_main_process) as log:
        optimizer: Any = None
        if begun:
            checkpoints.load(begun, loss_of)
        for step in schedule(config):
            if optimizer is None or step.in_stage == 0:
                optimizer, scheduler = _optimizer(loss_of, step.stage, accelerator)
            if step.number < begun:
                continue
            if step.number == begun and begun > 0 and step.in_stage > 0:
                checkpoints.load(begun, loss_of, optimizer, scheduler)
            started = time.perf_counter()
            values = _update(loss_of, optimizer, scheduler, accelerator, _batch(vlm, corpus, config, step), step.stage)
            log.step(step.number, step.stage.name, values, config.log_every, time.perf_counter() - started)
            done = step.number + 1
            if held_out is not None and (done % config.eval_every == 0 or done == config.total_steps):
                log.event(done, "validation", validate(vlm, held_out, config))
            if done % config.save_every == 0 or step.in_stage == step.stage.steps - 1:
                checkpoints.save(done, loss_of, optimizer, scheduler)
    if accelerator.is_main_process:
        save_entry(vlm, config)
    return config.folder / "entry"


def schedule(config: TrainConfig) -> Iterator[Step]:
    number = 0
    for stage in config.stages:
        for i in range(stage.steps):
            yield Step(number, stage, i)
            number += 1


def _optimizer(model: nn.Module, stage: StageConfig, accelerator: Accelerator) -> tuple[Any, Any]:
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": stage.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.98))
    scheduler = get_cosine_schedule_with_warmup(optimizer, stage.warmup, stage.steps)
    return accelerator.prepare(optimizer, scheduler)


def _update(
    loss_of: nn.Module,
    optimizer: Any,
    scheduler: Any,
    accelerator: Accelerator,
    batch: tuple[str, list[Example], Tensor | None],
    stage: StageConfig,
) -> dict[str, float]:
    kind, examples, canvas = batch
    loss = loss_of(examples, canvas)
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(loss_of.parameters(), stage.max_grad_norm)
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    return {
        f"loss/{kind}": float(loss.detach()),
        "gradient_norm": float(norm),
        "learning_rate": scheduler.get_last_lr()[0],
    }


def _batch(
    vlm: HuggingFaceVLM, corpus: Corpus, config: TrainConfig, step: Step
) -> tuple[str, list[Example], Tensor | None]:
    """This process's share of the batch of a step: one task, questions drawn with replacement."""
    rng = np.random.default_rng(derive_seed(config.seed, "batch", step.number))
    tasks = step.stage.tasks
    shares = np.array([t.weight for t in tasks])
    task = tasks[int(rng.choice(len(tasks), p=shares / shares.sum()))]
    size = step.stage.batch_size
    if task.kind == "binding":
        return task.kind, [binding_example(vlm, corpus.words, rng) for _ in range(size)], None
    kind = f"{task.kind}_{task.prompts[0]}"
    if task.kind == "stated":
        return kind, [stated_example(vlm, task, corpus.words, rng) for _ in range(size)], None
    rows = rng.integers(len(corpus), size=size)
    if task.kind == "caption":
        kind, examples = task.kind, [caption_example(vlm, corpus.captions[row]) for row in rows]
    elif task.kind == "open":
        kind, examples = task.kind, [open_example(vlm, corpus.questions[row]) for row in rows]
    else:
        examples = [_example(vlm, corpus, task, int(row), rng) for row in rows]
    canvas = corpus.canvases(rows)
    return kind, examples, torch.from_numpy(augmented(canvas, rng) if config.data.augment else canvas)


def _example(vlm: HuggingFaceVLM, corpus: Corpus, task: TaskConfig, row: int, rng: np.random.Generator) -> Example:
    question = shuffled_options(corpus.questions[row], rng)
    return question_example(vlm, task, question, corpus.rationales[row], rng)
