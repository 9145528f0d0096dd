"""Every family through the one adapter: self-check, batching, padding, gradient, prompts and generation."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from families import FAMILIES, TILING, build, lacks
from measured_family import (
    THREAT,
    attacked,
    load,
    map_error,
    prepared,
    processed,
    replies,
    straight_through,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from safemed_bench.attacks.threat import check
from safemed_bench.core.errors import ModelError
from safemed_bench.models.answers import fork
from safemed_bench.models.loading import compute_dtype, torch_dtype


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    if reason := lacks(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return build(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def model(family, folder):
    return load(family, folder)


@pytest.fixture(scope="module")
def batch(model):
    return prepared(model)


def test_self_check_passes(model, batch):
    found = model.self_check(batch)
    assert found["map"] <= 1e-5 and found["batching"] <= 1e-4 and found["gradient"] <= 0.05


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_self_check_passes_in_half_precision(family, folder, dtype):
    """Loading checks itself; the finite difference must not drown in rounding."""
    assert compute_dtype(load(family, folder, dtype=dtype).model) == torch_dtype(dtype, torch.device("cpu"))


def test_letters_may_be_merged_with_what_stands_before_them(family, model, batch):
    """Qwen's tokenizers have `>A`; the scores of the letters are those of whole replies."""
    with torch.no_grad():
        scores = model.option_logits(batch, batch.pixels)
        for k, letter in enumerate("AB"):
            tokens = model.encode(f"<answer>{letter}</answer>")
            stem = model.encode("<answer>A</answer>")
            same = next(i for i in range(len(tokens)) if model.encode("<answer>B</answer>")[i] != stem[i])
            one = torch.tensor([[tokens[same]]] * len(batch))
            direct = model.next_token_logits(batch, batch.pixels, [tokens[:same]] * len(batch), one)
            assert torch.allclose(scores[:, k], direct[:, 0], atol=1e-5)


def test_weights_are_those_of_the_folder(model, folder):
    """Whatever the adapter does for speed, the loaded model computes what the plain checkpoint computes."""
    plain = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = model.processor
    side = model.resolution[0]
    image = np.random.default_rng(6).integers(0, 256, (side, side, 3), dtype=np.uint8)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
    )
    inputs = processor(images=[image], text=[text], return_tensors="pt")
    with torch.no_grad():
        assert torch.allclose(model.model(**inputs).logits, plain(**inputs).logits, atol=1e-4)


def test_single_equals_batched(model, batch):
    with torch.no_grad():
        together = model.option_logits(batch, batch.pixels)
        for i in range(len(batch)):
            one = batch.select([i])
            alone = model.option_logits(one, one.pixels)
            k = len(one.questions[0].options)
            assert (alone[0, :k] - together[i, :k]).abs().max() <= 1e-4
            assert torch.isinf(together[i, k:]).all()


def test_left_padding_changes_nothing(model, batch):
    """A question prepared alone (no padding) against the same one in a batch with a longer one."""
    with torch.no_grad():
        together = model.option_logits(batch, batch.pixels)
        for i, question in enumerate(batch.questions):
            alone = model.prepare([question], batch.canvas[i : i + 1])
            assert alone.inputs["attention_mask"].all()
            k = len(question.options)
            difference = model.option_logits(alone, alone.pixels)[0, :k] - together[i, :k]
            assert difference.abs().max() <= 1e-4
    assert not batch.inputs["attention_mask"].all()


def test_prompt_is_the_one_of_the_real_processor(model, batch):
    """Token by token: one BOS, all image tokens, nothing else."""
    for i, question in enumerate(batch.questions):
        real = processed(model, question, batch.canvas[i])
        kept = batch.inputs["attention_mask"][i].bool()
        assert batch.inputs["input_ids"][i][kept].tolist() == real["input_ids"][0].tolist()


def test_option_logits_equal_the_stock_forward(family, model, batch):
    """Positions, token types, masks and pixels as the stock model itself would make them of the processor's output."""
    one = model.prepare(batch.questions[1:2], batch.canvas[1:2])
    tokens, letters = fork(model.encode, model.answer_prefix(), model.prompt.closing)
    inputs = processed(model, batch.questions[1], batch.canvas[1])
    more = {
        "input_ids": torch.tensor([tokens], dtype=torch.long),
        "attention_mask": torch.ones(1, len(tokens), dtype=torch.long),
        # After PaliGemma's prefix comes the reply, which is of the other type; elsewhere 1 is for image tokens.
        "token_type_ids": torch.full((1, len(tokens)), int(family == "paligemma2")),
        "mm_token_type_ids": torch.zeros(1, len(tokens), dtype=torch.long),
    }
    inputs |= {key: torch.cat([inputs[key], value], 1) for key, value in more.items() if key in inputs}
    if "cross_attention_mask" in inputs:
        mask = inputs["cross_attention_mask"]
        inputs["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, len(tokens), -1, -1)], 1)
    with torch.no_grad():
        stock = model.model(**inputs).logits[0, -1]
        ours = model.option_logits(one, one.pixels)[0]
    assert (stock.log_softmax(-1)[list(letters[:3])] - ours).abs().max() <= 1e-4


def test_gradient_reaches_every_image_and_only_its_own(model, batch):
    pixels = batch.pixels.requires_grad_()
    scores = model.option_logits(batch, pixels)
    (gradient,) = torch.autograd.grad(scores[1, 0], pixels)
    norms = gradient.flatten(1).norm(dim=1)
    assert norms[1] > 1e-4 and norms[0] == 0 and norms[2] == 0


def test_token_loss_equals_next_token_logits(model, batch):
    """The loss of a one-token continuation is minus its log-probability."""
    text = ["A"] * len(batch)
    candidates = torch.tensor([model.encode("A")] * len(batch))
    with torch.no_grad():
        loss = model.token_loss(batch, batch.pixels, text)
        score = model.next_token_logits(batch, batch.pixels, [""] * len(batch), candidates)[:, 0]
    assert (loss + score).abs().max() <= 1e-4


def test_continuations_of_different_lengths(model, batch):
    texts = ["a", "a much longer reply, with several tokens", ""]
    with torch.no_grad():
        together = model.token_loss(batch, batch.pixels, texts)
        for i, text in enumerate(texts[:2]):
            one = batch.select([i])
            assert abs(float(model.token_loss(one, one.pixels, [text])) - float(together[i])) <= 1e-4


def test_answer_by_log_probability(model, batch):
    answers = model.answer(batch, batch.pixels)
    scores = model.option_logits(batch, batch.pixels)
    for answer, row, question in zip(answers, scores, batch.questions, strict=True):
        assert answer.status == "valid" and answer.index == int(row.argmax())
        assert len(answer.option_logprobs) == len(question.options)


@pytest.fixture(scope="module")
def reasoning(family, folder):
    return load(family, folder, prompt="think", decode="generate")


def test_answer_by_generation_equals_stock_generate(reasoning, batch):
    """A random model writes nonsense: invalid or truncated, never forced to a letter; token for token the stock's."""
    asked = reasoning.prepare(batch.questions, batch.canvas)
    assert all(a.status in ("invalid", "truncated") and a.index is None for a in reasoning.answer(asked, asked.pixels))
    assert all(ours == stock for ours, stock in replies(reasoning, asked))


def test_a_reply_is_scored_as_it_was_written(reasoning, batch):
    """Teacher-forced, each token of a greedy reply is the likeliest after those before it: none sees a later one."""
    asked = reasoning.prepare(batch.questions, batch.canvas)
    written = [answer.tokens for answer in reasoning.answer(asked, asked.pixels)]
    inputs, tail, mask = reasoning._join(asked.inputs, written)
    with torch.no_grad():
        logits = reasoning._logits(inputs, reasoning.pixel_values(asked.pixels), tail.shape[1] + 1)[:, :-1]
    assert mask.sum() > 0 and torch.equal(logits.argmax(-1)[mask.bool()], tail[mask.bool()])


def test_pgd_fools_the_deployed_path(model):
    """A whole attack: the loss rises, the ball is kept, and the verdicts are those of the saved 8-bit images."""
    batch, result = attacked(model)
    assert result.attacked.all() and (result.dead_gradients == 0).all()
    gain = result.final_loss - result.start_loss
    assert (gain >= 0).all() and (gain > 0).sum() >= 4 and result.success.sum() >= 2
    check(THREAT, batch.canvas, result.adversarial)
    again = model.answer(batch, result.adversarial.float() / 255)
    assert [a.index != q.answer for a, q in zip(again, batch.questions, strict=True)] == result.success.tolist()


def test_rounding_inside_the_processor_hardly_turns_the_gradient(family, model, batch):
    assert straight_through(model, batch) >= (0.99 if family in TILING else 1 - 1e-5)


def test_the_real_processor_makes_what_the_map_says(model, batch):
    assert map_error(model, batch) <= 1e-5


@pytest.mark.parametrize("resolution", [(56, 112), (112, 56)], ids=str)
def test_two_tiles_beside_or_above_each_other(family, folder, resolution):
    """Another grid: other prompts and masks, the thumbnail squeezed along one side only."""
    if family not in (*TILING, "mllama"):
        return
    model = load(family, folder, resolution=resolution, prompt="think", decode="generate")
    batch = prepared(model)
    assert map_error(model, batch) <= 1e-5
    assert all(ours == stock for ours, stock in replies(model, batch))


def test_a_checkpoint_with_missing_weights_is_refused(family, folder, tmp_path):
    """transformers only warns, and fills the hole with random numbers."""
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(name for name in sorted(weights) if "vision" in name or "visual" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="lacks 1 weights"):
        load(family, tmp_path)


def test_another_image_gives_another_answer_distribution(model, batch):
    with torch.no_grad():
        a = model.option_logits(batch, batch.pixels)
        b = model.option_logits(batch, 1 - batch.pixels)
    present = torch.isfinite(a)
    assert (a - b)[present].abs().max() > 1e-4
