"""Gradient checkpointing that acts: activations of a layer are computed again in the backward pass, not held.

transformers' own switch is silently without effect in evaluation mode, in which everything here is attacked: dropout
must stay off. So in that mode each layer that transformers could checkpoint is called through `torch.utils.checkpoint`
here. Training mode is left to transformers, which draws a layer's dropout the same way twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from .prefix import FixedCache


def recompute(model: nn.Module, on: bool = True) -> bool:
    """Switch it on or off for evaluation mode, in all layers that know it; False where nothing changes."""
    changed = False
    for layer in model.modules():
        if not isinstance(layer, GradientCheckpointingLayer):
            continue
        own = layer.__dict__.get("forward")
        is_on = isinstance(own, partial) and own.func is _twice
        if on and not is_on:
            layer.forward = partial(_twice, layer, layer.forward)
            changed = True
        elif is_on and not on:
            del layer.forward
            changed = True
    return changed


def _twice(layer: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    cache = kwargs.get("past_key_values")
    grows = cache is not None and not isinstance(cache, FixedCache)
    if layer.training or grows or not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
