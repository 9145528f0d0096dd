"""Which attention kernels a model runs on.

Text: flash attention where its package is installed and can be used, else PyTorch's scaled dot-product attention.

Vision, for images of one size: one batched SDPA instead of one call per image and layer.

Stock Qwen-VL vision towers pack all images into one sequence. With a flash-attention kernel they pass the packed
layout through; with SDPA they loop over images in Python. All canvases of a suite have one size, so the packed
sequence is a plain batch, or one for each of a few lengths. Registered under a name with "flash" in it, because that is
how transformers decides on the packed layout; nothing of flash-attention itself is used, and any device will do.
"""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.utils import is_flash_attn_2_available

from .loading import compute_dtype

NAME = "flash_layout_sdpa"
HALF = (torch.float16, torch.bfloat16)


def preferred_attention(device: torch.device, dtype: torch.dtype) -> str:
    """`flash_attention_2` in half precision on a GPU where the package is installed, else `sdpa`."""
    flash = device.type == "cuda" and dtype in HALF and is_flash_attn_2_available()
    return "flash_attention_2" if flash else "sdpa"


def use_preferred_attention(model: Any, device: torch.device, *, both_ways: bool = False) -> str:
    """Switch the model to flash attention where that is preferred and its family has it; what it runs on then.

    both_ways: prompts are seen in both directions. Such masks are dropped by transformers on the way to flash
    attention, without a word, so that the model would be another one.
    """
    wanted = preferred_attention(device, compute_dtype(model))
    if wanted == "flash_attention_2" and not both_ways:
        with suppress(ValueError, ImportError):  # this family has none: it stays with what it was loaded with
            model.set_attn_implementation(wanted)
    return str(model.config._attn_implementation)


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Bidirectional attention within each packed sequence.

    query, key, value: (1, heads, N, d) with N = the sum of the sequence lengths. Returns ((1, N, heads, d), None).
    """
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError(f"{NAME} is for packed vision sequences only")
    heads, total, width = query.shape[1:]
    lengths = tuple((cu_seq_lens_q[1:] - cu_seq_lens_q[:-1]).tolist())
    if all(n == max_length_q for n in lengths):
        shape = (heads, len(lengths), max_length_q, width)
        q, k, v = (x[0].view(shape).transpose(0, 1) for x in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        return out.transpose(1, 2).reshape(1, total, heads, width), None
    groups, back = _by_length(lengths, query.device)
    outs = []
    for length, places in groups:
        shape = (heads, -1, length, width)
        q, k, v = (x[0].index_select(1, places).view(shape).transpose(0, 1) for x in (query, key, value))
        out = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        outs.append(out.transpose(1, 2).reshape(-1, heads, width))
    return torch.cat(outs).index_select(0, back)[None], None


@lru_cache(maxsize=64)
def _by_length(lengths: tuple[int, ...], device: torch.device) -> tuple[list[tuple[int, Tensor]], Tensor]:
    """For each length that occurs, the tokens of all sequences that have it; and where each token then stands.

    Qwen2.5-VL's windows are of three sizes where they do not divide the image: whole, at the edge, in the corner.
    """
    owner = torch.tensor(lengths).repeat_interleave(torch.tensor(lengths))
    groups = [(n, (owner == n).nonzero()[:, 0]) for n in sorted(set(lengths))]
    back = torch.cat([places for _, places in groups]).argsort()
    return [(n, places.to(device)) for n, places in groups], back.to(device)


AttentionInterface.register(NAME, packed_sdpa)


def use_packed_vision_attention(model: nn.Module) -> bool:
    """Switch the vision towers that pack their images to `packed_sdpa`; False where the model has none."""
    towers: list[Any] = [
        m
        for m in model.modules()
        if type(m).__name__ in {"Qwen2VisionTransformerPretrainedModel", "Qwen2_5_VisionTransformerPretrainedModel"}
        or (type(m).__name__.startswith("Qwen3VL") and type(m).__name__.endswith("VisionModel"))
    ]
    for tower in towers:
        tower.config._attn_implementation = NAME
    return bool(towers)
