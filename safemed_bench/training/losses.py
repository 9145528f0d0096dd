"""The losses of GRPO and its kin, on log-probabilities alone: no model, no optimiser, no processes.

N replies of T tokens each, padded to the right. `mask` is 1 (or True) on a reply's own tokens, its end of turn
included, and 0 on padding, whose values are never used. Log-probabilities are in nats, in float32 or wider: the ratios
of bfloat16 ones have steps of the size that clipping is to catch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..core.errors import UsageError, did_you_mean

Kind = Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo"]


class PolicyLoss(NamedTuple):
    """`loss` has a gradient; the rest is for the log. Means are over tokens, for gspo's ratios over replies.

    kl: to the reference, as it stands in the loss before the factor beta; None without a reference. clipped_low,
    clipped_high: share whose gradient was cut because the ratio had fallen, risen, far enough already. ratio_mean,
    ratio_max: of new to old probability.
    """

    loss: Tensor
    kl: Tensor | None
    clipped_low: Tensor
    clipped_high: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor

    @property
    def clip_fraction(self) -> Tensor:
        return self.clipped_low + self.clipped_high


def policy_loss(
    kind: Kind,
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ref_logps: Tensor | None = None,
    beta: float = 0.0,
    unbiased_kl: bool = True,
    max_tokens: int | None = None,
    tokens_in_batch: float | Tensor | None = None,
) -> PolicyLoss:
    """Clipped surrogate plus beta * KL(policy || reference), reduced over tokens and replies as `kind` says.

    logps, old_logps, ref_logps, mask: (N, T); advantages: (N,). Only `logps` gets a gradient, so on-policy `old_logps`
    may be `logps` itself.

    - grpo (arXiv 2402.03300): mean over a reply's tokens, then over replies.
    - bnpo, dapo (2503.14476): mean over all tokens.
    - dr_grpo (2503.20783): sum over tokens by N * `max_tokens`, the length limit, so that length is no bias.
    - gspo (2507.18071): one ratio per reply, the geometric mean of its tokens'; then as grpo.

    `unbiased_kl` weighs the KL by the ratio (2512.02556, TRL's default): on replies of the old policy it is then an
    estimate of the new one's KL, and its gradient that of KL(policy || reference), where plain k3's, which GRPO has, is
    the gradient of the reverse.

    Where the gradients of several shards (processes, micro-batches) of equal N are averaged, `tokens_in_batch` is the
    number of tokens in all shards by the number of shards; then the average is the gradient of the whole batch. Without
    it bnpo and dapo weigh every shard alike, whatever its number of tokens.
    """
    _check(kind, logps, old_logps, advantages, mask, ref_logps, beta, max_tokens)
    mask = mask.to(logps.dtype)
    padding = mask == 0
    logps = logps.masked_fill(padding, 0)
    log_ratio = logps - old_logps.detach().masked_fill(padding, 0)
    lengths = mask.sum(1).clamp(min=1)
    if kind == "gspo":
        log_ratio = (log_ratio.sum(1) / lengths)[:, None]
    ratio = log_ratio.exp()
    gain = advantages[:, None]
    loss = -torch.min(ratio * gain, ratio.clamp(1 - clip_low, 1 + clip_high) * gain)
    kl = None
    if ref_logps is not None:
        kl = k3(logps, ref_logps.masked_fill(padding, 0))
        kl = ratio * kl if unbiased_kl else kl
        loss = loss + beta * kl if beta else loss
    total = (loss * mask).sum(1)
    if kind in ("grpo", "gspo"):
        reduced = (total / lengths).mean()
    elif kind == "dr_grpo":
        assert max_tokens is not None
        reduced = total.sum() / (len(total) * max_tokens)
    else:
        reduced = _mean(total.sum(), mask, tokens_in_batch)
    counted = (mask.any(1, keepdim=True) if kind == "gspo" else mask).to(logps.dtype)
    ratio = ratio.detach()
    return PolicyLoss(
        reduced,
        None if kl is None else masked_mean(kl.detach(), mask),
        masked_mean((ratio < 1 - clip_low) & (gain < 0), counted),
        masked_mean((ratio > 1 + clip_high) & (gain > 0), counted),
        masked_mean(ratio, counted),
        ratio.masked_fill(counted == 0, 0).amax(),
    )


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """(N, T) estimate of KL(policy || reference) from the sampled tokens alone: r - 1 - log r, r = reference / policy.

    Unbiased under the policy, and never negative (Schulman, http://joschu.net/blog/kl-approx.html). The reference gets
    no gradient.
    """
    log_ratio = ref_logps.detach() - logps
    # expm1: the difference of two nearly equal numbers would be noise where the policy is still close
    return log_ratio.expm1() - log_ratio


def consistency(
    clean_logits: Tensor,
    adversarial_logits: Tensor,
    mask: Tensor,
    *,
    detach_clean: bool = True,
    tokens_in_batch: float | Tensor | None = None,
) -> Tensor:
    """Mean over tokens of KL(clean || adversarial), the whole vocabulary's; logits (N, T, V), nats.

    The clean side is the target and gets no gradient unless asked, so that the adversarial answer comes to the clean
    one and not the reverse. `tokens_in_batch` as in `policy_loss`.
    """
    chosen = mask != 0  # (N, T) picked first: no softmax over the vocabulary on padding
    clean, adversarial = _log_softmax(clean_logits[chosen]), _log_softmax(adversarial_logits[chosen])
    if detach_clean:
        clean = clean.detach()
    return _mean((clean.exp() * (clean - adversarial)).sum(), mask, tokens_in_batch)


def entropy(logits: Tensor, mask: Tensor) -> Tensor:
    """Mean over tokens of the entropy of the next-token distribution, nats; logits (N, T, V)."""
    logps = _log_softmax(logits[mask != 0])
    return _mean(-(logps.exp() * logps).sum(), mask)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask`, of the same shape, is not 0; 0 where it is nowhere."""
    return _mean(values.masked_fill(mask == 0, 0).sum(), mask)


def _mean(total: Tensor, mask: Tensor, count: float | Tensor | None = None) -> Tensor:
    """`total` by `count`, or by the number of tokens in `mask`; no division by 0 where a batch has none."""
    number = (mask != 0).sum() if count is None else torch.as_tensor(count, device=mask.device)
    return total / number.clamp(min=1)


def _log_softmax(logits: Tensor) -> Tensor:
    """In float32 or wider; a forbidden token's -inf becomes finite, so that probability 0 times it is 0."""
    logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return logps.clamp(min=torch.finfo(logps.dtype).min)


def _check(
    kind: str,
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logps: Tensor | None,
    beta: float,
    max_tokens: int | None,
) -> None:
    """Raise where broadcasting, or a default, would give a wrong number in silence."""
    if kind not in get_args(Kind):
        raise UsageError(f"unknown loss '{kind}'.{did_you_mean(kind, get_args(Kind))}")
    if logps.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"log-probabilities must be float32 or float64, not {logps.dtype}")
    named = {"old_logps": old_logps, "mask": mask, "ref_logps": ref_logps}
    for name, tensor in named.items():
        if tensor is not None and tensor.shape != logps.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, logps {tuple(logps.shape)}")
    if advantages.shape != logps.shape[:1]:
        raise ValueError(f"advantages have shape {tuple(advantages.shape)}, {len(logps)} replies need one each")
    if beta and ref_logps is None:
        raise ValueError("beta is not 0: ref_logps are needed")
    if kind == "dr_grpo" and max_tokens is None:
        raise ValueError("dr_grpo divides by max_tokens: it is needed")
