"""The policy side of GRPO on five families: one prefix per group is exact, a rollout depends on its own draws alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from families import NATIVE, TRAINED, build
from torch.nn.parallel import DistributedDataParallel
from transformers.cache_utils import DynamicCache

from safemed_bench.models import load_model
from safemed_bench.models.generation import generate
from safemed_bench.training.policy import Policy, check_cache, evaluating, pad_right
from safemed_bench.training.rollout import _choose, _placeholders, draws, sample

TEXTS = (
    "What is shown?",
    "Which imaging modality was most probably used to acquire the picture that you see?",
    "Is it?",
)
REPLIES = ("a cyst", "no", "the picture shows a chest radiograph", "it", "x", "normal, as far as can be seen")
GROUP = 2
"""Two replies to each of three prompts, so that tiling (0 1 2 0 1 2) is not interleaving (0 0 1 1 2 2)."""


@pytest.fixture(scope="module", params=TRAINED)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return build(family, tmp_path_factory.mktemp(family))


def load(family, folder, dtype=None):
    settings = {"name": family, "path": str(folder), "revision": None, "prompt": None, "decode": None}
    spec = SimpleNamespace(**settings, max_new_tokens=12, dtype=dtype, adapter=None)
    return load_model(spec, NATIVE[family], device="cpu")


@pytest.fixture(scope="module")
def policy(family, folder):
    policy = Policy(load(family, folder))
    policy.requires_grad_(True)
    return policy


@pytest.fixture(scope="module")
def prompts(policy):
    composed = policy.vlm.compose(TEXTS)
    assert not composed["attention_mask"].all()
    return composed


@pytest.fixture(scope="module")
def pixels(policy):
    shape = (len(TEXTS), 3, *policy.vlm.resolution)
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(3)).float() / 255


@pytest.fixture(scope="module")
def values(policy, pixels):
    return policy.vlm.pixel_values(pixels)


@pytest.fixture(scope="module")
def replies(policy):
    return [(*policy.vlm.encode(text), policy.vlm.end_of_turn) for text in REPLIES]


@pytest.fixture(scope="module")
def completions(policy, replies):
    return pad_right(replies, policy.vlm)


def score(policy, *arguments, cached=True, **more):
    was, policy.cached = policy.cached, cached
    try:
        return policy(*arguments, **more)
    finally:
        policy.cached = was


def test_the_probe_finds_the_cache_exact(policy):
    assert policy.cached and "once per group" in policy.reason


def test_log_probabilities_are_those_of_full_sequences(policy, prompts, values, completions, replies):
    tokens, mask = completions
    with torch.no_grad():
        cached = score(policy, prompts, values, tokens, mask, GROUP, want_logits=True)
        full = score(policy, prompts, values, tokens, mask, GROUP, cached=False, want_logits=True)
        repeated = {name: value.repeat_interleave(GROUP, 0) for name, value in prompts.items()}
        pairs = values.view(len(TEXTS), -1, *values.shape[1:]).repeat_interleave(GROUP, 0).flatten(0, 1)
        loss = policy.vlm.reply_loss(repeated, pairs, replies)
    assert (cached.logps - full.logps).abs().max() <= 1e-5
    assert (cached.entropies - full.entropies).abs().max() <= 1e-5
    assert ((cached.logits - full.logits) * mask[..., None]).abs().max() <= 1e-4
    assert (-cached.logps.sum(1) / mask.sum(1) - loss).abs().max() <= 1e-5
    assert cached.logps[~mask].eq(0).all() and cached.entropies[~mask].eq(0).all()


def test_temperature_divides_the_logits(policy, prompts, values, completions):
    tokens, mask = completions
    with torch.no_grad():
        scores = policy(prompts, values, tokens, mask, GROUP, temperature=0.7, want_logits=True)
    direct = (scores.logits / 0.7).log_softmax(-1)
    picked = direct.gather(2, tokens[..., None])[..., 0]
    assert (scores.logps - picked)[mask].abs().max() <= 1e-5
    assert (scores.entropies + (direct.exp() * direct).sum(-1))[mask].abs().max() <= 1e-5
    assert not scores.entropies.requires_grad


def test_gradients_are_those_of_full_sequences(policy, prompts, pixels, completions):
    """Of all parameters, the vision tower's among them, and of the picture."""
    tokens, mask = completions
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for cached in (True, False):
        picture = pixels.clone().requires_grad_()
        scores = score(policy, prompts, policy.vlm.pixel_values(picture), tokens, mask, GROUP, cached=cached)
        parameters = list(policy.parameters())
        found.append(torch.autograd.grad((scores.logps * weights).sum(), [picture, *parameters], allow_unused=True))
    names = ["picture", *(name for name, _ in policy.named_parameters())]
    pairs = {name: (a, b) for name, a, b in zip(names, *found, strict=True) if a is not None}
    assert {n for n, g in zip(names, found[1], strict=True) if g is not None} == set(pairs)
    vision = {n: p for n, p in pairs.items() if "visual" in n or "vision_tower" in n}
    assert vision
    for chosen in ({"picture": pairs["picture"]}, vision, pairs):
        apart = sum(float((a - b).square().sum()) for a, b in chosen.values()) ** 0.5
        length = sum(float(b.square().sum()) for _, b in chosen.values()) ** 0.5
        assert length > 0 and apart / length <= 1e-5


def test_each_rollout_has_its_own_prompt_and_image(policy, prompts, values, completions):
    """Alone it scores the same; tiled prompts, or images, would not (the bug of R1-V)."""
    tokens, mask = completions
    images = values.view(len(TEXTS), -1, *values.shape[1:])

    def alone(row, prompt, image):
        one = {name: value[prompt : prompt + 1] for name, value in prompts.items()}
        return policy(one, images[image], tokens[row : row + 1], mask[row : row + 1], 1).logps[0]

    with torch.no_grad():
        together = policy(prompts, values, tokens, mask, GROUP).logps
        for row in range(len(tokens)):
            own, tiled = row // GROUP, row % len(TEXTS)
            assert (together[row] - alone(row, own, own)).abs().max() <= 1e-5
            if tiled != own:
                assert (together[row] - alone(row, tiled, own)).abs().max() > 1e-3
                assert (together[row] - alone(row, own, tiled)).abs().max() > 1e-3


def test_what_stands_in_the_padding_is_not_seen(policy, prompts, values, completions):
    tokens, mask = completions
    other = tokens.where(mask, policy.vlm.encode("x")[0])
    with torch.no_grad():
        a, b = (policy(prompts, values, ids, mask, GROUP).logps for ids in (tokens, other))
    assert torch.equal(a, b)


def test_replies_of_one_token_and_text_alone(policy):
    text_only = policy.vlm.compose(TEXTS, image=False)
    for rows in ([policy.vlm.encode("x")[:1]] * 6, [policy.vlm.encode(text) for text in REPLIES]):
        tokens, mask = pad_right(rows, policy.vlm)
        with torch.no_grad():
            a, b = (score(policy, text_only, None, tokens, mask, GROUP, cached=c).logps for c in (True, False))
        assert a.shape == tokens.shape and (a - b).abs().max() <= 1e-5


def test_half_precision(family, folder, prompts, values, completions):
    half = Policy(load(family, folder, "bf16"))
    assert half.cached
    with torch.no_grad():
        scores = half(prompts, values, *completions, GROUP, want_logits=True)
    assert scores.logps.dtype == torch.float32 and scores.logits.dtype == torch.bfloat16


# -- the choice of the path ----------------------------------------------------------------------------------------


def test_gradient_checkpointing_takes_the_plain_path(policy, prompts, values, completions):
    with torch.no_grad():
        expected = policy(prompts, values, *completions, GROUP).logps
    policy.model.gradient_checkpointing_enable()
    policy.model.train()
    try:
        assert not policy.uses_cache
        found = policy(prompts, values, *completions, GROUP).logps
        found.sum().backward()
        assert any(p.grad is not None for p in policy.parameters())
        with evaluating(policy.model):
            assert not policy.uses_cache, "the adversary's steps hold as little"
            with torch.no_grad():
                assert policy.uses_cache, "nothing is held where replies are sampled"
    finally:
        policy.model.gradient_checkpointing_disable()
        policy.model.eval()
        policy.zero_grad(set_to_none=True)
    assert (found - expected).abs().max() <= 1e-5


def tiled(cache, repeats):
    for layer in cache.layers:
        layer.keys, layer.values = (t.repeat(repeats, 1, 1, 1) for t in (layer.keys, layer.values))


def detached(cache, repeats):
    for layer in cache.layers:
        layer.keys, layer.values = (t.detach().repeat_interleave(repeats, 0) for t in (layer.keys, layer.values))


def refused(cache, repeats):
    raise NotImplementedError("this cache cannot be repeated")


@pytest.mark.parametrize(
    ("broken", "why"), [(tiled, "differ by"), (detached, "image gradient"), (refused, "cannot be repeated")]
)
def test_a_cache_that_gives_other_numbers_is_not_used(policy, monkeypatch, broken, why, prompts, values, completions):
    monkeypatch.setattr(DynamicCache, "batch_repeat_interleave", broken)
    fallen_back = Policy(policy.vlm)
    assert not fallen_back.cached and fallen_back.reason.startswith("plain path") and why in fallen_back.reason
    with torch.no_grad():
        a = fallen_back(prompts, values, *completions, GROUP).logps
        b = score(policy, prompts, values, *completions, GROUP, cached=False).logps
    assert torch.equal(a, b)


def worn(cache, repeats):
    """Changes log-probabilities by less than bfloat16 rounds."""
    for layer in cache.layers:
        layer.keys, layer.values = (1.002 * t.repeat_interleave(repeats, 0) for t in (layer.keys, layer.values))


def test_a_small_fault_of_the_cache_is_seen_in_half_precision(family, folder, monkeypatch):
    """The weights come out of the check as they were."""
    half = load(family, folder, "bf16")
    weights = [(p, p.dtype, p.data_ptr(), p.clone()) for p in half.model.parameters()]
    assert check_cache(half)[0]
    monkeypatch.setattr(DynamicCache, "batch_repeat_interleave", worn)
    fits, why = check_cache(half)
    assert not fits and "differ by" in why
    assert all((p.dtype, p.data_ptr()) == (kind, at) and torch.equal(p, old) for p, kind, at, old in weights)


def test_a_data_parallel_wrapper_sees_one_forward(policy, prompts, values, completions):
    """Prefix and completions are one forward, so the wrapper's hooks fire once per parameter, step after step."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(policy, find_unused_parameters=True)
        for module in (wrapped, wrapped, policy):
            policy.zero_grad(set_to_none=True)
            module(prompts, values, *completions, GROUP).logps.sum().backward()
            gradients = [p.grad for p in policy.parameters() if p.grad is not None]
            if module is wrapped:
                by_wrapper = [g.clone() for g in gradients]
        for a, b in zip(by_wrapper, gradients, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()
        policy.zero_grad(set_to_none=True)


# -- rollouts ------------------------------------------------------------------------------------------------------


def uniforms_for(names, n=GROUP, length=12):
    return torch.cat([draws("test", name, n=n, max_new_tokens=length) for name in names])


@pytest.fixture
def ending(policy, monkeypatch):
    """A random model hardly ever ends its turn: a third of all tokens do so here."""
    ids = tuple(i for i in range(len(policy.vlm.tokenizer)) if i % 3 == 0)
    monkeypatch.setattr(policy.vlm, "end_ids", ids)
    return ids


def rollouts_of(policy, prompts, values, **more):
    options = {"max_new_tokens": 12, "temperature": 1.0} | more
    return sample(policy, prompts, values, GROUP, uniforms_for("abc"), **options)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_sampled_log_probabilities_are_the_policy_s(policy, prompts, values, ending, temperature):
    found = rollouts_of(policy, prompts, values, temperature=temperature)
    with torch.no_grad():
        again = policy(prompts, values, found.tokens, found.mask, GROUP, temperature=temperature or 1.0)
    assert (found.logps - again.logps).abs().max() <= 1e-5


def test_greedy_is_the_deployed_path_s_generation(policy, prompts, pixels, values):
    found = rollouts_of(policy, prompts, values, temperature=0.0)
    batch = SimpleNamespace(inputs=prompts)
    replies = generate(policy.vlm, batch, policy.vlm.processed(pixels))
    deployed = [reply for reply in replies for _ in range(GROUP)]
    assert list(zip(found.replies(), found.finished.tolist(), strict=True)) == deployed


def test_a_rollout_does_not_depend_on_the_batch(policy, prompts, values, ending):
    together = rollouts_of(policy, prompts, values)
    images = values.view(len(TEXTS), -1, *values.shape[1:])
    assert len(set(together.replies())) > len(TEXTS)
    for i, name in enumerate("abc"):
        one = {key: value[i : i + 1] for key, value in prompts.items()}
        for n in (GROUP, 1, 3):
            alone = sample(policy, one, images[i], n, uniforms_for(name, n), max_new_tokens=12)
            both = min(n, GROUP)
            rows = slice(i * GROUP, i * GROUP + both)
            assert alone.replies()[:both] == together.replies()[rows]
            width = min(alone.logps.shape[1], together.logps.shape[1])
            assert torch.allclose(alone.logps[:both, :width], together.logps[rows, :width], atol=1e-5)


def test_the_plain_path_samples_the_same(policy, prompts, values, ending, monkeypatch):
    cached = rollouts_of(policy, prompts, values)
    monkeypatch.setattr(policy, "cached", False)
    full = rollouts_of(policy, prompts, values)
    assert torch.equal(cached.tokens, full.tokens) and torch.equal(cached.finished, full.finished)
    assert torch.allclose(cached.logps, full.logps, atol=1e-5)


def test_mask_and_finished(policy, prompts, values, ending):
    found = rollouts_of(policy, prompts, values, max_new_tokens=3)
    assert found.finished.any() and not found.finished.all()
    for row, kept, done, logps, reply in zip(
        found.tokens.tolist(), found.mask, found.finished, found.logps, found.replies(), strict=True
    ):
        length = int(kept.sum())
        assert kept[:length].all() and (logps[length:] == 0).all()
        assert row[length:] == [policy.vlm.pad_id] * (len(row) - length)
        assert reply == tuple(row[: length - int(done)]) and not set(reply) & set(ending)
        assert row[length - 1] in ending if done else length == 3
    assert found.texts(policy.vlm.decode_text) == [policy.vlm.decode_text(r) for r in found.replies()]


def test_sampling_stops_when_all_have_ended(policy, prompts, values, monkeypatch):
    monkeypatch.setattr(policy.vlm, "end_ids", tuple(range(len(policy.vlm.tokenizer))))
    found = rollouts_of(policy, prompts, values)
    assert found.tokens.shape == (len(TEXTS) * GROUP, 1) and found.finished.all() and found.mask.all()
    assert found.replies() == [()] * len(found.tokens)


def test_sampling_gives_every_mode_back(policy, prompts, values):
    part = next(m for m in policy.model.modules() if isinstance(m, torch.nn.Linear))
    policy.train()
    part.eval()
    before = [m.training for m in policy.modules()]
    try:
        rollouts_of(policy, prompts, values, max_new_tokens=2)
        assert [m.training for m in policy.modules()] == before
    finally:
        policy.eval()


def test_placeholders_of_images_are_never_sampled(policy):
    """The stock forward refuses a reply that holds one."""
    banned = _placeholders(policy.vlm)
    assert len(banned)
    logits = torch.zeros(5, len(policy.vlm.tokenizer))
    logits[:, banned] = 20.0
    chosen, _ = _choose(logits, torch.linspace(0, 0.999, 5).double(), banned, 1.0, 1.0)
    assert not set(chosen.tolist()) & set(banned.tolist())


def test_too_few_uniforms_are_refused(policy, prompts, values):
    with pytest.raises(ValueError, match="uniforms"):
        sample(policy, prompts, values, GROUP + 1, uniforms_for("abc"), max_new_tokens=4)
