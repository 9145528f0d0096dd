"""The policy of GRPO: log-probabilities of groups of rollouts, each prompt and its image encoded once per group.

All rollouts of a group share their prompt, and with an image the prompt is most of the sequence. Its keys and values
are computed once, repeated by `cache.batch_repeat_interleave` and extended by the completions; the repeat sums the
group's gradients into prompt, image and vision tower, so that values and gradients are those of full sequences. A
family whose cache gives other numbers is found out at the start and takes the plain path.

Rows are prompt-major throughout (a a a b b b): tiling instead of interleaving would pair rollouts with other prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models.huggingface import INPUTS, HuggingFaceVLM
from ..models.precision import in_float32
from ..models.prefix import CACHE_ERRORS, GRADIENT_TOLERANCE, SCORE_TOLERANCE
from ..models.selfcheck import probe_batch
from .logprobs import token_logprobs

PROBE_REPLIES = ("a", "so the picture shows a lesion", "it is", "no", "this is a chest radiograph of", "the")
"""Replies of different lengths for the three probe prompts, two each."""


class Scores(NamedTuple):
    """What a policy says of N completions of up to T tokens; a tuple, so that data-parallel wrappers see inside.

    logps: (N, T) log-probabilities of the tokens in nats, differentiable, 0 where masked. entropies: (N, T) of the
    distribution that each token was drawn from, nats, without gradient, 0 where masked. logits: (N, T, V) or None.
    """

    logps: Tensor
    entropies: Tensor
    logits: Tensor | None


class Policy(nn.Module):
    """A vision-language model as GRPO sees it. One `forward` does prefix and completions, as DDP wants it.

    cached: whether the prefix is encoded once per group; may be set to False by hand. reason: why, in words.
    """

    def __init__(self, vlm: HuggingFaceVLM) -> None:
        super().__init__()
        self.vlm, self.model = vlm, vlm.model
        self.cached, self.reason = check_cache(vlm)

    def forward(
        self,
        prompts: dict[str, Tensor],
        pixel_values: Tensor | None,
        tokens: Tensor,
        mask: Tensor,
        group: int,
        temperature: float = 1.0,
        want_logits: bool = False,
    ) -> Scores:
        """Score completions of P prompts, `group` for each.

        prompts: of `vlm.compose`, P rows, padded on the left. pixel_values: of `vlm.pixel_values`, None for text
        alone. tokens: (N, T) ids padded on the right, N = P * group, prompt-major. mask: (N, T), 0 on padding.
        Logits are divided by `temperature` before the softmax.
        """
        kept = mask.bool()
        score = cached_logits if self.uses_cache else plain_logits
        parts = score(self.vlm, prompts, pixel_values, tokens, kept, group)
        scored = [
            token_logprobs(logits, ids, temperature)
            for logits, ids in zip(parts, tokens.split([p.shape[1] for p in parts], 1), strict=True)
        ]
        logps, entropies = (torch.cat(columns, 1).masked_fill(~kept, 0.0) for columns in zip(*scored, strict=True))
        return Scores(logps, entropies, torch.cat(parts, 1) if want_logits else None)

    @property
    def uses_cache(self) -> bool:
        """Now: a growing cache cannot be computed twice; so gradient checkpointing goes without, but for sampling."""
        checkpointing = any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules())
        return self.cached and not (checkpointing and (self.model.training or torch.is_grad_enabled()))


@dataclass
class Encoded:
    """Prompts that are in a cache, and the tokens that have followed since; N rows, one per rollout.

    cache: of transformers, N rows. mask: (N, L) of all that the cache holds. last: (N,) the last token's position.
    rotary: 3 where positions are (N, 3, L), else 0.
    """

    vlm: HuggingFaceVLM
    cache: Any
    mask: Tensor
    last: Tensor
    rotary: int

    @classmethod
    def of(
        cls, vlm: HuggingFaceVLM, prompts: dict[str, Tensor], pixel_values: Tensor | None, group: int
    ) -> tuple[Encoded, Tensor]:
        """Encode P prompts once; N = P * group rows, and the (N, V) logits of their first tokens."""
        out = vlm.model(**vlm.arguments(prompts, pixel_values, 1), use_cache=True)
        out.past_key_values.batch_repeat_interleave(group)
        mask, last = (t.repeat_interleave(group, 0) for t in (prompts["attention_mask"], _last_position(prompts)))
        rotary = prompts["position_ids"].shape[1] if prompts["position_ids"].ndim == 3 else 0
        encoded = cls(vlm, out.past_key_values, mask, last, rotary)
        return encoded, out.logits[:, -1].repeat_interleave(group, 0)

    def extend(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Append (N, t) tokens, 0 in `mask` (N, t) on padding; the (N, t, V) logits after each of them."""
        self.mask = torch.cat([self.mask, mask.to(self.mask.dtype)], 1)
        positions = _counting(self.last, tokens.shape[1], self.rotary)
        self.last = self.last + tokens.shape[1]
        # No token types: they say which positions see each other in both directions, the image's, which are cached.
        logits: Tensor = self.vlm.model(
            input_ids=tokens,
            attention_mask=self.mask,
            position_ids=positions.permute(1, 0, 2) if self.rotary else positions,
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        return logits

    def select(self, rows: Tensor) -> None:
        """Keep the rows at `rows` (long) alone."""
        self.cache.batch_select_indices(rows)
        self.mask, self.last = self.mask[rows], self.last[rows]


def cached_logits(
    vlm: HuggingFaceVLM,
    prompts: dict[str, Tensor],
    pixel_values: Tensor | None,
    tokens: Tensor,
    mask: Tensor,
    group: int,
) -> list[Tensor]:
    """Logits of the first (N, 1, V) and of the other (N, T - 1, V) tokens, apart to spare a copy."""
    encoded, first = Encoded.of(vlm, prompts, pixel_values, group)
    if tokens.shape[1] == 1:
        return [first[:, None]]
    return [first[:, None], encoded.extend(tokens[:, :-1], mask[:, :-1])]


def plain_logits(
    vlm: HuggingFaceVLM,
    prompts: dict[str, Tensor],
    pixel_values: Tensor | None,
    tokens: Tensor,
    mask: Tensor,
    group: int,
) -> list[Tensor]:
    """One full forward of every row, prompt and image included: (N, T, V), in a list of one."""
    ids, seen, positions = (prompts[name].repeat_interleave(group, 0) for name in INPUTS)
    rotary = positions.shape[1] if positions.ndim == 3 else 0
    width = tokens.shape[1] - 1
    after = _counting(_last_position(prompts).repeat_interleave(group, 0), width, rotary)
    joined = (
        torch.cat([ids, tokens[:, :-1]], 1),
        torch.cat([seen, mask[:, :-1].to(seen.dtype)], 1),
        torch.cat([positions, after], -1),
    )
    values = None if pixel_values is None else repeated(pixel_values, len(prompts["input_ids"]), group)
    arguments = vlm.arguments(dict(zip(INPUTS, joined, strict=True)), values, width + 1)
    return [vlm.model(**arguments, use_cache=False).logits[:, -width - 1 :]]


def repeated(pixel_values: Tensor, prompts: int, group: int) -> Tensor:
    """Each prompt's own slice of `pixel_values` (patches of one image for Qwen, one image for others), interleaved."""
    slices = pixel_values.view(prompts, -1, *pixel_values.shape[1:])
    return slices.repeat_interleave(group, 0).flatten(0, 1)


def _last_position(prompts: dict[str, Tensor]) -> Tensor:
    """(P,) the largest position of each prompt: what follows counts on from it."""
    return prompts["position_ids"].flatten(1).amax(1)


def _counting(last: Tensor, width: int, rotary: int) -> Tensor:
    """(N, width) positions after `last`, or (N, rotary, width) for rotary embeddings of several rows."""
    positions = last[:, None] + torch.arange(1, width + 1, device=last.device)
    return positions[:, None].expand(-1, rotary, -1) if rotary else positions


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; each submodule gets its own mode back."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def exchanged(module: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """`weights` and the parameters that they name trade places inside, a tensor at a time."""
    parameters = dict(module.named_parameters())

    @torch.no_grad()
    def trade() -> None:
        for name, other in weights.items():
            own = parameters[name].detach().clone()
            parameters[name].copy_(other)
            other.copy_(own)

    trade()
    try:
        yield
    finally:
        trade()


def check_cache(vlm: HuggingFaceVLM) -> tuple[bool, str]:
    """Whether the cached path gives the plain path's values and image gradient on three probe prompts; and why.

    Tried in float32, since rounding in half precision is as large as what a cache off by one position changes.
    """
    try:
        with in_float32(vlm):
            error, slope = _cache_errors(vlm)
    except CACHE_ERRORS as problem:
        text = " ".join(str(problem).split())[:200]
        return False, f"plain path: its cache cannot be extended ({type(problem).__name__}: {text})"
    fits = error <= SCORE_TOLERANCE and slope <= GRADIENT_TOLERANCE
    measured = f"log-probabilities differ by {error:.1e}, the image gradient by {slope:.1e}"
    return fits, f"prefix encoded once per group: {measured}" if fits else f"plain path: with a cache, {measured}"


def _cache_errors(vlm: HuggingFaceVLM) -> tuple[float, float]:
    """Largest difference of log-probabilities, and relative difference of the gradients with respect to the image."""
    batch = probe_batch(vlm)
    tokens, mask = pad_right([vlm.encode(text) for text in PROBE_REPLIES], vlm)
    group = len(tokens) // len(batch)
    found: list[tuple[Tensor, Tensor]] = []
    with evaluating(vlm.model), torch.enable_grad():
        for path in (cached_logits, plain_logits):
            pixels = batch.pixels.requires_grad_()
            values = vlm.pixel_values(pixels)
            parts = path(vlm, batch.inputs, values, tokens, mask, group)
            logps = token_logprobs(torch.cat(parts, 1), tokens)[0] * mask
            wanted = values is not None and logps.requires_grad
            slope = torch.autograd.grad(logps.sum(), pixels)[0] if wanted else torch.zeros(())
            found.append((logps.detach(), slope))
    (cached, steep), (plain, steep_plain) = found
    error = float((cached - plain).abs().max())
    slope_error = float((steep - steep_plain).norm() / steep_plain.norm().clamp_min(1e-20))
    return error, slope_error


def pad_right(rows: list[tuple[int, ...]], vlm: HuggingFaceVLM) -> tuple[Tensor, Tensor]:
    """(N, T) ids padded on the right and their (N, T) bool mask, on the model's device; T >= 1."""
    width = max(1, *map(len, rows))
    ids = torch.tensor([[*row, *[vlm.pad_id] * (width - len(row))] for row in rows])
    lengths = torch.tensor([[len(row)] for row in rows])
    return ids.to(vlm.device), (torch.arange(width) < lengths).to(vlm.device)
