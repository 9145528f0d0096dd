"""One perturbation per modality: fitted on some questions, it works on others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy_model import ToyVLM, generators, toy_batch

from safemed_bench.attacks import build_objective
from safemed_bench.attacks.threat import check, quantize, random_start
from safemed_bench.attacks.universal import Universal, fit_universal
from safemed_bench.core.types import ThreatModel


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
