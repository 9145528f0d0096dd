"""Square attack (Andriushchenko et al., 1912.00049): random search with squares, without any gradient.

It sees only what the deployed path answers, so that a defence which merely hides its gradient does not stop it. The L1
form is that of 2103.01208, appendix.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Generator, Tensor

from ..core.errors import UsageError
from ..core.types import Answer, ThreatModel
from .base import Attack, Pursuit
from .climb import require_count
from .threat import project

HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""Queries, of 10,000, after which the squares' share of the image halves."""


@dataclass(frozen=True)
class Square(Attack):
    """Random squares, each kept if the answer gets worse.

    queries: calls of the deployed path per question, at most. feedback: what is seen of an answer; `scores` the
    options' log-probabilities, of which the best wrong one minus the true one is raised; `verdict` only which option is
    answered, so that nothing guides the search before it succeeds. share: of the image that the first squares cover.
    No objective: there is nothing to differentiate.
    """

    name: ClassVar[str] = "square"
    needs_objective: ClassVar[bool] = False

    queries: int = 500
    feedback: Literal["scores", "verdict"] = "scores"
    share: float = 0.8

    def __post_init__(self) -> None:
        require_count(self.name, "queries", self.queries)
        if self.feedback not in ("scores", "verdict"):
            raise UsageError(f"attack '{self.name}': feedback must be scores or verdict, not {self.feedback!r}")
        if not 0 < self.share <= 1:
            raise UsageError(f"attack '{self.name}': share must be in (0, 1], not {self.share!r}")

    def perturb(self, pursuit: Pursuit) -> None:
        rows, threat = pursuit.rows(), pursuit.threat
        score = margin if self.feedback == "scores" else wrongness
        starts = [_start(threat, clean, g) for clean, g in zip(pursuit.clean, pursuit.generators, strict=True)]
        best = project(threat, torch.stack(starts), pursuit.clean)
        loss = pursuit.query(rows, best, score)
        for count in range(1, self.queries):
            standing = ~pursuit.success[rows]
            rows, best, loss = rows[standing], best[standing], loss[standing]
            if not len(rows):
                return
            share = self.share / 2 ** bisect_left(HALVINGS, count * 10_000 // self.queries)
            moved = [_move(threat, delta, share, pursuit.generators[i]) for delta, i in zip(best, rows, strict=True)]
            trial = project(threat, torch.stack(moved), pursuit.clean[rows])
            reached = pursuit.query(rows, trial, score)
            # Verdicts alone are equal until the end: without a guide the search wanders.
            better = reached > loss if self.feedback == "scores" else reached >= loss
            best = torch.where(better.view(-1, 1, 1, 1), trial, best)
            loss = torch.where(better, reached, loss)


def margin(answer: Answer, target: int) -> float:
    """Best wrong option's log-probability minus the true one's; `wrongness` where the answer shows no scores."""
    scores = answer.option_logprobs
    if not scores:
        return wrongness(answer, target)
    return max(s for i, s in enumerate(scores) if i != target) - scores[target]


def wrongness(answer: Answer, target: int) -> float:
    """1 for a wrong answer, 0 for the true one."""
    return float(answer.index != target)


def _start(threat: ThreatModel, clean: Tensor, generator: Generator) -> Tensor:
    """(3, H, W). L∞: vertical stripes of +-eps. Else a grid of bumps, with the whole budget."""
    channels, height, width = clean.shape
    if threat.norm == "linf":
        return (threat.eps * _signs((channels, 1, width), generator).to(clean)).expand_as(clean)
    delta, side = torch.zeros_like(clean), max(min(height, width) // 5, 1)
    for top in range(0, height - side + 1, side):
        for left in range(0, width - side + 1, side):
            bumps = _bumps(side, generator) * _signs((channels, 1, 1), generator)
            delta[:, top : top + side, left : left + side] = bumps.to(clean)
    return _whole(threat, delta)


def _move(threat: ThreatModel, delta: Tensor, share: float, generator: Generator) -> Tensor:
    """A neighbour of one (3, H, W) perturbation: one square of it is painted anew."""
    channels, height, width = delta.shape
    delta = delta.clone()
    side = round((share * height * width) ** 0.5)
    if threat.norm == "linf":
        side = max(1, min(side, height - 1, width - 1))
        window = _window(delta, side, generator)
        delta[window] = threat.eps * _signs((channels, 1, 1), generator).to(delta)
        return delta
    side = min(max(side, 3) | 1, (min(height, width) - 1) | 1)  # odd
    return _move_mass(threat, delta, side, generator)


def _move_mass(threat: ThreatModel, delta: Tensor, side: int, generator: Generator) -> Tensor:
    """Empties one square into another, which gets new bumps on top of its own; the whole budget is used."""
    order = 1 if threat.norm == "l1" else 2
    target, source = _window(delta, side, generator), _window(delta, side, generator)
    unused = max(threat.eps**order - float(_power(delta, order).sum()), 0.0) / len(delta)
    both = torch.zeros_like(delta)
    both[target] = both[source] = 1.0
    held = _power(delta * both, order)
    own = delta[target]
    bumps = (_bumps(side, generator) * _signs((len(delta), 1, 1), generator)).to(delta)
    fresh = bumps + own / _length(own, order).clamp_min(1e-10)
    delta[source] = 0.0
    delta[target] = fresh / _length(fresh, order).clamp_min(1e-10) * (unused + held) ** (1 / order)
    return _whole(threat, delta)


def _power(delta: Tensor, order: int) -> Tensor:
    """(3, 1, 1) sum of |values| ** order of each channel."""
    return delta.abs().pow(order).sum(dim=(1, 2), keepdim=True)


def _length(delta: Tensor, order: int) -> Tensor:
    return _power(delta, order) ** (1 / order)


def _whole(threat: ThreatModel, delta: Tensor) -> Tensor:
    """Scaled to norm eps."""
    order = 1 if threat.norm == "l1" else 2
    return delta * (threat.eps / delta.flatten().norm(p=order).clamp_min(1e-10))


def _window(delta: Tensor, side: int, generator: Generator) -> tuple[slice, slice, slice]:
    """A random square inside the image, over all channels."""
    top, left = (int(torch.randint(0, max(size - side, 0) + 1, (), generator=generator)) for size in delta.shape[1:])
    return slice(None), slice(top, top + side), slice(left, left + side)


def _signs(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0


def _bumps(side: int, generator: Generator) -> Tensor:
    """(side, side), norm 1: a hill beside a hollow, upright or lying (1912.00049, equation 2)."""
    half = side // 2
    parts = [_hill(half, side), -_hill(side - half, side)] if half else [_hill(1, 1)]
    bumps = torch.cat(parts)
    bumps = bumps / bumps.norm()
    return bumps.T if int(torch.randint(0, 2, (), generator=generator)) else bumps


def _hill(height: int, width: int) -> Tensor:
    """(height, width): the sum of 1 / (k + 1)^2 over the centred squares of side 2k + 1 that hold a value; norm 1."""
    steps = max(height, width) // 2 + 1
    heights = torch.tensor([1 / (k + 1) ** 2 for k in range(steps)]).flip(0).cumsum(0).flip(0)
    rows, columns = (torch.arange(height) - height // 2).abs(), (torch.arange(width) - width // 2).abs()
    hill = heights[torch.maximum(rows[:, None], columns[None]).clamp(max=steps - 1)]
    return hill / hill.norm()
