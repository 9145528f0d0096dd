"""Models: the interface (base), the Hugging Face adapter, prompts, answers and the shipped entries (zoo)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import VisionLanguageModel
    from .card import Spec


def load_model(
    spec: Spec, resolution: int | tuple[int, int], *, device: str = "auto", dtype: str = "auto"
) -> VisionLanguageModel:
    """Build the model of a suite's entry for a canvas of `resolution` pixels.

    `device` auto takes the first GPU where there is one; `dtype` auto is bfloat16 there and float32 on the CPU.
    Raises ModelError where weights are absent or the adapter's start-up self-check fails.
    """
    import torch

    from ..core import registry
    from .card import resolve

    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    card = resolve(spec)
    if card.path:
        from .huggingface import HuggingFaceVLM

        wanted = card.dtype if card.dtype not in (None, "auto") else dtype
        return HuggingFaceVLM.load(card, size, device=where, dtype=wanted or "auto")
    return registry.models.get(spec.name)(resolution=size, device=where)
