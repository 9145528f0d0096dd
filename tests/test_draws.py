"""How a token is drawn from its distribution, without a model."""

from __future__ import annotations

import pytest
import torch

from safemed_bench.training import logprobs
from safemed_bench.training.logprobs import token_logprobs
from safemed_bench.training.rollout import _choose, draws

NONE_BARRED = torch.zeros(0, dtype=torch.long)


def chosen_at(chances, count, top_p=1.0, temperature=1.0):
    """Shares of the tokens at `count` evenly spaced uniforms."""
    at = (torch.arange(count).double() + 0.5) / count
    logits = torch.tensor(chances).double().log().expand(count, -1)
    ids, _ = _choose(logits, at, NONE_BARRED, temperature, top_p)
    return torch.bincount(ids, minlength=len(chances)).double() / count


def test_inverse_of_the_cumulative_distribution():
    assert chosen_at([0.1, 0.0, 0.6, 0.3], 1000).tolist() == pytest.approx([0.1, 0.0, 0.6, 0.3], abs=1e-3)
    assert chosen_at([0.1, 0.0, 0.6, 0.3], 1000, temperature=0.5).tolist() == pytest.approx(
        [0.01 / 0.46, 0.0, 0.36 / 0.46, 0.09 / 0.46], abs=1e-3
    )
    assert chosen_at([0.1, 0.0, 0.6, 0.3], 10, temperature=0.0).tolist() == [0, 0, 1, 0]


def test_top_p_is_the_smallest_set_that_has_it():
    assert chosen_at([0.1, 0.05, 0.5, 0.35], 1000, top_p=0.8).tolist() == pytest.approx(
        [0, 0, 0.5 / 0.85, 0.35 / 0.85], abs=1e-3
    )
    assert chosen_at([0.1, 0.05, 0.5, 0.35], 10, top_p=0.1).tolist() == [0, 0, 1, 0]


def test_the_ends_of_the_unit_interval_choose_possible_tokens():
    logits = torch.tensor([[0.0, 0.5, 0.5, 0.0]]).double().log().expand(2, -1)
    ids, _ = _choose(logits, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), NONE_BARRED, 1.0, 1.0)
    assert ids.tolist() == [1, 2]


def test_draws_belong_to_their_rollout_alone():
    wide = draws("run", 3, "question", n=4, max_new_tokens=20)
    assert wide.shape == (4, 20) and wide.dtype == torch.float64 and wide.min() >= 0 and wide.max() < 1
    assert torch.equal(draws("run", 3, "question", n=2, max_new_tokens=7), wide[:2, :7])
    assert not torch.equal(wide[0], wide[1])
    assert not torch.equal(draws("run", 4, "question", n=4, max_new_tokens=20), wide)


def test_token_logprobs_by_slices(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 7, generator=draw, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(0, 7, (3, 4), generator=draw)
    whole = token_logprobs(logits, tokens, 0.6)
    monkeypatch.setattr(logprobs, "SLICE", 20)
    for a, b in zip(whole, token_logprobs(logits, tokens, 0.6), strict=True):
        assert torch.equal(a, b)
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, tokens, 0.6)[0], (logits,))


def test_token_logprobs_of_an_impossible_token():
    logits = torch.tensor([[[0.0, 1.0, -torch.inf]]], requires_grad=True)
    logps, entropies = token_logprobs(logits, torch.tensor([[1]]))
    logps.sum().backward()
    assert torch.isfinite(logps).all() and torch.isfinite(entropies).all() and torch.isfinite(logits.grad).all()
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(logits, torch.tensor([[1]]), 0.0)
