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
from torch import nn

from ..core.errors import ModelError, UsageError
from ..models import tiny
from ..models.card import ENTRY_FILE, ModelCard, card_from_folder, folder_digest, locate
from ..models.huggingface import HuggingFaceVLM
from ..models.prompts import get_prompt
from .config import TrainConfig
from .log import METRICS

KEEP = 2
FREE_FIELDS = {"output", "log_every", "eval_every", "eval_questions", "save_every", "description", "export_dtype"}
"""Fields that change nothing in the weights; a run may be resumed with other values of them."""

DIFFERENT = {"config": "another config", "start": "other start weights (init)", "data": "other training data"}
"""What is said where a part of a checkpoint's origin is not the run's."""


def load_start(config: TrainConfig, words: Sequence[str], device: torch.device) -> HuggingFaceVLM:
    """The model a run starts from, trainable, in float32: AdamW's steps are below the resolution of bfloat16 weights.

    Autocast makes the forward pass cheaper where `precision` says so.
    """
    resolution = (config.data.resolution, config.data.resolution)
    if config.init == "tiny":
        model, processor = tiny.build(words, seed=config.seed, resolution=config.data.resolution, **config.architecture)
        return HuggingFaceVLM(model.train(), processor, _card(config, ""), resolution, device=device)
    folder = _start_folder(config.init)
    card = replace(card_from_folder(config.name, folder), prompt=config.prompt, adapter=None)
    vlm = HuggingFaceVLM.load(_with_reading(card, config), resolution, device=device, dtype="fp32")
    if layers := config.architecture.get("layers"):
        vlm = HuggingFaceVLM(
            tiny.grow(vlm.model, layers, config.seed), vlm.processor, vlm.card, resolution, device=device
        )
    vlm.model.train().requires_grad_(True)
    return vlm


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
        self.origin = origin(config, data)

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

    def save(self, step: int, model: nn.Module, optimizer: Any, scheduler: Any) -> None:
        """Write whole, then name; the oldest beyond the last two are removed."""
        if not self.accelerator.is_main_process:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {
            "origin": self.origin,
            "model": self.accelerator.unwrap_model(model).state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "torch_rng": torch.get_rng_state(),
        }
        scratch = self._path(step).with_suffix(".tmp")
        torch.save(state, scratch)
        scratch.replace(self._path(step))
        for old in sorted(self.folder.glob("step-*.pt"))[:-KEEP]:
            old.unlink()

    def load(self, step: int, model: nn.Module, optimizer: Any = None, scheduler: Any = None) -> None:
        """Bring everything to where it was after `step` steps; without an optimiser the weights and random state.

        A stage begins with a fresh optimiser, so none is given where `step` ended a stage.
        """
        state = torch.load(self._path(step), map_location="cpu", weights_only=True)
        self.accelerator.unwrap_model(model).load_state_dict(state["model"])
        torch.set_rng_state(state["torch_rng"])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])


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


def save_entry(vlm: HuggingFaceVLM, config: TrainConfig) -> Path:
    """The finished entry as a folder of safetensors, processor files and `entry.json`; replaces an older one whole."""
    final, scratch = config.folder / "entry", config.folder / "entry.tmp"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    weights = {k: v.to(getattr(torch, config.export_dtype)) for k, v in vlm.model.state_dict().items()}
    model: Any = vlm.model
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
