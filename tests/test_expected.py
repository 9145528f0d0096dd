"""Objectives that are means over several texts, the one that stops the rationale, and the proved decision slot."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy_model import TOKEN, ToyVLM, generators, toy_batch

from safemed_bench.attacks import applies, build_attack, build_objective, standard_objectives
from safemed_bench.attacks.expected import TEXTS, ExpectedPrompts, ExpectedRationales
from safemed_bench.attacks.objectives import own_tokens
from safemed_bench.attacks.regenerated import EVERY
from safemed_bench.attacks.slots import find_slot, find_slots
from safemed_bench.core.errors import UsageError
from safemed_bench.core.types import LETTERS, ThreatModel

THREAT = ThreatModel("linf", 0.01)
EXPECTED = ("expected_rationales", "expected_prompts")


@pytest.mark.parametrize("name", (*EXPECTED, "stop_reasoning", "decisive_slot", "regenerated"))
def test_they_are_for_entries_that_reason_and_are_asked_for_by_name(name):
    assert applies(name, True) and not applies(name, False) and name not in standard_objectives(True)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_loss_is_the_mean_over_the_texts_and_its_gradient_too(name):
    """Held against one text at a time, through the decision slot's own objective."""
    model = ToyVLM(reasons=True).double()
    batch, answers = toy_batch(model, 8, wrong_every=0)
    goal = build_objective(name)
    texts = goal.texts(model, batch, [own_tokens(model, a) for a in answers])
    pixels = batch.pixels.double().requires_grad_()
    loss, _ = goal.prepare(model, batch, answers)(pixels)
    slope = torch.autograd.grad(loss.sum(), pixels)[0]
    sums, weights = torch.zeros(8, dtype=torch.double), torch.zeros(8, dtype=torch.double)
    other = torch.zeros_like(pixels)
    for row, (reply, owner, weight) in enumerate(zip(texts.replies, texts.owner, texts.weight, strict=True)):
        one = texts.batch.select([row])
        answer = replace(answers[owner], tokens=reply, text=model.decode_text(reply))
        single = build_objective("decision_slot").prepare(model, one, [answer])
        if "slot" not in single.extra[0]:
            continue
        here = batch.pixels[[owner]].double().requires_grad_()
        value = single(here).loss
        sums[owner] += weight * value.item()
        weights[owner] += weight
        other[owner] += weight * torch.autograd.grad(value.sum(), here)[0][0]
    assert (weights > 1).any() and torch.allclose(loss.detach(), sums / weights, atol=1e-6)
    assert torch.allclose(slope, other / weights.view(-1, 1, 1, 1), atol=1e-6)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_selection_is_the_same_as_the_whole(name):
    model = ToyVLM(reasons=True)
    batch, answers = toy_batch(model, 7, wrong_every=0)
    prepared = build_objective(name).prepare(model, batch, answers)
    whole, rows = prepared(batch.pixels), torch.tensor([5, 0, 3])
    part = prepared.select(rows)(batch.pixels[rows])
    assert torch.allclose(part.loss, whole.loss[rows], atol=1e-6) and torch.equal(part.suspects, whole.suspects[rows])
    again = prepared.select(rows).select(torch.tensor([2, 1]))(batch.pixels[[3, 0]])
    assert torch.allclose(again.loss, whole.loss[[3, 0]], atol=1e-6)


def test_sampled_rationales_depend_on_the_question_alone_and_count_as_often_as_they_came():
    model = ToyVLM(reasons=True, sharpness=0.2)
    batch, answers = toy_batch(model, 6, wrong_every=0)
    own = [own_tokens(model, a) for a in answers]
    texts = ExpectedRationales().texts(model, batch, own)
    for i in range(6):
        mine = [(texts.replies[r], texts.weight[r]) for r, owner in enumerate(texts.owner) if owner == i]
        assert own[i] in dict(mine) and sum(weight for _, weight in mine) == TEXTS
    assert len(texts.replies) > 6  # others than the greedy one were drawn
    alone = ExpectedRationales().texts(model, batch.select([4]), [own[4]])
    assert alone.replies == tuple(r for r, owner in zip(texts.replies, texts.owner, strict=True) if owner == 4)


def test_options_are_turned_with_the_answer_and_a_wrong_reply_is_left_out():
    model = ToyVLM(reasons=True)
    batch, answers = toy_batch(model, 6, wrong_every=0)
    own = [own_tokens(model, a) for a in answers]
    texts = ExpectedPrompts().texts(model, batch, own)
    for row, owner in enumerate(texts.owner):
        asked, question = texts.batch.questions[row], batch.questions[owner]
        assert asked.options[asked.answer] == question.options[question.answer]
        assert sorted(asked.options) == sorted(question.options)
        (answer,) = model.answer(one := texts.batch.select([row]), one.pixels)
        assert answer.index == asked.answer and own_tokens(model, answer) == texts.replies[row]
        assert torch.equal(texts.batch.canvas[row], batch.canvas[owner])
    assert {len(q.options) for q in batch.questions} == {2, 3, 4}
    counts = [texts.owner.count(i) for i in range(6)]
    assert all(1 <= n <= len(q.options) for n, q in zip(counts, batch.questions, strict=True)) and max(counts) == 4


def test_a_model_that_cannot_sample_is_told():
    class Silent(ToyVLM):
        sample = None

    model = Silent(reasons=True)
    batch, answers = toy_batch(model, 2, wrong_every=0)
    with pytest.raises(UsageError, match="has no `sample`"):
        build_objective("expected_rationales").prepare(model, batch, answers)


@pytest.mark.parametrize("name", EXPECTED)
def test_the_attack_finds_what_the_decision_slot_finds(name):
    model, count, threat = ToyVLM(reasons=True), 20, ThreatModel("linf", 4 / 255)
    batch, answers = toy_batch(model, count, wrong_every=0)
    attack = build_attack("pgd", {"steps": 5})
    result = attack(model, batch, build_objective(name), threat, generators=generators(count), clean_answers=answers)
    assert result.success.any() and all("texts" in note or "fallback" in note for note in result.extra)


def test_stop_reasoning_makes_the_empty_rationale_and_a_wrong_letter_likely():
    model = ToyVLM(reasons=True)
    batch, answers = toy_batch(model, 4, wrong_every=0)
    prepared = build_objective("stop_reasoning").prepare(model, batch, answers)
    loss = prepared(batch.pixels).loss
    for restart in range(2):
        turned = prepared.turn(restart)(batch.pixels).loss
        for i, (question, answer) in enumerate(zip(batch.questions, answers, strict=True)):
            order = sorted(
                (k for k in range(len(question.options)) if k != question.answer),
                key=lambda k: -answer.option_logprobs[k],
            )
            letter = LETTERS[order[restart % len(order)]]
            text = f"<think></think><answer>{letter}</answer>"
            wanted = -model.token_loss(batch.select([i]), batch.pixels[[i]], [text])
            assert turned[i].item() == pytest.approx(wanted.item(), abs=1e-5)
    assert torch.allclose(loss, prepared.turn(0)(batch.pixels).loss)


def test_the_decisive_slot_is_the_place_that_moves_the_answer():
    """The toy names the option once, and the letter follows: this is the decision slot."""
    model = ToyVLM(reasons=True)
    batch, answers = toy_batch(model, 8, wrong_every=0)
    decisive = build_objective("decisive_slot").prepare(model, batch, answers)
    slot = build_objective("decision_slot").prepare(model, batch, answers)
    assert [note["slot"] for note in decisive.extra] == [note["slot"] for note in slot.extra]
    assert all(note["moves"] == 1 for note in decisive.extra)
    assert torch.allclose(decisive(batch.pixels).loss, slot(batch.pixels).loss)


def test_a_place_whose_change_moves_nothing_is_passed_over():
    class Twice(ToyVLM):
        """Names what it sees, and decides at the second mention whatever stands at the first."""

        def completed(self, batch, pixels, texts):
            return super().completed(batch, pixels, [self.latest(text) for text in texts])

        def latest(self, text):
            think, shows = TOKEN["<think>"], TOKEN["shows"]
            mentions = [i for i, token in enumerate(text) if token == shows]
            return (think, *text[mentions[-1] :]) if len(mentions) > 1 else (think,)

    model = Twice(reasons=True)
    batch, answers = toy_batch(model, 6, wrong_every=0)
    said = []
    for question, answer in zip(batch.questions, answers, strict=True):
        words = model.encode(question.options[question.answer])
        head, tail = answer.tokens[:1], answer.tokens[1:]
        tokens = (*head, TOKEN["shows"], *words, *tail)
        said.append(replace(answer, tokens=tokens, text=model.decode_text(tokens)))
    decisive = build_objective("decisive_slot").prepare(model, batch, said)
    early = build_objective("decision_slot").prepare(model, batch, said)
    for mine, theirs, question in zip(decisive.extra, early.extra, batch.questions, strict=True):
        words = len(model.encode(question.options[question.answer]))
        assert mine["slot"] == theirs["slot"] + words + 1 and mine["moves"] == 1


def test_all_places_are_found_and_the_first_is_the_decision_slot():
    model = ToyVLM(reasons=True)
    reply = model.encode("<think>shows mass shows cyst shows mass</think><answer>B</answer>")
    found = find_slots(("cyst", "mass"), 1, reply, model.encode, model.decode_text)
    assert [slot.position for slot in found] == [2, 6]
    assert found[0] == find_slot(("cyst", "mass"), 1, reply, model.encode, model.decode_text)
    assert find_slots(("left", "skin"), 0, reply, model.encode, model.decode_text) == ()


def test_a_rationale_is_written_anew_on_the_present_picture_every_few_readings():
    """Held against the answer objective given what the model says of that very picture."""
    model = ToyVLM(reasons=True)
    batch, answers = toy_batch(model, 8, wrong_every=0)
    prepared = build_objective("regenerated").prepare(model, batch, answers)
    other = (batch.pixels + 0.3 * torch.randn(batch.pixels.shape, generator=generators(1)[0])).clamp(0, 1)
    old = build_objective("answer").prepare(model, batch, answers)(other).loss
    for _ in range(EVERY - 1):
        assert torch.allclose(prepared(other).loss, old)
    now = model.answer(batch, other)
    said = build_objective("answer").prepare(model, batch, now)(other)
    reading = prepared(other)
    assert torch.allclose(reading.loss, said.loss) and not torch.allclose(reading.loss, old)
    wrong = torch.tensor([a.index != q.answer for a, q in zip(now, batch.questions, strict=True)])
    assert wrong.any() and reading.suspects[wrong].all()
    assert torch.allclose(prepared.turn(1)(other).loss, old)


def test_when_a_rationale_is_written_anew_depends_on_the_question_alone():
    model, (attack, threat) = ToyVLM(reasons=True), (build_attack("pgd", {"steps": 12, "restarts": 2}), THREAT)
    batch, answers = toy_batch(model, 8, wrong_every=0)
    goal = build_objective("regenerated")
    whole = attack(model, batch, goal, threat, generators=generators(8), clean_answers=answers)
    for row in (0, 5, 7):
        part = attack(
            model,
            batch.select([row]),
            goal,
            threat,
            generators=[generators(8)[row]],
            clean_answers=[answers[row]],
        )
        assert torch.equal(part.adversarial[0], whole.adversarial[row]) and part.success[0] == whole.success[row]
    assert 0 < int(whole.success.sum()) < 8


def test_a_model_that_cannot_go_on_has_the_last_place_unproved():
    model, bare = ToyVLM(reasons=True), ToyVLM(reasons=True)
    batch, answers = toy_batch(model, 4, wrong_every=0)
    bare.completed = None
    proved, unproved = (build_objective("decisive_slot").prepare(m, batch, answers) for m in (model, bare))
    assert [note["slot"] for note in unproved.extra] == [note["slot"] for note in proved.extra]
    assert {note["moves"] for note in unproved.extra} == {None}
