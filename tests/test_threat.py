"""The tensor side of the threat model: ball, box, 8-bit grid, starts."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import generators, toy_canvas

from safemed_bench.attacks.audit import audit
from safemed_bench.attacks.threat import ConstraintError, ascent, check, norms, project, quantize, random_start
from safemed_bench.core.types import Norm, ThreatModel

NORMS = get_args(Norm)

threats = st.one_of(
    st.builds(
        ThreatModel, st.just("linf"), st.sampled_from([0, 0.5 / 255, 1 / 255, 2 / 255, 4 / 255, 8 / 255, 0.05, 1])
    ),
    st.builds(ThreatModel, st.just("l2"), st.sampled_from([0, 0.004, 0.01, 0.1, 0.5, 1.0, 3.7, 100])),
    st.builds(ThreatModel, st.just("l1"), st.sampled_from([0, 0.5 / 255, 0.01, 0.1, 1.0, 12, 60, 1000])),
)


def size(threat: ThreatModel, delta: torch.Tensor) -> torch.Tensor:
    flat = delta.flatten(1).double()
    return flat.norm(dim=1, p={"linf": math.inf, "l2": 2, "l1": 1}[threat.norm])


@given(threats, st.integers(0, 10**6), st.sampled_from([1e-3, 0.02, 0.3, 5]))
@settings(max_examples=80, deadline=None)
def test_projection_holds_ball_and_box_and_is_idempotent(threat, seed, scale):
    clean = toy_canvas(3, (8, 8), seed).float() / 255
    delta = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)) * scale
    once = project(threat, delta, clean)
    assert (size(threat, once) <= threat.eps * (1 + 1e-6) + 1e-6).all()
    assert (clean + once).min() >= -1e-7 and (clean + once).max() <= 1 + 1e-7
    assert torch.allclose(project(threat, once, clean), once, atol=1e-6)


@given(threats, st.integers(0, 10**6), st.sampled_from([1e-3, 0.02, 0.3, 5]))
@settings(max_examples=120, deadline=None)
def test_artefact_is_inside_the_ball_exactly(threat, seed, scale):
    canvas = toy_canvas(3, (8, 8), seed)
    clean = canvas.float() / 255
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed)) * scale
    pixels = clean + (project(threat, noise, clean) if seed % 2 else noise)
    artefact = quantize(threat, canvas, pixels)
    assert artefact.dtype == torch.uint8
    check(threat, canvas, artefact)
    levels = (artefact.long() - canvas.long()).flatten(1)
    if threat.norm == "linf":
        assert levels.abs().max() <= math.floor(threat.eps * 255 + 1e-6)
    elif threat.norm == "l2":
        assert (levels.square().sum(1).double() <= (threat.eps * 255) ** 2 + 1e-6).all()
    else:
        assert (levels.abs().sum(1) <= math.floor(threat.eps * 255 + 1e-6)).all()


@given(st.integers(0, 10**6), st.sampled_from([0.01, 0.3, 2.0, 40.0]), st.sampled_from([0.02, 0.3, 5]))
@settings(max_examples=60, deadline=None)
def test_l1_projection_is_the_nearest_point_of_ball_and_box(seed, eps, scale):
    """No allowed point is nearer: <d - p, q - p> <= 0 for the projection p of d and every allowed q."""
    threat, draw = ThreatModel("l1", eps), torch.Generator().manual_seed(seed)
    clean = toy_canvas(3, (8, 8), seed).double() / 255
    delta = torch.randn(clean.shape, generator=draw, dtype=torch.float64) * scale
    nearest = project(threat, delta, clean)
    assert (size(threat, nearest) <= eps + 1e-9).all()
    others = [torch.zeros_like(clean), *(project(ThreatModel("l1", eps * part), delta, clean) for part in (0.3, 0.9))]
    for power in (1, 3, 30):  # dense to sparse points, on the surface and inside
        noise = torch.randn(clean.shape, generator=draw, dtype=torch.float64)
        boxed = (clean + noise.sign() * noise.abs() ** power * delta.abs()).clamp(0, 1) - clean
        total = boxed.flatten(1).abs().sum(1).view(-1, 1, 1, 1)
        others.append(boxed * (eps / total.clamp_min(1e-12)).clamp_max(1.0))
    for other in others:
        assert (((delta - nearest) * (other - nearest)).flatten(1).sum(1) <= 1e-8 * (1 + scale * eps)).all()


def test_l1_projection_by_hand():
    """Of (.9, .5, .1) with room for .2 in the first and a sum of .5: the first is full, the others give the rest."""
    clean = torch.tensor([0.8, 0.5, 0.5]).view(1, 3, 1, 1)
    delta = torch.tensor([0.9, 0.5, -0.1]).view(1, 3, 1, 1)
    assert project(ThreatModel("l1", 0.5), delta, clean).flatten().tolist() == pytest.approx([0.2, 0.3, 0.0], abs=1e-6)
    assert project(ThreatModel("l1", 0.7), delta, clean).flatten().tolist() == pytest.approx([0.2, 0.45, -0.05])


def test_ascent_has_unit_length_and_climbs_steepest_among_such_directions():
    draw = torch.Generator().manual_seed(0)
    gradient, pixels = torch.randn(2, 3, 20, 20, generator=draw), torch.full((2, 3, 20, 20), 0.5)
    for threat, dual in ((ThreatModel("linf", 0.1), 1), (ThreatModel("l2", 1.0), 2)):
        direction = ascent(threat, gradient, pixels)
        assert torch.allclose(size(threat, direction), torch.ones(2, dtype=torch.float64))
        gained = (direction * gradient).flatten(1).sum(1)
        assert torch.allclose(gained, gradient.flatten(1).norm(dim=1, p=dual))
    sparse = ascent(ThreatModel("l1", 5.0), gradient, pixels).flatten(1)
    largest = gradient.flatten(1).abs() >= gradient.flatten(1).abs().topk(12, dim=1).values[:, -1:]
    assert torch.equal(sparse != 0, largest) and torch.allclose(sparse.abs().sum(1), torch.ones(2))
    assert torch.equal(sparse.sign(), gradient.flatten(1).sign() * (sparse != 0))


def test_an_l1_step_wastes_nothing_on_values_at_the_end_of_their_range():
    gradient = torch.tensor([5.0, -4.0, 3.0]).view(1, 3, 1, 1)
    pixels = torch.tensor([1.0, 0.0, 0.5]).view(1, 3, 1, 1)
    assert ascent(ThreatModel("l1", 1.0), gradient, pixels).flatten().tolist() == [0, 0, 1]
    assert not ascent(ThreatModel("l1", 1.0), torch.zeros_like(gradient), pixels).any()


def test_a_perturbation_of_whole_levels_survives_untouched():
    threat, canvas = ThreatModel("linf", 4 / 255), toy_canvas(2, (8, 8))
    clean = canvas.float() / 255
    signs = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).sign() * threat.eps
    delta = project(threat, signs, clean)
    expected = (canvas.int() + (signs * 255).round().int()).clamp(0, 255)
    assert torch.equal(quantize(threat, canvas, clean + delta).int(), expected)


def test_l2_artefact_well_inside_the_ball_is_plain_rounding():
    threat, canvas = ThreatModel("l2", 2.0), toy_canvas(3, (8, 8))
    noise = torch.randn(canvas.shape, generator=torch.Generator().manual_seed(3)) * 0.05
    pixels = (canvas.float() / 255 + noise).clamp(0, 1)
    assert torch.equal(quantize(threat, canvas, pixels), (pixels * 255).round().to(torch.uint8))


@pytest.mark.parametrize("threat", [ThreatModel("l2", 0.5), ThreatModel("l1", 12.0)], ids=lambda t: t.label)
def test_artefact_uses_the_budget(threat):
    """Shrinking takes back single levels, not the whole perturbation."""
    canvas = toy_canvas(4, (16, 16))
    clean = canvas.float() / 255
    delta = project(threat, torch.randn(clean.shape, generator=torch.Generator().manual_seed(1)), clean)
    used = size(threat, (quantize(threat, canvas, clean + delta).double() - canvas) / 255)
    assert (used > 0.97 * threat.eps).all() and (used <= threat.eps + 1e-9).all()


@pytest.mark.parametrize("norm", NORMS)
def test_eps_zero_is_the_clean_image_bit_for_bit(norm):
    threat, canvas = ThreatModel(norm, 0.0), toy_canvas(3)
    clean = canvas.float() / 255
    assert torch.equal(project(threat, torch.randn(clean.shape), clean), torch.zeros_like(clean))
    start = random_start(threat, clean, generators(3))
    assert torch.equal(start, torch.zeros_like(clean))
    assert torch.equal(quantize(threat, canvas, clean + 0.3), canvas)


@pytest.mark.parametrize("norm", NORMS)
def test_start_is_inside_and_does_not_depend_on_the_batch(norm):
    threat, clean = ThreatModel(norm, 0.1), toy_canvas(4).float() / 255
    together = random_start(threat, clean, generators(4))
    assert (size(threat, together) <= threat.eps + 1e-6).all() and (size(threat, together) > 0).all()
    alone = random_start(threat, clean[2:3], generators(4)[2:3])
    assert torch.equal(alone[0], together[2])
    assert not torch.equal(together[0], together[1])
    with pytest.raises(ValueError, match="4 samples need as many generators"):
        random_start(threat, clean, generators(3))


def test_linf_start_is_uniform_in_the_ball():
    threat, clean = ThreatModel("linf", 0.1), torch.full((1, 3, 64, 64), 0.5)
    start = random_start(threat, clean, generators(1)).flatten() / threat.eps
    assert abs(start.mean()) < 0.03 and abs(start.square().mean() - 1 / 3) < 0.02


def test_l2_start_is_uniform_in_the_ball():
    """In 3 dimensions the mean radius of a uniform point is 3/4 of the ball's."""
    threat, clean = ThreatModel("l2", 0.3), torch.full((800, 3, 1, 1), 0.5)
    radius = size(threat, random_start(threat, clean, generators(800))) / threat.eps
    assert abs(radius.mean() - 0.75) < 0.03 and (radius < 0.5).sum() == pytest.approx(100, abs=40)


def test_l1_start_is_uniform_in_the_ball():
    """As in L2, and every value has the same share of the radius, with either sign."""
    threat, clean = ThreatModel("l1", 0.3), torch.full((800, 3, 1, 1), 0.5)
    start = random_start(threat, clean, generators(800)) / threat.eps
    radius = size(threat, start) / 1.0
    assert abs(radius.mean() - 0.75) < 0.03 and (radius < 0.5).sum() == pytest.approx(100, abs=40)
    assert (start.mean(0).abs() < 0.03).all() and (start.abs().mean(0) - 0.25).abs().max() < 0.03


def test_no_global_random_stream_is_touched():
    before = torch.random.get_rng_state()
    for norm in NORMS:
        random_start(ThreatModel(norm, 0.1), toy_canvas(2).float() / 255, generators(2))
    assert torch.equal(before, torch.random.get_rng_state())


def test_norms_are_of_the_saved_levels():
    canvas = torch.full((1, 3, 2, 2), 100, dtype=torch.uint8)
    moved = canvas.clone()
    moved[0, 0, 0, 0], moved[0, 1, 1, 1] = 103, 96
    linf, l2 = norms(canvas, moved)
    assert linf.item() == 4 / 255 and l2.item() == pytest.approx(5 / 255, abs=1e-15)


def test_audit_names_the_violation():
    canvas = torch.full((2, 3, 2, 2), 100, dtype=torch.uint8)
    far = canvas.clone()
    far[1, 0, 0, 0] = 109
    check(ThreatModel("linf", 9 / 255), canvas, far)
    with pytest.raises(ConstraintError, match=r"sample 1 .*0\.0352941 leaves the linf:8/255 ball"):
        check(ThreatModel("linf", 8 / 255), canvas, far)
    with pytest.raises(ConstraintError, match="sample 1"):
        check(ThreatModel("l2", 8 / 255), canvas, far)
    with pytest.raises(ConstraintError, match="uint8"):
        check(ThreatModel("l2", 1.0), canvas, far.float())
    with pytest.raises(ConstraintError, match="shape"):
        check(ThreatModel("l2", 1.0), canvas, far[:1])
    with pytest.raises(ConstraintError, match="levels 109 to 109 leave the box, 0 to 102"):
        check(ThreatModel("linf", 1.0, bounds=(0.0, 0.4)), canvas, far)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("levels", [1, 3, 4, 8, 77, 254])
def test_the_audit_allows_whole_levels_exactly_and_not_one_more(norm, levels):
    """For every eps = k/255, k levels pass and k + 1 do not; L2 and L1 are exact to the last unit."""
    threat, canvas = ThreatModel(norm, levels / 255), np.zeros((3, 2, 2), np.uint8)
    moved = canvas.copy()
    moved[1, 0, 1] = levels
    assert audit(threat, canvas, moved) == ""
    moved[0, 0, 0] = 1
    assert ("leaves" in audit(threat, canvas, moved)) == (norm != "linf")
    moved[0, 0, 0], moved[1, 0, 1] = 0, levels + 1
    assert "leaves" in audit(threat, canvas, moved)


def test_the_audit_needs_no_torch():
    code = "import sys, safemed_bench.attacks.audit; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
