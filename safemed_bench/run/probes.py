"""Measurements that serve the diagnostics alone: does the model say the same twice, and is its gradient a gradient?"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..attacks.base import climbing
from ..core.types import Answer
from ..models.base import Batch, VisionLanguageModel

STEPS = (0.005, 0.05, 0.5)
"""Steps of the finite difference, root mean square per value in units of 1/255; as in models/selfcheck.py, a right
gradient agrees at one of them at least."""

Found = list[tuple[Answer, dict[str, Any]]]


def repeat(model: VisionLanguageModel, batch: Batch) -> Found:
    """The deployed path twice on the same batch. extra: `again`, what it answered the second time, and `spread`, how
    far the options' log-probabilities moved."""
    first = model.answer(batch, batch.pixels)
    anew = getattr(getattr(model, "base", model), "asked_anew", nullcontext)  # where replies are held
    with anew():
        second = model.answer(batch, batch.pixels)
    found: Found = []
    for one, two in zip(first, second, strict=True):
        pairs = zip(one.option_logprobs, two.option_logprobs, strict=True)
        spread = max((abs(a - b) for a, b in pairs if a != b), default=0.0)
        found.append((one, {"again": two.index, "spread": spread}))
    return found


def gradient(model: VisionLanguageModel, batch: Batch) -> Found:
    """The slope of the true option's log-odds at the answer position, on the clean image, as an attack climbs it.

    extra: `slope`, the gradient's norm (0 where there is none); `mismatch`, the smallest difference over STEPS of that
    norm and a central difference along the gradient, relative to the larger of the two; `noise`, how far the score
    moved between two readings of the same image; `reach`, how far it moves over the widest step, to hold noise against.
    Without a gradient the differences are along a random direction.
    """
    answers = model.answer(batch, batch.pixels)
    with climbing(model):
        pixels = batch.pixels.clamp(0.02, 0.98)
        slope = _slope(model, batch, pixels)
        norm = slope.flatten(1).norm(dim=1)
        dead = ~norm.isfinite() | (norm == 0)
        norm = torch.where(dead, 0.0, norm)
        direction = torch.where(dead.view(-1, 1, 1, 1), _signs(pixels), slope)
        direction = direction / direction.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        mismatch, reach = torch.full_like(norm, torch.inf), torch.zeros_like(norm)
        for unit in STEPS:
            step = unit / 255 * pixels[0].numel() ** 0.5
            ahead, behind = (_score(model, batch, pixels + sign * step * direction) for sign in (1, -1))
            measured = (ahead - behind) / (2 * step)
            larger = torch.maximum(measured.abs(), norm)
            apart = torch.where(larger > 0, (measured - norm).abs() / larger.clamp_min(1e-30), 0.0)
            mismatch, reach = torch.minimum(mismatch, apart), (ahead - behind).abs()
        noise = (_score(model, batch, pixels) - _score(model, batch, pixels)).abs()
    table = torch.stack([norm, mismatch, noise, reach], dim=1).nan_to_num(nan=0.0, posinf=1e30).tolist()
    names = ("slope", "mismatch", "noise", "reach")
    return [(answer, dict(zip(names, row, strict=True))) for answer, row in zip(answers, table, strict=True)]


def _slope(model: VisionLanguageModel, batch: Batch, pixels: Tensor) -> Tensor:
    pixels = pixels.detach().requires_grad_(True)
    with torch.enable_grad():
        total = _log_odds(model, batch, pixels).sum()
        if not total.requires_grad:
            return torch.zeros_like(pixels)
        return torch.autograd.grad(total, pixels)[0].detach()


@torch.no_grad()
def _score(model: VisionLanguageModel, batch: Batch, pixels: Tensor) -> Tensor:
    return _log_odds(model, batch, pixels).double()


def _log_odds(model: VisionLanguageModel, batch: Batch, pixels: Tensor) -> Tensor:
    """(B,) the true option against all others: does not saturate where the model is sure."""
    scores = model.option_logits(batch, pixels).float()
    targets = batch.targets.to(scores.device)[:, None]
    others = scores.scatter(1, targets, -torch.inf).logsumexp(1)
    return scores.gather(1, targets).squeeze(1) - others


def _signs(pixels: Tensor) -> Tensor:
    draws = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0))
    return torch.where(draws < 0.5, -1.0, 1.0).to(pixels)
