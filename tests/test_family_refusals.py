"""What a family is refused for, and what its prompt may not hold: each with a reason that says what to do."""

from __future__ import annotations

import json

import pytest
import torch
from families import build
from measured_family import load
from transformers import Blip2Config, Blip2ForConditionalGeneration

from safemed_bench.core.errors import ModelError
from safemed_bench.models.chat import ChatFormat
from safemed_bench.models.processors import image_settings, load_processor


def test_an_encoder_decoder_is_refused(tmp_path):
    folder = build("blip2", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    text = {
        "model_type": "t5",
        "vocab_size": 320,
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 32,
        "num_layers": 1,
        "num_heads": 2,
    }
    config["text_config"] = text | {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    }
    model = Blip2ForConditionalGeneration(Blip2Config.from_dict(config | {"use_decoder_only_language_model": False}))
    model.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"is refused: its language model \(t5\) is an encoder-decoder"):
        load("blip2", folder)


def test_a_processor_without_a_prompt_layout_is_refused(tmp_path):
    folder = build("llava", tmp_path)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match=r"has no chat template: put a chat_template.jinja"):
        load_processor(folder)


def test_paligemma_is_asked_in_its_own_layout_and_one_line(tmp_path):
    model = load("paligemma2", build("paligemma2", tmp_path))
    ids = model.chat.ids("What is it?\nA) a")
    text = model.tokenizer.decode(ids)
    assert text == "<image>" * 16 + "<bos>answer en What is it? A) a\n"
    prefix_and_reply = torch.tensor([[*ids, *model.encode("yes\nno")]])
    kinds = model.chat.token_types(prefix_and_reply)["token_type_ids"][0]
    assert not kinds[: len(ids)].any() and kinds[len(ids) :].all()


def test_a_paligemma_prompt_that_ends_early_is_refused(tmp_path):
    processor = load_processor(build("paligemma2", tmp_path))
    processor.chat_template = "<image>{{ messages[0]['content'][-1]['text'] }}"
    with pytest.raises(ModelError, match="holds the token that ends it"):
        ChatFormat(processor, (56, 56)).ids("two\nlines")


@pytest.mark.parametrize("family", ["paligemma2", "blip2", "instructblip"])
def test_a_family_that_insists_on_an_image_is_not_asked_without(family, tmp_path):
    with pytest.raises(ModelError, match="cannot be asked without an image"):
        load(family, build(family, tmp_path), prompt="blind")


def test_tiles_are_cut_as_the_processor_has_it_done_not_the_image_processor_alone(tmp_path):
    """InternVL's image processor makes no tiles unless its processor says so."""
    model = load("internvl", build("internvl", tmp_path))
    assert image_settings(model.processor) == {"crop_to_patches": True}
    assert model.pixel_map.shape[0] == 5 and not model.processor.image_processor.crop_to_patches
