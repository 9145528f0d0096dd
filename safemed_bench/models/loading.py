"""Weights from disk: precision, LoRA adapters, and what to ask of a model once it is there."""

from __future__ import annotations

import inspect
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig
from transformers.utils.logging import disable_progress_bar

from ..core.errors import ModelError
from .card import ModelCard
from .families import refusal
from .processors import LOAD_ERRORS


def load_weights(card: ModelCard, device: torch.device, dtype: str) -> nn.Module:
    """The card's model with its LoRA adapter, frozen, in eval mode. Raises ModelError where files are missing."""
    wanted = torch_dtype(dtype, device)
    if wanted == torch.float32:
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32, in patch convolutions too
    options = _quantised(card.quantize, device, wanted) if card.quantize else {}
    disable_progress_bar()  # it would run across ours, and write control codes where there is no terminal
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            card.path, dtype=wanted, output_loading_info=True, **options
        )
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:400]
        raise ModelError(f"cannot load the weights in {card.path}: {type(error).__name__}: {reason}") from error
    model, report = loaded
    if problem := refusal(model.config):
        raise ModelError(f"{card.path} is refused: {problem}")
    if absent := sorted(report["missing_keys"]):
        raise ModelError(f"the checkpoint in {card.path} lacks {len(absent)} weights, the first: {absent[0]}")
    if card.adapter:
        model = _with_adapter(model, card.adapter)
    model.eval().requires_grad_(False)
    return model


def _quantised(kind: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is given for int8 or nf4 weights. Raises ModelError where they cannot be computed with."""
    if device.type != "cuda":
        raise ModelError(
            f"quantize: {kind} needs a CUDA GPU, for bitsandbytes computes with such weights there; on {device.type} "
            "take the whole weights (leave `quantize` out)"
        )
    if find_spec("bitsandbytes") is None:
        raise ModelError(f"quantize: {kind} needs the extra: pip install 'safemed-bench[quantize]'")
    settings = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "int8"
        else BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def placed(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on `device`; a quantised one was loaded there, and 8-bit ones refuse to be moved."""
    return model if getattr(unwrapped(model), "is_quantized", False) else model.to(device)


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT wrapper, whose own signature hides arguments."""
    base = getattr(model, "get_base_model", None)
    return base() if callable(base) else model


def keeps_columns(model: nn.Module) -> bool:
    """Whether `logits_to_keep` reaches the LM head: the forward takes it, or hands it on to its language model."""
    base: Any = unwrapped(model)
    known = inspect.signature(base.forward).parameters
    if "logits_to_keep" in known:
        return True
    inner = getattr(base, "language_model", None)
    hands_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in known.values())
    return inner is not None and hands_on and "logits_to_keep" in inspect.signature(inner.forward).parameters


def compute_dtype(model: nn.Module) -> torch.dtype:
    """What the model computes in: its word embeddings' type. BLIP-2 keeps parts in float32, int8 weights are bytes."""
    embeddings: Any = unwrapped(model).get_input_embeddings()  # type: ignore[operator]
    found: torch.dtype = embeddings.weight.dtype
    return found


def torch_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    known = {
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
    }
    if name not in known:
        raise ModelError(f"unknown dtype '{name}'. Known: auto, {', '.join(known)}")
    return known[name]


def end_ids(model: nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """Tokens that end a reply, the tokenizer's own first."""
    config = getattr(model, "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(dict.fromkeys([*own, *listed]))


def _with_adapter(model: nn.Module, adapter: str) -> nn.Module:
    if not Path(adapter).is_dir():
        raise ModelError(f"LoRA adapter folder not found: {adapter}")
    try:
        from peft import PeftModel
    except ImportError as error:
        raise ModelError("a LoRA adapter needs the extra: pip install 'safemed-bench[peft]'") from error
    try:
        with warnings.catch_warnings():
            # peft only warns, and leaves what it did not find at no effect.
            warnings.filterwarnings("error", message="(?s).*missing adapter keys")
            return PeftModel.from_pretrained(model, adapter)
    except (*LOAD_ERRORS, UserWarning, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"the adapter in {adapter} does not fit the model: {reason}") from error
