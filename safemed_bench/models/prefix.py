"""Keys and values of the text before the image, computed once and read by every pass that has an image.

System prompt and opening of the turn are the same tokens in every prompt of an entry, and with causal attention they
see nothing of the image: neither an attack's step nor a certificate's sample can change what they are. They are
computed without gradient, as one row, and put before the rest of each sequence, whose positions and mask stay as they
were.

Used by a clear rule, not by a flag: where a pass spends at least `WORTH` on these tokens, the family's attention is
causal, and the start-up check finds the uncached path's scores and image gradient. That is checked in float32: rounding
in bfloat16 is as large as what a cache that is off by one position changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from .loading import compute_dtype
from .precision import in_float32
from .selfcheck import difference, scores_and_slope
from .sequences import INPUTS

if TYPE_CHECKING:
    from .huggingface import HuggingFaceVLM

WORTH = 1e8
"""FLOPs a row, 2 * parameters * tokens. Below it a step is spared a fraction of a millisecond, which is not worth
scores that differ in the last digit from those of records that exist: shipped entries are at 1e7, a 4B model at 4e10.
"""

SCORE_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3
"""Nats, and relative to the norm of the gradient with respect to the image."""

CACHE_ERRORS = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError)
"""What a family raises whose cache does not go on from a prompt."""


class FixedLayer(DynamicLayer):
    """Keys and values (1, heads, L, d) of one layer that every pass reads and none extends.

    So a pass can be run again, as a checkpointed backward does, and batches of any size share one row.
    """

    _layer_type = None

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The known keys and values before the given ones (B, heads, n, d)."""
        assert self.keys is not None and self.values is not None
        pairs = ((self.keys, key_states), (self.values, value_states))
        keys, values = (torch.cat([known.expand(len(new), -1, -1, -1), new], -2) for known, new in pairs)
        return keys, values


class FixedCache(Cache):
    """Of `FixedLayer`s."""


@dataclass
class Prefix:
    """The tokens before the image of one entry. `reason`: why they are cached or not, in words. ids: () if not."""

    ids: tuple[int, ...]
    reason: str
    vlm: HuggingFaceVLM | None = None
    _held: FixedCache | None = None
    _state: tuple[Any, ...] = ()
    _weights: tuple[Tensor, ...] = field(default=(), repr=False)

    @classmethod
    def off(cls, reason: str) -> Prefix:
        return cls((), f"not cached: {reason}")

    @classmethod
    def of(cls, vlm: HuggingFaceVLM, worth: float = WORTH) -> Prefix:
        """The entry's prefix where caching it pays and is exact; else one that does nothing, and says why."""
        ids = vlm.chat.before_image if vlm.prompt.image else ()
        if not ids:
            return cls.off("no text before an image")
        work = 2 * len(ids) * sum(p.numel() for p in vlm.model.parameters())
        if work < worth:
            return cls.off(f"{len(ids)} tokens of a small model, {work:.0e} FLOPs a row, are not worth it")
        if vlm.chat.both_ways:
            return cls.off("parts of the prompt are seen in both directions")
        drafted = cls(ids, "", vlm, _weights=tuple(vlm.model.parameters()))
        try:
            with in_float32(vlm):
                error, slope = _errors(vlm, drafted)
        except CACHE_ERRORS as problem:
            text = " ".join(str(problem).split())[:200]
            return cls.off(f"the family's cache cannot be used ({type(problem).__name__}: {text})")
        measured = f"scores differ by {error:.1e}, the image gradient by {slope:.1e}"
        if not (error <= SCORE_TOLERANCE and slope <= GRADIENT_TOLERANCE):
            return cls.off(f"with it, {measured}")
        drafted.reason = f"{len(ids)} tokens cached: {measured}"
        return drafted

    @property
    def length(self) -> int:
        return len(self.ids)

    def begins(self, row: tuple[int, ...]) -> bool:
        """Whether a prompt begins with it."""
        return row[: len(self.ids)] == self.ids

    def cache(self) -> FixedCache | None:
        """What a pass is given, None where it must see the whole prompt: weights that ask for gradients, or training.

        Computed anew after any change to the weights or their precision.
        """
        if self.vlm is None or self.vlm.model.training or any(w.requires_grad for w in self._weights):
            return None
        device = self.vlm.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        state = (sum(w._version for w in self._weights), compute_dtype(self.vlm.model), autocast)
        if self._held is None or state != self._state:
            self._held, self._state = known_text(self.vlm, self.ids), state
        return self._held


@torch.no_grad()
def known_text(vlm: HuggingFaceVLM, ids: Sequence[int]) -> FixedCache:
    """Keys and values of a prompt's first tokens. Raises one of CACHE_ERRORS where the family's cannot be used."""
    row_ids = torch.tensor([ids], device=vlm.device)
    positions = torch.arange(len(ids), device=vlm.device)
    shape = (1, 3, -1) if vlm.rotary else (1, -1)
    row = dict(zip(INPUTS, (row_ids, torch.ones_like(row_ids), positions.expand(shape)), strict=True))
    known = vlm.model(**vlm.arguments(row, None, 1), use_cache=True).past_key_values
    if any(type(layer) is not DynamicLayer for layer in known.layers):
        raise NotImplementedError("a layer that does not attend to all that went before")
    return FixedCache(layers=[FixedLayer(layer.keys, layer.values) for layer in known.layers])


def _errors(vlm: HuggingFaceVLM, drafted: Prefix) -> tuple[float, float]:
    """Largest difference of option scores, relative one of image gradients, from the path without a cache."""
    found, before = [], vlm.prefix
    try:
        for prefix in (drafted, Prefix.off("to compare with")):
            vlm.prefix = prefix
            found.append(scores_and_slope(vlm))
    finally:
        vlm.prefix = before
    return difference(*found)
