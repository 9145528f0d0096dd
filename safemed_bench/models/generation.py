"""Greedy decoding of the deployed path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .base import Batch
from .loading import compute_dtype, unwrapped

if TYPE_CHECKING:
    from .huggingface import HuggingFaceVLM

Reply = tuple[tuple[int, ...], bool]
"""Token ids without the end token, and whether the reply ended by itself and not by the limit."""


STATIC = {"cache_implementation": "static", "disable_compile": True}
"""A cache of its final size from the start. transformers would compile the model for every new size of it, which takes
longer than the replies to a batch."""


def cache_options(vlm: HuggingFaceVLM) -> dict[str, Any]:
    """For `generate`: on a GPU a static cache where the family has one, so that no token copies all before it."""
    fixed = getattr(unwrapped(vlm.model), "_can_compile_fullgraph", False)
    return STATIC if vlm.device.type == "cuda" and fixed else {}


def generate(
    vlm: HuggingFaceVLM, batch: Batch, processed: dict[str, Tensor], *, static: bool | None = None
) -> list[Reply]:
    """Greedy continuation of each prompt; `processed` is what the image processor gives for the batch's images.

    static: whether the cache is; None for what suits the device.
    """
    ids = batch.inputs["input_ids"]
    arguments: dict[str, Any] = {
        **{k: v for k, v in batch.inputs.items() if k != "position_ids"},
        **vlm.chat.token_types(ids),
    }
    if vlm.prompt.image:
        dtype = compute_dtype(vlm.model)
        arguments |= {k: v.to(dtype) if k == "pixel_values" else v for k, v in processed.items()}
    out = vlm.model.generate(  # type: ignore[operator]
        **arguments,
        **(cache_options(vlm) if static is None else STATIC if static else {}),
        max_new_tokens=vlm.card.max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=vlm.pad_id,
        eos_token_id=list(vlm.end_ids),
    )
    replies = []
    for row in out[:, ids.shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in vlm.end_ids), None)
        replies.append((tuple(row if end is None else row[:end]), end is not None))
    return replies
