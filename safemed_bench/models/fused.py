"""RMS norm and rotary embedding as one autograd function each, for weights that ask for no gradient.

The same functions as transformers' own, in fewer operations; what is saved above all is the backward pass, which
autograd takes through each of them. For float32: without the casts of their source.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class RMSNorm(torch.autograd.Function):
    """w * x / sqrt(mean(x^2) + eps) over the last axis (arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x: (..., d), weight: (d,). Returns (..., d)."""
        y, scale = _unit(x, eps)
        ctx.save_for_backward(y, scale, weight)
        return weight * y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        y, scale, weight = ctx.saved_tensors
        return _through_unit(slope * weight, y, scale), None, None


class Rotary(torch.autograd.Function):
    """x * cos + rotate_half(x) * sin (arXiv 2104.09864), a rotation: its backward is the one back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: (..., d), d even; cos, sin broadcast to it, both halves of their last axis alike. Returns (..., d)."""
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(slope, cos, -sin), None, None


class NormedRotary(torch.autograd.Function):
    """`Rotary` of `RMSNorm`, as queries and keys have it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        y, scale = _unit(x, eps)
        ctx.save_for_backward(y, scale, weight, cos, sin)
        return _turn(weight * y, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None, None]:
        y, scale, weight, cos, sin = ctx.saved_tensors
        return _through_unit(_turn(slope, cos, -sin).mul_(weight), y, scale), None, None, None, None


def _unit(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x of mean square 1, and (..., 1) by what it was multiplied."""
    scale = (torch.linalg.vecdot(x, x).unsqueeze(-1) / x.shape[-1] + eps).rsqrt_()
    return x * scale, scale


def _through_unit(slope: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """The slope before `_unit`, of the one behind it: scale * (slope - y * mean(slope * y))."""
    along = torch.linalg.vecdot(slope, y).unsqueeze(-1).div_(-y.shape[-1])
    return torch.addcmul(slope, y, along).mul_(scale)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out
