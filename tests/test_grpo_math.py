"""Losses of GRPO and its kin: equal to TRL's (golden numbers), and what must hold of them whoever computes them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safemed_bench.core.errors import UsageError
from safemed_bench.training.losses import consistency, entropy, k3, masked_mean, policy_loss

GOLDEN = json.loads((Path(__file__).parent / "golden" / "grpo_losses.json").read_text())
"""TRL's numbers; test_grpo_trl.py says how they are written and checks them against TRL itself."""

KINDS = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo")
seeds = st.integers(0, 10_000)
quick = partial(settings, deadline=None)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['kind']}-{c['unbiased_kl']}")
def test_loss_and_gradient_are_trls_golden_numbers(case):
    inputs = {name: torch.tensor(value) for name, value in GOLDEN["inputs"].items()}
    logps = inputs.pop("logps").requires_grad_()
    if case["kind"] == "bnpo":  # TRL's counts each shard's own
        inputs["tokens_in_batch"] = inputs["mask"].sum()
    ours = policy_loss(case["kind"], logps, **inputs, unbiased_kl=case["unbiased_kl"], **GOLDEN["settings"])
    ours.loss.backward()
    assert ours.loss.item() == pytest.approx(case["loss"], abs=1e-6)
    assert ours.kl.item() == pytest.approx(case["kl"], abs=1e-6)
    assert ours.clip_fraction.item() == pytest.approx(case["clip_fraction"], abs=1e-6) and case["clip_fraction"] > 0
    torch.testing.assert_close(logps.grad, torch.tensor(case["gradient"]), rtol=0, atol=1e-6)


def drawn(seed, n=4, t=6):
    """A batch in float64 with replies of 1 to t tokens, ratios beyond the clip and a reference."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    logps = -normal(n, t).abs()
    lengths = torch.randint(1, t + 1, (n,), generator=draw)
    return {
        "logps": logps,
        "old_logps": logps + 0.3 * normal(n, t),
        "advantages": normal(n),
        "mask": (torch.arange(t) < lengths[:, None]).int(),
        "ref_logps": logps + 0.3 * normal(n, t),
    }


def loss_and_gradient(kind, batch, **settings):
    logps = batch["logps"].clone().requires_grad_()
    done = policy_loss(kind, **(batch | {"logps": logps}), **{"beta": 0.1, "max_tokens": 8} | settings)
    return done, torch.autograd.grad(done.loss, logps)[0]


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds, shards=st.sampled_from([2, 3]))
@quick(max_examples=20)
def test_the_average_of_shards_is_the_whole_batch(kind, seed, shards):
    batch = drawn(seed, n=2 * shards)
    whole, gradient = loss_and_gradient(kind, batch)
    share = batch["mask"].sum() / shards
    parts = [
        loss_and_gradient(
            kind, {name: value[2 * i : 2 * i + 2] for name, value in batch.items()}, tokens_in_batch=share
        )
        for i in range(shards)
    ]
    torch.testing.assert_close(sum(p.loss for p, _ in parts) / shards, whole.loss)
    torch.testing.assert_close(torch.cat([g for _, g in parts]) / shards, gradient)


@pytest.mark.parametrize("kind", ["bnpo", "dapo"])
def test_shards_that_count_their_own_tokens_do_not_average_to_the_whole_batch(kind):
    batch = drawn(0)
    batch["mask"] = torch.tensor([[1] * 6, [1] * 6, [1] + [0] * 5, [1] + [0] * 5])
    _, gradient = loss_and_gradient(kind, batch)
    parts = [loss_and_gradient(kind, {k: v[i : i + 2] for k, v in batch.items()})[1] for i in (0, 2)]
    assert not torch.allclose(torch.cat(parts) / 2, gradient, rtol=0.1)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds)
@quick(max_examples=20)
def test_on_policy_it_is_the_policy_gradient(kind, seed):
    """Ratios of 1: nothing is clipped, and a token's gradient is minus its reply's advantage times its own weight."""
    batch = drawn(seed)
    batch["old_logps"] = batch["logps"]
    done, gradient = loss_and_gradient(kind, batch, beta=0.0)
    mask, lengths = batch["mask"].double(), batch["mask"].sum(1, keepdim=True)
    n = len(mask)
    weight = {"dr_grpo": mask / (n * 8), "bnpo": mask / mask.sum(), "dapo": mask / mask.sum()}.get(
        kind, mask / lengths / n
    )
    torch.testing.assert_close(gradient, -batch["advantages"][:, None] * weight)
    torch.testing.assert_close(done.loss, (-batch["advantages"][:, None] * weight).sum())
    assert done.clip_fraction == 0 and done.ratio_mean == 1 and done.ratio_max == 1
    same_tensor = batch["logps"].clone().requires_grad_()
    itself = policy_loss(kind, same_tensor, same_tensor, batch["advantages"], batch["mask"], max_tokens=8)
    torch.testing.assert_close(torch.autograd.grad(itself.loss, same_tensor)[0], gradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", [-5.0, -torch.inf, torch.nan])
def test_padding_is_never_looked_at(kind, garbage):
    batch = drawn(1)
    done, gradient = loss_and_gradient(kind, batch)
    padding = batch["mask"] == 0
    for name in ("logps", "old_logps", "ref_logps"):
        batch[name] = batch[name].masked_fill(padding, garbage)
    filled, filled_gradient = loss_and_gradient(kind, batch | {"mask": ~padding})
    for a, b in zip((*done, gradient), (*filled, filled_gradient), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert padding.any() and not filled_gradient[padding].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_a_token_is_nothing(kind):
    batch = drawn(2)
    batch["mask"] = torch.zeros_like(batch["mask"])
    done, gradient = loss_and_gradient(kind, batch)
    assert not gradient.any() and all(value == 0 for value in done)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("log_ratio", "advantage", "side"),
    [(0.5, 1.0, "high"), (-0.5, -1.0, "low"), (0.5, -1.0, ""), (-0.5, 1.0, ""), (0.1, 1.0, ""), (-0.1, -1.0, "")],
)
def test_only_what_has_gone_far_enough_is_clipped(kind, log_ratio, advantage, side):
    logps = torch.full((1, 3), -1.0, requires_grad=True)
    done = policy_loss(
        kind, logps, logps.detach() - log_ratio, torch.tensor([advantage]), torch.ones(1, 3), max_tokens=3
    )
    done.loss.backward()
    assert logps.grad.any() == (not side)
    assert (done.clipped_high, done.clipped_low, done.clip_fraction) == (side == "high", side == "low", side != "")


@given(seeds)
@quick(max_examples=30)
def test_k3_is_the_kl_in_the_mean_and_never_negative(seed):
    draw = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, 7, generator=draw, dtype=torch.float64).log_softmax(-1)
    estimate = k3(p, q)
    assert (estimate >= 0).all() and not k3(p, p).any()
    torch.testing.assert_close((p.exp() * estimate).sum(), (p.exp() * (p - q)).sum())


def test_k3_keeps_its_digits_where_the_policy_has_hardly_moved():
    assert k3(torch.tensor([[-1.0]]), torch.tensor([[-1.001]])).item() == pytest.approx(0.5e-6, rel=0.01)


@pytest.mark.parametrize("unbiased_kl", [True, False])
def test_the_unbiased_kl_has_the_gradient_of_the_kl(unbiased_kl):
    """A uniform policy over V tokens, every token once: the mean over replies is the expectation."""
    logits = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05], dtype=torch.float64).log()
    logps = logits.log_softmax(-1)
    ones = torch.ones(5, 1)
    sampled = policy_loss(
        "grpo", logps[:, None], logps[:, None], torch.zeros(5), ones, ref_logps=reference[:, None], beta=1.0,
        unbiased_kl=unbiased_kl,
    )  # fmt: skip
    kl = (logps.exp() * (logps - reference)).sum()
    torch.testing.assert_close(sampled.kl, kl.detach())
    wanted, found = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (kl, sampled.loss))
    assert torch.allclose(found, wanted) == unbiased_kl


def test_without_a_reference_there_is_no_kl_and_without_beta_it_is_only_logged():
    batch = drawn(3)
    bare, gradient = loss_and_gradient("dapo", batch | {"ref_logps": None}, beta=0.0)
    logged, same = loss_and_gradient("dapo", batch, beta=0.0)
    assert bare.kl is None and logged.kl > 0 and bare.loss == logged.loss and torch.equal(gradient, same)
    assert not any(value.requires_grad for value in logged[1:])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "drgrpo"}, "unknown loss 'drgrpo'.* mean 'dr_grpo'"),
        ({"kind": "dr_grpo", "max_tokens": None}, "max_tokens"),
        ({"ref_logps": None}, "beta"),
        ({"mask": torch.ones(4, 1)}, "mask has shape"),
        ({"advantages": torch.ones(4, 1)}, "advantages have shape"),
        ({"logps": torch.zeros(4, 6, dtype=torch.bfloat16)}, "bfloat16"),
    ],
)
def test_what_would_give_a_wrong_number_is_refused(change, said):
    with pytest.raises((ValueError, UsageError), match=said):
        policy_loss(**({"kind": "grpo", "beta": 0.1, "max_tokens": 8} | drawn(0) | change))


def test_consistency_pulls_the_adversarial_side_to_the_clean_one():
    draw = torch.Generator().manual_seed(0)
    clean, adversarial = (torch.randn(2, 3, 5, generator=draw).requires_grad_() for _ in range(2))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss = consistency(clean, adversarial, mask)
    p, q = clean.log_softmax(-1), adversarial.log_softmax(-1)
    per_token = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(loss, (per_token * mask).sum() / 3)
    torch.testing.assert_close(consistency(clean, adversarial, mask, tokens_in_batch=6), loss / 2)
    torch.testing.assert_close(consistency(clean + 1, adversarial - 2, mask), loss)
    loss.backward()
    assert clean.grad is None and adversarial.grad[mask != 0].any() and not adversarial.grad[mask == 0].any()
    assert consistency(clean, clean, mask).item() == 0
    consistency(clean, adversarial.detach(), mask, detach_clean=False).backward()
    assert clean.grad.any()


def test_forbidden_tokens_and_padding_do_no_harm():
    logits = torch.tensor([[[0.0, 1.0, -torch.inf], [torch.nan] * 3]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    loss = consistency(logits.detach() * 2, logits, mask) + entropy(logits, mask)
    loss.backward()
    assert loss.isfinite() and logits.grad.isfinite().all()
    assert entropy(torch.zeros(1, 2, 8), mask).item() == pytest.approx(torch.tensor(8.0).log().item())
    assert masked_mean(torch.tensor([[3.0, torch.nan]]), mask) == 3
