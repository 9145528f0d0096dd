"""Checkpoints that continue bit for bit, and the finished entry."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import AutoConfig

from ..core.errors import ModelError, UsageError
from ..models import tiny
from ..models.card import ENTRY_FILE, ModelCard, card_from_folder, folder_digest, locate
from ..models.huggingface import HuggingFaceVLM
from ..models.prompts import get_prompt
from ..models.recompute import recompute
from .config import TrainConfig
from .log import METRICS
from .settings import LoraSettings
from .sharding import is_sharded, load_optimizer, whole
from .stage import Method

KEEP = 2
FREE_FIELDS = {"output", "log_every", "eval_every", "eval_questions", "save_every", "description", "export_dtype"}
"""Fields that change nothing in the weights; a run may be resumed with other values of them."""

DIFFERENT = {"config": "another config", "start": "other start weights (init)", "data": "other training data"}
"""What is said where a part of a checkpoint's origin is not the run's."""


def load_start(
    config: TrainConfig, words: Sequence[str], device: torch.device, *, bf16: bool = False
) -> HuggingFaceVLM:
    """The model a run starts from, trainable, in float32: AdamW's steps are below the resolution of bfloat16 weights.

    bf16: arithmetic is in bfloat16. Weights below a LoRA adapter, which are never changed, then stay in bfloat16 if
    they were saved so, exact and in half the memory; autocast would make a bfloat16 copy of them in every pass.
    """
    resolution = (config.data.resolution, config.data.resolution)
    if config.init == "tiny":
        model, processor = tiny.build(words, seed=config.seed, resolution=config.data.resolution, **config.architecture)
        return HuggingFaceVLM(model.train(), processor, _card(config, ""), resolution, device=device)
    folder = _start_folder(config.init)
    card = replace(card_from_folder(config.name, folder), prompt=config.prompt, adapter=None)
    saved_so = AutoConfig.from_pretrained(folder).dtype == torch.bfloat16
    dtype = "bf16" if config.lora and bf16 and saved_so else "fp32"
    vlm = HuggingFaceVLM.load(_with_reading(card, config), resolution, device=device, dtype=dtype)
    vlm.model.train().requires_grad_(True)
    if config.gradient_checkpointing:
        whole: Any = vlm.model
        whole.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        recompute(whole)  # the adversary's steps, which are taken in evaluation mode
    if config.lora:
        adapted = with_lora(vlm.model, config.lora)
        vlm = HuggingFaceVLM(adapted, vlm.processor, vlm.card, resolution, device=device)
    return vlm


def with_lora(model: nn.Module, settings: LoraSettings) -> nn.Module:
    """The model with fresh adapters, which alone are trained. Raises ModelError where peft is not installed."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ModelError("training with `lora` needs the extra: pip install 'safemed-bench[peft]'") from error
    targets = list(settings.targets) or "all-linear"
    options: dict[str, Any] = {"r": settings.rank, "lora_alpha": settings.alpha, "target_modules": targets}
    return get_peft_model(model, LoraConfig(**options))


def _start_folder(name: str) -> Path:
    from ..core import registry

    if name in registry.models:
        item = registry.models.get(name)
        if not isinstance(item, str | Path):
            raise ModelError(f"model '{name}' is a plugin without a folder of weights: it cannot be trained on")
        return Path(item)
    return locate(name)


def _card(config: TrainConfig, path: str) -> ModelCard:
    prompt = get_prompt(config.prompt)
    decode = config.decode or ("generate" if prompt.reasons else "logprob")
    return ModelCard(config.name, path, config.prompt, decode, config.max_new_tokens, prompt.reasons, "")


def _with_reading(card: ModelCard, config: TrainConfig) -> ModelCard:
    return replace(_card(config, card.path), fingerprint=card.fingerprint)


class Checkpoints:
    """`checkpoints/step-N.pt` in the run's folder: weights, optimiser, schedule and random states of the process."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator, data: str) -> None:
        self.folder = config.folder / "checkpoints"
        self.accelerator = accelerator
        self.origin, self.lora = origin(config, data), config.lora is not None

    def set_aside(self) -> None:
        """Rename what an earlier run left, `checkpoints` to `checkpoints.1` and so on, for a fresh run to begin."""
        if self.accelerator.is_main_process:
            paths = (self.folder, self.folder.with_name(METRICS))
            names = ([path.with_name(f"{path.stem}.{n}{path.suffix}") for path in paths] for n in count(1))
            free = next(new for new in names if not any(path.exists() for path in new))
            for old, new in zip(paths, free, strict=True):
                if old.exists():
                    old.rename(new)
        self.accelerator.wait_for_everyone()

    def latest_step(self) -> int:
        """Optimiser steps done in the newest complete checkpoint, 0 where there is none.

        Raises UsageError where another config, other start weights or other data made it, and says which.
        """
        steps = sorted(int(p.stem.split("-")[1]) for p in self.folder.glob("step-*.pt"))
        if not steps:
            return 0
        state = torch.load(self._path(steps[-1]), map_location="cpu", weights_only=True, mmap=True)
        found = state.get("origin", {})
        if other := [words for part, words in DIFFERENT.items() if found.get(part) != self.origin[part]]:
            raise UsageError(
                f"{self.folder} holds checkpoints of a run with {' and '.join(other)}; give another output folder, "
                "or use --no-resume, which sets them aside"
            )
        return steps[-1]

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:07d}.pt"

    def save(self, step: int, method: Method) -> None:
        """Write whole, then name; the oldest beyond the last two are removed. The main process writes, all gather."""
        learner, main = method.learner, self.accelerator.is_main_process
        if not (main or is_sharded(learner.vlm.model)):
            return
        state = {
            "origin": self.origin,
            "model": _weights(learner.vlm.model, self.lora, main),
            "optimizer": whole(learner.optimizer.state_dict(), main),
            "scheduler": learner.scheduler.state_dict(),
            "method": whole(method.state_dict(), main),
            "torch_rng": torch.get_rng_state(),
        }
        if not main:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        scratch = self._path(step).with_suffix(".tmp")
        torch.save(state, scratch)
        scratch.replace(self._path(step))
        for old in sorted(self.folder.glob("step-*.pt"))[:-KEEP]:
            old.unlink()

    def load_weights(self, step: int, model: nn.Module) -> None:
        """Weights and random state as they were after `step` steps; all there is where `step` ended a stage."""
        state = self._state(step)
        model.load_state_dict(state["model"], strict=not self.lora)
        torch.set_rng_state(state["torch_rng"])

    def load_method(self, step: int, method: Method) -> None:
        """Optimiser, schedule and what the method remembers, inside a stage."""
        state = self._state(step)
        load_optimizer(method.learner.optimizer, state["optimizer"])
        method.learner.scheduler.load_state_dict(state["scheduler"])
        method.load_state_dict(state["method"])

    def _state(self, step: int) -> dict[str, Any]:
        state: dict[str, Any] = torch.load(self._path(step), map_location="cpu", weights_only=True)
        return state


def _weights(model: nn.Module, lora: bool, keep: bool) -> dict[str, Tensor]:
    """Whole weights. Of a model with adapters these alone: the frozen rest is the start, which the checkpoint's origin
    names."""
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    state = {name: value for name, value in model.state_dict().items() if name in names or not lora}
    weights: dict[str, Tensor] = whole(state, keep)
    return weights


def origin(config: TrainConfig, data: str) -> dict[str, str]:
    """Hashes of all that decides the weights: a checkpoint may be continued only where every one is the same.

    `init` and `data.root` are names in a config; what they hold may change under the same name. `data` is the
    fingerprint of the training data.
    """
    start = "" if config.init == "tiny" else folder_digest(str(_start_folder(config.init)))
    return {"config": config_digest(config), "start": start, "data": data}


def config_digest(config: TrainConfig) -> str:
    """Hash of everything in a config that can change the weights."""
    text = json.dumps(config.model_dump(mode="json", exclude=FREE_FIELDS), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def finished(
    vlm: HuggingFaceVLM, config: TrainConfig, words: Sequence[str], accelerator: Accelerator
) -> HuggingFaceVLM:
    """The trained model as the main process can save it; called by all processes.

    One in shards is put together on the CPU, from what it started as and what has been trained.
    """
    if not is_sharded(vlm.model):
        return vlm
    weights = _weights(vlm.model, config.lora is not None, accelerator.is_main_process)
    if not accelerator.is_main_process:
        return vlm
    fresh = load_start(config, words, torch.device("cpu"), bf16=accelerator.mixed_precision == "bf16")
    fresh.model.load_state_dict(weights, strict=config.lora is None)
    return fresh


def save_entry(vlm: HuggingFaceVLM, config: TrainConfig) -> Path:
    """The finished entry as a folder of safetensors, processor files and `entry.json`; replaces an older one whole."""
    final, scratch = config.folder / "entry", config.folder / "entry.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    model: Any = vlm.model
    # In float32: an adapter's update is below the resolution of the bfloat16 weights that it is added to.
    model = model.float().merge_and_unload() if config.lora else model
    weights = {k: v.to(getattr(torch, config.export_dtype)) for k, v in model.state_dict().items()}
    model.save_pretrained(scratch, state_dict=weights)
    vlm.processor.save_pretrained(scratch)
    entry = {
        "prompt": vlm.card.prompt,
        "decode": vlm.card.decode,
        "max_new_tokens": vlm.card.max_new_tokens,
        "description": config.description,
        "training": config.model_dump(mode="json", exclude={"output"}),
    }
    (scratch / ENTRY_FILE).write_text(json.dumps(entry, indent=1) + "\n")
    shutil.rmtree(final, ignore_errors=True)
    scratch.replace(final)
    return final
