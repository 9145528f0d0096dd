"""Rollouts of a policy: groups of sampled replies, each prompt and its image encoded once per group.

A token is the inverse of the cumulative distribution at a uniform number that is given beforehand. So a rollout
depends on its own draws alone, and on neither batch, rank nor device (1e-7 of rounding in the logits aside).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.seeds import derive_seed
from ..models.huggingface import INPUTS, HuggingFaceVLM
from .policy import Encoded, Policy, evaluating, plain_logits, repeated
from .sharding import any_process

PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id")


@dataclass(frozen=True)
class Rollouts:
    """N sampled replies of up to T tokens, prompt-major (a a a b b b).

    tokens: (N, T) ids, padded on the right with the pad token. mask: (N, T) bool, the reply with the token that
    ended it. finished: (N,) bool, ended by itself and not by the limit. logps: (N, T) log-probabilities of the tokens
    in nats under `logits / temperature` (greedy: under the logits), 0 where masked, whatever `top_p` was.
    """

    tokens: Tensor
    mask: Tensor
    finished: Tensor
    logps: Tensor

    @property
    def lengths(self) -> Tensor:
        """(N,) tokens of each reply, with the one that ended it."""
        return self.mask.sum(1)

    def replies(self) -> list[tuple[int, ...]]:
        """Token ids of each reply without the token that ended it."""
        counts = (self.lengths - self.finished.long()).tolist()
        return [tuple(row[:n]) for row, n in zip(self.tokens.tolist(), counts, strict=True)]

    def texts(self, decode: Callable[[Sequence[int]], str]) -> list[str]:
        """Replies as text; `decode` is `vlm.decode_text`."""
        return [decode(reply) for reply in self.replies()]


def draws(*parts: object, n: int, max_new_tokens: int) -> Tensor:
    """(n, max_new_tokens) float64 uniforms in [0, 1) for n rollouts of the prompt that `parts` name.

    Rollout i and its token t have the same draw whatever `n` and `max_new_tokens` are.
    """
    rows = [np.random.default_rng(derive_seed(*parts, "rollout", i)).random(max_new_tokens) for i in range(n)]
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def sample(
    policy: Policy | HuggingFaceVLM,
    prompts: dict[str, Tensor],
    pixel_values: Tensor | None,
    group: int,
    uniforms: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Rollouts:
    """Sample `group` replies to each of P prompts, in evaluation mode.

    prompts: of `vlm.compose`. pixel_values: of `vlm.pixel_values`, None for text alone. uniforms: (N, at least
    max_new_tokens) in [0, 1), N = P * group, of `draws`. temperature 0 is greedy, as the deployed path. top_p: the
    smallest set of most likely tokens that has this probability is sampled from (1904.09751). Placeholders of images
    are never sampled: there is no image behind them, and the stock forward refuses such a reply.
    """
    policy = policy if isinstance(policy, Policy) else Policy(policy)
    vlm, count = policy.vlm, len(prompts["input_ids"]) * group
    if uniforms.ndim != 2 or len(uniforms) != count or uniforms.shape[1] < max_new_tokens:
        raise ValueError(f"uniforms must be ({count}, {max_new_tokens}) or wider, not {tuple(uniforms.shape)}")
    uniforms, ends = uniforms.to(vlm.device), torch.tensor(vlm.end_ids, device=vlm.device)
    tokens = torch.full((count, max_new_tokens), vlm.pad_id, device=vlm.device)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    logps = torch.zeros(count, max_new_tokens, device=vlm.device)
    barred = _placeholders(vlm)
    rows = torch.arange(count, device=vlm.device)
    with evaluating(policy.model):
        decoder: _Cached | _Plain = (_Cached if policy.uses_cache else _Plain)(vlm, prompts, pixel_values, group)
        logits = decoder.first()
        for t in range(max_new_tokens):
            chosen, logps[rows, t] = _choose(logits[: len(rows)], uniforms[rows, t], barred, temperature, top_p)
            tokens[rows, t], mask[rows, t] = chosen, True
            going = (~torch.isin(chosen, ends)).nonzero()[:, 0]
            rows = rows[going]
            if t + 1 == max_new_tokens or not any_process(policy.model, len(rows) > 0):
                break
            if not len(rows):  # other processes still need this one's shards: a row goes on that nobody reads
                going, chosen = going.new_zeros(1), ends[:1]
            logits = decoder.step(going, chosen[going])
    finished = torch.ones(count, dtype=torch.bool, device=vlm.device)
    finished[rows] = False
    width = t + 1  # that of the longest reply, of all processes' where they go on together
    return Rollouts(tokens[:, :width], mask[:, :width], finished, logps[:, :width])


class _Cached:
    """Next-token logits of the rows that still go on, from the cache."""

    def __init__(
        self, vlm: HuggingFaceVLM, prompts: dict[str, Tensor], pixel_values: Tensor | None, group: int
    ) -> None:
        self._encoded, self._first = Encoded.of(vlm, prompts, pixel_values, group)

    def first(self) -> Tensor:
        """(N, V) logits of the first token."""
        return self._first

    def step(self, going: Tensor, chosen: Tensor) -> Tensor:
        """(n, V) logits after the tokens `chosen` (n,) of the rows at `going`; the other rows are dropped."""
        if len(going) < len(self._encoded.last):
            self._encoded.select(going)
        return self._encoded.extend(chosen[:, None], torch.ones_like(chosen[:, None]))[:, -1]


class _Plain:
    """The same from full sequences at every token, for a family whose cache gives other numbers."""

    def __init__(
        self, vlm: HuggingFaceVLM, prompts: dict[str, Tensor], pixel_values: Tensor | None, group: int
    ) -> None:
        count = len(prompts["input_ids"])
        self._vlm, self._prompts = vlm, {name: prompts[name].repeat_interleave(group, 0) for name in INPUTS}
        self._values = None if pixel_values is None else repeated(pixel_values, count, group)
        # The last column is one that is never read: a completion's logits end at its last token's own.
        self._tokens = torch.full((count * group, 1), vlm.pad_id, device=vlm.device)

    def first(self) -> Tensor:
        tokens = self._tokens
        (logits,) = plain_logits(self._vlm, self._prompts, self._values, tokens, torch.ones_like(tokens), 1)
        return logits[:, -1]

    def step(self, going: Tensor, chosen: Tensor) -> Tensor:
        if self._values is not None:
            slices = self._values.view(len(self._tokens), -1, *self._values.shape[1:])
            self._values = slices[going].flatten(0, 1)
        self._prompts = {name: value[going] for name, value in self._prompts.items()}
        self._tokens = torch.cat([self._tokens[going, :-1], chosen[:, None], self._tokens[going, -1:]], 1)
        return self.first()


def _choose(
    logits: Tensor, uniforms: Tensor, barred: Tensor, temperature: float, top_p: float
) -> tuple[Tensor, Tensor]:
    """Ids (n,), the inverse of each row's cumulative distribution at `uniforms` (n,), or the most likely; and their
    log-probabilities (n,) among all tokens, the barred too.

    In float64, so that float32's rounding over a large vocabulary never moves a choice.
    """
    logps = (logits.double() / (temperature or 1.0)).log_softmax(1)
    if temperature == 0:
        chosen = logits.argmax(1)
    else:
        chances = logps.exp().index_fill_(1, barred, 0.0)
        summed = (_nucleus(chances, top_p) if top_p < 1 else chances).cumsum(1)
        total = summed[:, -1:]
        # Strictly below the total: at it, the search would end on a token of probability 0.
        at = torch.minimum(uniforms[:, None] * total, total.nextafter(torch.zeros_like(total)))
        chosen = torch.searchsorted(summed, at, right=True)[:, 0]
    return chosen, logps.gather(1, chosen[:, None])[:, 0].float()


def _nucleus(chances: Tensor, top_p: float) -> Tensor:
    """`chances` (n, V) with all outside the smallest set that has a share `top_p` of each row set to 0."""
    ranked, order = chances.sort(1, descending=True)
    summed = ranked.cumsum(1)
    outside = summed - ranked >= top_p * summed[:, -1:]
    return torch.zeros_like(chances).scatter(1, order, ranked.masked_fill(outside, 0.0))


def _placeholders(vlm: HuggingFaceVLM) -> Tensor:
    """Ids of the tokens that stand for images or videos."""
    config = vlm.model.config
    ids = {int(i) for name in PLACEHOLDERS if (i := getattr(config, name, None)) is not None}
    return torch.tensor(sorted(ids), dtype=torch.long, device=vlm.device)
