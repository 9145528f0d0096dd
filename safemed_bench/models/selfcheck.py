"""What the adapter proves about itself before it is used; it refuses to run otherwise (DESIGN, section 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..core.errors import ModelError
from ..core.types import Question
from .base import Batch
from .loading import compute_dtype

if TYPE_CHECKING:
    from .huggingface import HuggingFaceVLM

MAP_TOLERANCE = 1e-5
BATCH_TOLERANCE = {torch.float32: 1e-4}
GRADIENT_TOLERANCE = {torch.float32: 0.05}
LOW_PRECISION = 0.25
"""Half-precision forward passes carry errors of this order in log-probabilities and relative finite differences."""


def probe_batch(model: HuggingFaceVLM) -> Batch:
    """Three made-up questions of two to four options, on images of noise: enough for every check."""
    options = ("cyst", "normal", "haemorrhage", "no abnormality, as far as seen")
    questions = [Question(f"probe-{k}", "", "", "What is shown?", options[:k], 0, "", "", "", "") for k in (2, 3, 4)]
    draw = torch.Generator().manual_seed(0)
    canvas = torch.randint(0, 256, (3, 3, *model.resolution), generator=draw, dtype=torch.uint8)
    return model.prepare(questions, canvas)


def self_check(model: HuggingFaceVLM, batch: Batch) -> dict[str, Any]:
    """Measured errors of map, prompt, gradient and batching on a batch of at least 2 questions.

    Raises ModelError naming the check and the error that is out of tolerance.
    """
    dtype = compute_dtype(model.model)
    found: dict[str, Any] = {"prompt": _prompt(model, batch)}
    if model.prompt.image:
        found["map"] = _require("pixel map", _map_error(model, batch), MAP_TOLERANCE, model.name)
        slope = _gradient_error(model, batch)
        found["gradient"] = _require("gradient", slope, GRADIENT_TOLERANCE.get(dtype, LOW_PRECISION), model.name)
    error = _batching_error(model, batch)
    found["batching"] = _require("batching", error, BATCH_TOLERANCE.get(dtype, LOW_PRECISION), model.name)
    return found


def _require(what: str, error: float, tolerance: float, name: str) -> float:
    if not error <= tolerance:
        raise ModelError(
            f"model '{name}' fails its start-up check of the {what}: error {error:.2e}, allowed {tolerance:g}"
        )
    return error


def _prompt(model: HuggingFaceVLM, batch: Batch) -> int:
    """Number of prompts that differ from the real processor's; must be 0."""
    if not model.prompt.image:
        return 0
    text = model.prompt.user_text(batch.questions[0])
    whole = model.chat.with_processor(text)
    real = tuple(whole["input_ids"][0].tolist())
    if real != model.chat.ids(text, image=True):
        raise ModelError(f"model '{model.name}': composed prompt differs from its processor's")
    blank = torch.zeros(1, 3, *model.resolution)
    if not torch.equal(whole["pixel_values"].cpu(), model.processed(blank)["pixel_values"].cpu()):
        raise ModelError(
            f"model '{model.name}': its processor sets up its image processor in a way that is not followed"
        )
    return 0


def _map_error(model: HuggingFaceVLM, batch: Batch) -> float:
    real = model.processed(batch.pixels)["pixel_values"].float()
    return float((model.pixel_map(batch.pixels).float() - real).abs().max())


def _log_odds(model: HuggingFaceVLM, batch: Batch, pixels: Tensor) -> Tensor:
    """(B,) log-odds of the first option: does not saturate where the model is sure."""
    scores = model.option_logits(batch, pixels)
    return scores[:, 0] - scores[:, 1:].logsumexp(1)


STEPS = (0.005, 0.05, 0.5, 2, 5)
"""Steps of the finite difference, root mean square per pixel in units of 1/255. A right gradient agrees at one of them
at least, whatever the precision of the forward pass (the longest are for BLIP-2, whose answers depend on the image so
little that in half precision shorter ones drown); a wrong one at none."""


def _gradient_error(model: HuggingFaceVLM, batch: Batch) -> float:
    """Smallest relative difference, over STEPS, of the gradient's norm and a central difference along it."""
    one, rounded = batch.select([0]), model.pixel_map
    model.pixel_map = rounded.smooth()  # a finite difference of a step function says nothing
    try:
        return _slope_error(model, one)
    finally:
        model.pixel_map = rounded


def _slope_error(model: HuggingFaceVLM, one: Batch) -> float:
    pixels = one.pixels.clamp(0.02, 0.98).requires_grad_(True)
    (gradient,) = torch.autograd.grad(_log_odds(model, one, pixels).sum(), pixels)
    norm = gradient.norm()
    if not torch.isfinite(norm) or norm == 0:
        raise ModelError(f"model '{model.name}': the gradient with respect to the image is {float(norm)}")
    direction = gradient / norm
    errors = []
    for unit in STEPS:
        step = unit / 255 * pixels.numel() ** 0.5
        with torch.no_grad():
            ahead, behind = (_log_odds(model, one, pixels + sign * step * direction).sum() for sign in (1, -1))
        errors.append(float(((ahead - behind) / (2 * step) - norm).abs() / norm))
    return min(errors)


@torch.no_grad()
def _batching_error(model: HuggingFaceVLM, batch: Batch) -> float:
    together = model.option_logits(batch, batch.pixels)
    worst = 0.0
    for i in range(len(batch)):
        one = model.prepare(batch.questions[i : i + 1], batch.canvas[i : i + 1].cpu())
        k = len(one.questions[0].options)
        alone = model.option_logits(one, one.pixels)[0, :k]
        worst = max(worst, float((alone - together[i, :k]).abs().max()))
    return worst


def scores_and_slope(model: HuggingFaceVLM) -> tuple[Tensor, Tensor]:
    """Scores of the options that exist, flat, and the gradient of their sum (B, 3, H, W), on the probe batch."""
    batch = probe_batch(model)
    with torch.enable_grad():
        pixels = batch.pixels.requires_grad_()
        scores = model.option_logits(batch, pixels)
        present = scores[scores.isfinite()]
        (slope,) = torch.autograd.grad(present.sum(), pixels)
    return present.detach(), slope


def difference(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Of two `scores_and_slope`: largest difference of scores, relative one of gradients."""
    (scores, slope), (plain, plain_slope) = one, other
    return float((scores - plain).abs().max()), float((slope - plain_slope).norm() / plain_slope.norm())
