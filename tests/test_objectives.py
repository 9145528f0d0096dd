"""What the objectives measure, and where the decision slot is found."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from families import build
from toy_model import TOKEN, ToyVLM, generators, toy_batch, toy_canvas, toy_questions

from safemed_bench.attacks import OBJECTIVES, applies, build_attack, build_objective
from safemed_bench.attacks.pgd import PGD
from safemed_bench.attacks.slots import find_slot, rationale_length
from safemed_bench.attacks.threat import check
from safemed_bench.core.types import Answer, Question, ThreatModel
from safemed_bench.models import load_model

PAIRS = [(reasons, name) for reasons in (False, True) for name in OBJECTIVES if applies(name, reasons)]


class Words:
    """A tokenizer of whole words and punctuation, a leading space being part of the token, as in byte-level BPE."""

    def __init__(self, pieces: str = r" ?</?\w+>| ?\w+| ?[^\w\s]") -> None:
        self.pieces, self.ids, self.texts = pieces, {}, []

    def encode(self, text: str) -> tuple[int, ...]:
        found = re.findall(self.pieces, text)
        for piece in found:
            if piece not in self.ids:
                self.ids[piece] = len(self.texts)
                self.texts.append(piece)
        return tuple(self.ids[piece] for piece in found)

    def decode(self, tokens) -> str:
        return "".join(self.texts[t] for t in tokens)


def slot_text(options, chosen, reply, tokenizer=None):
    """The reply before the slot, the token there, and its rivals."""
    tokenizer = tokenizer or Words()
    ids = tokenizer.encode(reply)
    slot = find_slot(options, chosen, ids, tokenizer.encode, tokenizer.decode)
    if slot is None:
        return None
    own, *rivals = (tokenizer.texts[t] for t in slot.candidates)
    assert ids[slot.position] == slot.candidates[0] and len(set(slot.candidates)) == len(slot.candidates)
    return tokenizer.decode(ids[: slot.position]), own, set(rivals)


def test_slot_is_the_earliest_place_that_tells_the_options_apart():
    reply = "<think>The lung shows a mass, so mass B</think><answer>B</answer>"
    found = slot_text(("cyst", "mass", "normal"), 1, reply)
    assert found == ("<think>The lung shows a", " mass", {" cyst", " normal"})


def test_slot_finds_other_cases_and_the_place_without_a_space():
    assert slot_text(("Cyst", "Mass"), 1, "<think>Seen: mass.</think><answer>B</answer>") == (
        "<think>Seen:",
        " mass",
        {" cyst"},
    )
    assert slot_text(("cyst", "mass"), 1, "<think>Mass.</think><answer>B</answer>") == ("<think>", "Mass", {"Cyst"})


def test_slot_skips_a_shared_beginning():
    options = ("left lung", "left kidney", "left eye")
    found = slot_text(options, 0, "<think>on the left side: left lung</think><answer>A</answer>")
    assert found == ("<think>on the left side: left", " lung", {" kidney", " eye"})


def test_slot_is_the_first_difference_to_any_option():
    """` left` does not tell the first two apart, but it already tells them from the third."""
    options = ("left lung", "left kidney", "right lung")
    found = slot_text(options, 0, "<think>see left lung</think><answer>A</answer>")
    assert found == ("<think>see", " left", {" right"})


def test_slot_behind_an_option_that_begins_another():
    options = ("cyst", "cyst with bleeding")
    stops = slot_text(options, 0, "<think>a cyst, so A</think><answer>A</answer>")
    assert stops == ("<think>a cyst", ",", {" with"})
    goes_on = slot_text(options, 1, "<think>a cyst with bleeding</think><answer>B</answer>")
    assert goes_on == ("<think>a cyst", " with", set())
    # The text of the longer option is no mention of the shorter one.
    assert slot_text(options, 0, "<think>no cyst with bleeding</think><answer>A</answer>") is None


def test_slot_prefers_the_whole_text_then_leading_words():
    options = ("the lungs", "a kidney")
    whole = slot_text(options, 0, "<think>the image shows the lungs</think><answer>A</answer>")
    assert whole == ("<think>the image shows", " the", {" a"})
    part = slot_text(("lung cancer", "skin rash"), 0, "<think>the lung has cancer</think><answer>A</answer>")
    assert part == ("<think>the", " lung", {" skin"})


def test_slot_does_not_take_a_piece_of_a_word():
    pieces = Words(r" ?</?\w+>| ?\w{1,4}|.")  # splits words after four letters
    found = slot_text(("cyst", "mass"), 0, "<think>a cystic cyst</think><answer>A</answer>", pieces)
    assert found == ("<think>a cystic", " cyst", {" mass"})


def test_slot_stays_inside_the_rationale():
    assert slot_text(("A", "B"), 0, "<think>nothing</think><answer>A</answer>") is None
    assert slot_text(("cyst", "cyst"), 0, "<think>a cyst</think><answer>A</answer>") is None
    words = Words()
    ids = words.encode("<think>a b</think><answer>A</answer>")
    assert rationale_length(ids, words.decode) == ids.index(words.ids["<answer>"])
    assert rationale_length(ids[:3], words.decode) == 3 and rationale_length((), words.decode) == 0


@pytest.mark.parametrize(("reasons", "objective"), PAIRS)
def test_gradient_is_that_of_the_loss(reasons, objective):
    """Per-sample losses with gradients equal to a central difference, in float64."""
    model = ToyVLM(reasons=reasons).double()
    batch, answers = toy_batch(model, 6, wrong_every=0)
    prepared = build_objective(objective).prepare(model, batch, answers)
    pixels = (batch.pixels.double() * 0.9 + 0.05).requires_grad_()
    loss, suspects = prepared(pixels)
    assert loss.shape == suspects.shape == (6,) and suspects.dtype == torch.bool
    (gradient,) = torch.autograd.grad(loss.sum(), pixels)
    step = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e-4
    with torch.no_grad():
        difference = (prepared(pixels + step).loss - prepared(pixels - step).loss) / 2
    assert torch.allclose((gradient * step).flatten(1).sum(1), difference, rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize(("reasons", "objective"), PAIRS)
def test_selection_keeps_each_question_its_own(reasons, objective):
    model = ToyVLM(reasons=reasons).double()
    batch, answers = toy_batch(model, 7, wrong_every=0)
    prepared = build_objective(objective).prepare(model, batch, answers)
    whole = prepared(batch.pixels)
    rows = torch.tensor([5, 0, 3, 6])
    part = prepared.select(rows)(batch.pixels[rows])
    assert torch.allclose(part.loss, whole.loss[rows]) and torch.equal(part.suspects, whole.suspects[rows])
    twice = prepared.select(rows).select(torch.tensor([2, 1]))(batch.pixels[[3, 0]])
    assert torch.allclose(twice.loss, whole.loss[[3, 0]])


def test_answer_is_cross_entropy_among_the_options():
    model = ToyVLM()
    batch, answers = toy_batch(model, 6, wrong_every=3)
    loss, suspects = build_objective("answer").prepare(model, batch, answers)(batch.pixels)
    for i, (question, answer) in enumerate(zip(batch.questions, answers, strict=True)):
        scores = torch.tensor(answer.option_logprobs)
        expected = torch.logsumexp(scores, 0) - scores[question.answer]
        assert loss[i].item() == pytest.approx(expected.item(), abs=1e-4)
        assert suspects[i].item() == (answer.index != question.answer)
    margin, same = build_objective("margin").prepare(model, batch, answers)(batch.pixels)
    assert torch.equal(same, suspects) and torch.equal(margin > 0, suspects)


def test_rationale_answer_suspects_only_what_greedy_decoding_could_change():
    model = ToyVLM(reasons=True)
    batch, answers = toy_batch(model, 40, wrong_every=0)
    prepared = build_objective("rationale_answer").prepare(model, batch, answers)
    noise = torch.rand(batch.pixels.shape, generator=torch.Generator().manual_seed(0)) * 0.2
    pixels = ((batch.pixels + noise - 0.1).clamp(0, 1) * 255).round() / 255
    loss, suspects = prepared(pixels)
    changed = torch.tensor([a.tokens != b.tokens for a, b in zip(model.answer(batch, pixels), answers, strict=True)])
    assert changed.any() and not changed.all() and suspects[changed].all()
    assert not suspects.all() and (loss > 0).all()


def test_decision_slot_is_the_margin_there():
    model = ToyVLM(reasons=True)
    batch, answers = toy_batch(model, 8, wrong_every=0)
    prepared = build_objective("decision_slot").prepare(model, batch, answers)
    assert all(note == {"slot": 2} for note in prepared.extra[::2])  # <think> shows | WORD
    loss, suspects = prepared(batch.pixels)
    assert (loss < 0).all() and not suspects.any()
    question, answer = batch.questions[0], answers[0]
    candidates = torch.tensor([[TOKEN[o] for o in question.options]])
    scores = model.next_token_logits(batch.select([0]), batch.pixels[:1], [answer.tokens[:2]], candidates)[0]
    others = [s for k, s in enumerate(scores.tolist()) if k != question.answer]
    assert loss[0].item() == pytest.approx(max(others) - scores[question.answer].item(), abs=1e-5)


def test_decision_slot_falls_back_where_the_rationale_never_names_the_answer():
    model = ToyVLM(reasons=True)
    batch, answers = toy_batch(model, 4, wrong_every=0)
    silent = model.encode("<think>shows unknown</think><answer>B</answer>")
    answers[0] = Answer(answers[0].index, "valid", model.decode_text(silent), tokens=silent)
    prepared = build_objective("decision_slot").prepare(model, batch, answers)
    assert prepared.extra[0] == {"fallback": "rationale_answer"} and "slot" in prepared.extra[1]
    whole = build_objective("rationale_answer").prepare(model, batch, answers)(batch.pixels)
    loss, _ = prepared(batch.pixels)
    assert loss[0].item() == pytest.approx(whole.loss[0].item()) and (loss[1:] < 0).all()
    rows = torch.tensor([3, 0, 1])
    assert torch.allclose(prepared.select(rows)(batch.pixels[rows]).loss, loss[rows])
    only = torch.tensor([0])
    assert torch.allclose(prepared.select(only)(batch.pixels[only]).loss, loss[only])


def test_decision_slot_without_a_rival_takes_all_other_tokens():
    model = ToyVLM(reasons=True)
    options = ("left", "left lung")
    question = Question("q", "", "", "Where?", options, 1, "CT", "anatomy", "toy", "test")
    batch = model.prepare([question], toy_canvas(1))
    reply = model.encode("<think>shows left lung</think><answer>B</answer>")
    answer = Answer(1, "valid", model.decode_text(reply), tokens=reply)
    prepared = build_objective("decision_slot").prepare(model, batch, [answer])
    assert prepared.extra == ({"slot": 3},)
    loss, suspects = prepared(batch.pixels)
    score = model.next_token_logits(batch, batch.pixels, [reply[:3]], torch.tensor([[TOKEN["lung"]]])).item()
    assert loss.item() == pytest.approx(-score, abs=1e-5) and suspects.item() == (score < math.log(0.5))


def test_a_leaking_rationale_hides_what_the_decision_slot_finds():
    """The reason for having several objectives: teacher-forced with its rationale, the letter hardly moves."""
    model, count, threat = ToyVLM(reasons=True), 40, ThreatModel("linf", 2 / 255)
    batch, answers = toy_batch(model, count, wrong_every=0)

    def losses(name):
        attack = build_attack("pgd", {"steps": 10})
        return attack(model, batch, build_objective(name), threat, generators=generators(count), clean_answers=answers)

    slot, leaked = losses("decision_slot"), losses("answer")
    assert all("suspected" not in note for note in leaked.extra)
    assert slot.success.sum() > 0 and (slot.final_loss > 0).sum() >= slot.success.sum() * 0.9
    assert leaked.final_loss.max() < 0.1


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """The real adapter over a tiny Qwen3-VL of random weights, and a batch with the rationale it might have written."""
    folder = build("qwen3_vl", tmp_path_factory.mktemp("qwen3_vl"))
    options = {"revision": None, "max_new_tokens": 4, "dtype": None, "adapter": None}

    def make(prompt: str, decode: str):
        spec = SimpleNamespace(name="tiny", path=str(folder), prompt=prompt, decode=decode, **options)
        model = load_model(spec, 64, device="cpu")
        batch = model.prepare(toy_questions(4), toy_canvas(4, (64, 64)))
        return model, batch

    return make


def test_pgd_on_a_hugging_face_model(hugging_face):
    model, batch = hugging_face("instruct", "logprob")
    clean = model.answer(batch, batch.pixels)
    targets = tuple(replace(q, answer=a.index) for q, a in zip(batch.questions, clean, strict=True))
    batch = replace(batch, questions=targets)
    goal, threat = build_objective("margin"), ThreatModel("linf", 8 / 255)
    result = PGD(steps=3)(model, batch, goal, threat, generators=generators(4), clean_answers=clean)
    check(threat, batch.canvas, result.adversarial)
    assert result.attacked.all() and (result.final_loss > result.start_loss).any()
    again = model.answer(batch, result.adversarial.float() / 255)
    assert [a.index for a in again] == [a.index for a in result.answers]


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_objectives_on_a_reasoning_hugging_face_model(hugging_face, objective):
    """Random weights never reason, so that the rationale is put into their mouth; loss and gradient are real."""
    model, batch = hugging_face("think", "generate")
    answers = []
    for question in batch.questions:
        text = f"<think>Seen is {question.options[question.answer]}.</think><answer>A</answer>"
        answers.append(Answer(question.answer, "valid", text, tokens=model.encode(text)))
    prepared = build_objective(objective).prepare(model, batch, answers)
    if objective == "decision_slot":
        assert all("slot" in note for note in prepared.extra)
        position = prepared.extra[0]["slot"]
        assert model.decode_text(answers[0].tokens[:position]).startswith("<think>Seen is")
    delta = PGD(steps=2).maximise(prepared, batch.pixels, ThreatModel("linf", 8 / 255), generators(4)).delta
    start, end = prepared(batch.pixels).loss, prepared(batch.pixels + delta).loss
    assert (end > start).all()
