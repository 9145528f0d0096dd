"""Models of published shapes with random weights, built offline: what speed and memory depend on, and nothing else.

Shapes are those of the `config.json` of Qwen/Qwen3-VL-4B-Instruct and Qwen/Qwen2.5-VL-3B-Instruct. The tokenizer is our
own (models/tiny.py): its words are single tokens, so that prompts are about as long as Qwen's, while the embedding
table and the LM head have the published 151,936 rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from safemed_bench.models import tiny
from safemed_bench.models.card import ModelCard
from safemed_bench.models.huggingface import HuggingFaceVLM
from safemed_bench.models.processors import without_video
from safemed_bench.models.prompts import get_prompt

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
"""What Qwen2.5-VL's chat template puts before the first message; Qwen3-VL's puts nothing."""

CLASSES: dict[str, tuple[Any, Any, Any]] = {
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor),
}


@dataclass(frozen=True)
class Shape:
    """text, vision: of the family's config. side: of the canvas in pixels, a multiple of twice the patch."""

    name: str
    family: str
    side: int
    text: dict[str, Any]
    vision: dict[str, Any]
    system: str = ""
    words: tuple[str, ...] = field(default=("cyst", "normal", "fracture", "mass", "pneumonia", "letter", "question"))


def _rope(theta: float, sections: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": sections, **more}}


SHAPES = {
    "qwen3-vl-4b": Shape(
        "qwen3-vl-4b",
        "qwen3_vl",
        384,
        {
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            **_rope(5e6, [24, 20, 20], mrope_interleaved=True),
        },
        {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "patch_size": 16,
            "out_hidden_size": 2560,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    ),
    # Its patches of 14 pixels, merged 2 x 2, do not divide 384.
    "qwen2.5-vl-3b": Shape(
        "qwen2.5-vl-3b",
        "qwen2_5_vl",
        392,
        {
            "vocab_size": 151936,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128000,
            **_rope(1e6, [16, 24, 24]),
        },
        {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "patch_size": 14,
            "out_hidden_size": 2048,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        SYSTEM,
    ),
}

_SMALL_TEXT = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "initializer_range": tiny.INIT_STD,
}
_SMALL_VISION = {"depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "patch_size": 8}

MINIATURES = {
    "qwen3-vl-4b": Shape(
        "qwen3-vl miniature",
        "qwen3_vl",
        64,
        _SMALL_TEXT | _rope(1e4, [6, 5, 5], mrope_interleaved=True),
        _SMALL_VISION | {"out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
    ),
    "qwen2.5-vl-3b": Shape(
        "qwen2.5-vl miniature",
        "qwen2_5_vl",
        80,  # windows of three sizes, as the published shape has
        _SMALL_TEXT | _rope(1e4, [8, 4, 4]),
        _SMALL_VISION | {"out_hidden_size": 64, "window_size": 32, "fullatt_block_indexes": [1]},
        SYSTEM,
    ),
}
"""The same two families, small enough for seconds on a CPU."""


def build(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    *,
    prompt: str = "instruct",
    max_new_tokens: int = 8,
    seed: int = 0,
) -> HuggingFaceVLM:
    """The adapter around a model of this shape whose weights are drawn on `device`; frozen, in eval mode.

    It is not self-checked: a random model of 4B parameters in half precision may fail the finite difference.
    """
    tokenizer = tiny.build_tokenizer(shape.words)
    model = _model(shape, tokenizer, device, dtype, seed)
    patch = shape.vision["patch_size"]
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": (2 * patch) ** 2, "longest_edge": 1 << 24},
    )
    template = shape.system + tiny.CHAT_TEMPLATE
    processor = without_video(CLASSES[shape.family][2])(image_processor, tokenizer, chat_template=template)
    wording = get_prompt(prompt)
    decode: Any = "generate" if wording.reasons else "logprob"
    card = ModelCard(shape.name, "", prompt, decode, max_new_tokens, wording.reasons, "")
    return HuggingFaceVLM(model.eval().requires_grad_(False), processor, card, (shape.side, shape.side), device=device)


def _model(shape: Shape, tokenizer: Any, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    config_class, model_class, _ = CLASSES[shape.family]
    ids = {token: tokenizer.get_vocab()[token] for token in (tiny.PAD, tiny.END, *tiny.VISION)}
    ends = {"pad_token_id": ids[tiny.PAD], "eos_token_id": ids[tiny.END]}
    config = config_class(
        text_config={"tie_word_embeddings": True, **shape.text, **ends},
        vision_config={"spatial_merge_size": 2, "temporal_patch_size": 2, **shape.vision},
        vision_start_token_id=ids[tiny.VISION[0]],
        vision_end_token_id=ids[tiny.VISION[1]],
        image_token_id=ids[tiny.VISION[2]],
        video_token_id=ids[tiny.VISION[3]],
        tie_word_embeddings=True,
    )
    before = torch.get_default_dtype()
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=forked), torch.device(device):
        torch.manual_seed(seed)
        torch.set_default_dtype(dtype)
        try:
            model = model_class(config)
        finally:
            torch.set_default_dtype(before)
    model.generation_config = GenerationConfig(**ends, do_sample=False)
    return model
