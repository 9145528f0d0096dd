"""The frame of every certifier: noisy copies in a fixed order, counts that can be journalled, and the certificate.

A certifier sees one picture and a plain `predict`. It knows no model, no question and no true answer. Sample i is the
same picture whatever the batch size and whenever it is drawn, and a certificate is a function of the samples in their
order: neither batch size nor interruption can change it.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, final

from ..core.errors import UsageError
from ..core.seeds import derive_seed
from .evidence import certified_radius, needed_probability

if TYPE_CHECKING:
    import torch
    from torch import Tensor

INVALID = -1
"""The label of an answer that names no option. A class like any other when counted; it can win, and never certifies."""

NOISE_CHUNK = 16
"""Noise is drawn in chunks of this many samples, each from a stream of its own. Changing it changes every result."""

NEAR_ONE = 1 - 1e-12
"""A radius that asks for a probability above this is beyond what counts and double precision can show."""

Predict = Callable[["Tensor"], Sequence[int]]
"""(B, 3, H, W) noisy pixels, not clamped, to B labels: the option's index or INVALID."""

Verdict = Literal["certified", "refuted", "abstain"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided of one radius (L2), and after how many test samples."""

    radius: float
    verdict: Verdict
    n: int


@dataclass(frozen=True)
class Certificate:
    """What is proven of one picture; wrong with probability at most alpha, over the noise.

    answer: the smoothed model's answer within `radius` of the picture, None where none is proven (p_low < 1/2, or
    INVALID won the selection). radius: L2, [0, 1] pixel scale, 0 without an answer. verdict: on the smallest radius
    that was asked for, or on radius 0 (is `candidate` the majority answer?) where none was. n: test samples; the
    n0 selection samples are not among them. counts: label -> how many of the n. p_low: lower bound of the
    probability of `candidate`, the winner of the selection. decisions: one per radius asked for, rising.
    """

    answer: int | None
    radius: float
    verdict: Verdict
    n: int
    counts: Mapping[int, int]
    p_low: float
    alpha: float
    sigma: float
    candidate: int
    decisions: tuple[Decision, ...] = ()

    def linf_equivalent(self, values: int) -> float:
        """R / sqrt(d): the largest L-infinity ball inside the L2 ball, for a picture of d = `values` = 3 H W."""
        return self.radius / math.sqrt(values)


class Request(NamedTuple):
    """Samples start to start + size of a phase's stream."""

    phase: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class State:
    """How far a certificate is. `seed` and `origin` say of what; resumed with any other, it is refused.

    selection, test: label -> count; their sums say how many samples were drawn. decided: per radius the verdict and
    the number of test samples it took, None while open.
    """

    seed: int
    origin: int
    selection: Mapping[int, int] = field(default_factory=dict)
    test: Mapping[int, int] = field(default_factory=dict)
    decided: tuple[tuple[Verdict, int] | None, ...] = ()

    @property
    def selected(self) -> int:
        return sum(self.selection.values())

    @property
    def tested(self) -> int:
        return sum(self.test.values())

    @property
    def candidate(self) -> int:
        """The most frequent label of the selection; of equals the smallest, and INVALID last."""
        return min(self.selection, key=lambda label: (-self.selection[label], label == INVALID, label))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a journal in JSON."""
        return {
            "seed": self.seed,
            "origin": self.origin,
            "selection": {str(label): count for label, count in self.selection.items()},
            "test": {str(label): count for label, count in self.test.items()},
            "decided": [done and list(done) for done in self.decided],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> State:
        return cls(
            seed=int(data["seed"]),
            origin=int(data["origin"]),
            selection={int(label): int(count) for label, count in data["selection"].items()},
            test={int(label): int(count) for label, count in data["test"].items()},
            decided=tuple(done and (done[0], int(done[1])) for done in data["decided"]),
        )


@dataclass(frozen=True)
class Certifier(ABC):
    """Shared parameters, sampling and selection. A subclass says which samples count, when to stop, and what follows.

    sigma: of the Gaussian noise, L2, [0, 1] pixel scale. n: test samples, or the most of them. n0: selection samples,
    kept apart from the test. alpha: probability that a certificate is wrong. radii: L2, the ones a table asks for.
    """

    name: ClassVar[str]

    sigma: float
    n: int = 1000
    n0: int = 100
    alpha: float = 0.001
    radii: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for key in ("sigma", "alpha"):
            self._number(key, getattr(self, key))
        for key in ("n", "n0"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise self._refused(f"{key} must be a whole number of at least 1, not {value!r}")
        if not 0 < self.sigma < math.inf:
            raise self._refused(f"sigma must be above 0, not {self.sigma}: without noise there is no certificate")
        if not 0 < self.alpha < 1:
            raise self._refused(f"alpha must lie between 0 and 1, not {self.alpha}")
        if isinstance(self.radii, str) or not isinstance(self.radii, Sequence):
            raise self._refused(f"radii must be a list of numbers, not {self.radii!r}")
        radii = tuple(sorted({self._number("radii", radius) for radius in self.radii}))
        object.__setattr__(self, "radii", radii)
        self._check_reach()

    def _number(self, key: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise self._refused(f"{key} must be a number, not {value!r}")
        return float(value)

    def _refused(self, reason: str) -> UsageError:
        return UsageError(f"certifier '{self.name}': {reason}")

    def _check_reach(self) -> None:
        """Refuse a radius that n samples could not certify even if all of them agreed."""
        for radius in self.radii or (0.0,):
            if not 0 <= radius < math.inf:
                raise self._refused(f"a radius must be at least 0 and finite, not {radius}")
            p0 = float(needed_probability(radius, self.sigma))
            if p0 > NEAR_ONE:
                raise self._refused(f"radius {radius:g} is {radius / self.sigma:.3g} sigma: out of reach of any n")
            if self.n < (least := self.needs(p0)):
                raise self._refused(
                    f"n = {self.n} can never certify radius {radius:g} at sigma = {self.sigma:g} and alpha = "
                    f"{self.alpha:g}, even if all samples agree; the smallest n that can is {least}"
                )

    @abstractmethod
    def needs(self, p0: float) -> int:
        """The smallest n that can show a probability above p0."""

    @abstractmethod
    def _count(self, state: State, labels: Sequence[int]) -> State:
        """Take test samples in their order; none after the one that ends the test."""

    @abstractmethod
    def _ended(self, state: State) -> bool:
        """Whether the test has ended, short of drawing all n."""

    @abstractmethod
    def _p_low(self, state: State) -> float:
        """Lower bound of the candidate's probability, valid where the test has stopped."""

    @abstractmethod
    def _decisions(self, state: State, p_low: float) -> tuple[Decision, ...]:
        """One per radius, or one for radius 0 where none was asked for."""

    @abstractmethod
    def _identity(self) -> tuple[object, ...]:
        """The parameters with which a state must be resumed."""

    def start(self, seed: int) -> State:
        """Nothing drawn yet. seed: of this picture's own stream; the certifier derives selection and test from it."""
        return State(seed, derive_seed("certify", self.name, seed, *self._identity()))

    def done(self, state: State) -> bool:
        if state.selected < self.n0:
            return False
        return state.candidate == INVALID or state.tested >= self.n or self._ended(state)

    def request(self, state: State, limit: int) -> Request:
        """The next up to `limit` samples that an unfinished certificate wants, of one phase."""
        if state.selected < self.n0:
            return Request("selection", state.selected, min(limit, self.n0 - state.selected))
        return Request("test", state.tested, min(limit, self.n - state.tested))

    def take(self, state: State, labels: Sequence[int]) -> State:
        """The answers to what `request` asked for, in its order."""
        if state.selected < self.n0:
            return replace(state, selection=merged(state.selection, labels))
        return self._count(state, labels)

    def advance(self, state: State, predict: Predict, image: Tensor, batch_size: int) -> State:
        """The next up to `batch_size` samples of the selection or of the test. Raises ValueError on bad arguments."""
        check_image(image)
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        request = self.request(state, batch_size)
        labels = [int(label) for label in predict(noisy(image, self.sigma, state.seed, *request))]
        if len(labels) != request.size:
            raise ValueError(f"predict gave {len(labels)} answers for {request.size} pictures")
        return self.take(state, labels)

    def resumed(self, seed: int, state: State | None = None) -> State:
        """Where to go on: `state`, or the start. Raises ValueError for a state of something else."""
        fresh = self.start(seed)
        state = fresh if state is None else state
        if (state.seed, state.origin) != (fresh.seed, fresh.origin):
            raise ValueError("this state belongs to another seed, certifier or set of parameters")
        return state

    def certificate(self, state: State) -> Certificate:
        """What a finished state proves."""
        if not self.done(state):
            raise ValueError(f"{state.selected} + {state.tested} samples drawn: the certificate is not finished")
        candidate = state.candidate
        p_low = 0.0 if candidate == INVALID else self._p_low(state)
        if candidate == INVALID:
            decisions = tuple(Decision(radius, "abstain", 0) for radius in self.radii or (0.0,))
        else:
            decisions = self._decisions(state, p_low)
        # Through p0 and back a radius may come out a hair too small.
        shown = [decision.radius for decision in decisions if decision.verdict == "certified"]
        return Certificate(
            answer=candidate if p_low >= 0.5 else None,
            radius=max([certified_radius(p_low, self.sigma), *shown]),
            verdict=decisions[0].verdict,
            n=state.tested,
            counts=dict(sorted(state.test.items())),
            p_low=p_low,
            alpha=self.alpha,
            sigma=self.sigma,
            candidate=candidate,
            decisions=decisions if self.radii else (),
        )

    @final
    def __call__(
        self,
        predict: Predict,
        image: Tensor,
        *,
        seed: int,
        batch_size: int = 32,
        state: State | None = None,
        save: Callable[[State], None] | None = None,
    ) -> Certificate:
        """Certify one clean picture: (3, H, W) float in [0, 1], on the device that `predict` wants.

        state: where an earlier call was interrupted. save: called with the state after every batch. Raises ValueError
        for a picture of another form and for a state of another seed, certifier or parameters.
        """
        state = self.resumed(seed, state)
        while not self.done(state):
            state = self.advance(state, predict, image, batch_size)
            if save is not None:
                save(state)
        return self.certificate(state)


def merged(counts: Mapping[int, int], labels: Sequence[int]) -> dict[int, int]:
    """`counts` and the labels' own, by label."""
    return dict(sorted((Counter(counts) + Counter(labels)).items()))


def check_image(image: Tensor) -> None:
    """Raises ValueError unless `image` is (3, H, W) float in [0, 1]."""
    if image.ndim != 3 or image.shape[0] != 3 or not image.is_floating_point():
        raise ValueError(f"the picture must be (3, H, W) float, not {tuple(image.shape)} {image.dtype}")
    if not (image.min() >= 0 and image.max() <= 1):  # also refuses NaN
        raise ValueError("the picture must lie in [0, 1]")


def noise(image: Tensor, seed: int, phase: str, start: int, count: int) -> Tensor:
    """(count, 3, H, W) standard normal, like `image`: samples start to start + count of the phase's stream."""
    import torch  # here, so that a suite's certifiers can be checked without it

    drawn = torch.empty((count, *image.shape))
    fill(drawn, seed, phase, start)
    return drawn.to(image)


def fill(drawn: Tensor, seed: int, phase: str, start: int) -> None:
    """Put samples start to start + count of the phase's stream into `drawn`: (count, 3, H, W) float32 on the CPU, so
    that a GPU sees the same."""
    import torch

    count, shape = len(drawn), drawn.shape[1:]
    for number in range(start // NOISE_CHUNK, (start + count - 1) // NOISE_CHUNK + 1):
        offset = number * NOISE_CHUNK - start
        stream = derive_seed(seed, "certify", phase, number)
        if 0 <= offset <= count - NOISE_CHUNK:
            drawn[offset : offset + NOISE_CHUNK].normal_(generator=torch.Generator().manual_seed(stream))
        else:
            chunk = _chunk(shape, stream)
            drawn[max(offset, 0) : offset + NOISE_CHUNK] = chunk[max(-offset, 0) : count - offset]


def noisy(image: Tensor, sigma: float, seed: int, phase: str, start: int, count: int) -> Tensor:
    """(count, 3, H, W): `image` plus sigma times the noise of these samples."""
    return noise(image, seed, phase, start, count).mul_(sigma).add_(image)


@functools.lru_cache(maxsize=2)
def _chunk(shape: torch.Size, seed: int) -> Tensor:
    """All of a chunk of which a part is wanted. Never written to; held because the next batch asks for the rest."""
    import torch

    return torch.randn((NOISE_CHUNK, *shape), generator=torch.Generator().manual_seed(seed))
