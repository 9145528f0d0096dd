"""The tensor side of `core.types.ThreatModel`: start, ascent, projection, 8-bit artefact, norms and audit.

`clean` and `delta` are (B, 3, H, W) float on the [0, 1] pixel scale; `canvas` and `adversarial` are uint8 levels.
Nothing here draws from a global random stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import SafeMedError
from ..core.types import ThreatModel
from .audit import LEVELS, audit, level_range, squared_budget, summed_budget, whole_levels

SPARSITY = 0.01
"""Part of all values that one steepest L1 step moves (SLIDE, 1904.13000, section 4)."""


class ConstraintError(SafeMedError):
    """An attack returned an image that its threat model does not allow; the record must not count."""


def flat_norm(values: Tensor) -> Tensor:
    """Euclidean norm of each sample, shaped (B, 1, 1, 1) for broadcasting."""
    return values.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def project(threat: ThreatModel, delta: Tensor, clean: Tensor) -> Tensor:
    """The perturbation, brought into the ball and into the box.

    L∞: clamped to ±eps, then to the box; this is the exact projection. L2: clipped to the box, then scaled down to
    norm eps; scaling moves towards `clean`, which lies in the (convex) box, so that both constraints hold. L1: the
    exact projection onto the intersection of ball and box (Croce & Hein, 2103.01208, proposition 2.1).
    """
    low, high = threat.bounds
    if threat.norm == "l1":
        room = torch.where(delta >= 0, high - clean, clean - low).clamp_min(0.0)
        return _onto_l1(delta, room, threat.eps)
    if threat.norm == "linf":
        return delta.clamp(-threat.eps, threat.eps).add_(clean).clamp_(low, high).sub_(clean)
    boxed = (clean + delta).clamp(low, high) - clean
    return boxed * (threat.eps / flat_norm(boxed).clamp_min(1e-12)).clamp_max(1.0)


def _onto_l1(delta: Tensor, room: Tensor, eps: float) -> Tensor:
    """The point nearest to `delta` among those of its signs with |value| <= room and a sum of |values| <= eps.

    Each value is min(max(|value| - t, 0), room) for the smallest t >= 0 that keeps the sum. As t falls, a value enters
    at t = |value| and is full at t = |value| - room; between two such points the sum grows linearly.
    """
    size, cap = delta.flatten(1).abs().double(), room.flatten(1).double()
    points, order = torch.cat([size, (size - cap).clamp_min(0.0)], dim=1).sort(dim=1, descending=True)
    growing = torch.where(order < size.shape[1], 1.0, -1.0).to(size.dtype).cumsum(dim=1)[:, :-1]
    total = torch.nn.functional.pad((growing * (points[:, :-1] - points[:, 1:])).cumsum(dim=1), (1, 0))
    past = (total < eps).sum(dim=1, keepdim=True)  # the first point at which the sum has reached eps
    at = past.clamp(max=total.shape[1] - 1)
    back = (total.gather(1, at) - eps) / growing.gather(1, (at - 1).clamp_min(0)).clamp_min(1.0)
    least = torch.where(past < total.shape[1], points.gather(1, at) + back.clamp_min(0.0), 0.0)
    return ((size - least).clamp_min(0.0).minimum(cap) * delta.flatten(1).sign()).to(delta.dtype).view_as(delta)


def ascent(threat: ThreatModel, gradient: Tensor, pixels: Tensor) -> Tensor:
    """The direction (B, 3, H, W) of unit length in the threat's norm that climbs steepest from `pixels`.

    L∞: the sign. L2: the normalised gradient. L1: the steepest step moves one value alone; as in SLIDE (1904.13000) the
    hundredth part with the largest gradients moves, all by the same length, without values at the end of their range.
    """
    if threat.norm == "linf":
        return gradient.sign()
    if threat.norm == "l1":
        return sparse_ascent(threat, gradient, pixels, torch.full((len(gradient),), SPARSITY, dtype=torch.float64))
    # float64, since the squares of a vanishing gradient underflow in float32
    exact = gradient.double()
    return (exact / flat_norm(exact).clamp_min(1e-300)).to(gradient.dtype)


def sparse_ascent(threat: ThreatModel, gradient: Tensor, pixels: Tensor, parts: Tensor) -> Tensor:
    """Signs of the largest gradients, of L1 norm 1. parts: (B,) in (0, 1], the part of all values that moves."""
    low, high = threat.bounds
    stuck = ((pixels >= high) & (gradient > 0)) | ((pixels <= low) & (gradient < 0))
    free = gradient.masked_fill(stuck, 0.0).flatten(1)
    order = free.abs().argsort(dim=1, descending=True, stable=True)
    count = (parts.to(free.device) * free.shape[1]).long().clamp_min(1)
    first = torch.arange(free.shape[1], device=free.device) < count[:, None]
    moves = torch.zeros_like(free).scatter(1, order, first.to(free.dtype)) * free.sign()
    return (moves / moves.abs().sum(dim=1, keepdim=True).clamp_min(1.0)).view_as(gradient)


def random_start(threat: ThreatModel, clean: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """A perturbation drawn uniformly from each sample's ball, then projected.

    One CPU generator per sample: the draw of a question depends neither on its batch nor on the device.
    """
    if len(generators) != len(clean):
        raise ValueError(f"{len(clean)} samples need as many generators, not {len(generators)}")
    draws = [_draw(threat, clean.shape[1:], generator) for generator in generators]
    delta = torch.stack(draws).to(clean) if draws else torch.zeros_like(clean)
    return project(threat, delta, clean)


def _draw(threat: ThreatModel, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if threat.norm == "linf":
        return (2 * torch.rand(shape, generator=generator) - 1) * threat.eps
    if threat.norm == "l1":  # d + 1 exponential variables over their sum; the last one is the way to the surface
        parts = torch.rand(shape.numel() + 1, generator=generator).clamp_min(1e-12).log().neg()
        signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        return threat.eps * signs * (parts[:-1] / parts.sum()).view(shape)
    direction = torch.randn(shape, generator=generator)
    # The volume of a ball grows as radius^d, so that a uniform point has radius u^(1/d).
    radius = threat.eps * torch.rand((), generator=generator) ** (1 / direction.numel())
    return direction / direction.norm().clamp_min(1e-12) * radius


def quantize(threat: ThreatModel, canvas: Tensor, pixels: Tensor) -> Tensor:
    """The 8-bit image nearest to `pixels` that still lies inside the ball around `canvas` and inside the box.

    canvas: (B, 3, H, W) uint8; pixels: (B, 3, H, W) float; returns uint8. L∞: level differences are clamped to
    floor(255 eps). L2 and L1: rounded; where that leaves the ball, the values that rounding moved furthest away from
    the clean image go back by one level until it holds. With eps 0 the canvas comes back bit for bit. An eps below
    one level (L∞, L1) allows no change at all.
    """
    base = canvas.to(torch.int32)
    exact = pixels.detach().double() * LEVELS - base
    if threat.norm == "l2":
        # Float error may have left it a hair outside: scaled in, truncating every value is sure to fit.
        exact = exact * (threat.eps * LEVELS / flat_norm(exact).clamp_min(1e-12)).clamp_max(1.0)
    if threat.norm == "l1":
        total = exact.flatten(1).abs().sum(dim=1).view(-1, 1, 1, 1)
        exact = exact * (threat.eps * LEVELS / total.clamp_min(1e-12)).clamp_max(1.0)
    shift = exact.round().to(torch.int32)
    if threat.norm == "linf":
        shift = shift.clamp(-whole_levels(threat), whole_levels(threat))
    shift = (base + shift).clamp(*level_range(threat)) - base
    size = shift.flatten(1).long().abs()
    if threat.norm == "l2":  # one level back saves size^2 - (size - 1)^2
        shift = _shrink(shift, exact, 2 * size - 1, size.square().sum(dim=1) - squared_budget(threat))
    if threat.norm == "l1":
        shift = _shrink(shift, exact, torch.ones_like(size), size.sum(dim=1) - summed_budget(threat))
    return (base + shift).to(torch.uint8)


def _shrink(shift: Tensor, exact: Tensor, saved: Tensor, over: Tensor) -> Tensor:
    """Integer steps (B, ...) back inside the ball: undoes rounding away from zero, the furthest first.

    saved: (B, d) what one level back saves of the budget. over: (B,) how much too much is spent.
    """
    flat, over = shift.flatten(1).long(), over[:, None]
    excess = flat.abs() - exact.flatten(1).abs()
    order = excess.argsort(dim=1, descending=True, stable=True)
    gain = (saved * (excess > 0)).gather(1, order)
    # A value goes back if those before it did not save enough.
    back = (gain.cumsum(dim=1) - gain < over) & (over > 0) & (gain > 0)
    step = torch.zeros_like(flat).scatter(1, order, back.long())
    return (flat - step * flat.sign()).view_as(shift).to(torch.int32)


def norms(canvas: Tensor, adversarial: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) L∞ and (B,) L2 norm of the difference of two 8-bit images, float64 on the [0, 1] pixel scale; exact."""
    shift = (adversarial.long() - canvas.long()).flatten(1).abs()
    return shift.amax(dim=1).double() / LEVELS, shift.square().sum(dim=1).double().sqrt() / LEVELS


def check(threat: ThreatModel, canvas: Tensor, adversarial: Tensor) -> None:
    """Audit of (B, 3, H, W) uint8 images. Raises ConstraintError naming the first sample that is not allowed."""
    if adversarial.dtype != torch.uint8 or canvas.dtype != torch.uint8:
        raise ConstraintError(f"the artefact must be uint8, not {adversarial.dtype}")
    if adversarial.shape != canvas.shape:
        raise ConstraintError(f"the artefact has shape {tuple(adversarial.shape)}, the image {tuple(canvas.shape)}")
    pairs = zip(canvas.cpu().numpy(), adversarial.cpu().numpy(), strict=True)
    for sample, (clean, image) in enumerate(pairs):
        if problem := audit(threat, clean, image):
            raise ConstraintError(f"sample {sample} of the batch: {problem}")
