"""Attacks of the Adversarial Robustness Toolbox, one question per call.

ART pairs images with the wrong question as soon as it reorders or thins out a batch. Here it is never given more than
one question, and its model refuses more than one image. It is imported when an attack of it runs: that takes seconds.
Its image is then quantised, audited and judged by the deployed path like any other.
"""

from __future__ import annotations

import random
import warnings
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from ..core.errors import UsageError
from ..core.types import Answer
from . import pgd
from .base import Attack, Pursuit
from .climb import require_count
from .pursuit import Scored
from .square import margin
from .threat import project

NORMS: dict[str, float] = {"linf": np.inf, "l2": 2}


class _Art(Attack):
    """Calls ART for one question after the other, each with its own random stream."""

    @abstractmethod
    def _adversarial(self, pursuit: Pursuit, row: int) -> NDArray[np.float32] | None:
        """ART's (1, 3, H, W) image for one question; None where nothing is left to judge."""

    @property
    def starts(self) -> int:
        """Calls per question; later ones where the earlier ones failed."""
        return 1

    def perturb(self, pursuit: Pursuit) -> None:
        norm = pursuit.threat.norm
        if norm not in NORMS:
            raise UsageError(f"attack '{self.name}' works in {' and '.join(NORMS)}, not in {norm}")
        if not pursuit.judged:
            raise UsageError(f"attack '{self.name}' needs the deployed path's answers; it cannot train a model")
        self._begin(pursuit)
        for _ in range(self.starts):
            for row in pursuit.survivors().tolist():
                self._attack(pursuit, row)

    def _begin(self, pursuit: Pursuit) -> None:
        """Before the first question: the loss on the clean images, as the start of each."""
        pursuit.read(pursuit.rows(), torch.zeros_like(pursuit.clean), gradient=False)

    def _attack(self, pursuit: Pursuit, row: int) -> None:
        rows = pursuit.rows()[row : row + 1]
        clean, delta = pursuit.clean[rows], torch.zeros_like(pursuit.clean[rows])
        if pursuit.threat.eps:
            with _seeded(pursuit.generators[row]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                image = self._adversarial(pursuit, row)
            if image is None:
                return
            delta = project(pursuit.threat, (torch.from_numpy(image).to(clean) - clean).nan_to_num(), clean)
        self._judge(pursuit, rows, delta)

    def _judge(self, pursuit: Pursuit, rows: Tensor, delta: Tensor) -> None:
        reading, _ = pursuit.read(rows, delta, gradient=False)
        pursuit.verify(rows, delta, reading.loss)


class _Gradient(_Art):
    """An attack of ART's that climbs the gradient of a loss of the options' scores."""

    @abstractmethod
    def _build(self, classifier: Any, given: dict[str, Any]) -> Any:
        """ART's attack; `given` is what all of them take."""

    def _adversarial(self, pursuit: Pursuit, row: int) -> NDArray[np.float32]:
        from art.estimators.classification import PyTorchClassifier

        module = _OneQuestion(pursuit, row)
        clean = pursuit.clean[row : row + 1].cpu().numpy().astype(np.float32)
        classifier = PyTorchClassifier(
            module,
            loss=_Loss(module.objective),
            input_shape=clean.shape[1:],
            nb_classes=module.options,
            clip_values=pursuit.threat.bounds,
            device_type="cpu",  # of its own tensors; the module takes the pixels to the model
        )
        given = {"norm": NORMS[pursuit.threat.norm], "eps": pursuit.threat.eps, "batch_size": 1}
        attack = self._build(classifier, given)
        return np.asarray(attack.generate(clean, np.eye(module.options)[pursuit.targets[row]][None]), np.float32)


class _OneQuestion(nn.Module):
    """Pixels to the scores of one question's options, as ART wants a model. Raises ValueError for two images."""

    def __init__(self, pursuit: Pursuit, row: int) -> None:
        super().__init__()
        self.objective = pursuit.scored(pursuit.rows()[row : row + 1])
        self.pursuit, self.row = pursuit, row
        pursuit.spend(row, forwards=1)
        with torch.no_grad():
            found = self.objective.scores(pursuit.clean[row : row + 1])
        self.present = found[0].isfinite().nonzero().flatten()

    @property
    def options(self) -> int:
        return len(self.present)

    def forward(self, pixels: Tensor) -> Tensor:
        if len(pixels) != 1:
            raise ValueError(f"{len(pixels)} images for one question")
        self.pursuit.spend(self.row, forwards=1)
        shown = pixels.to(self.pursuit.clean)  # Auto-PGD's become float64 on the way
        scores = self.objective.scores(shown)[:, self.present].to(pixels.device)
        if not scores.requires_grad:  # of a model that does not look: a gradient of zero, not an error
            scores = scores + 0.0 * pixels.sum()
        if scores.requires_grad:
            scores.register_hook(lambda _: self.pursuit.spend(self.row, backwards=1))
        return scores


class _Loss(nn.Module):
    """The objective's loss of scores and one-hot targets; ART sets `reduction`."""

    def __init__(self, objective: Scored) -> None:
        super().__init__()
        self.objective, self.reduction = objective, "mean"

    def forward(self, scores: Tensor, targets: Tensor) -> Tensor:
        loss = self.objective.loss_of(scores, targets.argmax(dim=1))
        return loss if self.reduction == "none" else loss.mean()


@contextmanager
def _seeded(generator: Generator) -> Iterator[None]:
    """ART draws from the global streams: inside they follow the question's own one, and are put back at the end."""
    seed = int(torch.randint(2**31, (), generator=generator))
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)


@dataclass(frozen=True)
class FGM(_Gradient):
    """ART's FastGradientMethod: one step of length eps from the clean image."""

    name: ClassVar[str] = "art:FGM"

    def _build(self, classifier: Any, given: dict[str, Any]) -> Any:
        from art.attacks.evasion import FastGradientMethod

        return FastGradientMethod(classifier, **given)


@dataclass(frozen=True)
class PGD(_Gradient):
    """ART's ProjectedGradientDescent. Parameters are those of `pgd`; the result is the last iterate."""

    name: ClassVar[str] = "art:PGD"

    steps: int = 20
    restarts: int = 1
    random_start: bool = True
    step_size: float | None = None
    rel_step: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "restarts"):
            require_count(self.name, name, getattr(self, name))
        self._ours()  # refuses what ours does

    def _ours(self) -> pgd.PGD:
        return pgd.PGD(steps=self.steps, step_size=self.step_size, rel_step=self.rel_step)

    @property
    def starts(self) -> int:
        return self.restarts

    def _build(self, classifier: Any, given: dict[str, Any]) -> Any:
        from art.attacks.evasion import ProjectedGradientDescent

        return ProjectedGradientDescent(
            classifier,
            **given,
            eps_step=self._ours().length(given["eps"]),
            max_iter=self.steps,
            num_random_init=int(self.random_start),
            verbose=False,
        )


@dataclass(frozen=True)
class MIM(_Gradient):
    """ART's MomentumIterativeMethod, from the clean image. rel_step: as a part of eps, by default 1 / steps."""

    name: ClassVar[str] = "art:MIM"

    steps: int = 20
    decay: float = 1.0
    rel_step: float | None = None

    def __post_init__(self) -> None:
        require_count(self.name, "steps", self.steps)
        if not self.decay >= 0:
            raise UsageError(f"attack '{self.name}': decay must be 0 or above, not {self.decay!r}")
        if self.rel_step is not None and not self.rel_step > 0:
            raise UsageError(f"attack '{self.name}': rel_step must be above 0, not {self.rel_step!r}")

    def _build(self, classifier: Any, given: dict[str, Any]) -> Any:
        from art.attacks.evasion import MomentumIterativeMethod

        step = given["eps"] * (self.rel_step if self.rel_step is not None else 1 / self.steps)
        return MomentumIterativeMethod(
            classifier, **given, eps_step=step, decay=self.decay, max_iter=self.steps, verbose=False
        )


@dataclass(frozen=True)
class APGD(_Gradient):
    """ART's AutoProjectedGradientDescent on the objective's loss, with a first step of 2 eps as in the paper."""

    name: ClassVar[str] = "art:APGD"

    steps: int = 20
    restarts: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "restarts"):
            require_count(self.name, name, getattr(self, name))

    @property
    def starts(self) -> int:
        return self.restarts

    def _build(self, classifier: Any, given: dict[str, Any]) -> Any:
        from art.attacks.evasion import AutoProjectedGradientDescent

        return AutoProjectedGradientDescent(
            classifier,
            **given,
            eps_step=2 * given["eps"],
            max_iter=self.steps,
            nb_random_init=1,
            loss_type=None,
            verbose=False,
        )


class _FooledError(Exception):
    """Ends a search that has succeeded."""


@dataclass(frozen=True)
class Square(_Art):
    """ART's SquareAttack on the option scores that the deployed path shows.

    queries: calls of the deployed path per question, at most; an image that ART asks for twice is shown once. share: of
    the image that the first squares cover.
    """

    name: ClassVar[str] = "art:Square"
    needs_objective: ClassVar[bool] = False

    queries: int = 500
    share: float = 0.8

    def __post_init__(self) -> None:
        require_count(self.name, "queries", self.queries)
        if self.queries < 3:
            raise UsageError(f"attack '{self.name}': queries must be 3 or more: clean image, stripes, one square")
        if not 0 < self.share < 1:
            raise UsageError(f"attack '{self.name}': share must be in (0, 1), not {self.share!r}")

    def _begin(self, pursuit: Pursuit) -> None:
        """No loss to begin with."""

    def _judge(self, pursuit: Pursuit, rows: Tensor, delta: Tensor) -> None:
        """Only where eps is 0; else every image was judged when ART asked for it."""
        pursuit.query(rows, delta, margin)

    def _adversarial(self, pursuit: Pursuit, row: int) -> None:
        from art.attacks.evasion import SquareAttack
        from art.estimators.classification import BlackBoxClassifierNeuralNetwork

        clean = pursuit.clean[row : row + 1].cpu().numpy().astype(np.float32)
        deployed = _Deployed(pursuit, row)
        if pursuit.success[row]:
            return
        classifier = BlackBoxClassifierNeuralNetwork(
            deployed,
            clean.shape[1:],
            deployed.options,
            channels_first=True,
            clip_values=pursuit.threat.bounds,
        )
        attack = SquareAttack(
            classifier,
            norm=NORMS[pursuit.threat.norm],
            eps=pursuit.threat.eps,
            max_iter=self.queries - 2,  # the clean image and the first stripes are asked for, too
            p_init=self.share,
            batch_size=1,
            verbose=False,
        )
        try:
            attack.generate(clean, np.eye(deployed.options)[pursuit.targets[row]][None])
        except _FooledError:
            return


class _Deployed:
    """(1, 3, H, W) pixels to (1, K) scores of the deployed answer. Raises _FooledError once that is wrong."""

    def __init__(self, pursuit: Pursuit, row: int) -> None:
        self.pursuit, self.row, self.rows = pursuit, row, pursuit.rows()[row : row + 1]
        self.seen: dict[bytes, NDArray[np.float64]] = {}
        self.options = self._scores_of(pursuit.clean[self.rows].cpu().numpy()).shape[1]

    def __call__(self, pixels: NDArray[Any]) -> NDArray[np.float64]:
        if len(pixels) != 1:
            raise ValueError(f"{len(pixels)} images for one question")
        scores = self._scores_of(pixels)
        if self.pursuit.success[self.row]:
            raise _FooledError
        return scores

    def _scores_of(self, pixels: NDArray[Any]) -> NDArray[np.float64]:
        shown = np.ascontiguousarray(pixels, dtype=np.float32)
        if not np.isfinite(shown).all():  # in L2 it divides by zero where a move leaves nothing; never an improvement
            return np.eye(self.options)[self.pursuit.targets[self.row]][None] * 1e9
        key = shown.tobytes()
        scores = self.seen.pop(key) if key in self.seen else self._asked(torch.from_numpy(shown))
        self.seen = dict([*self.seen.items()][-3:]) | {key: scores}  # the best image so far is asked for at every step
        return scores

    def _asked(self, pixels: Tensor) -> NDArray[np.float64]:
        clean = self.pursuit.clean[self.rows]
        answers: list[Answer] = []

        def score(answer: Answer, target: int) -> float:
            answers.append(answer)
            return margin(answer, target)

        delta = project(self.pursuit.threat, pixels.to(clean) - clean, clean)
        self.pursuit.query(self.rows, delta, score)
        scores = answers[0].option_logprobs
        if not scores:
            raise UsageError("attack 'art:Square' needs option scores, which this entry's answers do not show")
        return np.array([scores])
