"""Tiny models of the families that cut the canvas into tiles and add a resampled view of the whole."""

from __future__ import annotations

from functools import partial
from typing import Any

from families import LLAVA_TEMPLATE, PARTS, TOWER, byte_tokenizer, seeded, text_config
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMProcessor,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from safemed_bench.models.processors import without_video

GRID = [[56, 112], [112, 56], [112, 112]]
_TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + PARTS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_IDEFICS_TEMPLATE = (
    "<|im_start|>{% for m in messages %}{{ m['role'].capitalize() }}:" + PARTS + "<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
).replace("IMAGE", "<image>")


def _llava_next(_family: str, seed: int) -> tuple[Any, Any]:
    words = byte_tokenizer(["<unk>", "<s>", "</s>", "<image>", "<pad>"], bos="<s>", eos_token="</s>", pad_token="<pad>")
    number = words.convert_tokens_to_ids
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=GRID
    )
    processor = LlavaNextProcessor(
        image_processor,
        words,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    ids = {"bos_token_id": number("<s>"), "eos_token_id": number("</s>"), "pad_token_id": number("<pad>")}
    config = LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **TOWER},
        text_config={"model_type": "llama", **text_config(words, **ids)},
        image_token_index=number("<image>"),
        image_grid_pinpoints=GRID,
        image_seq_length=16,
    )
    ends = {"eos": number("</s>"), "pad": number("<pad>")}
    return seeded(LlavaNextForConditionalGeneration, config, seed, ends), processor


def _qwen_words(*more: str, **roles: Any) -> Any:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more]
    return byte_tokenizer(specials, pad_token="<|endoftext|>", eos_token="<|im_end|>", **roles)


def _llava_onevision(_family: str, seed: int) -> tuple[Any, Any]:
    words = _qwen_words("<image>", "<video>")
    number = words.convert_tokens_to_ids
    image_processor = LlavaOnevisionImageProcessorPil(size={"height": 56, "width": 56}, image_grid_pinpoints=GRID)
    processor = without_video(LlavaOnevisionProcessor)(
        image_processor,
        words,
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=_TURNS.replace("IMAGE", "<image>\n"),
    )
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER},
        text_config={"model_type": "qwen2", **_qwen_text(words)},
        image_token_index=number("<image>"),
        video_token_index=number("<video>"),
        image_grid_pinpoints=GRID,
    )
    ends = {"eos": number("<|im_end|>"), "pad": 0}
    return seeded(LlavaOnevisionForConditionalGeneration, config, seed, ends), processor


def _qwen_text(words: Any) -> dict[str, Any]:
    return text_config(words, bos_token_id=None, eos_token_id=words.eos_token_id, pad_token_id=0)


def _internvl(_family: str, seed: int) -> tuple[Any, Any]:
    roles = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = _qwen_words(*roles.values(), extra_special_tokens=roles)
    image_processor = GotOcr2ImageProcessorPil(size={"height": 56, "width": 56})
    template = _TURNS.replace("IMAGE", "<IMG_CONTEXT>\n")
    processor = without_video(InternVLProcessor)(image_processor, words, image_seq_length=4, chat_template=template)
    tower = {k: v for k, v in TOWER.items() if k != "initializer_factor"}
    config = InternVLConfig(
        vision_config={**tower, "image_size": [56, 56], "patch_size": [14, 14]},
        text_config={"model_type": "qwen2", **_qwen_text(words)},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
    )
    ends = {"eos": words.eos_token_id, "pad": 0}
    return seeded(InternVLForConditionalGeneration, config, seed, ends), processor


def _idefics(family: str, seed: int) -> tuple[Any, Any]:
    specials = ["<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<image>"]
    specials += ["<global-img>", *(f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2))]
    words = byte_tokenizer(specials, pad_token="<|endoftext|>", eos_token="<end_of_utterance>")
    number = words.convert_tokens_to_ids
    sizes = {"size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}}
    if family == "idefics3":
        image_processor, processor_class = Idefics3ImageProcessorPil(**sizes), Idefics3Processor
        classes = (Idefics3Config, Idefics3ForConditionalGeneration)
    else:
        image_processor = SmolVLMImageProcessorPil(**sizes)
        processor_class = partial(without_video(SmolVLMProcessor), video_processor=None)
        classes = (SmolVLMConfig, SmolVLMForConditionalGeneration)
    processor = processor_class(image_processor, words, image_seq_len=4, chat_template=_IDEFICS_TEMPLATE)
    config = classes[0](
        vision_config={k: v for k, v in TOWER.items() if k != "initializer_factor"},
        text_config={"model_type": "llama", **_qwen_text(words)},
        image_token_id=number("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    return seeded(classes[1], config, seed, {"eos": words.eos_token_id, "pad": 0}), processor


BUILDERS = {
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "idefics3": _idefics,
    "smolvlm": _idefics,
}
