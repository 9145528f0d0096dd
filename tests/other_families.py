"""Tiny models of PaliGemma 2, BLIP-2, InstructBLIP, Mllama, Pixtral and Mistral 3."""

from __future__ import annotations

from typing import Any

import torch
from families import INIT, PARTS, TOWER, byte_tokenizer, seeded, text_config
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PixtralProcessor,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

SIZE = {"height": 56, "width": 56}
_LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    + PARTS
    + "<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
).replace("IMAGE", "<|image|>")
_MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST]"
    + PARTS
    + "[/INST]{% else %}"
    + PARTS
    + ""
    "{{ eos_token }}{% endif %}{% endfor %}"
).replace("IMAGE", "[IMG]")


def _paligemma2(_family: str, seed: int) -> tuple[Any, Any]:
    words = byte_tokenizer(
        ["<pad>", "<eos>", "<bos>", "<unk>", "<image>"],
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    image_processor = SiglipImageProcessorPil(size=SIZE, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    image_processor.image_seq_length = 16
    processor = PaliGemmaProcessor(image_processor, words)  # no chat template, like the checkpoints
    text = text_config(words, query_pre_attn_scalar=32, sliding_window=64, max_position_embeddings=2048)
    config = PaliGemmaConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER},
        text_config={"model_type": "gemma2", "layer_types": ["sliding_attention", "full_attention"], **text},
        image_token_index=words.convert_tokens_to_ids("<image>"),
        projection_dim=64,
        hidden_size=64,
    )
    ends = {"eos": words.convert_tokens_to_ids("<eos>"), "pad": 0}
    return seeded(PaliGemmaForConditionalGeneration, config, seed, ends), processor


def _blip(family: str, seed: int) -> tuple[Any, Any]:
    words = byte_tokenizer(
        ["<s>", "<pad>", "</s>", "<unk>", "<image>"],
        bos="</s>" if family == "blip2" else "<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    image_processor = BlipImageProcessorPil(size=SIZE)
    tower = {"attention_dropout": 0.0, **TOWER}
    former = {"vocab_size": len(words), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    former |= {"num_attention_heads": 2, "encoder_hidden_size": 32, "initializer_range": INIT}
    ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    if family == "blip2":
        classes = (Blip2Config, Blip2ForConditionalGeneration)
        processor = Blip2Processor(image_processor, words, num_query_tokens=4)
        text = {"model_type": "opt", "vocab_size": len(words), "hidden_size": 64, "ffn_dim": 96, "init_std": INIT}
        text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 64, **ids}
    else:
        classes = (InstructBlipConfig, InstructBlipForConditionalGeneration)
        reader = byte_tokenizer(["[PAD]", "[UNK]", "[CLS]", "[DEC]"], bos="[CLS]", pad_token="[PAD]")
        former["vocab_size"] = len(reader)
        processor = InstructBlipProcessor(image_processor, words, reader, num_query_tokens=4)
        text = {"model_type": "llama", **text_config(words, **ids)}
    config = classes[0](
        vision_config=tower,
        qformer_config=former,
        text_config=text,
        num_query_tokens=4,
        image_token_index=words.convert_tokens_to_ids("<image>"),
        initializer_range=INIT,
    )
    model = seeded(classes[1], config, seed, {"eos": 2, "pad": 1})
    # New queries are all zeros, and what comes through a Q-Former of their scale hardly depends on the image.
    draw = torch.Generator().manual_seed(seed)
    model.query_tokens.data.normal_(0, INIT, generator=draw)
    model.language_projection.weight.data.normal_(0, 3 * INIT, generator=draw)
    for name, weight in model.qformer.named_parameters():
        if "crossattention" in name and weight.ndim == 2:
            weight.data.mul_(2)
    return model, processor


def _mllama(_family: str, seed: int) -> tuple[Any, Any]:
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    words = byte_tokenizer(
        [*specials, "<|finetune_right_pad_id|>", "<|python_tag|>", "<|image|>"],
        bos="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        extra_special_tokens={"image_token": "<|image|>"},
    )
    number = words.convert_tokens_to_ids
    processor = MllamaProcessor(MllamaImageProcessorPil(size=SIZE), words, chat_template=_LLAMA_TEMPLATE)
    vision = {"hidden_size": 32, "num_hidden_layers": 3, "num_global_layers": 1, "attention_heads": 2}
    vision |= {"intermediate_size": 64, "image_size": 56, "patch_size": 14, "initializer_range": INIT}
    vision |= {"intermediate_layers_indices": [0, 1], "vision_output_dim": 96}
    ids = {"bos_token_id": 0, "eos_token_id": number("<|eot_id|>"), "pad_token_id": number("<|finetune_right_pad_id|>")}
    config = MllamaConfig(
        vision_config=vision,
        text_config=text_config(words, cross_attention_layers=[1], **ids),
        image_token_index=number("<|image|>"),
    )
    model = seeded(
        MllamaForConditionalGeneration, config, seed, {"eos": ids["eos_token_id"], "pad": ids["pad_token_id"]}
    )
    # New gates are zeros, so that neither image nor gradient would get through.
    for name, parameter in model.named_parameters():
        if "gate" in name.split(".")[-1]:
            parameter.data.fill_(0.5)
    return model, processor


def _pixtral(family: str, seed: int) -> tuple[Any, Any]:
    specials = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    words = byte_tokenizer(specials, bos="<s>", eos_token="</s>", pad_token="<pad>")
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 5}
    merge = 1 if family == "pixtral" else 2
    processor = PixtralProcessor(
        PixtralImageProcessorPil(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14}),
        words,
        patch_size=14,
        spatial_merge_size=merge,
        chat_template=_MISTRAL_TEMPLATE,
    )
    tower = {k: v for k, v in TOWER.items() if k != "initializer_factor"}
    parts = {
        "vision_config": {"model_type": "pixtral", "head_dim": 16, **tower},
        "text_config": {"model_type": "mistral", "sliding_window": None, **text_config(words, **ids)},
        "image_token_index": words.convert_tokens_to_ids("[IMG]"),
        "vision_feature_layer": -1,
    }
    ends = {"eos": 2, "pad": 5}
    if family == "mistral3":
        config: Any = Mistral3Config(**parts, spatial_merge_size=merge)
        return seeded(Mistral3ForConditionalGeneration, config, seed, ends), processor
    config = LlavaConfig(**parts, vision_feature_select_strategy="full")
    return seeded(LlavaForConditionalGeneration, config, seed, ends), processor


BUILDERS = {
    "paligemma2": _paligemma2,
    "blip2": _blip,
    "instructblip": _blip,
    "mllama": _mllama,
    "pixtral": _pixtral,
    "mistral3": _pixtral,
}
