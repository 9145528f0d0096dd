"""One perturbation per modality: fitted on some questions, it works on others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_model import ToyVLM, generators, toy_batch
from toy_run import records, toy_dataset, toy_execute, toy_plan

from safemed_bench.attacks import build_objective, build_strike
from safemed_bench.attacks.threat import check, quantize, random_start
from safemed_bench.attacks.universal import Universal, fit_universal
from safemed_bench.core.errors import SuiteError, UsageError
from safemed_bench.core.types import Question, ThreatModel
from safemed_bench.datasets.base import Dataset
from safemed_bench.run.batching import BatchSizer
from safemed_bench.suite import load_suite
from safemed_bench.suite.plan import Plan


def two_modalities(model: ToyVLM, count: int, seed: int):
    """CT questions speak of findings, MRI ones of places."""
    batch, answers = toy_batch(model, count, seed, wrong_every=0)
    questions = tuple(replace(q, modality=("CT", "MRI")[i % 2]) for i, q in enumerate(batch.questions))
    return replace(batch, questions=questions), answers


def fooled(model: ToyVLM, batch, images: torch.Tensor) -> int:
    answers = model.answer(batch, images.float() / 255)
    return sum(a.index != q.answer for a, q in zip(answers, batch.questions, strict=True))


@pytest.mark.parametrize(
    "threat", [ThreatModel("linf", 4 / 255), ThreatModel("l2", 0.5), ThreatModel("l1", 20.0)], ids=lambda t: t.label
)
def test_what_was_fitted_on_some_questions_fools_others(threat):
    model = ToyVLM()
    known, answers = two_modalities(model, 80, seed=1)
    unseen, _ = two_modalities(model, 80, seed=2)
    universal = fit_universal(model, known, answers, build_objective("margin"), threat, steps=10)
    assert set(universal.deltas) == {"CT", "MRI"} and all(p.requires_grad for p in model.parameters())
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[threat.norm]
    for delta in universal.deltas.values():
        assert delta.flatten().norm(p=order) <= threat.eps * (1 + 1e-5)
    images = universal.images(unseen)
    check(threat, unseen.canvas, images)
    noise = random_start(threat, unseen.pixels, generators(80))
    assert fooled(model, unseen, images) > fooled(model, unseen, quantize(threat, unseen.canvas, unseen.pixels + noise))
    # Each modality has its own: the other one's does less.
    swapped = Universal(threat, {"CT": universal.deltas["MRI"], "MRI": universal.deltas["CT"]})
    assert fooled(model, known, universal.images(known)) > fooled(model, known, swapped.images(known))


def test_eps_zero_and_an_unknown_modality_change_nothing():
    model = ToyVLM()
    known, answers = two_modalities(model, 10, seed=1)
    none = fit_universal(model, known, answers, build_objective("answer"), ThreatModel("linf", 0.0), steps=2)
    assert torch.equal(none.images(known), known.canvas)
    some = fit_universal(model, known, answers, build_objective("answer"), ThreatModel("linf", 0.1), steps=2)
    other = replace(known, questions=tuple(replace(q, modality="OCT") for q in known.questions))
    assert torch.equal(some.images(other), known.canvas) and not torch.equal(some.images(known), known.canvas)


def test_batches_of_the_fit_are_summed():
    model = ToyVLM().double()
    known, answers = two_modalities(model, 30, seed=1)
    goal, threat = build_objective("margin"), ThreatModel("l2", 0.5)

    def one_by_one(places, work):
        BatchSizer(1).map("fit", places, work)

    whole = fit_universal(model, known, answers, goal, threat, steps=5)
    parts = fit_universal(model, known, answers, goal, threat, steps=5, in_batches=one_by_one)
    for modality, delta in whole.deltas.items():
        assert delta.abs().max() > 0 and torch.allclose(delta, parts.deltas[modality], atol=1e-6)


def test_as_an_attack_it_shows_every_right_question_its_perturbation_and_no_other():
    model, threat = ToyVLM(), ThreatModel("linf", 8 / 255)
    known, answers = two_modalities(model, 40, seed=1)
    universal = fit_universal(model, known, answers, build_objective("margin"), threat, steps=5)
    batch, clean = toy_batch(model, 20, seed=2)
    batch = replace(batch, questions=tuple(replace(q, modality="CT") for q in batch.questions))
    result = universal(model, batch, threat, generators=generators(20), clean_answers=clean)
    right = torch.tensor([a.index == q.answer for a, q in zip(clean, batch.questions, strict=True)])
    assert torch.equal(result.attacked, right) and result.success.any() and not result.success[~right].any()
    assert torch.equal(result.adversarial[right], universal.images(batch)[right])
    assert torch.equal(result.adversarial[~right], batch.canvas[~right])
    with pytest.raises(UsageError, match="fitted on other questions first"):
        build_strike("universal", "answer")


UNIVERSAL = {"attack": "universal", "steps": 5, "objectives": ["answer"], "params": {"questions": 6}}
CELL = "universal[answer]@linf:8/255"


def data(folder: Path) -> tuple[Dataset, tuple[Question, ...]]:
    """12 questions to ask and 16 of other images to fit on, of which two share an image with one that is asked."""
    whole = toy_dataset(folder / "images", 28)
    asked, rest = whole.questions[:12], list(whole.questions[12:])
    for i in (0, 1):
        rest[i] = replace(rest[i], image=asked[i].image, image_sha256=asked[i].image_sha256)
    return replace(whole, questions=asked), tuple(replace(q, split="validation") for q in rest)


def planned(folder: Path, conditions: tuple[Any, ...] = (UNIVERSAL,), **run: Any) -> Plan:
    asked, pool = data(folder)
    return toy_plan(asked, ("toy", "toy_cot"), ("clean", *conditions), pools={"validation": pool}, **run)


def test_in_a_suite_neither_chunks_nor_workers_nor_interruption_change_it(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    fit = next(cell.fit for cell in plan.cells if cell.fit)
    asked = {q.image_sha256 for q in plan.dataset.questions}
    assert {name: len(part.questions) for name, part in fit.items()} == {"CT": 6, "MRI": 6}
    assert not any(q.image_sha256 in asked for part in fit.values() for q in part.questions)
    toy_execute(plan, tmp_path / "run")
    found = [r for r in records(tmp_path / "run") if r["condition"] == CELL]
    assert len(found) == 24 and not any(r["error"] for r in found)
    assert all(r["extra"]["fitted_on"] <= 6 for r in found) and any(r["extra"]["fitted_on"] for r in found)
    assert any(r["linf"] for r in found) and max(r["linf"] for r in found) <= 8 / 255 + 1e-9
    kept = sorted((tmp_path / "run" / "universal").rglob("*.npz"))
    assert len(kept) == 4  # two entries, two modalities
    toy_execute(planned(tmp_path, workers=2, chunk=3), tmp_path / "other")
    again = [r for r in records(tmp_path / "other") if r["condition"] == CELL]
    strip = ("artefact", "option_logprobs")
    assert [{k: v for k, v in r.items() if k not in strip} for r in again] == [
        {k: v for k, v in r.items() if k not in strip} for r in found
    ]
    kept[0].write_bytes(b"torn")
    (tmp_path / "run" / "journal.jsonl").unlink()
    toy_execute(planned(tmp_path), tmp_path / "run")
    assert [r for r in records(tmp_path / "run") if r["condition"] == CELL] == found


def test_what_is_fitted_on_is_part_of_the_key_and_must_be_there(tmp_path: Path) -> None:
    asked, pool = data(tmp_path)

    def keys(pool: tuple[Question, ...]) -> dict[str, str]:
        plan = toy_plan(asked, ("toy",), (UNIVERSAL,), pools={"validation": pool})
        return {unit.question_id: unit.key for unit in plan.units}

    first = keys(pool)
    changed = keys(tuple(replace(q, answer=1 - q.answer) if q.modality == "CT" else q for q in pool))
    assert {q.modality for q in asked.questions if first[q.id] != changed[q.id]} == {"CT"}
    lacking = toy_plan(
        asked, ("toy",), (UNIVERSAL,), pools={"validation": tuple(q for q in pool if q.modality == "CT")}
    )
    assert any("no question of MRI" in note for note in lacking.notes)
    with pytest.raises(UsageError, match="split validation has no question to fit 'universal' on"):
        toy_plan(asked, ("toy",), (UNIVERSAL,))


@pytest.mark.parametrize(
    ("data", "params", "message"),
    [
        ("{split: validation}", "{}", "set `params: {split: train}`"),
        ("{split: test}", "{split: test}", "must be validation or train, not 'test'"),
        ("{split: test}", "{questions: 0}", "must be a whole number from 1, not 0"),
    ],
)
def test_a_fit_on_what_is_asked_is_refused(tmp_path: Path, data: str, params: str, message: str) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text(f"name: x\ndata: {data}\nmodels: [sft]\nconditions:\n  - {{attack: universal, params: {params}}}\n")
    with pytest.raises(SuiteError, match=message.replace("{", r"\{")):
        load_suite(str(file))
