"""A cascade is its stages run apart, and nothing more; the standard attack is one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
from toy_model import ToyVLM, generators, toy_batch

from safemed_bench import attacks as catalogue
from safemed_bench.attacks import applies, build_attack, build_strike, needs_objective
from safemed_bench.attacks.apgd import APGD
from safemed_bench.attacks.cascade import Cascade, SafeMedAttack, Stage
from safemed_bench.attacks.fgsm import FGSM
from safemed_bench.attacks.pgd import PGD
from safemed_bench.attacks.square import Square
from safemed_bench.attacks.threat import check, norms
from safemed_bench.core.errors import UsageError
from safemed_bench.core.types import ThreatModel

SMALL = SafeMedAttack(steps=3, apgd_steps=5, queries=6)
THREATS = [ThreatModel("linf", 1 / 255), ThreatModel("l2", 0.15), ThreatModel("l1", 3.0)]


def strike(stage, model, threat, count):
    batch, answers = toy_batch(model, count)
    return stage(model, batch, threat, generators=generators(count), clean_answers=answers)


@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.label)
@pytest.mark.parametrize("reasons", [False, True])
def test_the_cascade_is_the_worst_of_its_stages_run_apart(reasons, threat):
    """Same seeds, each stage on all questions; in float64, since a sum's last bit depends on the batch."""
    model, count = ToyVLM(reasons=reasons).double(), 20
    whole = strike(SMALL, model, threat, count)
    apart = {stage.label: strike(stage, model, threat, count) for stage in SMALL.stages(reasons)}
    assert torch.equal(whole.success, torch.stack([r.success for r in apart.values()]).any(dim=0))
    assert len({note.get("stage") for note in whole.extra}) > (2 if threat.norm == "linf" else 1)
    for i in range(count):
        winners = [label for label, result in apart.items() if result.success[i]]
        assert whole.extra[i].get("stage") == (winners[0] if winners else None)
        if winners:  # the image, the answer and the effort are those of the stage that was first
            first = apart[winners[0]]
            tried = list(apart.values())[: list(apart).index(winners[0]) + 1]
            assert torch.equal(whole.adversarial[i], first.adversarial[i]) and whole.linf[i] == first.linf[i]
            assert whole.answers[i].index == first.answers[i].index
            assert whole.final_loss[i].item() == pytest.approx(first.final_loss[i].item())
        else:
            tried = list(apart.values())
        for name in ("steps", "forwards", "backwards", "verdicts"):
            assert getattr(whole, name)[i] == sum(getattr(result, name)[i] for result in tried)
        assert whole.trace(i) == pytest.approx(sum((result.trace(i) for result in tried), ()))


def test_what_it_gives_is_inside_the_ball_and_true():
    model, threat = ToyVLM(), THREATS[0]
    batch, _ = toy_batch(model, 20)
    result = strike(SMALL, model, threat, 20)
    check(threat, batch.canvas, result.adversarial)
    linf, l2 = norms(batch.canvas, result.adversarial)
    assert torch.equal(linf, result.linf) and torch.equal(l2, result.l2)
    again = model.answer(batch, result.adversarial.float() / 255)
    assert [a.index for a in again] == [a.index for a in result.answers]


def test_later_stages_run_on_survivors_only():
    @dataclass(frozen=True)
    class Twice(Cascade):
        name: ClassVar[str] = "twice"

        def stages(self, reasons):
            return (Stage(PGD(steps=6), "answer"), Stage(APGD(steps=4), "margin"))

    model, threat = ToyVLM(), THREATS[0]
    first = strike(Stage(PGD(steps=6), "answer"), model, threat, 20)
    both = strike(Twice(), model, threat, 20)
    assert first.success.any() and torch.equal(both.forwards[first.success], first.forwards[first.success])
    held = first.attacked & ~first.success
    assert (both.steps[held] > first.steps[held]).all() and not both.steps[~first.attacked].any()


def test_the_standard_is_what_it_says():
    labels = [stage.label for stage in SafeMedAttack().stages(False)]
    assert labels == ["fgsm[answer]", "pgd[answer]", "apgd[margin]", "apgd[targeted_margin]", "square"]
    labels = [stage.label for stage in SafeMedAttack().stages(True)]
    assert labels == [
        "fgsm[decision_slot]", "pgd[decision_slot]", "pgd[decisive_slot]", "pgd[rationale_answer]", "pgd[answer]",
        "pgd[no_think]", "pgd[targeted]", "pgd[regenerated]", "apgd[decision_slot]", "apgd[targeted_margin]", "square",
    ]  # fmt: skip
    kinds = [stage.attack for stage in SMALL.stages(False)]
    assert kinds == [FGSM(), PGD(steps=3), APGD(steps=5), APGD(steps=5, restarts=3), Square(queries=6)]
    for reasons in (False, True):
        assert all(applies(s.objective, reasons) for s in SMALL.stages(reasons) if s.objective)
    with pytest.raises(UsageError, match="queries must be a whole number"):
        build_attack("safemed-attack", {"queries": 0})


def test_nothing_to_attack():
    model = ToyVLM()
    batch, answers = toy_batch(model, 4, wrong_every=1)
    result = SMALL(model, batch, THREATS[0], generators=generators(4), clean_answers=answers)
    assert not result.attacked.any() and torch.equal(result.adversarial, batch.canvas)


ATTACKS = {
    "fgsm": {}, "pgd": {"steps": 3, "restarts": 2}, "mim": {"steps": 3}, "apgd": {"steps": 6, "restarts": 2},
    "square": {"queries": 5}, "safemed-attack": {"steps": 2, "apgd_steps": 2, "queries": 2},
}  # fmt: skip
CELLS = [
    (attack, objective, reasons)
    for attack in ATTACKS
    for reasons in (False, True)
    for objective in (
        ["decision_slot" if reasons else "margin", "targeted_margin"] if needs_objective(attack) else [""]
    )
]


def test_every_registered_attack_is_tested_here():
    """Save those with tests of their own: ART's (test_art), images made elsewhere (test_external), attacks on
    randomised models (test_smoothadv), the shortest way (test_fab), and what is fitted on other questions
    (test_universal)."""
    elsewhere = {"external", "eot", "smoothadv", "universal", "fab"}
    assert set(ATTACKS) == {name for name in catalogue.ATTACKS if not name.startswith("art:")} - elsewhere


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(("name", "objective", "reasons"), CELLS)
def test_every_attack_at_eps_zero_gives_the_clean_image_and_verdict(name, objective, reasons, norm):
    model = ToyVLM(reasons=reasons)
    batch, answers = toy_batch(model, 5)
    result = strike(build_strike(name, objective, ATTACKS[name]), model, ThreatModel(norm, 0.0), 5)
    assert torch.equal(result.adversarial, batch.canvas) and not result.success.any()
    assert result.answers == tuple(answers) and not result.linf.any() and not result.l2.any()
    assert result.verdicts[result.attacked].min() >= 1  # asked, not assumed


@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.label)
@pytest.mark.parametrize(("name", "objective", "reasons"), CELLS)
def test_every_attack_keeps_ball_and_range_and_depends_on_no_batch(name, objective, reasons, threat):
    """In float64: alone, in other company and in another order a question gets the same image and verdict."""
    model = ToyVLM(reasons=reasons).double()
    batch, answers = toy_batch(model, 8)
    stage = build_strike(name, objective, ATTACKS[name])
    whole = stage(model, batch, threat, generators=generators(8), clean_answers=answers)
    check(threat, batch.canvas, whole.adversarial)
    again = model.answer(batch, whole.adversarial.float() / 255)
    wrong = torch.tensor([a.index != q.answer for a, q in zip(again, batch.questions, strict=True)])
    assert torch.equal(whole.success, wrong & whole.attacked)
    assert (whole.linf[whole.attacked] > 0).any()
    for places in ([3], [6, 2, 7]):
        own = [generators(8)[i] for i in places]
        part = stage(model, batch.select(places), threat, generators=own, clean_answers=[answers[i] for i in places])
        assert torch.equal(part.adversarial, whole.adversarial[places])
        assert torch.equal(part.success, whole.success[places])
        assert torch.equal(part.verdicts, whole.verdicts[places])


@pytest.mark.parametrize("name", ["mim", "apgd"])
@pytest.mark.parametrize("objective", ["margin", "targeted_margin"])
@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.label)
def test_the_active_set_gives_the_verdicts_of_the_naive_loop(name, objective, threat):
    model = ToyVLM().double()
    fast, naive = (
        strike(build_strike(name, objective, {"steps": 8, "restarts": 2, "active_set": active}), model, threat, 24)
        for active in (True, False)
    )
    assert torch.equal(fast.success, naive.success) and torch.equal(fast.adversarial, naive.adversarial)
    assert fast.success.any() and fast.forwards.sum() < naive.forwards.sum()


def test_a_cascade_of_nothing_is_an_error():
    @dataclass(frozen=True)
    class Empty(Cascade):
        name: ClassVar[str] = "empty"

        def stages(self, reasons):
            return ()

    with pytest.raises(ValueError, match="'empty' has no stage"):
        strike(Empty(), ToyVLM(), THREATS[0], 2)
    assert replace(SMALL, steps=9).stages(False)[1].attack.steps == 9
