"""Advantages: what must hold of them for any rewards, and whose replies are compared with whose."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from safemed_bench.training.advantages import advantages, zero_variance_share

quick = partial(settings, deadline=None)
rewards_of = st.integers(1, 4).flatmap(
    lambda prompts: st.lists(st.sampled_from([0.0, 0.1, 0.2, 1.0, 1.2]), min_size=4 * prompts, max_size=4 * prompts)
)
HALVES = ("clean", "clean", "adversarial", "adversarial")
ways = pytest.mark.parametrize("over", ["group", "part"])
scales = pytest.mark.parametrize("scale", ["group", "batch", "none"])


@ways
@scales
@given(rewards=rewards_of)
@quick(max_examples=40)
def test_advantages_sum_to_nothing_and_do_not_depend_on_the_level_of_the_rewards(scale, over, rewards):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    found = advantages(rewards, 4, HALVES, scale, over)
    siblings = found.reshape(-1, 4 if over == "group" else 2)
    torch.testing.assert_close(siblings.sum(1), torch.zeros(len(siblings), dtype=torch.float64), rtol=0, atol=1e-9)
    level = torch.arange(len(rewards) // 4, dtype=torch.float64).repeat_interleave(4) if scale != "batch" else 7.0
    torch.testing.assert_close(advantages(rewards + level, 4, HALVES, scale, over), found, rtol=1e-6, atol=1e-9)
    assert found.isfinite().all()
    # a better reply never has less advantage than its sibling
    order = rewards.reshape(siblings.shape).sort(1).indices
    assert (siblings.gather(1, order).diff(dim=1) >= 0).all()


@scales
@given(rewards=rewards_of, order=st.permutations(range(4)))
@quick(max_examples=40)
def test_advantages_move_with_the_replies_of_a_group(scale, rewards, order):
    rewards = torch.tensor(rewards, dtype=torch.float64)
    moved = rewards.reshape(-1, 4)[:, list(order)].flatten()
    found = advantages(rewards, 4, scale=scale).reshape(-1, 4)[:, list(order)].flatten()
    torch.testing.assert_close(advantages(moved, 4, scale=scale), found)


def test_rows_are_prompt_major():
    """An easy and a hard prompt, each with equal rewards: nothing to learn. In tile's order there would be."""
    by_prompt = torch.tensor([1.0, 0.0])
    assert not advantages(by_prompt.repeat_interleave(4), 4).any()
    assert advantages(by_prompt.tile(4), 4).abs().min() > 0.5
    assert zero_variance_share(by_prompt.repeat_interleave(4), 4) == 1
    assert zero_variance_share(by_prompt.tile(4), 4) == 0


@ways
@scales
@pytest.mark.parametrize("value", [0.0, 0.1, 1.2, -3.3])
def test_equal_rewards_are_exactly_no_advantage(scale, over, value):
    parts = ("a", "b", "b", "b", "b", "b", "b")
    rewards = torch.tensor([value] * 7 + [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    found = advantages(rewards, 7, parts, scale, over)
    assert (found[:7] == 0).all() and found[8:].all()


def test_group_scale_is_the_z_score_with_n_minus_one():
    found = advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4)
    torch.testing.assert_close(found, torch.tensor([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-4))
    torch.testing.assert_close(
        advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), 4, scale="none"), torch.tensor([0.75, -0.25, -0.25, -0.25])
    )
    batch = torch.tensor([1.0, 0.0, 5.0, 3.0])
    torch.testing.assert_close(
        advantages(batch, 2, scale="batch"), torch.tensor([0.5, -0.5, 1.0, -1.0]) / (batch.std() + 1e-4)
    )


@scales
def test_parts_are_measured_each_against_its_own_kind(scale):
    """The attack halves every reward: over the group this would praise clean replies for being clean."""
    parts = ("clean", "adversarial", "clean", "adversarial")
    rewards = torch.tensor([1.0, 0.5, 1.0, 0.0, 1.0, 0.5, 0.6, 0.5])
    found = advantages(rewards, 4, parts, scale, "part").reshape(2, 4)
    assert not found[0, ::2].any() and not found[1, 1::2].any()
    assert found[0, 1] > 0 > found[0, 3] and found[1, 0] > 0 > found[1, 2]
    if scale == "batch":  # one divisor for all, whichever the part
        plain = advantages(rewards, 4, parts, "none", "part").reshape(2, 4)
        torch.testing.assert_close(found, plain / (rewards.std() + 1e-4))
    else:
        clean = advantages(rewards.reshape(2, 4)[:, ::2].flatten(), 2, scale=scale)
        torch.testing.assert_close(found[:, ::2].flatten(), clean)
    assert zero_variance_share(rewards, 4, parts, "part") == 0.5
    assert zero_variance_share(rewards, 4) == 0 == zero_variance_share(torch.zeros(0), 4)
    assert advantages(rewards, 4, scale=scale)[0] > 0, "what parts are there to avoid"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((torch.zeros(6), 4), "whole groups of 4"),
        ((torch.zeros(4, 1), 4), "whole groups of 4"),
        ((torch.zeros(4), 4, None, "group", "part"), "parts must label"),
        ((torch.zeros(4), 4, ("a", "b"), "group", "part"), "parts must label"),
        ((torch.zeros(4), 4, None, "std"), "scale must be"),
        ((torch.zeros(4), 4, None, "group", "half"), "over must be"),
    ],
)
def test_wrong_groups_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        advantages(*arguments)
