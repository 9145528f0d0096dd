"""Attacks that average over draws: what they climb, which draws they see, and which draws judge them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch
from toy_model import ToyVLM, generators, toy_batch
from toy_run import SIDE, toy_dataset, toy_plan

from safemed_bench.attacks import build_objective
from safemed_bench.attacks.base import AttackResult, Prepared, Reading, frozen
from safemed_bench.attacks.pgd import PGD
from safemed_bench.attacks.smoothadv import EOT, Averaged, SmoothAdv
from safemed_bench.core.errors import UsageError
from safemed_bench.core.seeds import derive_seed
from safemed_bench.core.types import ATTACK_DRAWS, JUDGE_DRAWS, ThreatModel
from safemed_bench.models.smoothed import Smoothed
from safemed_bench.run.batching import BatchSizer
from safemed_bench.run.conditions import Bench
from safemed_bench.run.messages import Settings
from safemed_bench.run.plans import jobs_of
from safemed_bench.run.reading import Images

LINF, L2 = ThreatModel("linf", 4 / 255), ThreatModel("l2", 0.5)
SIGMA, COPIES = 0.3, 5


def prepared(objective: str, model: ToyVLM, count: int = 4) -> tuple[Prepared, torch.Tensor]:
    batch, answers = toy_batch(model, count, wrong_every=0)
    return build_objective(objective).prepare(model, batch, answers), batch.pixels.to(model.words.weight.dtype)


def averaged(inner: Prepared, count: int, *, likelihood: bool, seed: int = 0) -> Averaged:
    return Averaged(inner, SIGMA, COPIES, likelihood, tuple(generators(count, seed)))


# -- what is climbed


@pytest.mark.parametrize("likelihood", [True, False])
def test_the_loss_is_that_of_the_mean_probability_or_the_mean_loss(likelihood: bool) -> None:
    model = ToyVLM().double()
    batch, _ = toy_batch(model, 4, wrong_every=0)
    inner, pixels = prepared("answer", model)
    found = averaged(inner, 4, likelihood=likelihood)(pixels)
    for i, stream in enumerate(generators(4)):
        draw = torch.randn((COPIES, *pixels.shape[1:]), generator=stream).double()
        copies = (pixels[i] + SIGMA * draw).clamp(0, 1)
        chances = model.option_logits(batch.select([i] * COPIES), copies).softmax(1)
        right = chances[:, batch.questions[i].answer]
        expected = -right.mean().log() if likelihood else -right.log().mean()
        assert float(found.loss[i].detach()) == pytest.approx(float(expected.detach()), rel=1e-9)
        wrong = (chances.argmax(1) != batch.questions[i].answer).float().mean()
        assert bool(found.suspects[i]) == bool(wrong > 0.5)


@pytest.mark.parametrize("likelihood", [True, False])
@pytest.mark.parametrize(("reasons", "objective"), [(False, "answer"), (True, "decision_slot"), (True, "no_think")])
def test_the_gradient_is_a_finite_difference(reasons: bool, objective: str, likelihood: bool) -> None:
    model = ToyVLM(reasons=reasons).double()
    inner, pixels = prepared(objective, model)

    def loss(at: torch.Tensor) -> torch.Tensor:
        return averaged(inner, 4, likelihood=likelihood)(at).loss.sum()

    asked = pixels.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(asked), asked)
    direction = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    step = 1e-6 * direction
    measured = float((loss(pixels + step) - loss(pixels - step)).detach()) / 2e-6
    assert abs(measured) > 1e-3 and float((slope * direction).sum()) == pytest.approx(measured, rel=1e-5)


def run(kind: PGD, model, objective: str, threat: ThreatModel, rows: list[int] | None = None) -> AttackResult:
    count = 10
    batch, answers = toy_batch(getattr(model, "base", model), count)
    if model is not getattr(model, "base", model):
        answers = model.answer(batch, batch.pixels)
    rows = list(range(count)) if rows is None else rows
    return kind(
        model,
        batch.select(rows),
        build_objective(objective),
        threat,
        generators=[generators(count)[i] for i in rows],
        clean_answers=[answers[i] for i in rows],
    )


@pytest.mark.parametrize("threat", [LINF, L2], ids=["linf", "l2"])
@pytest.mark.parametrize("kind", [SmoothAdv, EOT])
@pytest.mark.parametrize(("reasons", "objective"), [(False, "answer"), (False, "margin"), (True, "decision_slot")])
def test_one_draw_without_noise_is_pgd_bit_for_bit(kind, threat, reasons: bool, objective: str) -> None:
    model = ToyVLM(reasons=reasons)
    plain = run(PGD(steps=4, restarts=2), model, objective, threat)
    ours = run(kind(steps=4, restarts=2, sigma=0.0, draws=1, keep="best"), model, objective, threat)
    assert plain.steps.sum() > 0 and plain.success.any()
    for field in fields(AttackResult):
        a, b = getattr(plain, field.name), getattr(ours, field.name)
        equal = torch.equal(a.nan_to_num(-9), b.nan_to_num(-9)) if isinstance(a, torch.Tensor) else a == b
        assert equal, field.name
    noisy = run(kind(steps=4, restarts=2, sigma=0.2, draws=1), model, objective, threat)
    assert not torch.equal(noisy.adversarial, plain.adversarial)


# -- which draws it sees


@dataclass(frozen=True)
class Recorder(Prepared):
    """Keeps the pictures it is shown, by question."""

    names: tuple[int, ...]
    seen: list[dict[int, list[torch.Tensor]]]

    def __call__(self, pixels: torch.Tensor) -> Reading:
        shown: dict[int, list[torch.Tensor]] = {}
        for name, picture in zip(self.names, pixels, strict=True):
            shown.setdefault(name, []).append(picture)
        self.seen.append(shown)
        return Reading(pixels.flatten(1).sum(1), torch.zeros(len(pixels), dtype=torch.bool))

    def select(self, rows: torch.Tensor) -> Recorder:
        return replace(self, names=tuple(self.names[i] for i in rows.tolist()))


def test_the_draws_of_a_question_do_not_depend_on_the_batch_and_are_fresh_at_every_step() -> None:
    pixels = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def steps(*batches: list[int]) -> list[dict[int, list[torch.Tensor]]]:
        whole = averaged(Recorder(tuple(range(6)), []), 6, likelihood=True)
        for rows in batches:
            whole.select(torch.tensor(rows))(pixels[rows])
        return whole.inner.seen

    together = steps([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5])
    left = steps([5, 3, 0], [3])  # others left the batch, and one more after the first step
    for step, question in ((0, 5), (0, 3), (0, 0), (1, 3)):
        ours, theirs = torch.stack(left[step][question]), torch.stack(together[step][question])
        assert len(ours) == COPIES and torch.equal(ours, theirs)
    first, second = torch.stack(together[0][3]), torch.stack(together[1][3])
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    assert first.min() >= 0 and first.max() <= 1


def test_the_batch_changes_no_attack() -> None:
    model = ToyVLM()
    kind = SmoothAdv(steps=4, sigma=0.2, draws=3)
    whole, part = run(kind, model, "answer", LINF), run(kind, model, "answer", LINF, [6, 1, 3])
    assert whole.success[[6, 1, 3]].tolist() == part.success.tolist()
    apart = (whole.adversarial[[6, 1, 3]].int() - part.adversarial.int()).abs()
    assert (apart > 0).float().mean() < 0.01  # signs of vanishing gradients


def test_sigma_comes_from_the_suite_or_from_the_smoothed_entry() -> None:
    bare = ToyVLM()
    smoothed = Smoothed(bare, 0.125, 11)
    with pytest.raises(UsageError, match="'smoothadv' needs `sigma`: 'toy' is not a smoothed entry"):
        run(SmoothAdv(steps=1), bare, "answer", LINF)
    inner, _ = prepared("answer", bare)
    sigmas = {
        (kind.name, own, getattr(model, "sigma", 0)): kind(sigma=own).surrogate(inner, model, generators(4)).sigma
        for kind in (SmoothAdv, EOT)
        for own in (None, 0.5)
        for model in (bare, smoothed)
        if not (kind is SmoothAdv and own is None and model is bare)
    }
    assert sigmas == {
        ("smoothadv", None, 0.125): 0.125,
        ("smoothadv", 0.5, 0): 0.5,
        ("smoothadv", 0.5, 0.125): 0.5,
        ("eot", None, 0): 0.0,
        ("eot", None, 0.125): 0.125,
        ("eot", 0.5, 0): 0.5,
        ("eot", 0.5, 0.125): 0.5,
    }


@pytest.mark.parametrize(("key", "value"), [("draws", 0), ("draws", True), ("draws", 2.0), ("sigma", -0.1)])
def test_bad_parameters_are_refused(key: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"'eot': {key} must be"):
        EOT(**{key: value})


def test_it_climbs_what_is_deployed_higher_than_plain_pgd_does() -> None:
    """Equal steps; the judge is the loss of the mean probability over many draws that nobody saw."""
    model, threat, count = ToyVLM(sharpness=3.0), ThreatModel("l2", 0.5), 12
    inner, pixels = prepared("answer", model, count)
    aware = Averaged(inner, SIGMA, 16, True, tuple(generators(count)))

    def reached(kind: PGD, climbed: Prepared) -> torch.Tensor:
        delta = kind.maximise(climbed, pixels, threat, generators(count)).delta
        return Averaged(inner, SIGMA, 200, True, tuple(generators(count, 9)))(pixels + delta).loss.detach()

    plain, ours = reached(PGD(steps=10), inner), reached(SmoothAdv(steps=10), aware)
    lucky = reached(SmoothAdv(steps=10, keep="best"), aware)
    assert ours.mean() > plain.mean() and ours.mean() > lucky.mean()


def test_the_parameters_under_a_smoothed_entry_are_frozen_too() -> None:
    class Holder:
        def __init__(self) -> None:
            self.model = torch.nn.Linear(2, 2)

    class Wrapped:
        def __init__(self) -> None:
            self.base = Holder()

    held = Wrapped()
    with frozen(held):  # type: ignore[arg-type]
        assert not any(p.requires_grad for p in held.base.model.parameters())
    assert all(p.requires_grad for p in held.base.model.parameters())


# -- which draws judge


OWN = [derive_seed("attack verdict", number) for number in range(ATTACK_DRAWS)]
JUDGE = [derive_seed("judge", 0, number) for number in range(JUDGE_DRAWS)]


class Leaky(ToyVLM):
    """Randomised: on a picture that was tampered with it errs in the streams that it is told. Tells which it was asked
    with; None is the deployed one."""

    randomised = True

    def __init__(self, wrong_in: tuple[int, ...] = ()) -> None:
        super().__init__(resolution=(SIDE, SIDE))
        self.wrong_in, self.asked = wrong_in, []
        self.clean: dict[str, torch.Tensor] = {}

    def answer(self, batch, pixels, *, generator=None):
        seed = generator.initial_seed() if generator else None
        self.asked.append(seed)
        answers = []
        for question, picture in zip(batch.questions, pixels, strict=True):
            tampered = not torch.equal(self.clean.setdefault(question.id, picture), picture)
            index = 1 - question.answer if tampered and seed in self.wrong_in else question.answer
            answers.append(replace(super().answer(batch.select([0]), pixels[:1])[0], index=index, status="valid"))
        return answers


def judged(model: Leaky, tmp_path: Path):
    dataset = toy_dataset(tmp_path / "images", 4)
    attack = {"attack": "eot", "steps": 2, "params": {"draws": 2, "sigma": 0.1}}
    (job,) = jobs_of(toy_plan(dataset, ("toy",), (attack,)))
    settings = Settings(tmp_path, SIDE, "pad", "fp32", None)
    bench = Bench(model, settings, BatchSizer(None), Images(settings))
    return bench.run(job)


def test_attack_defence_and_judge_draw_from_streams_of_their_own(tmp_path: Path) -> None:
    model = Leaky()
    records = judged(model, tmp_path)
    assert all(record.correct and record.linf for record in records)
    assert len({None, *OWN, *JUDGE}) == 1 + ATTACK_DRAWS + JUDGE_DRAWS
    assert set(model.asked) == {None, OWN[0], *JUDGE}
    assert model.asked[-JUDGE_DRAWS:] == JUDGE, "each draw of the judge is fresh"


def test_one_lucky_draw_of_the_attack_is_no_success(tmp_path: Path) -> None:
    lucky = judged(Leaky((OWN[0], OWN[2])), tmp_path / "lucky")
    plain = judged(Leaky(), tmp_path / "plain")
    for a, b in zip(lucky, plain, strict=True):
        assert a.correct and a.steps == b.steps == 2, "the attack went on to its end"
    always = judged(Leaky(tuple(OWN)), tmp_path / "always")
    assert all(record.correct for record in always), "the judge's draws decide"
    model = Leaky()
    batch, answers = toy_batch(model, 4, wrong_every=0)
    for wrong_in, success in ((OWN[:1], False), ((OWN[0], OWN[2]), False), (OWN, True)):
        model.wrong_in = tuple(wrong_in)
        kind, goal, streams = EOT(steps=2, draws=2, sigma=0.1), build_objective("answer"), generators(4)
        result = kind(model, batch, goal, LINF, generators=streams, clean_answers=answers)
        assert result.success.tolist() == [success] * 4


@pytest.mark.parametrize(("wrong", "correct"), [((0,), True), ((2,), True), ((0, 1), False), ((0, 1, 2), False)])
def test_the_judge_goes_by_the_majority_of_its_draws(tmp_path: Path, wrong: tuple[int, ...], correct: bool) -> None:
    records = judged(Leaky(tuple(JUDGE[i] for i in wrong)), tmp_path)
    assert [record.correct for record in records] == [correct] * 4
    for record in records:
        assert record.answer == (record.target if correct else 1 - record.target)
