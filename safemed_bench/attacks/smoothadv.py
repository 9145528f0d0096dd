"""Attacks on models that see the image through randomness: smoothed ones, or any that draws while it answers.

A gradient at one draw climbs that draw. These attacks climb an average over `draws` of them, fresh ones at every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core.errors import UsageError
from ..models.base import VisionLanguageModel
from .base import Prepared, Reading
from .pgd import PGD


@dataclass(frozen=True)
class Averaged(Prepared):
    """An objective over `draws` copies of each image, behind Gaussian noise of `sigma` (0: the model's own draws).

    likelihood: the loss is -log of the mean of exp(-loss) over the copies (SmoothAdv, 1906.04584, eq. 5: the loss of
    the mean probability); otherwise the mean loss (EOT, 1707.07397). A copied image stays in [0, 1], as the deployed
    path's 8-bit image does. generators: one CPU stream per image.
    """

    inner: Prepared
    sigma: float
    draws: int
    likelihood: bool
    generators: tuple[torch.Generator, ...]
    extra: tuple[dict[str, Any], ...] = ()

    def __call__(self, pixels: Tensor) -> Reading:
        count = len(pixels)
        rows = torch.arange(count, device=pixels.device).repeat_interleave(self.draws)
        copies = pixels.repeat_interleave(self.draws, dim=0)
        if self.sigma:
            copies = (copies + self.sigma * self._noise(pixels)).clamp(0, 1)
        reading = self.inner.select(rows)(copies)
        losses = reading.loss.view(count, self.draws)
        loss = math.log(self.draws) - (-losses).logsumexp(1) if self.likelihood else losses.mean(1)
        return Reading(loss, reading.suspects.view(count, self.draws).float().mean(1) > 0.5)

    def _noise(self, pixels: Tensor) -> Tensor:
        shape = (self.draws, *pixels.shape[1:])
        return torch.cat([torch.randn(shape, generator=generator) for generator in self.generators]).to(pixels)

    def select(self, rows: Tensor) -> Averaged:
        chosen = tuple(self.generators[i] for i in rows.tolist())
        return replace(self, inner=self.inner.select(rows), generators=chosen, extra=())


@dataclass(frozen=True)
class SmoothAdv(PGD):
    """PGD on the smoothed model (Salman et al., 1906.04584): the log of the mean probability over noisy copies.

    draws: copies per step. sigma: of the noise, [0, 1] pixel scale; None is that of the smoothed entry under attack.
    keep: the last iterate, for the best by a loss that is noise would be the luckiest. Raises UsageError where nobody
    names a sigma.
    """

    name: ClassVar[str] = "smoothadv"
    likelihood: ClassVar[bool] = True

    keep: Literal["best", "last"] = "last"
    draws: int = 4
    sigma: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.draws, bool) or not isinstance(self.draws, int) or self.draws < 1:
            raise UsageError(f"attack '{self.name}': draws must be a whole number above 0, not {self.draws!r}")
        if self.sigma is not None and not 0 <= self.sigma < math.inf:
            raise UsageError(f"attack '{self.name}': sigma must be a number of at least 0, not {self.sigma!r}")

    def surrogate(
        self, prepared: Prepared, model: VisionLanguageModel, generators: Sequence[torch.Generator]
    ) -> Prepared:
        sigma = self._sigma(model)
        return Averaged(prepared, sigma, self.draws, self.likelihood, tuple(generators), prepared.extra)

    def _sigma(self, model: VisionLanguageModel) -> float:
        sigma = getattr(model, "sigma", None) if self.sigma is None else self.sigma
        if sigma is None:
            raise UsageError(f"attack '{self.name}' needs `sigma`: '{model.name}' is not a smoothed entry")
        return float(sigma)


@dataclass(frozen=True)
class EOT(SmoothAdv):
    """PGD on the expected loss (expectation over transformation, Athalye et al., 1707.07397) of a randomised model.

    sigma: None is 0 for a model that draws by itself, and a smoothed entry's own noise.
    """

    name: ClassVar[str] = "eot"
    likelihood: ClassVar[bool] = False

    def _sigma(self, model: VisionLanguageModel) -> float:
        return float(getattr(model, "sigma", 0.0) if self.sigma is None else self.sigma)
