"""A cheaper pass for the steps of an attack: when it is taken, and that it is checked.

It is for climbing alone, and for nothing that is believed: verdicts, recorded scores and certificates come from
transformers' own forward pass, so that an error in it could only make an attack weaker. It is taken by a clear rule,
not by a flag: the model is a Qwen3-VL (qwen3_vl.py) with nothing hooked into it, its weights are float32 on one device
and ask for no gradient, and the start-up check finds the own pass's scores and image gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch

from .loading import unwrapped
from .prefix import CACHE_ERRORS, GRADIENT_TOLERANCE, SCORE_TOLERANCE
from .qwen3_vl import Pass, strange
from .selfcheck import difference, scores_and_slope

if TYPE_CHECKING:
    from .huggingface import HuggingFaceVLM


@dataclass(frozen=True)
class Shortcut:
    """Whether an entry has one. `reason`: why, or why not, in words."""

    exact: bool
    reason: str

    @classmethod
    def off(cls, reason: str) -> Shortcut:
        return cls(False, f"not taken: {reason}")

    @classmethod
    def of(cls, vlm: HuggingFaceVLM) -> Shortcut:
        """Found out by comparing it with the entry's own pass."""
        if why := _why_not(vlm):
            return cls.off(why)
        before = vlm.shortcut
        try:
            plain = scores_and_slope(vlm)
            vlm.shortcut = cls(True, "to be compared")
            with vlm.climbing():
                error, slope = difference(scores_and_slope(vlm), plain)
        except CACHE_ERRORS as problem:
            return cls.off(f"{type(problem).__name__}: {' '.join(str(problem).split())[:200]}")
        finally:
            vlm.shortcut = before
        measured = f"scores differ by {error:.1e}, the image gradient by {slope:.1e}"
        exact = error <= SCORE_TOLERANCE and slope <= GRADIENT_TOLERANCE
        return cls(True, measured) if exact else cls.off(f"with it, {measured}")

    def begin(self, vlm: HuggingFaceVLM) -> Pass | None:
        """The pass for weights as they are now; None without, or where the entry is not what it was at the start."""
        return Pass(vlm) if self.exact and not _why_not(vlm) else None


def _why_not(vlm: HuggingFaceVLM) -> str:
    """'' where it could be taken now, else the reason."""
    model = vlm.model
    if why := strange(unwrapped(model)):
        return why
    if not (vlm.prompt.image and vlm.chat.before_image):
        return "no text before an image"
    if any(m.training for m in model.modules()):
        return "in training"
    tensors = [*chain(model.parameters(), model.buffers())]
    kinds = {t.dtype for t in tensors if t.is_floating_point()}
    if kinds != {torch.float32} or len({t.device for t in tensors}) > 1:
        return "its weights are not float32 on one device"
    return "its weights ask for gradients" if any(p.requires_grad for p in model.parameters()) else ""
