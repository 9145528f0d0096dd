"""Work that is not done for a large model: with and without each shortcut the same scores, gradients and verdicts."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import FAMILIES, TRAINED, build, lacks
from measured_family import load, prepared, questions
from torch.profiler import ProfilerActivity, profile
from transformers import DynamicCache, StaticCache

from safemed_bench.attacks import build_strike
from safemed_bench.attacks.base import frozen
from safemed_bench.core.types import ThreatModel
from safemed_bench.models import huggingface, load_model
from safemed_bench.models.generation import cache_options, generate
from safemed_bench.models.huggingface import HuggingFaceVLM
from safemed_bench.models.loading import compute_dtype, torch_dtype
from safemed_bench.models.parallel import host_threads, in_threads
from safemed_bench.models.pixels import image_processor_call
from safemed_bench.models.prefix import Prefix
from safemed_bench.models.recompute import recompute
from safemed_bench.models.sequences import behind
from safemed_bench.run.batching import BatchSizer
from safemed_bench.suite.schema import ModelSpec
from safemed_bench.training.checkpoint import with_lora
from safemed_bench.training.policy import Policy
from safemed_bench.training.settings import LoraSettings

TEXTS = ["a", "a much longer reply, with several tokens", ""]


HERE = [family for family in FAMILIES if not lacks(family)]
PLAIN = {
    "gemma3": "both directions",
    "paligemma2": "no text before an image",
    "blip2": "no text before an image",
    "instructblip": "no text before an image",
    "mllama": "the family's cache cannot be used",
}
"""Families whose text before the image is not cached, and why they say so."""
SOME = ("qwen2_5_vl", "llava", "internvl")
"""Where a test is of our own code, for which one family is as good as another."""
cacheable = pytest.mark.parametrize("family", [name for name in HERE if name not in PLAIN], indirect=True)
some = pytest.mark.parametrize("family", SOME, indirect=True)


@pytest.fixture(scope="module", params=HERE)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return build(family, tmp_path_factory.mktemp(family))


@pytest.fixture(scope="module")
def plain(family, folder):
    """A tiny model of the family; too small for any shortcut that is chosen by size."""
    return load(family, folder)


def with_prefix(vlm):
    """The same entry with the text before the image cached."""
    cached = copy.copy(vlm)
    cached.prefix = Prefix.of(vlm, worth=0)
    assert cached.prefix.length > 0, cached.prefix.reason
    return cached


def token_loss(vlm, batch, pixels):
    return -vlm.token_loss(batch, pixels, TEXTS)


def next_token(vlm, batch, pixels):
    return vlm.next_token_logits(batch, pixels, TEXTS, torch.tensor([[40, 41]] * len(batch)))


def options(vlm, batch, pixels):
    scores = vlm.option_logits(batch, pixels)
    return scores[scores.isfinite()]


# -- the text before the image ----------------------------------------------------------------------------------------


@cacheable
@pytest.mark.parametrize("read", [options, token_loss, next_token])
def test_cached_prefix_gives_the_whole_prompts_scores_and_gradients(plain, read):
    """On prompts and continuations of different lengths, so that rows are padded before the prefix."""
    cached, found = with_prefix(plain), []
    for vlm in (cached, plain):
        batch = prepared(vlm)
        assert not batch.inputs["attention_mask"].all()
        pixels = batch.pixels.requires_grad_()
        scores = read(vlm, batch, pixels)
        (slope,) = torch.autograd.grad(scores.sum(), pixels)
        found.append((scores.detach(), slope))
    (ours, steep), (theirs, steep_too) = found
    assert (ours - theirs).abs().max() <= 1e-5
    assert (steep - steep_too).norm() <= 1e-5 * steep_too.norm()


@cacheable
def test_cached_prefix_gives_the_same_verdicts(plain):
    """A whole attack, its clean answers and its judge."""
    found = []
    for vlm in (with_prefix(plain), plain):
        batch = prepared(vlm)
        clean = vlm.answer(batch, batch.pixels)
        asked = [SimpleNamespace(**(vars_of(q) | {"answer": a.index})) for q, a in zip(questions(), clean, strict=True)]
        batch = type(batch)(tuple(asked), batch.canvas, batch.inputs)
        result = build_strike("pgd", "answer", {"steps": 4})(
            vlm,
            batch,
            ThreatModel("linf", 8 / 255),
            generators=[torch.Generator().manual_seed(i) for i in range(len(batch))],
            clean_answers=clean,
        )
        found.append(([a.index for a in clean], result.success.tolist(), [a.index for a in result.answers]))
    assert found[0] == found[1]


def vars_of(question):
    return {name: getattr(question, name) for name in question.__slots__}


def shifted(inputs, length):
    """What comes after the cached text stands one position too far."""
    rest = behind(inputs, length)
    return rest | {"position_ids": rest["position_ids"] + 1}


def unseen(inputs, length):
    """The first cached token is not attended to."""
    rest = behind(inputs, length)
    return rest | {"attention_mask": rest["attention_mask"].index_fill(1, torch.tensor([0]), 0)}


@some
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_cache_that_is_slightly_wrong_is_refused(monkeypatch, folder, family, dtype):
    """In bfloat16 too, whose rounding is as large as such faults; the weights come out of the check as they were."""
    vlm = load(family, folder, dtype=dtype)
    weights = [(p, p.dtype, p.data_ptr(), p.clone()) for p in vlm.model.parameters()]
    for fault in (shifted, unseen):
        with monkeypatch.context() as patch:
            patch.setattr(huggingface, "behind", fault)
            assert "with it, scores differ" in Prefix.of(vlm, worth=0).reason
    right = with_prefix(vlm)
    assert all((p.dtype, p.data_ptr()) == (kind, at) and torch.equal(p, old) for p, kind, at, old in weights)
    keys = {layer.keys.dtype for layer in right.prefix.cache().layers}
    assert keys == {compute_dtype(vlm.model)} == {torch_dtype(dtype, vlm.device)}


@some
def test_prefix_is_computed_once_and_not_again_until_the_weights_change(plain):
    cached = with_prefix(plain)
    batch, seen = prepared(cached), []
    embedding = cached.model.get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, ids, out: seen.append(tuple(out.shape[:2])))
    try:
        with torch.no_grad():
            for _ in range(3):
                cached.option_logits(batch, batch.pixels)
            width = batch.inputs["input_ids"].shape[1] + len(cached.encode(cached.answer_prefix()))
            assert [rows for rows, _ in seen].count(1) == 0, "held since the start-up check"
            assert all(columns <= width - cached.prefix.length for _, columns in seen)
            embedding.weight.mul_(1.01)
            changed = cached.option_logits(batch, batch.pixels)
            assert (1, cached.prefix.length) in seen
            assert torch.allclose(changed, plain.option_logits(batch, batch.pixels), atol=1e-5)
    finally:
        hook.remove()
        with torch.no_grad():
            embedding.weight.div_(1.01)


@some
def test_weights_that_are_trained_get_the_gradient_of_the_whole_prompt(plain):
    """A prefix without gradient would lose the part that comes through it."""
    cached, found = with_prefix(plain), []
    weight = plain.model.get_input_embeddings().weight
    for vlm in (cached, plain):
        batch = prepared(vlm)
        weight.requires_grad_(True)
        try:
            (slope,) = torch.autograd.grad(token_loss(vlm, batch, batch.pixels).sum(), weight)
        finally:
            weight.requires_grad_(False)
        found.append(slope)
        with frozen(vlm):
            assert (vlm.prefix.cache() is not None) == (vlm is cached)
    assert torch.equal(*found)


def test_a_family_takes_the_plain_path_or_reads_the_prefix(family, plain):
    """Found out by looking at the entry, not by its family's name; both outcomes are told with the reason."""
    prefix = Prefix.of(plain, worth=0)
    assert (PLAIN.get(family) or "tokens cached: scores differ by") in prefix.reason
    assert (prefix.length > 0) == (prefix.cache() is not None) == (family not in PLAIN)
    assert prefix.length == (0 if family in PLAIN else len(plain.chat.before_image))


@some
def test_prefix_is_cached_where_it_is_worth_it(plain):
    assert plain.prefix.length == 0 and "not worth it" in plain.prefix.reason
    work = 2 * len(plain.chat.before_image) * sum(p.numel() for p in plain.model.parameters())
    assert Prefix.of(plain, worth=work).length and not Prefix.of(plain, worth=work + 1).length


def test_shipped_entries_keep_the_very_numbers_that_they_had():
    shipped = load_model(ModelSpec(name="instruct"), 64, device="cpu")
    assert shipped.prefix.length == 0 and "not worth it" in shipped.prefix.reason


@some
def test_blind_prompts_have_no_prefix(plain):
    blind = copy.copy(plain)
    blind.prompt = SimpleNamespace(image=False)
    assert Prefix.of(blind, worth=0).reason.endswith("no text before an image")


# -- activations computed twice ---------------------------------------------------------------------------------------


def held_bytes(vlm, batch):
    """What a forward pass leaves allocated for its backward pass; scores, gradient."""
    pixels = batch.pixels.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        scores = vlm.token_loss(batch, pixels, ["a longer reply, with several tokens"] * len(batch))
    held = sum(event.self_cpu_memory_usage for event in seen.key_averages())
    (slope,) = torch.autograd.grad(scores.sum(), pixels)
    return held, scores.detach(), slope


def test_recomputing_holds_less_and_changes_nothing(family, plain):
    """In evaluation mode, where transformers' own switch does nothing; with the prefix's cache where the family has
    one, which a second pass must not extend."""
    vlm = plain if family in PLAIN else with_prefix(plain)
    share = 0.9 if family == "mllama" else 0.5  # transformers holds all that Mllama's vision tower computes
    batch = prepared(vlm)
    assert not vlm.model.training
    before, scores, slope = held_bytes(vlm, batch)
    vlm.model.gradient_checkpointing_enable()
    try:
        assert held_bytes(vlm, batch)[0] >= 0.95 * before, "transformers' switch acts by itself: ours can go"
    finally:
        vlm.model.gradient_checkpointing_disable()
    assert vlm.save_memory() and not vlm.save_memory(), "it changes something once"
    try:
        after, same_scores, same_slope = held_bytes(vlm, batch)
        assert 0 < after < share * before
        assert torch.equal(same_scores, scores) and torch.equal(same_slope, slope)
        batch_answers = vlm.answer(batch, batch.pixels)
    finally:
        assert recompute(vlm.model, on=False)
    assert held_bytes(vlm, batch)[0] >= 0.95 * before
    assert [a.tokens for a in batch_answers] == [a.tokens for a in vlm.answer(batch, batch.pixels)]


@pytest.mark.parametrize("family", TRAINED, indirect=True)
def test_recomputing_leaves_a_growing_cache_alone(plain):
    """The trainer's prompt cache is extended by every layer that runs: none may run twice."""
    policy, batch = Policy(plain), prepared(plain)
    tokens = torch.randint(60, 90, (2 * len(batch), 4), generator=torch.Generator().manual_seed(0))
    found = []
    for on in (True, False):
        recompute(plain.model, on=on)
        pixels = batch.pixels.requires_grad_()
        with frozen(plain):
            out = policy(batch.inputs, plain.pixel_values(pixels), tokens, torch.ones_like(tokens), 2)
            found.append((out.logps.detach(), torch.autograd.grad(out.logps.sum(), pixels)[0]))
    assert policy.cached and torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


# -- the LM head ------------------------------------------------------------------------------------------------------


def adapted(vlm):
    """With a LoRA adapter, whose wrapper hides the arguments of the model's own forward."""
    pytest.importorskip("peft")
    model = with_lora(copy.deepcopy(vlm.model), LoraSettings(rank=2))
    model.eval().requires_grad_(False)
    return HuggingFaceVLM(model, vlm.processor, vlm.card, vlm.resolution)


@pytest.mark.parametrize("wrap", [lambda vlm: vlm, adapted], ids=["bare", "peft"])
def test_the_head_sees_answer_positions_only(plain, wrap):
    """How many positions the LM head really multiplied, for each way of reading the model."""
    vlm, columns = wrap(plain), []
    batch = prepared(vlm)
    width = max(len(vlm.encode(text)) for text in TEXTS)
    head = vlm.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, inputs, out: columns.append(inputs[0].shape[1]))
    try:
        with torch.no_grad():
            options(vlm, batch, batch.pixels)
            next_token(vlm, batch, batch.pixels)
            token_loss(vlm, batch, batch.pixels)
    finally:
        hook.remove()
    assert columns == [1, 1, width + 1]


# -- memory -----------------------------------------------------------------------------------------------------------


@some
def test_where_one_question_does_not_fit_activations_are_computed_twice(plain):
    """The sizer on real work with a real limit: what a forward pass holds, of one question less than the limit only
    where it is computed twice."""
    batch, said, slopes = prepared(plain), [], {}
    alone = max(held_bytes(plain, batch.select([i]))[0] for i in range(len(batch)))

    def work(rows):
        held, _, slope = held_bytes(plain, batch.select(rows))
        if held > 0.6 * alone:
            raise torch.OutOfMemoryError(f"{held} bytes")
        slopes.update(zip(rows, slope, strict=True))

    sizer = BatchSizer(None, say=said.append, probe=2, relieve=plain.save_memory)
    try:
        sizer.map("pgd", range(len(batch)), work)
    finally:
        recompute(plain.model, on=False)
    assert sorted(slopes) == list(range(len(batch))) and any("computed twice" in line for line in said)
    whole = held_bytes(plain, batch)[2]
    for row, slope in slopes.items():
        assert (slope - whole[row]).norm() <= 1e-4 * whole[row].norm()


# -- generation, kernels, transfers -----------------------------------------------------------------------------------


def test_a_static_cache_writes_the_same_replies(family, folder):
    """Prompts of different lengths, among them one that is padded; for every family that would get one on a GPU."""
    vlm = load(family, folder, prompt="think", decode="generate", max_new_tokens=12)
    batch = prepared(vlm)
    processed = vlm.processed(batch.pixels)
    assert cache_options(vlm) == {}, "on a CPU the cache grows"
    beside_gpu = copy.copy(vlm)
    beside_gpu.device = torch.device("cuda")
    assert bool(cache_options(beside_gpu)) == (family not in ("idefics3", "smolvlm", "paligemma2"))
    if not cache_options(beside_gpu):
        return
    kinds = []
    decoder = vlm.model.get_decoder()
    decoder.register_forward_pre_hook(
        lambda module, given, named: kinds.append(type(named["past_key_values"])), with_kwargs=True
    )
    replies = generate(vlm, batch, processed, static=False)
    assert set(kinds) == {DynamicCache} and generate(vlm, batch, processed, static=True) == replies
    assert set(kinds) == {DynamicCache, StaticCache}
    assert any(len(tokens) > 1 for tokens, _ in replies)


@some
def test_the_adapter_says_what_it_runs_on(plain):
    assert plain.attention == "sdpa" == plain.model.config._attn_implementation


def test_the_image_processor_in_threads_gives_the_same_tensors(plain):
    """More images than threads, fewer, and one."""
    draw, one = np.random.default_rng(0), image_processor_call(plain.processor)
    images = list(draw.integers(0, 256, (13, *plain.resolution, 3), dtype=np.uint8))
    many = in_threads(one, 4)
    for count in (13, 13, 3, 1):
        alone, together = one(images[:count]), many(images[:count])
        assert alone.keys() == together.keys()
        assert all(torch.equal(alone[name], together[name]) for name in alone)
    assert host_threads(plain.device) == 1 and in_threads(one, 1) is one
