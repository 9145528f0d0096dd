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
    A plugin's builder is called with `resolution` and `device`, and with what the suite sets of the entry; where it has
    a parameter `dtype` and the entry sets none, that gets the run's. Raises ModelError where weights are absent or the
    adapter's start-up self-check fails, UsageError for a setting that the builder does not take.
    """
    model = _bare(spec, resolution, device, dtype)
    smooth = getattr(spec, "smooth", None)
    if smooth is None:
        return model
    from .smoothed import Smoothed

    return Smoothed(model, smooth.sigma, smooth.n, smooth.alpha)


def _bare(spec: Spec, resolution: int | tuple[int, int], device: str, dtype: str) -> VisionLanguageModel:
    import torch

    from ..core import registry
    from .card import builder_settings, registered_name, resolve

    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    card = resolve(spec)
    if (api := getattr(spec, "api", None)) is not None:
        from .api import ApiVLM

        return ApiVLM(card, api, size)
    if card.path:
        from .huggingface import HuggingFaceVLM

        wanted = card.dtype if card.dtype not in (None, "auto") else dtype
        return HuggingFaceVLM.load(card, size, device=where, dtype=wanted or "auto")
    builder = registry.models.get(registered_name(spec))
    return builder(resolution=size, device=where, **builder_settings(builder, spec, dtype))
