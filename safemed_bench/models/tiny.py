"""The architecture of the default entries: a Qwen3-VL of under a million parameters, with its tokenizer, from scratch.

One size for all default entries, so that they differ in the recipe alone (DESIGN, section 7).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ..core.types import LETTERS
from .processors import without_video
from .prompts import PROMPTS

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

WORD = r" ?[\p{L}\p{N}]+(?:-[\p{L}\p{N}]+)*| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What may become one token: words with the space before them (`X-ray` is one), runs of signs, white space."""

INIT_STD = 0.1
"""About 1/sqrt(width). With the usual 0.02, made for widths of thousands, option letters are never learnt here."""

OPENERS = ("so", "this", "the")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

QUESTION_WORDS = """
a abnormal abnormality acquire acquired anatomical anatomy and any appears are area axial belong benign biopsy
blood body bone brain breast by can capture captured cancer category cell chest classification condition could
depicted depicts describe detected diagnosis diagnosed diagnostic disease diseases disorder display displayed
does employed evidence eye figure finding following for from healthy how identified identify image images
imaging in indicate indicated infection is it kind lesion lesions level lung magnetic main malignant medical
method microscopic modality most name no normal not object observed obtain obtained of one or organ part
patient photo photograph photography picture plane pneumonia possible presence present produce procedure
radiograph ray region represent represented resonance retinal revealed scan see seen severity show showing
shown shows sign skin specific specimen stage structure suggest suspected symptom take taken technique that
the this tissue to tomography tumor type ultrasound used using view visible was what where which white with x
yes
"""


def build_tokenizer(words: Iterable[str], *, general: str = QUESTION_WORDS) -> PreTrainedTokenizerFast:
    """Byte-level BPE that can spell any text and keeps each of `words` (and the prompts' words) one token.

    Deterministic; trained on the words alone, each with and without a leading space and a capital.
    """
    own = sorted({*words, *(w for p in PROMPTS.values() for w in p.template.split()), *general.split(), *LETTERS})
    corpus = [form for w in own for form in (f" {w}", w, f" {w.capitalize()}", w.capitalize())]
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=3,
        special_tokens=[PAD, START, END, *VISION],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # A word that stands in the corpus `min_frequency` times is merged into one token. Sentences and
    # rationales begin with a capital or with one of OPENERS.
    repeats = {f: 3 if f.startswith(" ") or f == f.capitalize() or f in OPENERS else 1 for f in corpus}
    tokenizer.train_from_iterator([form for form, n in repeats.items() for _ in range(n)], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        padding_side="left",
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
    )
    fast.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return fast


def build(
    words: Iterable[str],
    *,
    seed: int = 0,
    resolution: int = 64,
    hidden: int = 96,
    layers: int = 4,
    vision_hidden: int = 64,
    vision_layers: int = 4,
    patch: int = 8,
) -> tuple[Qwen3VLForConditionalGeneration, Any]:
    """A randomly initialised model and its processor. `hidden` must be a multiple of 32, `resolution` of 2 * patch."""
    tokenizer = build_tokenizer(words)
    ids = {token: tokenizer.get_vocab()[token] for token in (PAD, END, *VISION)}
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": (2 * patch) ** 2, "longest_edge": 1 << 22},
    )
    processor = without_video(Qwen3VLProcessor)(image_processor, tokenizer, chat_template=CHAT_TEMPLATE)
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 32,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "pad_token_id": ids[PAD],
            "eos_token_id": ids[END],
            "tie_word_embeddings": True,
            "initializer_range": INIT_STD,
        },
        vision_config={
            "depth": vision_layers,
            "hidden_size": vision_hidden,
            "intermediate_size": 2 * vision_hidden,
            "num_heads": vision_hidden // 32,
            "patch_size": patch,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "out_hidden_size": hidden,
            "num_position_embeddings": (resolution // patch) ** 2,
            "deepstack_visual_indexes": [1],
            "initializer_range": INIT_STD,
        },
        vision_start_token_id=ids[VISION[0]],
        vision_end_token_id=ids[VISION[1]],
        image_token_id=ids[VISION[2]],
        video_token_id=ids[VISION[3]],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    _tie_queries_to_keys(model)
    model.generation_config = GenerationConfig(eos_token_id=ids[END], pad_token_id=ids[PAD], do_sample=False)
    return model, processor


@torch.no_grad()
def _tie_queries_to_keys(model: Qwen3VLForConditionalGeneration) -> None:
    """Start one head of each text layer as "attend to the same token".

    Finding an option's letter is matching a word with its earlier occurrence. From plain random weights that circuit
    appears late and suddenly; from equal query and key projections it is there at step 0.
    """
    for layer in model.model.language_model.layers:
        key = layer.self_attn.k_proj.weight
        key.copy_(layer.self_attn.q_proj.weight[: key.shape[0]])


def save(model: Any, processor: Any, folder: str | Path) -> None:
    """Weights (in the model's own dtype), config, tokenizer and processor files, loadable by path."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
