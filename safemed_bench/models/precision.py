"""A model in float32 for as long as a check takes that half precision is too coarse for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .attention import HALF, use_packed_vision_attention
from .loading import unwrapped

if TYPE_CHECKING:
    from .huggingface import HuggingFaceVLM


@contextmanager
def in_float32(vlm: HuggingFaceVLM) -> Iterator[None]:
    """Float32 copies of all half-precision weights and buffers inside; afterwards the very tensors that were there.

    Needs 4 more bytes a weight. Flash attention, which is for half precision only, gives way to `sdpa`; weights that
    are quantised stay so.
    """
    tensors = [*vlm.model.parameters(), *vlm.model.buffers()]
    own = [(tensor, tensor.data) for tensor in tensors if tensor.dtype in HALF]
    base: Any = unwrapped(vlm.model)
    flash = bool(own) and vlm.attention == "flash_attention_2"
    try:
        if flash:
            _run_on(base, "sdpa")
        for tensor, data in own:
            tensor.data = data.float()
        with torch.autocast(vlm.device.type, enabled=False):
            yield
    finally:
        for tensor, data in own:
            tensor.data = data
        if flash:
            _run_on(base, vlm.attention)


def _run_on(model: Any, attention: str) -> None:
    model.set_attn_implementation(attention)
    use_packed_vision_attention(model)
