"""Log-probabilities of given tokens from logits, with no second tensor of the logits' size kept for the backward pass.

With a vocabulary of 150,000 the logits are the largest tensor of a policy update. A full log-softmax in float32 beside
bfloat16 logits is twice their size, and autograd keeps it; here the backward pass makes it again, a slice at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SLICE = 1 << 25
"""Most values that are held in float32 at once: 128 MiB."""


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(N, T, V) logits and (N, T) ids -> (N, T) log-probabilities and entropies of `softmax(logits / temperature)`.

    In nats, at least float32. Differentiable in the logits through the log-probabilities; the entropies are for the
    log. Raises ValueError for a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"the temperature must be above 0, not {temperature}")
    logps, entropies = _TokenLogProbs.apply(logits, tokens, temperature)
    return logps, entropies


class _TokenLogProbs(torch.autograd.Function):
    """Gather minus logsumexp; keeps the logits themselves and one number per token."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        rows, ids = logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        norms, logps, entropies = rows.new_empty(3, len(rows), dtype=wide).unbind()
        for part in _slices(rows):
            scores = _scaled(rows[part], wide, temperature)
            norms[part] = scores.logsumexp(-1)
            logps[part] = scores.gather(1, ids[part, None])[:, 0] - norms[part]
            chances = (scores - norms[part, None]).exp_()
            # A forbidden token's -inf becomes finite, so that probability 0 times it is 0.
            entropies[part] = norms[part] - torch.linalg.vecdot(chances, scores.clamp(min=torch.finfo(wide).min))
        ctx.save_for_backward(logits, tokens, norms)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropies := entropies.view(tokens.shape))
        return logps.view(tokens.shape), entropies

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, tokens, norms = ctx.saved_tensors
        rows, ids = logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1)
        slope = (gradients[0] / ctx.temperature).reshape(-1, 1)
        out = torch.empty_like(rows)
        for part in _slices(rows):
            chances = (_scaled(rows[part], norms.dtype, ctx.temperature) - norms[part, None]).exp_()
            grown = chances.mul_(-slope[part]).scatter_add_(1, ids[part, None], slope[part])
            out[part] = grown.to(out.dtype)
        return out.view(logits.shape), None, None


def _scaled(rows: Tensor, dtype: torch.dtype, temperature: float) -> Tensor:
    rows = rows.to(dtype)
    return rows if temperature == 1 else rows / temperature


def _slices(rows: Tensor) -> list[slice]:
    size = max(1, SLICE // rows.shape[1])
    return [slice(start, start + size) for start in range(0, len(rows), size)]
