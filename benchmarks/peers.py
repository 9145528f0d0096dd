"""Attacks of ART, Foolbox and torchattacks for benchmarks/attacks.py, each as its own manual calls it.

Each takes (module, pixels, targets, eps, steps, restarts) and gives images of which all count: a question stands if it
does on each of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from safemed_bench.attacks.pursuit import Scored
from safemed_bench.models.base import Batch

ABSENT = -1e4
"""Score of an option that is not there; the peers cannot take -inf."""


class Module(nn.Module):
    """(n, 3, H, W) pixels to (n, K) scores of the same n questions, in their order. Refuses any other number."""

    def __init__(self, prepared: Scored, batch: Batch) -> None:
        super().__init__()
        self.prepared, self.count = prepared, len(batch)
        self.options = max(len(q.options) for q in batch.questions)
        self.anchor = nn.Parameter(torch.zeros(1), requires_grad=False)  # torchattacks looks for the device here

    def forward(self, pixels: Tensor) -> Tensor:
        if len(pixels) != self.count:
            raise ValueError(f"{len(pixels)} images for {self.count} questions")
        return self.prepared.scores(pixels.float()).clamp_min(ABSENT)


def art_classifier(module: Module, pixels: Tensor) -> Any:
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        module, loss=nn.CrossEntropyLoss(), input_shape=tuple(pixels.shape[1:]), nb_classes=module.options,
        clip_values=(0, 1), device_type="cpu",
    )  # fmt: skip


def art_pgd(module: Module, pixels: Tensor, targets: Tensor, eps: float, steps: int, restarts: int) -> list[Tensor]:
    from art.attacks.evasion import ProjectedGradientDescent

    attack = ProjectedGradientDescent(
        art_classifier(module, pixels), eps=eps, eps_step=2.5 * eps / steps, max_iter=steps, num_random_init=restarts,
        batch_size=len(pixels), verbose=False,
    )  # fmt: skip
    return [torch.from_numpy(attack.generate(pixels.numpy(), targets.numpy()))]


def art_apgd(module: Module, pixels: Tensor, targets: Tensor, eps: float, steps: int, restarts: int) -> list[Tensor]:
    """One restart: a second one would pair what still stands with the wrong questions."""
    from art.attacks.evasion import AutoProjectedGradientDescent

    classifier = art_classifier(module, pixels)
    # It asks with one image whether these are probabilities, which `module` would refuse.
    classifier.predict = lambda x: np.full((1, module.options), -1.0)
    attack = AutoProjectedGradientDescent(
        classifier, eps=eps, eps_step=2 * eps, max_iter=steps, nb_random_init=restarts,
        batch_size=len(pixels), loss_type="cross_entropy", verbose=False,
    )  # fmt: skip
    return [torch.from_numpy(attack.generate(pixels.numpy(), targets.numpy()))]


def foolbox_pgd(module: Module, pixels: Tensor, targets: Tensor, eps: float, steps: int, restarts: int) -> list[Tensor]:
    import foolbox

    attack = foolbox.attacks.LinfPGD(rel_stepsize=2.5 / steps, steps=steps).repeat(restarts)
    return [attack(foolbox.PyTorchModel(module, bounds=(0, 1), device="cpu"), pixels, targets, epsilons=eps)[1]]


def foolbox_fgsm(module: Module, pixels: Tensor, targets: Tensor, eps: float) -> list[Tensor]:
    import foolbox

    model = foolbox.PyTorchModel(module, bounds=(0, 1), device="cpu")
    return [foolbox.attacks.LinfFastGradientAttack()(model, pixels, targets, epsilons=eps)[1]]


def torchattacks_pgd(
    module: Module, pixels: Tensor, targets: Tensor, eps: float, steps: int, restarts: int
) -> list[Tensor]:
    import torchattacks

    attack = torchattacks.PGD(module, eps=eps, alpha=2.5 * eps / steps, steps=steps)
    return [attack(pixels, targets) for _ in range(restarts)]


def torchattacks_apgd(
    module: Module, pixels: Tensor, targets: Tensor, eps: float, steps: int, restarts: int
) -> list[Tensor]:
    import torchattacks

    return [torchattacks.APGD(module, eps=eps, steps=steps, n_restarts=restarts, loss="ce")(pixels, targets)]


PEERS: dict[tuple[str, str], Any] = {
    ("art", "pgd"): art_pgd,
    ("art", "apgd"): art_apgd,
    ("foolbox", "pgd"): foolbox_pgd,
    ("torchattacks", "pgd"): torchattacks_pgd,
    ("torchattacks", "apgd"): torchattacks_apgd,
}
