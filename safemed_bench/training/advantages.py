"""Advantages from rewards: how much better a reply was than its siblings.

Rows are prompt-major: with G replies to each prompt, rows 0..G-1 belong to prompt 0, the next G to prompt 1
(a a a a b b b b, what `repeat_interleave(G)` makes, never `tile`'s a b a b).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to the standard deviation, as TRL does."""

Scale = Literal["group", "batch", "none"]
Over = Literal["group", "part"]


def advantages(
    rewards: Tensor,
    group_size: int,
    parts: Sequence[Hashable] | None = None,
    scale: Scale = "group",
    over: Over = "group",
) -> Tensor:
    """(N,) rewards less their siblings' mean, divided by a standard deviation plus EPSILON.

    Siblings are the replies to one prompt (`over` "group"), or those of them with one label in `parts`, which has a
    label for each of the G places of a group ("part"): replies to the clean and to the attacked image are then measured
    each against their own kind, and an attack that lowers all rewards alike gives no advantage to the clean half.

    scale: "group" divides by the siblings' deviation (with N - 1, as TRL), "batch" by that of all rewards given here,
    "none" not at all (Dr. GRPO, arXiv 2503.20783: dividing favours prompts that are nearly always right or wrong).
    Siblings with equal rewards get exactly 0.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale must be group, batch or none, not {scale!r}")
    grouped = _grouped(rewards, group_size)
    result = torch.zeros_like(grouped)
    for columns in _siblings(group_size, parts, over):
        values = grouped[:, columns]
        # rounding leaves a rest of the mean, which the small divisor would make a signal
        centred = (values - values.mean(1, keepdim=True)).masked_fill(_equal(values)[:, None], 0)
        if scale == "group" and len(columns) > 1:
            centred = centred / (values.std(1, keepdim=True) + EPSILON)
        elif scale == "batch" and rewards.numel() > 1:
            centred = centred / (rewards.std() + EPSILON)
        result[:, columns] = centred
    return result.flatten()


def zero_variance_share(
    rewards: Tensor, group_size: int, parts: Sequence[Hashable] | None = None, over: Over = "group"
) -> float:
    """Share of groups (or parts) whose rewards are all equal, which therefore teach nothing; 0 where there are none."""
    grouped = _grouped(rewards, group_size)
    equal = torch.stack([_equal(grouped[:, columns]) for columns in _siblings(group_size, parts, over)])
    return float(equal.double().mean()) if equal.numel() else 0.0


def _grouped(rewards: Tensor, group_size: int) -> Tensor:
    """(prompts, G)."""
    if rewards.dim() != 1 or group_size < 1 or len(rewards) % group_size:
        raise ValueError(f"rewards of shape {tuple(rewards.shape)} are not whole groups of {group_size}")
    return rewards.reshape(-1, group_size)


def _siblings(group_size: int, parts: Sequence[Hashable] | None, over: Over) -> Iterator[list[int]]:
    """Places in a group that are measured against each other."""
    if over == "group":
        yield list(range(group_size))
    elif over == "part":
        if parts is None or len(parts) != group_size:
            raise ValueError(f"parts must label each of the {group_size} replies of a group")
        for label in dict.fromkeys(parts):
            yield [place for place, part in enumerate(parts) if part == label]
    else:
        raise ValueError(f"over must be group or part, not {over!r}")


def _equal(values: Tensor) -> Tensor:
    """(prompts,) whether all of a row are the same number."""
    return (values == values[:, :1]).all(1)
