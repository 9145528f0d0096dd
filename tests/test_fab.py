"""The shortest way to a wrong answer: exact where the boundary is a plane, within the rules everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy_model import ToyVLM, generators, toy_batch
from toy_run import records, toy_dataset, toy_execute, toy_plan

from safemed_bench.attacks import build_attack, build_objective
from safemed_bench.attacks.base import AttackResult
from safemed_bench.attacks.fab import FAB
from safemed_bench.attacks.pursuit import Prepared, Pursuit, Reading
from safemed_bench.attacks.threat import check
from safemed_bench.core.errors import UsageError
from safemed_bench.core.types import ThreatModel

THREATS = [ThreatModel("linf", 4 / 255), ThreatModel("l2", 0.4)]


class Plane(Prepared):
    """margin = w . (x - grey) - distance * |w|, so that the boundary is `distance` away from grey in the dual norm."""

    def __init__(self, slope: Tensor, offset: Tensor) -> None:
        self.slope, self.offset = slope, offset

    def __call__(self, pixels: Tensor) -> Reading:
        loss = ((pixels - 0.5) * self.slope).flatten(1).sum(dim=1) - self.offset
        return Reading(loss, (loss > 0).detach())

    def select(self, rows: Tensor) -> Plane:
        return Plane(self.slope[rows], self.offset[rows])


def fab(model: ToyVLM, threat: ThreatModel, count: int = 12, reasons: bool = False, steps: int = 40) -> AttackResult:
    batch, answers = toy_batch(model, count)
    objective = build_objective("decision_slot" if reasons else "margin")
    return FAB(steps)(model, batch, objective, threat, generators=generators(count), clean_answers=answers)


def minimal(result: AttackResult) -> Tensor:
    return torch.tensor([extra.get("minimal_norm", torch.inf) for extra in result.extra])


@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_the_way_to_a_plane_is_as_long_as_it_is(norm: str, dual: int) -> None:
    slope = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    far = torch.tensor([0.01, 0.02, 0.05, 0.1, 0.2], dtype=torch.float64)
    clean = torch.full((5, 3, 8, 8), 0.5, dtype=torch.float64)
    plane = Plane(slope, far * slope.flatten(1).norm(p=dual, dim=1))
    canvas = torch.full((5, 3, 8, 8), 128, dtype=torch.uint8)
    pursuit = Pursuit(plane, clean, canvas, ThreatModel(norm, 0.01), generators(5))  # type: ignore[arg-type]
    FAB(20).perturb(pursuit)
    found = torch.tensor([note["minimal_norm"] for note in pursuit.notes], dtype=torch.float64)
    assert (found >= far).all() and (found < 1.06 * far).all(), "never below the truth, at most the overshoot above"
    assert (pursuit.backwards == 20).all() and (pursuit.forwards == 22).all()


@pytest.mark.parametrize("reasons", [False, True])
@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.label)
def test_it_keeps_ball_and_range_tells_the_truth_and_depends_on_no_batch(threat: ThreatModel, reasons: bool) -> None:
    model = ToyVLM(reasons=reasons).double()
    batch, answers = toy_batch(model, 12)
    whole = fab(model, threat, reasons=reasons)
    check(threat, batch.canvas, whole.adversarial)
    again = model.answer(batch, whole.adversarial.float() / 255)
    wrong = torch.tensor([a.index != q.answer for a, q in zip(again, batch.questions, strict=True)])
    assert torch.equal(whole.success, wrong & whole.attacked) and whole.success.any()
    assert whole.verdicts.max() == 1 and not whole.steps[~whole.attacked].any()
    kind, objective = FAB(), build_objective("decision_slot" if reasons else "margin")
    own, places = [generators(12)[i] for i in (6, 2, 7)], [6, 2, 7]
    chosen = [answers[i] for i in places]
    part = kind(model, batch.select(places), objective, threat, generators=own, clean_answers=chosen)
    assert torch.equal(part.adversarial, whole.adversarial[places])
    assert [part.extra[k] for k in range(3)] == [whole.extra[i] for i in places]
    none = fab(model, ThreatModel(threat.norm, 0.0), reasons=reasons)
    assert torch.equal(none.adversarial, batch.canvas) and not none.success.any()
    assert torch.equal(minimal(none), minimal(whole)), "the way does not depend on the ball"


@pytest.mark.parametrize("threat", [ThreatModel("linf", 3 / 255), ThreatModel("l2", 0.2)], ids=lambda t: t.label)
def test_what_is_inside_the_ball_is_fooled_and_what_is_far_outside_is_not(threat: ThreatModel) -> None:
    result = fab(ToyVLM(), threat, count=30)
    norms = minimal(result)
    inside, outside = norms < 0.8 * threat.eps, norms > 1.25 * threat.eps
    assert torch.equal(norms.isfinite(), result.attacked), "every boundary is met"
    assert inside.sum() >= 5 and result.success[inside].all()
    assert not any("suspected" in result.extra[i] for i in outside.nonzero().flatten().tolist())
    assert (outside & result.attacked).sum() >= 3 and not result.success[outside].any()


def test_it_is_no_longer_than_the_way_that_pgd_takes() -> None:
    """The smallest eps at which PGD turns a question, by bisection, against the norm that FAB names."""
    model = ToyVLM()
    batch, answers = toy_batch(model, 12)
    norms = minimal(fab(model, ThreatModel("l2", 0.0)))
    low, high = torch.zeros(12), torch.full((12,), 3.0)
    for _ in range(7):
        for i in range(12):
            threat, one = ThreatModel("l2", float(low[i] + high[i]) / 2), batch.select([i])
            attack = build_attack("pgd", {"steps": 20, "random_start": False})
            made = attack(
                model, one, build_objective("margin"), threat, generators=generators(1), clean_answers=[answers[i]]
            )
            low[i], high[i] = (low[i], threat.eps) if made.success[0] else (threat.eps, high[i])
    open_rows = norms.isfinite() & (high < 3.0)
    assert open_rows.sum() >= 8 and (norms <= 1.1 * high + 0.03)[open_rows].float().mean() >= 0.9


def test_what_it_refuses() -> None:
    with pytest.raises(UsageError, match="steps must be a whole number above 0"):
        build_attack("fab", {"steps": 0})
    with pytest.raises(UsageError, match="linf and l2, not in l1"):
        fab(ToyVLM(), ThreatModel("l1", 3.0))


def test_the_norm_is_in_the_record(tmp_path: Path) -> None:
    conditions = ("clean", {"attack": "fab", "steps": 10, "objectives": ["margin"]})
    toy_execute(toy_plan(toy_dataset(tmp_path / "images", 8), conditions=conditions), tmp_path / "run")
    found = [r for r in records(tmp_path / "run") if r["condition"] == "fab[margin]@linf:8/255"]
    told = [r for r in found if "minimal_norm" in r["extra"]]
    assert told and all(r["clean_correct"] and r["extra"]["minimal_norm"] > 0 for r in told)
    assert any(not r["correct"] for r in told) and all(r["linf"] <= 8 / 255 + 1e-9 for r in found)
