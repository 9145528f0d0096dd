"""Tiny random-weight models of every family, saved as folders that load by path as a hub checkpoint does.

Each has its family's own config, image processor, special tokens, chat template and BOS habit; only sizes differ. Here
are the Qwen family, LLaVA 1.5 and Gemma 3; tiling_families.py has those that cut the canvas into tiles, and
other_families.py the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from safemed_bench.models.processors import without_video

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TILING = ("llava_next", "llava_onevision", "internvl", "idefics3", "smolvlm")
OTHER = ("paligemma2", "blip2", "instructblip", "mllama", "pixtral", "mistral3")
FAMILIES = (*QWEN, "llava", *TILING, "gemma3", *OTHER)
TRAINED = (*QWEN, "llava", "gemma3")
"""Those that training is tested with."""
NEEDS = {"smolvlm": "num2words", "pixtral": "torchvision", "mistral3": "torchvision"}
"""What transformers wants installed before it gives the family's processor, beyond what this package depends on."""
NATIVE = {**dict.fromkeys(FAMILIES, 56), **dict.fromkeys(QWEN, 64), **dict.fromkeys(TILING, 112)}
"""Side of a canvas that the image processor takes as it is. Tiling families cut it into four, and add a thumbnail."""
INIT = 0.1
"""Standard deviation of the weights: at the usual .02 a tiny model's logits hardly depend on the image."""

PARTS = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
)
_QWEN_TEMPLATE = (
    "SYSTEM{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + PARTS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
).replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
LLAVA_TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() }}: " + PARTS + " {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
).replace("IMAGE", "<image>\n")
_GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m['role'] }}\n" + PARTS + "<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
).replace("IMAGE", "<start_of_image>")


def lacks(family: str) -> str | None:
    """Why the family's processor cannot be had here, None where it can."""
    needed = NEEDS.get(family)
    if needed is None or find_spec(needed):
        return None
    return f"{family}: transformers gives its processor only where {needed} is installed"


def build(family: str, folder: Path, seed: int = 0) -> Path:
    """Save model, image processor, tokenizer and chat template of `family` to `folder`, and return it."""
    model, processor = _builder(family)(family, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _builder(family: str) -> Callable[[str, int], tuple[Any, Any]]:
    import other_families  # they take their parts from here
    import tiling_families

    own: dict[str, Callable[[str, int], tuple[Any, Any]]] = {**dict.fromkeys(QWEN, _qwen), "llava": _llava}
    return (own | {"gemma3": _gemma3} | tiling_families.BUILDERS | other_families.BUILDERS)[family]


_QWEN_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
"""Qwen's way to part text: a sign sticks to the word after it, so that `>A` becomes one token."""


def byte_tokenizer(
    specials: list[str], *, words: str | None = None, bos: str | None = None, **roles: Any
) -> PreTrainedTokenizerFast:
    """Byte-level BPE that spells any text; with `bos` it puts that token first, as Llama's and Gemma's do."""
    tokenizer = Tokenizer(BPE())
    parted = [pre_tokenizers.Split(Regex(words), "isolated")] if words else []
    spelt = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*parted, spelt])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["what is shown in the image answer think the letter <answer>A <answer>B <answer>C <answer>D"] * 3, trainer
    )
    if bos is not None:
        number = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, number)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"bos_token": bos} | roles)


def seeded(model_class: Any, config: Any, seed: int, ids: dict[str, int]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    model.generation_config = GenerationConfig(eos_token_id=ids["eos"], pad_token_id=ids["pad"])
    return model.eval()


def _qwen(family: str, seed: int) -> tuple[Any, Any]:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    specials += ["<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_tokenizer(specials, words=_QWEN_WORDS, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    number = tokenizer.convert_tokens_to_ids
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 1024, "longest_edge": 1 << 20}
    )
    vision = {"depth": 2, "num_heads": 2, "patch_size": 8, "spatial_merge_size": 2, "initializer_range": INIT}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": INIT,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]},
        "bos_token_id": None,
        "eos_token_id": number("<|im_end|>"),
        "pad_token_id": 0,
    }
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    if family == "qwen2_vl":
        classes = (Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor)
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    elif family == "qwen2_5_vl":
        classes = (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor)
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64}
        vision |= {"window_size": 32, "fullatt_block_indexes": [1]}
    else:
        classes = (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor)
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64}
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        text |= {"head_dim": 32}
        text["rope_parameters"] |= {"mrope_interleaved": True, "mrope_section": [6, 5, 5]}
        system = ""
    config = classes[0](
        vision_config=vision,
        text_config=text,
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
    )
    template = _QWEN_TEMPLATE.replace("SYSTEM", system)
    processor = without_video(classes[2])(image_processor, tokenizer, chat_template=template)
    return seeded(classes[1], config, seed, {"eos": number("<|im_end|>"), "pad": 0}), processor


def text_config(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "initializer_range": INIT,
        **more,
    }


TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "initializer_range": INIT,
    "initializer_factor": 5.0,
}


def _llava(_family: str, seed: int) -> tuple[Any, Any]:
    tokenizer = byte_tokenizer(
        ["<unk>", "<s>", "</s>", "<image>", "<pad>"], bos="<s>", eos_token="</s>", pad_token="<pad>"
    )
    number = tokenizer.convert_tokens_to_ids
    image_processor = CLIPImageProcessorPil(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    ids = {"bos_token_id": number("<s>"), "eos_token_id": number("</s>"), "pad_token_id": number("<pad>")}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **TOWER},
        text_config={"model_type": "llama", **text_config(tokenizer, **ids)},
        image_token_index=number("<image>"),
        image_seq_length=16,
    )
    ends = {"eos": number("</s>"), "pad": number("<pad>")}
    return seeded(LlavaForConditionalGeneration, config, seed, ends), processor


def _gemma3(_family: str, seed: int) -> tuple[Any, Any]:
    roles = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    turns = ["<start_of_turn>", "<end_of_turn>"]
    tokenizer = byte_tokenizer(
        ["<pad>", "<eos>", "<bos>", "<unk>", *turns, *roles.values()],
        bos="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=roles,
    )
    number = tokenizer.convert_tokens_to_ids
    image_processor = Gemma3ImageProcessorPil(
        size={"height": 56, "width": 56}, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_pan_and_scan=False
    )
    processor = Gemma3Processor(image_processor, tokenizer, chat_template=_GEMMA_TEMPLATE, image_seq_length=4)
    text = text_config(tokenizer, query_pre_attn_scalar=32, sliding_window=64, max_position_embeddings=2048)
    config = Gemma3Config(
        vision_config={"vision_use_head": False, **TOWER},
        text_config=text | {"layer_types": ["sliding_attention", "full_attention"]},
        mm_tokens_per_image=4,
        boi_token_index=number("<start_of_image>"),
        eoi_token_index=number("<end_of_image>"),
        image_token_index=number("<image_soft_token>"),
    )
    model = seeded(Gemma3ForConditionalGeneration, config, seed, {"eos": number("<end_of_turn>"), "pad": 0})
    # A new projector is all zeros, so that neither image nor gradient would get through.
    projection = model.model.multi_modal_projector.mm_input_projection_weight
    projection.data.normal_(0, INIT, generator=torch.Generator().manual_seed(seed))
    return model, processor
