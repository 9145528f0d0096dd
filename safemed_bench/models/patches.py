"""Convolutions over non-overlapping 3-d patches as one matrix product: same weights, faster on a CPU.

Only the forward changes, so that checkpoints stay as they are. (`fusion_config` of transformers 5.23 replaces classes
for the whole process, and leaves the patch weights of Qwen2-VL at random.)
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

SAME = 0.02
"""Largest relative difference from the module's own forward: above the rounding of half precision, and far below what
a module that does more than the convolution would show."""


def use_linear_patches(model: nn.Module) -> None:
    """Give patch embeddings of `model` that are such a convolution, and nothing else, the product as their forward."""
    for module in model.modules():
        conv = getattr(module, "proj", None)
        if not isinstance(conv, nn.Conv3d) or conv.groups != 1 or any(conv.padding):
            continue
        if conv.stride == conv.kernel_size and _is_product(module):
            module.forward = MethodType(_linear_patches, module)


@torch.no_grad()
def _is_product(module: Any) -> bool:
    """Whether the module's own forward gives the product, tried on four patches of noise."""
    weight = module.proj.weight
    patches = torch.randn(4, weight[0].numel(), generator=torch.Generator().manual_seed(0)).to(weight)
    product = _linear_patches(module, patches)
    try:
        own = module(patches)
    except (RuntimeError, TypeError, ValueError):
        return False
    return own.shape == product.shape and bool((own - product).norm() <= SAME * product.norm())


def _linear_patches(module: Any, patches: Tensor) -> Tensor:
    """(n, C * T * P * P) flattened patches -> (n, D)."""
    weight = module.proj.weight.flatten(1)
    return nn.functional.linear(patches.to(weight.dtype).view(-1, weight.shape[1]), weight, module.proj.bias)
