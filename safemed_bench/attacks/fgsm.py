"""Fast gradient sign method (Goodfellow et al., 1412.6572): one step of length eps, from the clean image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Attack, Pursuit
from .pgd import PGD


@dataclass(frozen=True)
class FGSM(Attack):
    """One full step along the sign of the gradient (L∞), the gradient (L2) or its largest values (L1), whatever it does
    to the loss.

    It is there for comparison: an iterative attack that is weaker than this one has a fault.
    """

    name: ClassVar[str] = "fgsm"

    def perturb(self, pursuit: Pursuit) -> None:
        PGD(steps=1, rel_step=1.0, random_start=False, keep="last").perturb(pursuit)
