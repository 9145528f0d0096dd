"""The cheaper pass of an attack's steps: transformers' own scores, gradients and verdicts, or the own pass itself."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import build
from measured_family import load, prepared, questions
from torch.autograd import gradcheck
from transformers import AutoConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl import modeling_qwen3_vl as stock

from safemed_bench.attacks import build_objective, build_strike
from safemed_bench.attacks.base import climbing, frozen
from safemed_bench.core.types import ThreatModel
from safemed_bench.datasets import load as load_data
from safemed_bench.datasets.images import load_canvas
from safemed_bench.models import load_model, qwen3_vl
from safemed_bench.models.fused import NormedRotary, RMSNorm, Rotary
from safemed_bench.models.huggingface import HuggingFaceVLM
from safemed_bench.models.shortcut import Shortcut
from safemed_bench.models.smoothed import Smoothed
from safemed_bench.run.probes import gradient
from safemed_bench.suite.schema import DataSpec, ModelSpec
from safemed_bench.training.checkpoint import with_lora
from safemed_bench.training.settings import LoraSettings

TEXTS = ["a", "a much longer reply, with several tokens", ""]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Random weights: every token matters to every score."""
    return load("qwen3_vl", build("qwen3_vl", tmp_path_factory.mktemp("qwen3_vl")))


def shaped(plain, *, layers, heads, key_heads, deepstack):
    """The same entry of another depth."""
    config = AutoConfig.from_pretrained(plain.card.path)
    text, vision = config.text_config, config.vision_config
    text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads = layers, heads, key_heads
    text.layer_types = ["full_attention"] * layers
    vision.deepstack_visual_indexes = deepstack
    torch.manual_seed(1)
    model = Qwen3VLForConditionalGeneration(config).eval().requires_grad_(False)
    model.generation_config = plain.model.generation_config
    return with_shortcut(HuggingFaceVLM(model, plain.processor, plain.card, plain.resolution))


def with_shortcut(vlm):
    vlm.shortcut = Shortcut.of(vlm)
    assert vlm.shortcut.exact, vlm.shortcut.reason
    return vlm


def token_loss(vlm, batch, pixels):
    return vlm.token_loss(batch, pixels, TEXTS)


def weighted_loss(vlm, batch, pixels):
    text = [vlm.encode(t or "x") for t in TEXTS]
    return vlm.token_loss(batch, pixels, text, [[k + 1.0 for k in range(len(t))] for t in text])


def next_token(vlm, batch, pixels):
    return vlm.next_token_logits(batch, pixels, TEXTS, torch.tensor([[40, 41]] * len(batch)))


def options(vlm, batch, pixels):
    scores = vlm.option_logits(batch, pixels)
    return scores[scores.isfinite()]


def read_with_slope(vlm, batch, read, *, inside):
    pixels = batch.pixels.requires_grad_()
    with inside(vlm):
        scores = read(vlm, batch, pixels)
        uneven = torch.arange(1, scores.numel() + 1, device=scores.device).view_as(scores)
        (slope,) = torch.autograd.grad((scores * uneven).sum(), pixels)
    return scores.detach(), slope


@contextmanager
def counted(monkeypatch):
    """How often the cheaper pass gave the logits."""
    taken, own = [], qwen3_vl.Pass.__call__

    def call(self, *arguments):
        logits = own(self, *arguments)
        taken.append(logits is not None)
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(qwen3_vl.Pass, "__call__", call)
        yield taken


def assert_same(vlm, batch, read, monkeypatch, close=1e-5):
    with counted(monkeypatch) as taken:
        theirs, steep = read_with_slope(vlm, batch, read, inside=frozen)
        assert taken == []
        ours, slope = read_with_slope(vlm, batch, read, inside=climbing)
        assert taken == [True]
    assert (ours - theirs).abs().max() <= 2 * close
    assert steep.norm() > 0 and (slope - steep).norm() <= 5 * close * steep.norm()


# -- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("read", [options, token_loss, weighted_loss, next_token])
def test_scores_and_gradients_are_those_of_the_own_pass(plain, read, monkeypatch):
    """On prompts and continuations of different lengths."""
    batch = prepared(plain)
    assert not batch.inputs["attention_mask"].all()
    assert_same(plain, batch, read, monkeypatch)


@pytest.mark.parametrize(
    "shape",
    [
        {"layers": 1, "heads": 2, "key_heads": 1, "deepstack": [0]},
        {"layers": 2, "heads": 4, "key_heads": 4, "deepstack": [0, 1]},
        {"layers": 4, "heads": 6, "key_heads": 2, "deepstack": [0, 1]},
        {"layers": 3, "heads": 2, "key_heads": 1, "deepstack": []},
    ],
    ids=str,
)
def test_of_any_depth_and_number_of_heads(plain, shape, monkeypatch):
    """One layer is the first and the last; DeepStack may reach the last one."""
    vlm = shaped(plain, **shape)
    for read in (options, token_loss):
        assert_same(vlm, prepared(vlm), read, monkeypatch)


def test_with_an_adapter(plain, monkeypatch):
    pytest.importorskip("peft")
    model = with_lora(copy.deepcopy(plain.model), LoraSettings(rank=2))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2, generator=torch.Generator().manual_seed(0))
    vlm = HuggingFaceVLM(model.eval().requires_grad_(False), plain.processor, plain.card, plain.resolution)
    assert_same(with_shortcut(vlm), prepared(vlm), token_loss, monkeypatch)
    different, _ = read_with_slope(vlm, prepared(vlm), token_loss, inside=climbing)
    without, _ = read_with_slope(plain, prepared(plain), token_loss, inside=climbing)
    assert (different - without).abs().max() > 1e-3, "the adapter does nothing here"


def asked(name, count=6):
    vlm = load_model(ModelSpec(name=name), 64, device="cpu")
    chosen = load_data(DataSpec(name="phantom", per_modality=2)).questions[:count]
    canvas = torch.stack([torch.from_numpy(load_canvas(Path(q.image), 64)).permute(2, 0, 1) for q in chosen])
    return vlm, vlm.prepare(chosen, canvas)


@pytest.mark.parametrize(
    ("entry", "objective"), [("sft", "answer"), ("safemed-r1", "answer"), ("safemed-r1", "rationale_answer")]
)
def test_verdicts_are_those_of_the_naive_loop(entry, objective, monkeypatch):
    vlm, batch = asked(entry)
    clean, found = vlm.answer(batch, batch.pixels), []
    for shortcut, active_set in ((vlm.shortcut, True), (Shortcut.off("the naive loop"), False)):
        vlm.shortcut = shortcut
        with counted(monkeypatch) as taken:
            result = build_strike("pgd", objective, {"steps": 6, "restarts": 2, "active_set": active_set})(
                vlm,
                batch,
                ThreatModel("linf", 4 / 255),
                generators=[torch.Generator().manual_seed(i) for i in range(len(batch))],
                clean_answers=clean,
            )
            assert bool(taken) == shortcut.exact and all(taken)
        found.append((result.success.tolist(), [a.index for a in result.answers]))
    assert found[0] == found[1] and vlm._pass is None


# -- only for climbing ------------------------------------------------------------------------------------------------


def test_what_is_believed_comes_from_the_own_pass_bit_for_bit(plain, monkeypatch):
    batch = prepared(plain)
    outside = plain.answer(batch, batch.pixels)
    with counted(monkeypatch) as taken, climbing(plain):
        inside = plain.answer(batch, batch.pixels)
        with torch.no_grad():
            plain.option_logits(batch, batch.pixels)
        plain.option_logits(batch, batch.pixels)
    assert inside == outside and taken == []


def test_the_entry_under_a_smoothed_one_takes_it(plain, monkeypatch):
    smoothed = Smoothed(plain, sigma=0.1, n=8, alpha=0.05)
    batch = prepared(plain)
    with counted(monkeypatch) as taken, climbing(smoothed):
        plain.option_logits(batch, batch.pixels.requires_grad_())
    assert taken == [True] and plain._pass is None


def test_what_is_known_of_the_words_is_computed_once(plain):
    """Embeddings of the words are looked up for each batch, not for each step; objectives may take turns."""
    batch, seen = prepared(plain), []
    hook = plain.model.get_input_embeddings().register_forward_hook(lambda module, ids, out: seen.append(1))
    try:
        with climbing(plain):
            read_with_slope(plain, batch, options, inside=climbing)
            read_with_slope(plain, batch, token_loss, inside=climbing)
            before = len(seen)
            for _ in range(3):
                read_with_slope(plain, batch, options, inside=climbing)
                read_with_slope(plain, batch, token_loss, inside=climbing)
            assert len(seen) == before
            read_with_slope(plain, batch.select([0, 1]), options, inside=climbing)
            assert len(seen) == before + 1
    finally:
        hook.remove()


def test_weights_that_change_between_two_attacks_are_seen(plain, monkeypatch):
    vlm = with_shortcut(HuggingFaceVLM(copy.deepcopy(plain.model), plain.processor, plain.card, plain.resolution))
    batch = prepared(vlm)
    assert_same(vlm, batch, options, monkeypatch)
    with torch.no_grad():
        for weight in vlm.model.parameters():
            weight.mul_(1.05)
    assert_same(vlm, batch, options, monkeypatch)


# -- left alone -------------------------------------------------------------------------------------------------------


def taken_by(vlm, monkeypatch, batch=None):
    batch = batch or prepared(vlm)
    with counted(monkeypatch) as taken:
        scores, slope = read_with_slope(vlm, batch, options, inside=climbing)
    assert slope.norm() > 0 and scores.isfinite().all()
    return any(taken)


@pytest.mark.parametrize("part", ["model.language_model.layers.0", "model.visual.blocks.1.attn", ""])
def test_a_hook_is_not_passed_over(plain, part, monkeypatch):
    """A defence that changes activations is attacked as it is."""
    assert taken_by(plain, monkeypatch)
    hook = plain.model.get_submodule(part).register_forward_hook(lambda module, given, out: out)
    try:
        assert not taken_by(plain, monkeypatch)
        assert "does something of its own" in Shortcut.of(plain).reason
    finally:
        hook.remove()
    assert taken_by(plain, monkeypatch)


def test_a_subclass_is_not_passed_over(plain, monkeypatch):
    class Defended(stock.Qwen3VLTextDecoderLayer):
        pass

    layer = plain.model.model.language_model.layers[1]
    layer.__class__ = Defended
    try:
        assert not taken_by(plain, monkeypatch)
    finally:
        layer.__class__ = stock.Qwen3VLTextDecoderLayer


def test_activations_that_are_computed_twice_stay_so(plain, monkeypatch):
    vlm = with_shortcut(HuggingFaceVLM(copy.deepcopy(plain.model), plain.processor, plain.card, plain.resolution))
    assert vlm.save_memory() and not taken_by(vlm, monkeypatch)


def test_training_and_half_precision_go_the_own_way(plain, tmp_path, monkeypatch):
    half = load("qwen3_vl", build("qwen3_vl", tmp_path), dtype="bf16")
    assert not half.shortcut.exact and "not float32" in half.shortcut.reason
    vlm = with_shortcut(HuggingFaceVLM(copy.deepcopy(plain.model), plain.processor, plain.card, plain.resolution))
    vlm.model.train()
    assert not taken_by(vlm, monkeypatch)
    vlm.model.eval()
    with torch.autocast("cpu"):
        assert not taken_by(vlm, monkeypatch)
    assert taken_by(vlm, monkeypatch)


def test_other_families_have_none(tmp_path):
    vlm = load("qwen2_5_vl", build("qwen2_5_vl", tmp_path))
    assert not vlm.shortcut.exact and vlm.shortcut.reason == "not taken: not a Qwen3-VL"


def with_another_beginning(batch):
    inputs = dict(batch.inputs)
    first = int((inputs["attention_mask"][0] == 0).sum())
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][0, first] += 1
    return replace(batch, inputs=inputs)


def with_holes(batch):
    inputs = dict(batch.inputs)
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][0, -2] = 0
    return replace(batch, inputs=inputs)


@pytest.mark.parametrize("change", [with_another_beginning, with_holes])
def test_a_prompt_that_is_laid_out_otherwise_goes_the_own_way(plain, change, monkeypatch):
    assert not taken_by(plain, monkeypatch, change(prepared(plain)))


def shifted_columns(x, at):
    return x[torch.arange(len(at))[:, None], (at - 1).clamp(min=0)]


def wrong_turn(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], -x[..., :half]), -1) * sin


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        ("safemed_bench.models.qwen3_vl._columns", shifted_columns),
        ("safemed_bench.models.fused._turn", wrong_turn),
        ("safemed_bench.models.fused._through_unit", lambda slope, y, scale: slope * scale),
    ],
)
def test_a_pass_that_is_slightly_wrong_is_refused(plain, where, fault, monkeypatch):
    monkeypatch.setattr(where, fault)
    shortcut = Shortcut.of(plain)
    assert not shortcut.exact and shortcut.reason.startswith("not taken: with it, scores differ by")


def test_the_diagnostic_of_gradients_looks_at_the_slope_that_is_climbed(plain, monkeypatch):
    """So that a pass that went wrong after its start-up check would be seen."""
    batch = prepared(plain)

    def mismatches():
        return [extra["mismatch"] for _, extra in gradient(plain, batch)]

    assert max(mismatches()) <= 0.05
    monkeypatch.setattr("safemed_bench.models.fused._through_unit", lambda slope, y, scale: -slope * scale)
    assert min(mismatches()) > 0.5


def test_every_shipped_entry_that_sees_has_it():
    for name in ("sft", "instruct", "cot", "safemed-r1"):
        vlm = load_model(ModelSpec(name=name), 64, device="cpu")
        assert vlm.shortcut.exact, vlm.shortcut.reason


def test_objectives_of_a_reasoning_entry_read_it_as_it_is():
    """Every objective's loss and slope at its start, on the entry's own rationales."""
    vlm, batch = asked("cot")
    answers = vlm.answer(batch, batch.pixels)
    for name in ("answer", "margin", "no_think", "rationale_answer", "decision_slot", "stop_reasoning"):
        found = []
        for inside in (frozen, climbing):
            pixels = (batch.pixels + 0.01).requires_grad_()
            with inside(vlm):
                loss = build_objective(name).prepare(vlm, batch, answers)(pixels).loss
                (slope,) = torch.autograd.grad(loss.sum(), pixels)
            found.append((loss.detach(), slope))
        (theirs, steep), (ours, slope) = found
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4), name
        assert (slope - steep).norm() <= 1e-3 * steep.norm(), name


# -- the functions ----------------------------------------------------------------------------------------------------


def drawn(*shapes, dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes]


def angles(columns, width, dtype=torch.float64):
    turn = torch.rand(columns, 1, width // 2, generator=torch.Generator().manual_seed(1), dtype=dtype) * 6
    return torch.cat([turn, turn], -1).cos(), torch.cat([turn, turn], -1).sin()


def test_fused_functions_are_transformers_own_with_the_gradient_of_a_finite_difference():
    x, weight = drawn((2, 3, 2, 8), (8,))
    cos, sin = angles(3, 8)
    norm = stock.Qwen3VLTextRMSNorm(8, eps=1e-6)
    norm.weight.data = weight.float()
    turned, _ = stock.apply_rotary_pos_emb(x, x, cos[..., 0, :], sin[..., 0, :], unsqueeze_dim=1)
    single = x.float()
    assert torch.allclose(RMSNorm.apply(single, norm.weight, 1e-6), norm(single), atol=1e-6)
    assert torch.allclose(Rotary.apply(x, cos, sin), turned, atol=1e-12)
    both = Rotary.apply(RMSNorm.apply(x, weight, 1e-6), cos, sin)
    assert torch.allclose(NormedRotary.apply(x, weight, 1e-6, cos, sin), both, atol=1e-12)
    x.requires_grad_()
    assert gradcheck(lambda x: RMSNorm.apply(x, weight, 1e-6), x)
    assert gradcheck(lambda x: Rotary.apply(x, cos, sin), x)
    assert gradcheck(lambda x: NormedRotary.apply(x, weight, 1e-6, cos, sin), x)


def test_questions_differ_in_length():
    assert len({len(q.question) for q in questions()}) > 1, "else nothing is padded above"
