"""Against the Adversarial Robustness Toolbox, one question per call: PGD step by step, Auto-PGD by what it reaches."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_model import ToyVLM, generators, toy_batch

from safemed_bench.attacks import build_objective
from safemed_bench.attacks.apgd import APGD
from safemed_bench.attacks.pgd import PGD
from safemed_bench.attacks.threat import project
from safemed_bench.core.types import ThreatModel
from safemed_bench.models.base import Batch

STEPS, COUNT = 12, 6


class Wrapped(nn.Module):
    """Pixels to option logits of one fixed question, as ART wants a model."""

    def __init__(self, model: ToyVLM, batch: Batch) -> None:
        super().__init__()
        self.model, self.batch = model, batch

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.option_logits(self.batch, pixels)[:, : len(self.batch.questions[0].options)]


def classifier(model: ToyVLM, batch: Batch):
    """The model as ART wants it, for a batch of one question."""
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        Wrapped(model, batch),
        loss=nn.CrossEntropyLoss(),
        input_shape=(3, *model.resolution),
        nb_classes=len(batch.questions[0].options),
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )


def art_pgd(model: ToyVLM, batch: Batch, threat: ThreatModel, step: float) -> np.ndarray:
    """ART's adversarial image of a batch of one question, started at the clean image."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from art.attacks.evasion import ProjectedGradientDescent

        attack = ProjectedGradientDescent(
            classifier(model, batch),
            norm=np.inf if threat.norm == "linf" else 2,
            eps=threat.eps,
            eps_step=step,
            max_iter=STEPS,
            num_random_init=0,
            batch_size=1,
            verbose=False,
        )
        return attack.generate(batch.pixels.numpy(), batch.targets.numpy())


def art_apgd(model: ToyVLM, batch: Batch, threat: ThreatModel) -> np.ndarray:
    """ART's Auto-PGD on the cross-entropy, from one random start."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from art.attacks.evasion import AutoProjectedGradientDescent

        attack = AutoProjectedGradientDescent(
            classifier(model, batch),
            norm=np.inf if threat.norm == "linf" else 2,
            eps=threat.eps,
            eps_step=2 * threat.eps,
            max_iter=STEPS,
            nb_random_init=1,
            loss_type="cross_entropy",
            batch_size=1,
            verbose=False,
        )
        return attack.generate(batch.pixels.numpy(), batch.targets.numpy())


@pytest.mark.parametrize(
    "threat", [ThreatModel("linf", 4 / 255), ThreatModel("l2", 0.5), ThreatModel("l2", 3.0)], ids=lambda t: t.label
)
def test_pgd_agrees_with_art(threat):
    model = ToyVLM()
    batch, answers = toy_batch(model, COUNT, wrong_every=0)
    attack = PGD(steps=STEPS, random_start=False, keep="last")
    prepared = build_objective("answer").prepare(model, batch, answers)
    delta = attack.maximise(prepared, batch.pixels, threat, generators(COUNT)).delta
    moved = 0.0
    for i in range(COUNT):
        one = batch.select([i])
        theirs = art_pgd(model, one, threat, attack.length(threat.eps)) - one.pixels.numpy()
        assert np.abs(theirs - delta[i : i + 1].numpy()).max() <= 1e-6
        moved = max(moved, np.abs(theirs).max())
    assert moved >= 0.01  # there was something to agree on
    assert torch.allclose(project(threat, delta, batch.pixels), delta, atol=1e-7)


@pytest.mark.parametrize("threat", [ThreatModel("linf", 4 / 255), ThreatModel("l2", 0.5)], ids=lambda t: t.label)
def test_apgd_reaches_at_least_what_arts_does(threat):
    model = ToyVLM(sharpness=3.0)
    batch, answers = toy_batch(model, COUNT, wrong_every=0)
    prepared = build_objective("answer").prepare(model, batch, answers)
    delta = APGD(steps=STEPS).maximise(prepared, batch.pixels, threat, generators(COUNT)).delta
    theirs = np.concatenate([art_apgd(model, batch.select([i]), threat) for i in range(COUNT)])
    with torch.no_grad():
        clean, ours, peer = (
            prepared(pixels).loss for pixels in (batch.pixels, batch.pixels + delta, torch.from_numpy(theirs))
        )
    assert (peer > clean).all()  # theirs does climb
    assert ours.mean() >= peer.mean() - 1e-3 and (ours >= peer - 0.02 * peer).all()
