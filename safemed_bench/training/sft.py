"""Supervised fine-tuning of any vision-language model behind the adapter: reads top to bottom.

Batches are a function of (seed, step) alone, so a resumed run sees the same data; model, optimiser, schedule and
random states come from the checkpoint, so on CPU it continues bit for bit. Of several processes (`torchrun
--nproc_per_node N -m safemed_bench train CONFIG`) each takes an equal share of the same batch, so that their mean
gradient is that of one process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup

from ..core.errors import UsageError
from ..core.seeds import derive_seed
from ..models.huggingface import HuggingFaceVLM
from .checkpoint import Checkpoints, load_start, save_entry
from .config import StageConfig, TaskConfig, TrainConfig
from .data import Corpus, augmented, load_corpus, shuffled_options
from .log import TrainLog
from .tasks import Example, binding_example, caption_example, open_example, question_example, stated_example
from .validate import validate

EARLY = 100
"""The first validation comes at this step at the latest, so that a set-up that is wrong shows at once."""

Draw = tuple[str, list[Example], Tensor | None]
"""Name of the task, examples, and their canvases (B, 3, H, W) uint8, None for text alone."""


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

    With `resume` it goes on from the last checkpoint in the output folder, without it sets aside what an earlier run
    left there. Raises UsageError where that checkpoint is of another origin, or where a batch cannot be shared equally
    by the processes.
    """
    accelerator = _accelerator(config)
    with accelerator.local_main_process_first():  # the others then find its cache
        corpus = load_corpus(config.data, "train")
        held_out = load_corpus(config.data, "validation") if config.eval_questions else None
    _check(config, corpus, accelerator.num_processes)
    checkpoints = Checkpoints(config, accelerator, corpus.fingerprint)
    if not resume:
        checkpoints.set_aside()
    begun = checkpoints.latest_step()
    torch.manual_seed(derive_seed(config.seed, "weights"))
    vlm = load_start(config, corpus.words, accelerator.device)
    loss_of = accelerator.prepare(SFTLoss(vlm))
    with TrainLog(config.folder, config.total_steps, begun, quiet, accelerator.is_main_process) as log:
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
            batch = share(_batch(vlm, corpus, config, step), accelerator.process_index, accelerator.num_processes)
            values = _update(loss_of, optimizer, scheduler, accelerator, batch, step.stage)
            log.step(step.number, step.stage.name, values, config.log_every, time.perf_counter() - started)
            done = step.number + 1
            if held_out is not None and _is_validated(done, config):
                with accelerator.autocast():
                    log.event(done, "validation", validate(vlm, held_out, config))
            if done % config.save_every == 0 or step.in_stage == step.stage.steps - 1:
                checkpoints.save(done, loss_of, optimizer, scheduler)
    if accelerator.is_main_process:
        save_entry(vlm, config)
    accelerator.wait_for_everyone()
    return config.folder / "entry"


def _accelerator(config: TrainConfig) -> Accelerator:
    on_gpu = torch.cuda.is_available()
    auto = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "fp32"
    precision = auto if config.precision == "auto" else config.precision
    # A batch of text alone leaves the vision tower without gradients.
    kwargs = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(
        cpu=not on_gpu, mixed_precision="no" if precision == "fp32" else precision, kwargs_handlers=[kwargs]
    )


def _check(config: TrainConfig, corpus: Corpus, processes: int) -> None:
    """UsageError on what could not be drawn or shared later on."""
    for stage in config.stages:
        for task in stage.tasks:
            corpus.rows_of(task.question_types)
        if stage.batch_size % processes:
            raise UsageError(
                f"stage '{stage.name}': {processes} processes cannot share a batch_size of {stage.batch_size} "
                f"equally; make it a multiple of {processes}"
            )


def _is_validated(done: int, config: TrainConfig) -> bool:
    return done % config.eval_every == 0 or done in (min(EARLY, config.eval_every), config.total_steps)


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
    # The schedule is not prepared: accelerate would move it on once for each process.
    return accelerator.prepare(optimizer), scheduler


def _update(
    loss_of: nn.Module,
    optimizer: Any,
    scheduler: Any,
    accelerator: Accelerator,
    batch: Draw,
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
        f"loss/{kind}": float(accelerator.reduce(loss.detach(), reduction="mean")),
        "gradient_norm": float(norm),
        "learning_rate": scheduler.get_last_lr()[0],
    }


def share(batch: Draw, rank: int, processes: int) -> Draw:
    """Every `processes`-th row of a batch, from row `rank` on: what one of several processes computes."""
    kind, examples, canvas = batch
    return kind, examples[rank::processes], None if canvas is None else canvas[rank::processes]


def _batch(vlm: HuggingFaceVLM, corpus: Corpus, config: TrainConfig, step: Step) -> Draw:
    """The batch of a step over all processes: one task, questions drawn with replacement."""
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
    among = corpus.rows_of(task.question_types)
    rows = among[rng.integers(len(among), size=size)]
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
