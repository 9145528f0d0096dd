"""What the methods of a stage (sft.py, at_grpo.py) have in common: a model being trained, and how it takes a step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from ..models.huggingface import HuggingFaceVLM
from .config import StageConfig, TrainConfig
from .data import Corpus
from .sharding import is_sharded, prepared, whole


@dataclass(frozen=True)
class Step:
    """One step of the schedule: which stage, and how far into it."""

    number: int
    stage: StageConfig
    in_stage: int


@dataclass(frozen=True)
class Learner:
    """A model with the optimiser of one stage.

    module: what computes the loss, wrapped for data-parallel work unless it is the model itself that is in shards.
    """

    config: TrainConfig
    stage: StageConfig
    vlm: HuggingFaceVLM
    corpus: Corpus
    accelerator: Accelerator
    module: nn.Module
    optimizer: Any
    scheduler: Any

    @classmethod
    def begin(
        cls,
        config: TrainConfig,
        stage: StageConfig,
        vlm: HuggingFaceVLM,
        corpus: Corpus,
        accelerator: Accelerator,
        module: nn.Module,
    ) -> Learner:
        """With a fresh AdamW and cosine schedule; biases and gains are not decayed."""
        module = prepared(accelerator, module, vlm)
        trained = [p for p in module.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": stage.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=stage.learning_rate, betas=(0.9, 0.98), fused=True)
        scheduler = get_cosine_schedule_with_warmup(optimizer, stage.warmup, stage.steps)
        # The schedule is not prepared: accelerate would move it on once for each process.
        return cls(config, stage, vlm, corpus, accelerator, module, accelerator.prepare_optimizer(optimizer), scheduler)

    @property
    def processes(self) -> int:
        return int(self.accelerator.num_processes)

    def accumulating(self) -> AbstractContextManager[None]:
        """Inside, a backward pass leaves its gradients with this process. Sharded ones are added up at once: whole ones
        would take the memory that shards save."""
        return nullcontext() if is_sharded(self.vlm.model) else self.accelerator.no_sync(self.module)

    def descend(self) -> dict[str, float]:
        """Clip the gathered gradients and take one optimiser step."""
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.stage.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"gradient_norm": float(whole(norm)), "learning_rate": self.scheduler.get_last_lr()[0]}

    def shared(self, values: Mapping[str, float]) -> dict[str, float]:
        """Means over all processes."""
        if self.processes == 1:
            return dict(values)
        row = torch.tensor(list(values.values()), dtype=torch.float64, device=self.accelerator.device)
        return dict(zip(values, self.accelerator.reduce(row, reduction="mean").tolist(), strict=True))


class Method(Protocol):
    """How a stage learns."""

    learner: Learner

    def update(self, step: Step) -> dict[str, float]:
        """One step; returns what is logged, under fixed names."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What it remembers from step to step, beside the weights and the optimiser."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...
