"""The loop around every stage: schedule, optimiser, checkpoints, log, validation; reads top to bottom.

A batch is a function of (seed, step) alone, so a resumed run sees the same data; model, optimiser, schedule, random
states and what a method remembers come from the checkpoint, so on CPU it continues bit for bit. Of several processes
(`torchrun --nproc_per_node N -m safemed_bench train CONFIG`) each takes an equal share of the same batch, so that their
mean gradient is that of one process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from ..core.errors import UsageError
from ..core.seeds import derive_seed
from ..models.huggingface import HuggingFaceVLM
from .at_grpo import ATGRPO
from .checkpoint import Checkpoints, finished, load_start, save_entry
from .config import TrainConfig
from .data import Corpus, load_corpus
from .log import TrainLog
from .policy import Policy
from .sft import SFT, SFTLoss
from .sharding import set_up
from .stage import Learner, Method, Step
from .validate import overfitting, validate

EARLY = 100
"""The first validation comes at this step at the latest, so that a set-up that is wrong shows at once."""


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
    vlm = load_start(config, corpus.words, accelerator.device, bf16=accelerator.mixed_precision == "bf16")
    if begun:
        checkpoints.load_weights(begun, vlm.model)
    method: Method | None = None
    with TrainLog(config.folder, config.total_steps, begun, quiet, accelerator.is_main_process) as log:
        for step in list(schedule(config))[begun:]:
            if method is None or step.in_stage == 0:
                method = _begin(config, step, vlm, corpus, accelerator)
                if step.in_stage > 0:
                    checkpoints.load_method(begun, method)
            started = time.perf_counter()
            values = method.update(step)
            log.step(step.number, step.stage.name, values, config.log_every, time.perf_counter() - started)
            done = step.number + 1
            if held_out is not None:
                with accelerator.autocast():
                    _look(log, done, step, method, held_out)
            if done % config.save_every == 0 or step.in_stage == step.stage.steps - 1:
                checkpoints.save(done, method)
    trained = finished(vlm, config, corpus.words, accelerator)
    if accelerator.is_main_process:
        save_entry(trained, config)
        from ..report.training import write_training_page  # figures take seconds to import: not at the start

        write_training_page(config.folder)
    accelerator.wait_for_everyone()
    return config.folder / "entry"


def schedule(config: TrainConfig) -> Iterator[Step]:
    """All steps of all stages, in order."""
    number = 0
    for stage in config.stages:
        for i in range(stage.steps):
            yield Step(number, stage, i)
            number += 1


def _begin(config: TrainConfig, step: Step, vlm: HuggingFaceVLM, corpus: Corpus, accelerator: Accelerator) -> Method:
    """The method of a stage, with a fresh optimiser."""
    module = Policy(vlm) if step.stage.grpo else SFTLoss(vlm)
    learner = Learner.begin(config, step.stage, vlm, corpus, accelerator, module)
    return ATGRPO(learner) if step.stage.grpo else SFT(learner)


def _look(log: TrainLog, done: int, step: Step, method: Method, held_out: Corpus) -> None:
    """Validation, and where a stage attacks, the look for catastrophic overfitting, at their times."""
    config, vlm, adversary = method.learner.config, method.learner.vlm, step.stage.adversary
    if done % config.eval_every == 0 or done in (min(EARLY, config.eval_every), config.total_steps):
        log.event(done, "validation", validate(vlm, held_out, config))
    if adversary and adversary.detect_every and (step.in_stage + 1) % adversary.detect_every == 0:
        found = overfitting(vlm, held_out, config, adversary)
        log.event(done, "robustness", found)
        if found["robust/gap"] > adversary.alarm:
            log.say(
                f"catastrophic overfitting? the training attack leaves {found['robust/train_attack']:.0%}, PGD-20 "
                f"{found['robust/pgd20']:.0%} (2001.03994); more attack steps or a smaller rel_step help"
            )


def _accelerator(config: TrainConfig) -> Accelerator:
    on_gpu = torch.cuda.is_available()
    auto = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "fp32"
    precision = auto if config.precision == "auto" else config.precision
    # A batch of text alone leaves the vision tower without gradients.
    kwargs = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(
        cpu=not on_gpu, mixed_precision="no" if precision == "fp32" else precision, kwargs_handlers=[kwargs]
    )
    set_up(accelerator)
    return accelerator


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
