"""Auto-PGD against its paper: the schedule, the steps, and what it is for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from toy_model import ToyVLM, generators, toy_batch

from safemed_bench.attacks import build_objective
from safemed_bench.attacks.apgd import APGD, Auto, AutoSparse, checkpoints
from safemed_bench.attacks.base import Prepared, Pursuit, Reading
from safemed_bench.attacks.mim import MIM
from safemed_bench.attacks.pgd import PGD
from safemed_bench.attacks.threat import random_start
from safemed_bench.core.types import ThreatModel

THREATS = [ThreatModel("linf", 4 / 255), ThreatModel("l2", 0.6), ThreatModel("l1", 8.0)]


@dataclass(frozen=True)
class Waves(Prepared):
    """A smooth loss with many local maxima, one phase per sample."""

    phase: torch.Tensor

    def __call__(self, pixels):
        waves = (pixels * 30 + self.phase).sin() - 2 * (pixels - 0.52).square()
        return Reading(waves.flatten(1).mean(1), torch.zeros(len(pixels), dtype=torch.bool))

    def select(self, rows):
        return Waves(self.phase[rows])


def waves(count: int = 3) -> tuple[Waves, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    phase = torch.rand(count, 3, 6, 6, generator=draw, dtype=torch.float64) * 6
    return Waves(phase), torch.rand(count, 3, 6, 6, generator=draw, dtype=torch.float64)


def test_checkpoints_are_those_of_the_paper():
    assert checkpoints(100) == (0, 22, 41, 57, 70, 80, 87, 93, 99)
    assert checkpoints(20) == (0, 5, 9, 12, 14, 16, 18, 19, 20)
    assert checkpoints(1) == (0, 1)


def reference(loss: Waves, clean: torch.Tensor, start: torch.Tensor, threat: ThreatModel, steps: int):
    """Algorithm 1 of 2003.01690 for one sample, written down line by line; the maximum and all step lengths.

    Losses are compared in float32, as everywhere.
    """

    def f(x):
        x = x.clone().requires_grad_()
        value = loss(x).loss.sum()
        return value.float().item(), torch.autograd.grad(value, x)[0]

    def p(x):
        if threat.norm == "linf":
            return torch.minimum(torch.maximum(x, clean - threat.eps), clean + threat.eps).clamp(0, 1)
        step = x.clamp(0, 1) - clean
        return clean + step * min(1.0, threat.eps / step.norm().item())

    def s(g):
        return g.sign() if threat.norm == "linf" else g / g.norm()

    marks = checkpoints(steps)
    eta, etas = 2 * threat.eps, {}
    x_before = clean + start
    values, f_max, x_max = [f(x_before)[0]], f(x_before)[0], x_before
    mark_eta, mark_max, rises = eta, f_max, 0
    x = p(x_before + eta * s(f(x_before)[1]))
    for k in range(1, steps + 1):
        value, slope = f(x)
        rises += value > values[-1]
        values.append(value)
        if value > f_max:
            f_max, x_max = value, x
        if k == steps:
            return x_max - clean, etas
        if k in marks:
            gap = k - marks[marks.index(k) - 1]
            unchanged = mark_eta == eta and mark_max == f_max
            mark_eta, mark_max = eta, f_max
            if rises < 0.75 * gap or unchanged:
                eta, x = eta / 2, x_max
                slope = f(x)[1]
                values.append(f_max)
            rises, etas[k] = 0, eta
        z = p(x + eta * s(slope))
        x, x_before = p(x + 0.75 * (z - x) + 0.25 * (x - x_before)), x


@pytest.mark.parametrize("threat", [ThreatModel("linf", 0.2), ThreatModel("l2", 1.0)], ids=lambda t: t.label)
def test_apgd_is_the_algorithm_of_the_paper(threat, monkeypatch):
    """Same best point and same halvings as a literal loop over one sample, for samples that halve at other times."""
    loss, clean = waves()
    seen = {}
    move = Auto.move

    def spy(self, *arguments):
        after = move(self, *arguments)
        seen[self.done - 1] = self.step.clone()
        return after

    monkeypatch.setattr(Auto, "move", spy)
    best = APGD(steps=40).maximise(loss, clean, threat, generators(3)).delta
    start = random_start(threat, clean, generators(3))
    halvings = set()
    for i in range(3):
        expected, etas = reference(loss.select(torch.tensor([i])), clean[i : i + 1], start[i : i + 1], threat, 40)
        assert torch.allclose(best[i : i + 1], expected, atol=1e-6)
        assert all(seen[k][i].item() == pytest.approx(eta) for k, eta in etas.items())
        halvings.add(tuple(etas.values()))
    assert len(halvings) > 1 and min(min(h) for h in halvings) < threat.eps / 4


@dataclass(frozen=True)
class Plane(Prepared):
    """A loss that rises for ever along one direction."""

    def __call__(self, pixels):
        return Reading(pixels.flatten(1).sum(1), torch.zeros(len(pixels), dtype=torch.bool))

    def select(self, rows):
        return self


def pursuit(loss: Prepared, clean: torch.Tensor, threat: ThreatModel) -> Pursuit:
    return Pursuit(loss, clean, (clean * 255).round().to(torch.uint8), threat, generators(len(clean)))


def test_the_step_halves_where_the_loss_goes_back_and_forth_and_not_where_it_rises():
    threat = ThreatModel("linf", 0.1)
    chase = pursuit(Plane(), torch.full((2, 3, 2, 2), 0.5), threat)
    walk, rows = Auto(chase, 100), chase.rows()
    delta, ones = torch.zeros(2, 3, 2, 2), torch.ones(2, 3, 2, 2)
    for step in range(60):
        loss = torch.tensor([float(step), float(step % 2)])  # one rises at every step, the other at every second
        walk.move(rows, delta, loss, ones)
        halvings = sum(step >= mark for mark in (22, 41, 57))
        assert walk.step.tolist() == pytest.approx([0.2, 0.2 * 0.5**halvings])


def test_l1_moves_fewer_and_fewer_values():
    """On a plane the best L1 point moves few values, so that the part that moves falls, and with it the step starts
    anew; at every point ball and box hold."""
    threat = ThreatModel("l1", 3.0)
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 3, 10, 10, generator=draw)
    chase = pursuit(Plane(), torch.rand(2, 3, 10, 10, generator=draw), threat)
    walk, rows, delta = AutoSparse(chase, 50), chase.rows(), torch.zeros(2, 3, 10, 10)
    parts = []
    for _ in range(20):
        delta = walk.move(rows, delta, (delta * weights).flatten(1).sum(1), weights)
        assert (delta.abs().flatten(1).sum(1) <= threat.eps + 1e-5).all()
        parts.append(walk.parts.max().item())
    assert parts[0] == 0.2 and parts[-1] < 0.1 and parts == sorted(parts, reverse=True)
    order = weights.flatten(1).abs().argsort(dim=1, descending=True)
    assert (delta.flatten(1).gather(1, order[:, :2]) != 0).all()


@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.label)
def test_apgd_reaches_at_least_the_loss_of_pgd_at_equal_steps(threat):
    """Without verdicts, so that nobody leaves early; on average, and for nearly every question."""
    model, count = ToyVLM(sharpness=3.0), 40
    batch, answers = toy_batch(model, count, wrong_every=0)
    prepared = build_objective("margin").prepare(model, batch, answers)

    def reached(attack):
        with torch.no_grad():
            return prepared(
                batch.pixels + attack.maximise(prepared, batch.pixels, threat, generators(count)).delta
            ).loss

    ours, theirs = reached(APGD(steps=20)), reached(PGD(steps=20))
    assert ours.mean() >= theirs.mean() - 1e-3
    assert (ours >= theirs - 0.02 * theirs.abs()).float().mean() >= 0.9


def test_mim_sums_gradients_that_were_scaled_to_one():
    """Two steps by hand, in L2, where the length of the sum shows."""
    loss, clean = waves(1)
    threat = ThreatModel("l2", 0.01)
    point, sums = clean.clone(), torch.zeros_like(clean)
    for _ in range(2):
        x = point.clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(x).loss.sum(), x)
        sums = 0.7 * sums + slope / slope.abs().sum()
        point = point + 0.005 * sums / sums.norm()
    walked = MIM(steps=2, decay=0.7).maximise(loss, clean, threat, generators(1)).delta
    assert torch.allclose(walked, point - clean, atol=1e-12)
    assert not torch.allclose(walked, MIM(steps=2, decay=0.0).maximise(loss, clean, threat, generators(1)).delta)


def test_mim_steps_span_the_ball():
    attack = MIM(steps=8)
    chase = pursuit(Plane(), torch.full((1, 3, 2, 2), 0.5), ThreatModel("linf", 0.1))
    assert attack.walk(chase).length == pytest.approx(0.1 / 8)
    delta = attack.maximise(Plane(), chase.clean, chase.threat, generators(1)).delta
    assert torch.allclose(delta, torch.full_like(delta, 0.1)) and math.isclose(attack.decay, 1.0)
