"""The tensor side of `core.types.ThreatModel`: start, projection, 8-bit artefact, norms and audit.

`clean` and `delta` are (B, 3, H, W) float on the [0, 1] pixel scale; `canvas` and `adversarial` are uint8 levels.
Nothing here draws from a global random stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.errors import SafeMedError
from ..core.types import ThreatModel
from .audit import LEVELS, audit, level_range, squared_budget, whole_levels


class ConstraintError(SafeMedError):
    """An attack returned an image that its threat model does not allow; the record must not count."""


def flat_norm(values: Tensor) -> Tensor:
    """Euclidean norm of each sample, shaped (B, 1, 1, 1) for broadcasting."""
    return values.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def project(threat: ThreatModel, delta: Tensor, clean: Tensor) -> Tensor:
    """The perturbation, brought into the ball and into the box.

    L∞: clamped to ±eps, then to the box; this is the exact projection. L2: clipped to the box, then scaled down to
    norm eps; scaling moves towards `clean`, which lies in the (convex) box, so that both constraints hold.
    """
    low, high = threat.bounds
    if threat.norm == "linf":
        return (clean + delta.clamp(-threat.eps, threat.eps)).clamp(low, high) - clean
    boxed = (clean + delta).clamp(low, high) - clean
    return boxed * (threat.eps / flat_norm(boxed).clamp_min(1e-12)).clamp_max(1.0)


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
    direction = torch.randn(shape, generator=generator)
    # The volume of a ball grows as radius^d, so that a uniform point has radius u^(1/d).
    radius = threat.eps * torch.rand((), generator=generator) ** (1 / direction.numel())
    return direction / direction.norm().clamp_min(1e-12) * radius


def quantize(threat: ThreatModel, canvas: Tensor, pixels: Tensor) -> Tensor:
    """The 8-bit image nearest to `pixels` that still lies inside the ball around `canvas` and inside the box.

    canvas: (B, 3, H, W) uint8; pixels: (B, 3, H, W) float; returns uint8. L∞: level differences are clamped to
    floor(255 eps). L2: rounded; where that leaves the ball, the values that rounding moved furthest away from the
    clean image go back by one level until it holds. With eps 0 the canvas comes back bit for bit. An eps below one
    level (L∞) allows no change at all.
    """
    base = canvas.to(torch.int32)
    exact = pixels.detach().double() * LEVELS - base
    if threat.norm == "l2":
        # Float error may have left it a hair outside: scaled in, truncating every value is sure to fit.
        exact = exact * (threat.eps * LEVELS / flat_norm(exact).clamp_min(1e-12)).clamp_max(1.0)
    shift = exact.round().to(torch.int32)
    if threat.norm == "linf":
        shift = shift.clamp(-whole_levels(threat), whole_levels(threat))
    shift = (base + shift).clamp(*level_range(threat)) - base
    if threat.norm == "l2":
        shift = _shrink(shift, exact, squared_budget(threat))
    return (base + shift).to(torch.uint8)


def _shrink(shift: Tensor, exact: Tensor, budget: int) -> Tensor:
    """Integer steps (B, ...) with squared norm <= budget: undoes rounding away from zero, the furthest first."""
    flat = shift.flatten(1).long()
    size = flat.abs()
    excess = size - exact.flatten(1).abs()
    order = excess.argsort(dim=1, descending=True, stable=True)
    # One level back saves size^2 - (size - 1)^2; a value goes back if those before it did not save enough.
    gain = ((2 * size - 1) * (excess > 0)).gather(1, order)
    over = size.square().sum(dim=1, keepdim=True) - budget
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
