"""One AT-GRPO step with LoRA by the trainer's own code, on a model of a published shape: does it fit the card?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from meter import Meter
from published import Shape, build

from safemed_bench.core.types import Question
from safemed_bench.models.huggingface import HuggingFaceVLM
from safemed_bench.run.batching import is_out_of_memory
from safemed_bench.training.at_grpo import ATGRPO
from safemed_bench.training.checkpoint import with_lora
from safemed_bench.training.config import TrainConfig
from safemed_bench.training.data import Corpus
from safemed_bench.training.policy import Policy
from safemed_bench.training.settings import LoraSettings
from safemed_bench.training.stage import Learner
from safemed_bench.training.trainer import schedule


@dataclass(frozen=True)
class Load:
    """prompts a step, rollouts for each, tokens a rollout; micro_batch: prompts per backward pass."""

    prompts: int
    group: int
    tokens: int
    micro_batch: int


GPU = Load(prompts=4, group=8, tokens=128, micro_batch=1)
SMALL = Load(prompts=2, group=4, tokens=4, micro_batch=1)


def measure(shape: Shape, load: Load, meter: Meter) -> dict[str, Any]:
    """Seconds and peak memory of the second of two steps; `fits` is False where memory ran out."""
    facts: dict[str, Any] = {"at_grpo_lora": shape.name, **vars(load)}
    try:
        import peft
    except ImportError:
        return facts | {"not_run": "peft is not installed"}
    facts["peft"] = peft.__version__
    try:
        method, steps = trainer(shape, load, meter.device)
        method.update(next(steps))
        seconds: list[float] = []
        peak = meter.peak(lambda: seconds.extend(meter.seconds(lambda: method.update(next(steps)))))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return facts | {"fits": False}
    trained = sum(p.numel() for p in method.policy.parameters() if p.requires_grad)
    return facts | {
        "fits": True,
        "trained_parameters": trained,
        "rollouts": method.policy.reason,
        "step_seconds": round(seconds[0], 4),
        "peak_gb": round(peak / 1e9, 3),
    }


def trainer(shape: Shape, load: Load, device: torch.device) -> tuple[ATGRPO, Any]:
    """As `safemed-bench train` builds it, and its steps; on a GPU frozen weights and arithmetic are bfloat16."""
    config, small = settings(shape, load), device.type == "cpu"
    dtype = torch.float32 if small else torch.bfloat16
    vlm = build(shape, device, dtype, prompt="think_brief", max_new_tokens=load.tokens)
    vlm.model.train()
    adapted = with_lora(vlm.model, LoraSettings())
    vlm = HuggingFaceVLM(adapted, vlm.processor, vlm.card, vlm.resolution, device=device)
    vlm.end_ids = (shape.text["vocab_size"] - 1,)  # no rollout ends early: every step does the same work
    accelerator = Accelerator(cpu=small, mixed_precision="no" if small else "bf16")
    steps = iter(schedule(config))
    stage = config.stages[0]
    return ATGRPO(Learner.begin(config, stage, vlm, corpus(shape), accelerator, Policy(vlm))), steps


def settings(shape: Shape, load: Load) -> TrainConfig:
    stage = {
        "name": "at-grpo",
        "steps": 2,
        "batch_size": load.prompts,
        "learning_rate": 1e-4,
        "warmup": 0,
        "adversary": {"eps": 4 / 255, "steps": 2, "rel_step": 0.75},
        "grpo": {"group_size": load.group, "micro_batch": load.micro_batch, "max_new_tokens": load.tokens},
        "tasks": [{"kind": "answer", "prompts": ["think_brief"]}],
    }
    return TrainConfig.model_validate(
        {
            "name": "gpu",
            "prompt": "think_brief",
            "max_new_tokens": load.tokens,
            "data": {"resolution": shape.side},
            "stages": [stage],
        }
    )


def corpus(shape: Shape) -> Corpus:
    """Eight questions on images of noise."""
    images = np.random.default_rng(0).integers(0, 256, (8, shape.side, shape.side, 3), dtype=np.uint8)
    options = ("cyst", "normal", "fracture", "mass")
    questions = tuple(
        Question(str(i), "", "", "What is shown?", options, i % 4, "CT", "Disease Diagnosis", "", "train")
        for i in range(len(images))
    )
    texts = ("",) * len(images)
    return Corpus(questions, texts, texts, images, np.arange(len(images)), shape.words, "noise")
