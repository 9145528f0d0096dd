"""Properties that every attack has, whatever it maximises, and what PGD may skip without changing a verdict."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_model import ToyVLM, generators, toy_batch

from safemed_bench.attacks import (
    ATTACKS,
    OBJECTIVES,
    applies,
    build_attack,
    build_objective,
    standard_objectives,
)
from safemed_bench.attacks.base import Attack, AttackResult, Objective, Prepared, Reading, frozen
from safemed_bench.attacks.fgsm import FGSM
from safemed_bench.attacks.pgd import PGD
from safemed_bench.attacks.threat import check, norms
from safemed_bench.core import registry
from safemed_bench.core.errors import UsageError
from safemed_bench.core.types import ThreatModel

HEADLINE = ThreatModel("linf", 2 / 255)
PAIRS = [(reasons, name) for reasons in (False, True) for name in OBJECTIVES if applies(name, reasons)]
EASY, STRONG = ThreatModel("linf", 1 / 255), ThreatModel("l2", 0.4)


def attack(kind: Attack, model: ToyVLM, objective: str | Objective, threat=HEADLINE, count=20, seed=0) -> AttackResult:
    batch, answers = toy_batch(model, count, seed)
    chosen = build_objective(objective) if isinstance(objective, str) else objective
    return kind(model, batch, chosen, threat, generators=generators(count), clean_answers=answers)


@given(
    st.sampled_from(PAIRS),
    st.sampled_from([HEADLINE, EASY, STRONG, ThreatModel("linf", 0.5 / 255), ThreatModel("l2", 0.05)]),
    st.sampled_from([PGD(steps=4), PGD(steps=3, restarts=2), PGD(steps=3, random_start=False), FGSM()]),
    st.integers(0, 50),
)
@settings(max_examples=60, deadline=None)
def test_every_pair_keeps_the_threat_model_and_tells_the_truth(pair, threat, kind, seed):
    reasons, objective = pair
    model = ToyVLM(reasons=reasons)
    batch, answers = toy_batch(model, 10, seed)
    result = kind(model, batch, build_objective(objective), threat, generators=generators(10), clean_answers=answers)
    check(threat, batch.canvas, result.adversarial)
    linf, l2 = norms(batch.canvas, result.adversarial)
    assert torch.equal(linf, result.linf) and torch.equal(l2, result.l2)
    # The success is that of the deployed path on the very artefact.
    again = model.answer(batch, result.adversarial.float() / 255)
    assert [a.index for a in again] == [a.index for a in result.answers]
    wrong = torch.tensor([a.index != q.answer for a, q in zip(again, batch.questions, strict=True)])
    assert torch.equal(result.success, wrong & result.attacked)
    # Questions that were wrong before are left as they are.
    left = ~result.attacked
    assert left.sum() == 2 and torch.equal(result.adversarial[left], batch.canvas[left])
    assert not result.steps[left].any() and not result.forwards[left].any() and not result.verdicts[left].any()
    assert [result.answers[i] for i in left.nonzero().flatten()] == [answers[i] for i in left.nonzero().flatten()]


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("reasons", "objective"), PAIRS)
def test_eps_zero_gives_the_clean_image_and_verdict(norm, reasons, objective):
    model = ToyVLM(reasons=reasons)
    batch, answers = toy_batch(model, 10)
    result = attack(PGD(steps=2), model, objective, ThreatModel(norm, 0.0), count=10)
    assert torch.equal(result.adversarial, batch.canvas)
    assert result.answers == tuple(answers) and not result.success.any()
    assert result.verdicts[result.attacked].min() >= 1  # asked, not assumed


@pytest.mark.parametrize(("reasons", "objective"), PAIRS)
def test_best_iterate_is_kept(reasons, objective):
    result = attack(PGD(steps=6, restarts=2), ToyVLM(reasons=reasons), objective, EASY)
    held = result.attacked & ~result.success
    assert held.any()
    assert (result.final_loss[held] >= result.start_loss[held]).all()
    for i in held.nonzero().flatten().tolist():
        assert result.final_loss[i].item() == max(result.trace(i))
        assert len(result.trace(i)) == 2 * 7 == result.forwards[i] and result.steps[i] == 12


@pytest.mark.parametrize("threat", [HEADLINE, STRONG], ids=str)
@pytest.mark.parametrize(("reasons", "objective"), PAIRS)
def test_active_set_gives_the_naive_verdicts(reasons, objective, threat):
    """Same verdicts and images, fewer passes; in float64, since a sum's last bit depends on the batch."""
    model = ToyVLM(reasons=reasons).double()
    fast = attack(PGD(steps=8, restarts=2), model, objective, threat, count=30)
    naive = attack(PGD(steps=8, restarts=2, active_set=False), model, objective, threat, count=30)
    assert torch.equal(fast.success, naive.success)
    assert torch.equal(fast.adversarial, naive.adversarial)
    assert 0 < fast.success.sum() < fast.attacked.sum() or threat is STRONG
    assert (fast.forwards <= naive.forwards).all() and fast.forwards.sum() < naive.forwards.sum()
    assert (naive.steps[naive.attacked] == 16).all()


def test_restarts_run_on_survivors_only():
    model = ToyVLM()
    once = attack(PGD(steps=5), model, "answer", EASY, count=40)
    thrice = attack(PGD(steps=5, restarts=3), model, "answer", EASY, count=40)
    assert once.success.any() and (thrice.success >= once.success).all()
    assert torch.equal(thrice.forwards[once.success], once.forwards[once.success])
    assert (thrice.steps[thrice.attacked & ~thrice.success] == 15).all()


@dataclass(frozen=True)
class All(Prepared):
    inner: Prepared

    def __call__(self, pixels):
        loss, _ = self.inner(pixels)
        return Reading(loss, torch.ones_like(loss, dtype=torch.bool))

    def select(self, rows):
        return All(self.inner.select(rows))


class Distrustful(Objective):
    """`answer`, with every question a suspect at every iterate."""

    name: ClassVar[str] = "distrustful"

    def prepare(self, model, batch, clean_answers):
        return All(build_objective("answer").prepare(model, batch, clean_answers))


def test_judging_suspects_only_misses_nothing_that_judging_all_would_find():
    """Against a loop that asks the deployed path at every iterate of every question."""

    model = ToyVLM()
    suspects = attack(PGD(steps=10), model, "answer", count=40)
    every = attack(PGD(steps=10), model, Distrustful(), count=40)
    assert torch.equal(suspects.success, every.success)
    assert suspects.verdicts.sum() < every.verdicts.sum() / 2


@pytest.mark.parametrize(
    ("decode", "random_start", "verdicts"),
    [
        ("logprob", True, 9),  # at iterates 0 to 7 and at the end
        ("logprob", False, 8),  # the first iterate is the clean image, known to be right
        ("generate", True, 5),  # a generation costs as much as a few steps: at 0, 1, 2, 4 and the end
        ("generate", False, 4),
    ],
)
def test_when_suspects_are_judged(decode, random_start, verdicts):
    kind, tiny = PGD(steps=8, random_start=random_start), ThreatModel("linf", 0.2 / 255)
    result = attack(kind, ToyVLM(decode=decode), Distrustful(), tiny)
    assert not result.success.any() and (result.verdicts[result.attacked] == verdicts).all()


@pytest.mark.parametrize(("reasons", "objective"), PAIRS)
def test_batch_composition_changes_nothing(reasons, objective):
    model = ToyVLM(reasons=reasons).double()
    batch, answers = toy_batch(model, 12)
    kind, goal = PGD(steps=4, restarts=2), build_objective(objective)
    whole = kind(model, batch, goal, HEADLINE, generators=generators(12), clean_answers=answers)
    for places in ([5], [7, 2, 11], [1, 0]):
        part = kind(
            model,
            batch.select(places),
            goal,
            HEADLINE,
            generators=[generators(12)[i] for i in places],
            clean_answers=[answers[i] for i in places],
        )
        assert torch.equal(part.adversarial, whole.adversarial[places])
        assert torch.equal(part.success, whole.success[places])


def test_one_forward_and_one_backward_a_step_and_few_verdicts():
    model = ToyVLM(reasons=True)
    batch, answers = toy_batch(model, 20, wrong_every=0)
    model.forwards = model.deployed = 0
    result = PGD(steps=8)(
        model, batch, build_objective("decision_slot"), EASY, generators=generators(20), clean_answers=answers
    )
    assert model.deployed == result.verdicts.sum()
    assert model.forwards == result.forwards.sum() + result.verdicts.sum()
    assert torch.equal(result.backwards, result.steps) and (result.forwards - result.steps <= 1).all()
    assert result.verdicts.max() <= 5  # at 0, 1, 2, 4 and the end: a generation costs as much as a few steps


def test_parameters_are_frozen_inside_and_restored():
    model = ToyVLM()
    model.words.weight.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    seen = []

    class Spy(type(build_objective("answer"))):
        def prepare(self, model, batch, clean_answers):
            seen.append([p.requires_grad for p in model.parameters()])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attack(PGD(steps=1), model, Spy())
    assert seen and not any(seen[0])
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before

    class Holder:  # an adapter that is no module itself
        inner = None

    holder = Holder()
    holder.inner = ToyVLM()
    with frozen(holder):
        assert not any(p.requires_grad for p in holder.inner.parameters())
    assert all(p.requires_grad for p in holder.inner.parameters())


def test_gradients_flow_even_where_the_caller_switched_them_off():
    with torch.no_grad():
        result = attack(PGD(steps=4), ToyVLM(), "answer", STRONG)
    assert result.success.any() and not result.dead_gradients.any()


def test_a_gradient_that_is_not_finite_is_counted_and_moves_nothing():
    @dataclass(frozen=True)
    class Broken(Prepared):
        def __call__(self, pixels):
            flat = pixels.flatten(1).sum(1)
            return Reading(flat * torch.nan, torch.zeros(len(flat), dtype=torch.bool))

        def select(self, rows):
            return self

    class BrokenObjective(Objective):
        name: ClassVar[str] = "broken"

        def prepare(self, model, batch, clean_answers):
            return Broken()

    result = attack(PGD(steps=3), ToyVLM(), BrokenObjective())
    assert (result.dead_gradients[result.attacked] == 3).all() and not result.success.any()
    assert torch.equal(result.adversarial[result.attacked], toy_batch(ToyVLM(), 20)[0].canvas[result.attacked])


def test_nothing_to_attack():
    model = ToyVLM()
    batch, answers = toy_batch(model, 3, wrong_every=1)
    result = PGD(steps=2)(
        model, batch, build_objective("answer"), HEADLINE, generators=generators(3), clean_answers=answers
    )
    assert not result.attacked.any() and torch.equal(result.adversarial, batch.canvas)
    assert result.trace(0) == () and result.start_loss.isnan().all()
    with pytest.raises(ValueError, match="2 generators"):
        PGD()(model, batch, build_objective("answer"), HEADLINE, generators=generators(2), clean_answers=answers)


def test_more_strength_is_not_weaker():
    model = ToyVLM(reasons=True)
    counts = [attack(FGSM(), model, "decision_slot", EASY, count=60).success.sum()]
    counts += [attack(PGD(steps=s), model, "decision_slot", EASY, count=60).success.sum() for s in (5, 20)]
    counts += [attack(PGD(steps=20), model, "decision_slot", HEADLINE, count=60).success.sum()]
    assert counts == sorted(counts) and counts[0] < counts[-1]


def test_fgsm_is_one_whole_step_from_the_clean_image():
    model = ToyVLM()
    batch, answers = toy_batch(model, 8, wrong_every=0)
    result = attack_clean(model, batch, answers, FGSM())
    pixels = batch.pixels.requires_grad_()
    loss = torch.nn.functional.cross_entropy(model.option_logits(batch, pixels), batch.targets, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, pixels)
    expected = (batch.canvas.int() + 2 * gradient.sign().int()).clamp(0, 255)
    assert torch.equal(result.adversarial.int(), expected)
    assert (result.steps == 1).all() and (result.forwards == 2).all() and (result.verdicts == 1).all()


@dataclass(frozen=True)
class Valley(Prepared):
    """Highest at a quarter of the step, so that the whole step ends lower than it began."""

    peak: torch.Tensor
    suspect: bool

    def __call__(self, pixels):
        loss = -(pixels - self.peak).square().flatten(1).sum(1)
        return Reading(loss, torch.full_like(loss, self.suspect, dtype=torch.bool))

    def select(self, rows):
        return Valley(self.peak[rows], self.suspect)


@dataclass(frozen=True)
class ValleyObjective(Objective):
    name: ClassVar[str] = "valley"
    suspect: bool = False

    def prepare(self, model, batch, clean_answers):
        return Valley(batch.pixels + HEADLINE.eps / 4, self.suspect)


def test_fgsm_keeps_its_step_even_where_the_loss_fell():
    fgsm, pgd = (attack(kind, ToyVLM(), ValleyObjective()) for kind in (FGSM(), PGD(steps=1, random_start=False)))
    one = fgsm.attacked
    assert (fgsm.final_loss[one] < fgsm.start_loss[one]).all() and (fgsm.linf[one] == HEADLINE.eps).all()
    assert (pgd.final_loss[one] == pgd.start_loss[one]).all() and (pgd.linf[one] == 0).all()


@pytest.mark.parametrize(
    ("reasons", "suspect", "last"), [(True, False, True), (True, True, False), (False, False, False)]
)
def test_the_last_iterate_is_judged_where_a_costly_verdict_was_never_asked_for(reasons, suspect, last):
    result = attack(PGD(steps=1, random_start=False), ToyVLM(reasons=reasons), ValleyObjective(suspect))
    moved = result.linf[result.attacked] == HEADLINE.eps
    assert result.attacked.any() and torch.equal(moved, torch.full_like(moved, last))


def attack_clean(model, batch, answers, kind) -> AttackResult:
    goal = build_objective("answer")
    return kind(model, batch, goal, HEADLINE, generators=generators(len(batch)), clean_answers=answers)


def test_maximise_is_the_same_climb_without_verdicts():
    model = ToyVLM()
    batch, answers = toy_batch(model, 8, wrong_every=0)
    prepared = build_objective("answer").prepare(model, batch, answers)
    start, _ = prepared(batch.pixels)
    model.deployed = model.forwards = 0
    delta = PGD(steps=4, keep="last").maximise(prepared, batch.pixels, HEADLINE, generators(8)).delta
    assert model.deployed == 0 and model.forwards == 4 * 8
    assert delta.abs().max() <= HEADLINE.eps + 1e-7 and not delta.requires_grad
    assert (prepared(batch.pixels + delta).loss > start).all()
    once = PGD(steps=4).maximise(prepared, batch.pixels, HEADLINE, generators(8)).delta
    more = PGD(steps=4, restarts=3).maximise(prepared, batch.pixels, HEADLINE, generators(8)).delta
    assert (prepared(batch.pixels + more).loss >= prepared(batch.pixels + once).loss - 1e-6).all()


def test_step_size():
    assert PGD(steps=20).length(8 / 255) == pytest.approx(1 / 255)
    assert PGD(step_size=0.01).length(1.0) == 0.01
    assert PGD(rel_step=0.25).length(0.04) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"steps": 0}, "steps must be a whole number"),
        ({"steps": 2.5}, "steps must be a whole number"),
        ({"restarts": 0}, "restarts"),
        ({"step_size": 0}, "step_size must be above 0"),
        ({"step_size": 0.1, "rel_step": 0.1}, "not both"),
        ({"keep": "worst"}, "best or last"),
        ({"step": 3}, "no parameter 'step'. Did you mean 'steps'"),
    ],
)
def test_bad_parameters_are_named(parameters, message):
    with pytest.raises(UsageError, match=message):
        build_attack("pgd", parameters)


def test_catalogue_agrees_with_the_classes():
    assert set(ATTACKS) <= set(registry.attacks) and set(OBJECTIVES) <= set(registry.objectives)
    for name, info in ATTACKS.items():
        kind = registry.attacks.get(name)
        assert kind.name == name and tuple(f.name for f in fields(kind)) == info.parameters
    for name, info in OBJECTIVES.items():
        kind = registry.objectives.get(name)
        assert kind.name == name and kind.reasoning_only == info.reasoning_only
    assert standard_objectives(False) == ("answer",)
    assert standard_objectives(True) == ("answer", "rationale_answer", "decision_slot", "no_think")
    assert applies("margin", False) and not applies("decision_slot", False) and applies("decision_slot", True)
    with pytest.raises(UsageError, match="Did you mean 'decision_slot'"):
        build_objective("decision_slots")
    with pytest.raises(UsageError, match="Did you mean 'pgd'"):
        build_attack("pdg")


def test_catalogue_imports_no_torch():
    code = "import sys, safemed_bench.attacks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_answers_of_a_stale_clean_run_do_not_matter_for_the_wrong_ones():
    """A question whose clean answer is invalid counts as wrong already and is not attacked."""
    model = ToyVLM()
    batch, answers = toy_batch(model, 4, wrong_every=0)
    answers[1] = replace(answers[1], index=None, status="invalid")
    result = attack_clean(model, batch, answers, PGD(steps=2))
    assert result.attacked.tolist() == [True, False, True, True] and result.answers[1].status == "invalid"


# -- an entry that is not shown the picture


@dataclass(frozen=True)
class Constant(Prepared):
    """A loss without the pixels in it."""

    count: int

    def __call__(self, pixels):
        return Reading(torch.zeros(self.count), torch.zeros(self.count, dtype=torch.bool))

    def select(self, rows):
        return Constant(len(rows))


class Blind(Objective):
    name = "blind"

    def prepare(self, model, batch, clean_answers):
        return Constant(len(batch))


class BlindVLM(ToyVLM):
    """Answers from the text alone."""

    def _features(self, pixels):
        return super()._features(torch.full_like(pixels, 0.5))


@pytest.mark.parametrize("kind", [FGSM(), PGD(steps=3), PGD(steps=3, active_set=False)])
def test_a_loss_without_the_picture_has_a_dead_gradient_and_changes_no_verdict(kind):
    result = attack(kind, BlindVLM(), Blind(), count=8)
    assert result.attacked.any() and not result.success.any()
    assert torch.equal(result.dead_gradients, result.backwards) and result.dead_gradients[result.attacked].min() > 0
