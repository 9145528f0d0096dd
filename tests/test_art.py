"""ART's attacks in this benchmark: one question per call, our verdict, and a reason for everything that is refused."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_art_agreement import STEPS, art_pgd
from toy_model import ToyVLM, generators, toy_batch
from toy_run import records, toy_dataset, toy_execute, toy_plan

from safemed_bench.attacks import ART_CLASSES, ATTACKS, build_attack, build_objective, build_strike
from safemed_bench.attacks.art import _OneQuestion
from safemed_bench.attacks.base import Pursuit
from safemed_bench.attacks.threat import check, quantize
from safemed_bench.core.errors import SuiteError, UsageError
from safemed_bench.core.types import ThreatModel
from safemed_bench.suite import load_suite

CASES = {
    "art:FGM": {}, "art:PGD": {"steps": 4, "restarts": 2}, "art:MIM": {"steps": 4},
    "art:APGD": {"steps": 8, "restarts": 2}, "art:Square": {"queries": 20},
}  # fmt: skip
THREATS = [ThreatModel("linf", 2 / 255), ThreatModel("l2", 0.3)]


def strike(name, model, threat, count, parameters=None, places=None):
    batch, answers = toy_batch(model, count)
    places = range(count) if places is None else places
    own = generators(count)
    return build_strike(
        name, "" if name == "art:Square" else "margin", CASES[name] if parameters is None else parameters
    )(
        model,
        batch.select(list(places)),
        threat,
        generators=[own[i] for i in places],
        clean_answers=[answers[i] for i in places],
    )


def test_every_art_attack_is_tested_here():
    assert set(CASES) == {name for name in ATTACKS if name.startswith("art:")} == set(ART_CLASSES.values())


@pytest.mark.parametrize("threat", THREATS, ids=lambda t: t.label)
@pytest.mark.parametrize("reasons", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_each_question_gets_its_own_image_whatever_stands_beside_it(name, reasons, threat):
    model, count = ToyVLM(reasons=reasons).double(), 10
    batch, answers = toy_batch(model, count)
    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()
    whole = strike(name, model, threat, count)
    after = np.random.get_state()[1], random.getstate(), torch.get_rng_state()
    assert np.array_equal(before[0], after[0]) and before[1] == after[1] and torch.equal(before[2], after[2])
    check(threat, batch.canvas, whole.adversarial)
    again = model.answer(batch, whole.adversarial.float() / 255)
    wrong = torch.tensor([a.index != q.answer for a, q in zip(again, batch.questions, strict=True)])
    assert torch.equal(whole.success, wrong & whole.attacked)
    assert (whole.linf[whole.attacked] > 0).float().mean() > 0.5 and not whole.linf[~whole.attacked].any()
    part = strike(name, model, threat, count, places=[6, 2, 7])
    assert torch.equal(part.adversarial, whole.adversarial[[6, 2, 7]])
    none = strike(name, model, ThreatModel(threat.norm, 0.0), count)
    assert torch.equal(none.adversarial, batch.canvas) and none.answers == tuple(answers)
    assert none.verdicts[none.attacked].min() >= 1


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_raised_and_the_effort_counted(name):
    model = ToyVLM()
    result = strike(name, model, ThreatModel("linf", 1 / 255), 15)
    open_rows = result.attacked & ~result.success
    assert open_rows.any() and (result.final_loss > result.start_loss)[open_rows].float().mean() > 0.5
    if name == "art:Square":
        assert result.verdicts.max() <= 20 and result.verdicts[open_rows].min() >= 12 and not result.backwards.any()
    else:
        steps, starts = CASES[name].get("steps", 1), CASES[name].get("restarts", 1)
        assert (result.backwards[open_rows] == steps * starts).all()
        assert (result.forwards[open_rows] > steps * starts).all()


def test_the_image_is_the_one_art_gives_by_hand():
    model, threat, count = ToyVLM().double(), ThreatModel("linf", 5 / 255), 6
    batch, answers = toy_batch(model, count, wrong_every=0)
    stage = build_strike("art:PGD", "answer", {"steps": STEPS, "random_start": False})
    found = stage(model, batch, threat, generators=generators(count), clean_answers=answers)
    for i in range(count):
        one = batch.select([i])
        theirs = torch.from_numpy(art_pgd(model, one, threat, 2.5 * threat.eps / STEPS))
        assert torch.equal(found.adversarial[i : i + 1], quantize(threat, one.canvas, theirs))


def test_two_images_for_one_question_are_refused():
    """What ART does when it evaluates a batch that it has reordered."""
    model = ToyVLM()
    batch, _ = toy_batch(model, 2, wrong_every=0)
    prepared = build_objective("answer").prepare(model, batch, model.answer(batch, batch.pixels))
    pursuit = Pursuit(prepared, batch.pixels, batch.canvas, THREATS[0], generators(2), targets=[0, 0])
    module = _OneQuestion(pursuit, 1)
    assert module(batch.pixels[1:]).shape == (1, len(batch.questions[1].options))
    with pytest.raises(ValueError, match="2 images for one question"):
        module(batch.pixels)


@pytest.mark.parametrize(
    ("name", "objective", "threat", "words"),
    [
        ("art:PGD", "decision_slot", THREATS[0], "must be answer or margin"),
        ("art:PGD", "answer", ThreatModel("l1", 3.0), "linf and l2, not in l1"),
    ],
)
def test_called_from_python_it_refuses_as_well(name, objective, threat, words):
    model = ToyVLM(reasons=True)
    batch, answers = toy_batch(model, 4)
    with pytest.raises(UsageError, match=words):
        build_strike(name, objective)(model, batch, threat, generators=generators(4), clean_answers=answers)


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("art:PGD", {"eps_step": 1}, "no parameter 'eps_step'"),
        ("art:PGD", {"step_size": 0.1, "rel_step": 0.1}, "not both"),
        ("art:MIM", {"decay": -1}, "decay must be"),
        ("art:Square", {"queries": 2}, "queries must be 3 or more"),
        ("art:Square", {"share": 1.0}, "share must be"),
    ],
)
def test_bad_parameters_are_named(name, parameters, words):
    with pytest.raises(UsageError, match=words):
        build_attack(name, parameters)


@pytest.mark.parametrize(
    ("condition", "norm", "key", "words"),
    [
        ("{attack: 'art:PDG'}", "linf", "conditions.0.attack", "Did you mean 'art:PGD'"),
        ("{attack: 'art:AutoAttack'}", "linf", "conditions.0.attack", "wrong question. Use safemed-attack"),
        ("{attack: 'art:DeepFool'}", "linf", "conditions.0.attack", "each image with its question"),
        ("{attack: 'art:PGD', params: {max_iter: 3}}", "linf", "conditions.0.params.max_iter", "no parameter"),
        ("{attack: 'art:FGM', steps: 3}", "linf", "conditions.0.steps", "It takes none"),
        ("{attack: 'art:APGD', objectives: [margin, no_think]}", "linf", "conditions.0.objectives.1", "or margin"),
        ("{attack: 'art:Square', objectives: [margin]}", "linf", "conditions.0.objectives", "takes no objectives"),
        ("{attack: 'art:Square'}", "l1", "conditions.0.attack", "works in linf and l2, not in l1"),
    ],
)  # fmt: skip
def test_a_suite_that_asks_for_what_art_cannot_do_is_refused(tmp_path: Path, condition, norm, key, words):
    path, eps = tmp_path / "suite.yaml", "12" if norm == "l1" else "4/255"
    path.write_text(
        f"models: [{{name: m, path: /weights}}]\nthreat: {{norm: {norm}, eps: [{eps}]}}\nconditions: [{condition}]\n"
    )
    with pytest.raises(SuiteError) as caught:
        load_suite(path, (), {})
    (problem,) = caught.value.problems
    assert problem.key == key and words in problem.message and problem.line == 3


def test_a_suite_needs_no_art_until_an_attack_of_it_runs(tmp_path: Path):
    (tmp_path / "suite.yaml").write_text(
        "models: [{name: m, path: /weights}]\nconditions: [{attack: 'art:ProjectedGradientDescent', steps: 3}]\n"
    )
    code = (
        "import sys; from safemed_bench.suite import load_suite; from safemed_bench.attacks import ATTACKS\n"
        f"suite = load_suite({str(tmp_path / 'suite.yaml')!r}, (), {{}})\n"
        "assert suite.conditions[0].attack == 'art:PGD', suite.conditions\n"
        "sys.exit('art' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_from_suite_to_records(tmp_path: Path):
    """`objectives: all` means those it can climb; the plan says which it leaves out."""
    conditions = ("clean", {"attack": "art:PGD", "steps": 4}, {"attack": "art:Square", "params": {"queries": 6}})
    made = toy_plan(toy_dataset(tmp_path / "images", 6), models=("toy", "toy_cot"), conditions=conditions)
    assert any("art:PGD cannot climb rationale_answer, decision_slot, no_think" in note for note in made.notes)
    toy_execute(made, tmp_path / "run")
    found = records(tmp_path / "run")
    assert {r["condition"] for r in found} == {"clean", "art:PGD[answer]@linf:8/255", "art:Square@linf:8/255"}
    attacked = [r for r in found if r["condition"] != "clean" and r["clean_correct"]]
    assert attacked and not any(r["error"] for r in found) and all(r["linf"] <= 8 / 255 for r in attacked)
    assert all(r["linf"] > 0 for r in attacked if "PGD" in r["condition"])  # Square may find nothing better
    assert any(not r["correct"] for r in attacked)
