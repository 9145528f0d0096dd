"""Five families through the one adapter: self-check, batching, padding, gradient, prompts and generation."""

from __future__ import annotations

import hashlib
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import FAMILIES, NATIVE, build
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from safemed_bench.core.errors import ModelError
from safemed_bench.core.types import Question
from safemed_bench.models import load_model
from safemed_bench.models.answers import fork

STEMS = (
    "What is shown?",
    "Which imaging modality was most probably used to acquire the picture that you see here?",
    "Is it normal?",
)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return build(family, tmp_path_factory.mktemp(family))


def load(family, folder, **more):
    options = {"revision": None, "prompt": None, "decode": None, "max_new_tokens": 6, "dtype": None, "adapter": None}
    spec = SimpleNamespace(**({"name": family, "path": str(folder)} | options | more))
    return load_model(spec, NATIVE[family], device="cpu")


@pytest.fixture(scope="module")
def model(family, folder):
    return load(family, folder)


def questions():
    """Prompts of different lengths and with 2 to 4 options, so that padding and absent options occur."""
    return [
        Question(
            id=str(i),
            image=f"{i}.png",
            image_sha256=hashlib.sha256(bytes([i])).hexdigest(),
            question=stem,
            options=("cyst", "normal", "fracture of the rib", "mass")[: 2 + i],
            answer=i % 2,
            modality="CT",
            question_type="Disease Diagnosis",
            source="made up",
            split="test",
        )
        for i, stem in enumerate(STEMS)
    ]


@pytest.fixture(scope="module")
def batch(family, model):
    side = NATIVE[family]
    canvas = np.random.default_rng(5).integers(0, 256, (len(STEMS), 3, side, side), dtype=np.uint8)
    return model.prepare(questions(), torch.from_numpy(canvas))


def test_self_check_passes(model, batch):
    found = model.self_check(batch)
    assert found["map"] <= 1e-5 and found["batching"] <= 1e-4 and found["gradient"] <= 0.05


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_self_check_passes_in_half_precision(family, folder, dtype):
    """Loading checks itself; the finite difference must not drown in rounding."""
    assert next(load(family, folder, dtype=dtype).model.parameters()).dtype in (torch.bfloat16, torch.float16)


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
        for i, question in enumerate(questions()):
            alone = model.prepare([question], batch.canvas[i : i + 1])
            assert alone.inputs["attention_mask"].all()
            k = len(question.options)
            difference = model.option_logits(alone, alone.pixels)[0, :k] - together[i, :k]
            assert difference.abs().max() <= 1e-4
    assert not batch.inputs["attention_mask"].all()


def chat_inputs(model, question, canvas):
    """What the family's own processor makes of a question in one call, template and tokens included."""
    image = canvas.permute(1, 2, 0).numpy()
    parts = [{"type": "image", "image": image}, {"type": "text", "text": model.prompt.user_text(question)}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return model.processor.apply_chat_template([{"role": "user", "content": parts}], **options)


def test_prompt_is_the_one_of_the_real_processor(model, batch):
    """Token by token: one BOS, all image tokens, nothing else."""
    for i, question in enumerate(batch.questions):
        real = chat_inputs(model, question, batch.canvas[i])
        kept = batch.inputs["attention_mask"][i].bool()
        assert batch.inputs["input_ids"][i][kept].tolist() == real["input_ids"][0].tolist()


def test_option_logits_equal_the_stock_forward(model, batch):
    """Positions, token types and pixels as the stock model itself would make them of the processor's output."""
    question = questions()[1]
    one = model.prepare([question], batch.canvas[1:2])
    tokens, letters = fork(model.encode, model.answer_prefix(), model.prompt.closing)
    ids = torch.cat([one.inputs["input_ids"], torch.tensor([tokens], dtype=torch.long)], 1)
    image = batch.canvas[1].permute(1, 2, 0).numpy()
    inputs = model.processor.image_processor([image], return_tensors="pt")
    extras = {k: v for k, v in inputs.items() if k not in model.processor.unused_input_names}
    with torch.no_grad():
        stock = model.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), **model.chat.token_types(ids), **extras
        ).logits[0, -1]
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


def test_answer_by_generation_equals_stock_generate(family, folder, batch):
    """A random model writes nonsense: invalid or truncated, never forced to a letter; token for token the stock's."""
    reasoning = load(family, folder, prompt="think", decode="generate")
    prepared = reasoning.prepare(batch.questions, batch.canvas)
    end = reasoning.model.generation_config.eos_token_id
    for i, answer in enumerate(reasoning.answer(prepared, prepared.pixels)):
        assert answer.status in ("invalid", "truncated") and answer.index is None
        inputs = chat_inputs(reasoning, batch.questions[i], batch.canvas[i])
        kept = {k: v for k, v in inputs.items() if k not in reasoning.processor.unused_input_names}
        reply = reasoning.model.generate(**kept, max_new_tokens=6, do_sample=False)[0, kept["input_ids"].shape[1] :]
        assert list(answer.tokens) == [token for token in reply.tolist() if token != end]


def test_a_checkpoint_with_missing_weights_is_refused(family, folder, tmp_path):
    """transformers only warns, and fills the hole with random numbers."""
    for file in folder.iterdir():
        shutil.copy(file, tmp_path)
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
