"""Objectives with a direction: which option each restart aims at, and what is pushed there."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy_model import TOKEN, ToyVLM, generators, toy_batch, toy_canvas, toy_questions

from safemed_bench.attacks import build_objective
from safemed_bench.attacks.apgd import APGD
from safemed_bench.attacks.base import Objective, Pursuit
from safemed_bench.attacks.pgd import PGD
from safemed_bench.attacks.targeted import Directed, TargetedMargin, wrong_options, wrong_reply
from safemed_bench.core.clinical import opposite_options, reads_normal
from safemed_bench.core.types import Answer, Question, ThreatModel


def ask(*options: str, answer: int = 0) -> Question:
    return Question("q", "", "", "What is shown?", options, answer, "CT", "diagnosis", "toy", "test")


@pytest.mark.parametrize(
    "option",
    ["Normal", "normal lung", "No, It's normal", "Healthy", "No tumor", "No abnormality detected",
     "no signs of disease", "Free of lesions", "Nothing abnormal", "No diabetic retinopathy"],
)  # fmt: skip
def test_options_that_say_nothing_is_wrong(option):
    assert reads_normal(option)


@pytest.mark.parametrize(
    "option",
    ["abnormal", "Not normal", "a tumor", "Paranormal", "nodule", "Cyst with no calcification", "non-normal rhythm",
     "disease", "No", "benign mass"],
)  # fmt: skip
def test_options_that_do_not(option):
    assert not reads_normal(option)


def test_the_opposite_of_a_disease_is_normal_and_back():
    options = ("cyst", "Normal", "mass", "No abnormality")
    assert opposite_options(options, 0) == (1, 3) and opposite_options(options, 1) == (0, 2)
    assert opposite_options(("cyst", "mass"), 0) == () and opposite_options(("normal", "healthy"), 0) == ()


def test_wrong_options_come_in_the_order_of_the_clean_image():
    question = ask("a", "b", "c", "d", answer=1)
    assert wrong_options(question, Answer(1, "valid", "", (-2.0, -0.1, -3.0, -1.0))) == (3, 0, 2)
    assert wrong_options(question, Answer(1, "valid", "")) == (0, 2, 3)


def test_a_wrong_reply_names_the_target_and_nothing_else_changes():
    question = ask("cyst", "Mass", "left lung")
    reply = "<think>A bright area: Cyst, cystic? so cyst A</think><answer>A</answer>"
    assert wrong_reply(question, reply, 1) == (
        "<think>A bright area: Mass, cystic? so mass B</think><answer>B</answer>"
    )
    assert wrong_reply(question, "<answer>(A)</answer>", 2) == "<answer>(C)</answer>"
    assert wrong_reply(question, "a cyst, A.", 2) == "a left lung, C."


@pytest.mark.parametrize("name", ["targeted", "targeted_margin"])
def test_each_restart_aims_at_the_next_wrong_option(name):
    """Margins by hand, for restarts 0 to 3 of questions with 2, 3 and 4 options."""
    model = ToyVLM()
    batch, answers = toy_batch(model, 6, wrong_every=0)
    prepared = build_objective(name).prepare(model, batch, answers)
    scores = model.option_logits(batch, batch.pixels).double()
    assert {len(q.options) for q in batch.questions} == {2, 3, 4}
    for restart in range(4):
        loss, _ = prepared.turn(restart)(batch.pixels)
        for i, (question, answer) in enumerate(zip(batch.questions, answers, strict=True)):
            wrong = wrong_options(question, answer)
            aim = wrong[restart % len(wrong)]
            expected = scores[i, aim] - (scores[i, question.answer] if name == "targeted_margin" else 0)
            if name == "targeted":
                expected = expected - scores[i].logsumexp(0)
            assert loss[i].item() == pytest.approx(expected.item(), abs=1e-4)
    assert torch.equal(prepared(batch.pixels).loss, prepared.turn(0)(batch.pixels).loss)


def test_the_attack_turns_at_each_restart():
    model = ToyVLM()
    batch, answers = toy_batch(model, 6, wrong_every=0)
    prepared = build_objective("targeted_margin").prepare(model, batch, answers)
    chase = Pursuit(prepared, batch.pixels, batch.canvas, ThreatModel("linf", 0.1), generators(6))
    rows, seen = torch.tensor([0, 2, 5]), []
    for _ in range(3):
        chase.begin(rows)
        seen.append(chase.read(rows, torch.zeros(3, 3, 16, 16))[0].loss)
    for restart, loss in enumerate(seen):
        assert torch.allclose(loss, prepared.turn(restart)(batch.pixels).loss[rows])
    assert seen[0][0] == seen[1][0] and seen[0][1] != seen[1][1]  # 2 options, then 4


class Stubborn(TargetedMargin):
    """Only ever aims at the first wrong option."""

    name = "stubborn"

    def targets(self, question, answer):
        return super().targets(question, answer)[:1]


def test_aiming_at_every_option_finds_what_one_option_does_not():
    model, count, threat = ToyVLM(sharpness=2.0), 60, ThreatModel("linf", 1.5 / 255)
    batch, answers = toy_batch(model, count, wrong_every=0)

    def fooled(objective: Objective) -> torch.Tensor:
        attack = APGD(steps=10, restarts=3)
        return attack(model, batch, objective, threat, generators=generators(count), clean_answers=answers).success

    one, every = fooled(Stubborn()), fooled(TargetedMargin())
    assert every.sum() >= one.sum() and one.any() and not every.all()


def test_the_slot_of_two_options_is_where_these_two_part():
    """Against `left kidney` it is the second word that decides, against `right lung` the first."""
    model = ToyVLM(reasons=True)
    question = ask("left lung", "left kidney", "right lung")
    batch = model.prepare([question], toy_canvas(1))
    reply = model.encode("<think>shows left lung</think><answer>A</answer>")
    answer = Answer(0, "valid", model.decode_text(reply), (-0.1, -1.0, -2.0), 0, reply)
    prepared = TargetedMargin().prepare(model, batch, [answer])
    for restart, (before, own, rival) in enumerate([(3, "lung", "kidney"), (2, "left", "right")]):
        candidates = torch.tensor([[TOKEN[own], TOKEN[rival]]])
        scores = model.next_token_logits(batch, batch.pixels, [reply[:before]], candidates)[0]
        loss = prepared.turn(restart)(batch.pixels).loss
        assert loss.item() == pytest.approx((scores[1] - scores[0]).item(), abs=1e-5)


def test_without_a_slot_the_reply_is_rewritten():
    model = ToyVLM(reasons=True)
    batch, answers = toy_batch(model, 2, wrong_every=0)
    silent = model.encode(f"<think>shows unknown</think><answer>{'ABCD'[batch.questions[0].answer]}</answer>")
    answers[0] = replace(answers[0], text=model.decode_text(silent), tokens=silent)
    loss, suspects = build_objective("targeted_margin").prepare(model, batch, answers)(batch.pixels)
    aim = wrong_options(batch.questions[0], answers[0])[0]
    wanted = f"<think>shows unknown</think><answer>{'ABCD'[aim]}</answer>"
    expected = -model.token_loss(batch.select([0]), batch.pixels[:1], [wanted])
    assert loss[0].item() == pytest.approx(expected.item()) and suspects.tolist() == [True, False]


def test_a_targeted_rationale_leads_to_the_target():
    model, count = ToyVLM(reasons=True), 40
    batch, answers = toy_batch(model, count, wrong_every=0)
    goal = build_objective("targeted")
    result = PGD(steps=20)(
        model, batch, goal, ThreatModel("linf", 4 / 255), generators=generators(count), clean_answers=answers
    )
    aims = [wrong_options(q, a)[0] for q, a in zip(batch.questions, answers, strict=True)]
    hits = [a.index == aim for a, aim in zip(result.answers, aims, strict=True)]
    assert sum(hits) > count / 4 and sum(hits) > 0.8 * result.success.sum()


def test_directed_aims_at_the_clinically_opposite_answer():
    model = ToyVLM()
    questions = [q for q in toy_questions(60) if q.options[0] in ("cyst", "mass", "normal", "nodule")]
    batch = model.prepare(questions, toy_canvas(len(questions)))
    answers = model.answer(batch, batch.pixels)
    batch = replace(
        batch, questions=tuple(replace(q, answer=a.index) for q, a in zip(batch.questions, answers, strict=True))
    )
    prepared = Directed().prepare(model, batch, answers)
    notes = [note.get("directed") for note in prepared.extra]
    assert {"reassurance", "alarm", None} == set(notes)
    scores = model.option_logits(batch, batch.pixels)
    for restart in range(3):
        loss, _ = prepared.turn(restart)(batch.pixels)
        for i, (question, note) in enumerate(zip(batch.questions, notes, strict=True)):
            gaps = {
                option: (scores[i, k] - scores[i, question.answer]).item() for k, option in enumerate(question.options)
            }
            aim = min(gaps, key=lambda option: abs(gaps[option] - loss[i].item()))
            assert aim != question.options[question.answer]
            if note == "reassurance":
                assert aim == "normal" and question.options[question.answer] != "normal"
            elif note == "alarm":
                assert question.options[question.answer] == "normal"
            else:
                assert "normal" not in question.options
