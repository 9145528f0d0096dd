"""The black box: what it asks, what it never does, and that it finds what there is to find."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy_model import ToyVLM, generators, toy_batch

from safemed_bench.attacks import build_attack, build_objective, needs_objective
from safemed_bench.attacks.base import AttackResult, NoObjective
from safemed_bench.attacks.pgd import PGD
from safemed_bench.attacks.square import Square, _bumps, _move, _start
from safemed_bench.attacks.threat import check, quantize
from safemed_bench.core.errors import UsageError
from safemed_bench.core.types import ThreatModel

THREATS = [ThreatModel("linf", 3 / 255), ThreatModel("l2", 0.4), ThreatModel("l1", 8.0)]


class BlackBox(ToyVLM):
    """Answers, and raises where anything but answers is asked for."""

    def next_token_logits(self, *arguments, **named):
        raise AssertionError("a black box was looked into")

    option_logits = token_loss = next_token_logits


class NoScores(BlackBox):
    """Shows which option it answers and nothing else."""

    def answer(self, batch, pixels, *, generator=None):
        return [replace(answer, option_logprobs=()) for answer in super().answer(batch, pixels)]


def square(model: ToyVLM, threat: ThreatModel, count: int = 30, **parameters) -> AttackResult:
    batch, answers = toy_batch(model, count)
    attack = build_attack("square", parameters)
    return attack(model, batch, NoObjective(), threat, generators=generators(count), clean_answers=answers)


@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.label)
def test_it_fools_a_model_that_has_no_gradient(threat):
    with torch.no_grad():
        result = square(BlackBox(sharpness=2.0), threat, queries=30)
    check(threat, toy_batch(ToyVLM(sharpness=2.0), 30)[0].canvas, result.adversarial)
    assert result.success.sum() >= 2 and not result.backwards.any() and not result.forwards.any()
    assert result.loss_trace.shape == (30, 0) and not result.steps.any()


@pytest.mark.parametrize("feedback", ["scores", "verdict"])
def test_queries_are_counted_and_end_with_the_first_wrong_answer(feedback):
    model = BlackBox(sharpness=2.0)
    batch, answers = toy_batch(model, 30)
    model.deployed = 0
    result = Square(queries=40, feedback=feedback)(
        model, batch, NoObjective(), THREATS[0], generators=generators(30), clean_answers=answers
    )
    assert model.deployed == result.verdicts.sum()
    held = result.attacked & ~result.success
    assert held.any() and (result.verdicts[held] == 40).all()
    assert result.success.any() and (result.verdicts[result.success] <= 40).all()
    assert result.verdicts[result.success].min() < 40
    assert (result.final_loss >= result.start_loss)[result.attacked].all()


def test_the_loss_is_the_margin_of_the_answer_on_the_saved_image():
    model = BlackBox()
    result = square(model, THREATS[0], queries=25)
    batch, _ = toy_batch(model, 30)
    for i in (result.attacked & ~result.success).nonzero().flatten().tolist():
        scores, true = result.answers[i].option_logprobs, batch.questions[i].answer
        margin = max(s for k, s in enumerate(scores) if k != true) - scores[true]
        assert result.final_loss[i].item() == pytest.approx(margin, abs=1e-6)


def test_scores_guide_the_search():
    """At equal queries the margin finds more than verdicts alone, and more queries find more."""
    model = BlackBox()
    guided, blind = (square(model, THREATS[0], count=40, queries=40, feedback=f) for f in ("scores", "verdict"))
    few = square(model, THREATS[0], count=40, queries=2)
    assert guided.success.sum() > blind.success.sum() and guided.success.sum() > few.success.sum()


def test_verdicts_are_enough_where_no_scores_are_shown():
    shown, hidden = (square(kind(), THREATS[0], queries=20, feedback="verdict") for kind in (BlackBox, NoScores))
    assert torch.equal(shown.adversarial, hidden.adversarial) and hidden.success.any()
    fallback = square(NoScores(), THREATS[0], queries=20)
    assert torch.equal(fallback.start_loss[fallback.attacked] == 1, fallback.verdicts[fallback.attacked] == 1)


@pytest.mark.parametrize("size", [(16, 16), (5, 7), (3, 3)])
@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.label)
def test_moves_use_the_whole_budget_and_change_squares(threat, size):
    draw, clean = torch.Generator().manual_seed(0), torch.full((3, *size), 0.5)
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[threat.norm]
    delta = _start(threat, clean, draw)
    for share in (0.8, 0.1, 0.01):
        before, delta = delta, _move(threat, delta, share, draw)
        assert delta.shape == clean.shape and delta.flatten().norm(p=order).item() == pytest.approx(
            threat.eps, rel=1e-4
        )
    if threat.norm == "linf" and size == (16, 16):
        changed = (delta != before).any(dim=0).nonzero()
        assert len(changed) in (0, 4) and set((delta.abs() * 255).round().flatten().tolist()) == {3}  # side 2


def test_bumps_are_a_hill_beside_a_hollow():
    bumps = _bumps(6, torch.Generator().manual_seed(0))
    bumps = bumps if bumps[0, 0] * bumps[0, -1] > 0 else bumps.T
    assert bumps.norm().item() == pytest.approx(1) and (bumps[:3] > 0).all() and (bumps[3:] < 0).all()
    assert bumps[:3].argmax() == 1 * 6 + 3  # height 3, width 6: its middle


def test_a_white_box_is_not_weaker():
    model = ToyVLM()
    batch, answers = toy_batch(model, 40)
    goal = build_objective("margin")
    white = PGD(steps=20)(model, batch, goal, THREATS[0], generators=generators(40), clean_answers=answers)
    assert white.success.sum() >= square(model, THREATS[0], count=40, queries=40).success.sum()


def test_it_has_no_objective_and_cannot_train():
    assert not needs_objective("square") and needs_objective("pgd")
    with pytest.raises(UsageError, match="feedback must be scores or verdict"):
        Square(feedback="loss")
    with pytest.raises(UsageError, match="queries must be a whole number above 0"):
        Square(queries=0)
    model = ToyVLM()
    batch, answers = toy_batch(model, 2)
    prepared = build_objective("answer").prepare(model, batch, answers)
    with pytest.raises(ValueError, match="cannot train"):
        Square(queries=2).maximise(prepared, batch.pixels, THREATS[0], generators(2))
    with pytest.raises(ValueError, match="needs an objective"):
        PGD()(model, batch, NoObjective(), THREATS[0], generators=generators(2), clean_answers=answers)
    assert torch.equal(quantize(ThreatModel("l1", 0.0), batch.canvas, batch.pixels), batch.canvas)
