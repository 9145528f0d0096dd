"""Many certificates at a time: their noisy copies share batches, so that a model is never asked a handful at once.

A certificate is a function of its own samples in their order; who shared a batch with whom cannot change it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from .base import Certificate, Certifier, Request, State, check_image, fill

if TYPE_CHECKING:
    from torch import Tensor

PredictMany = Callable[["Tensor", Sequence[int]], Sequence[int]]
"""(B, 3, H, W) noisy pixels and the place of the picture that each is a copy of, to B labels."""

Save = Callable[[Mapping[int, State]], None]

LEAST = 16
"""Samples a picture is given at a time; most certificates take a few dozen, and what is drawn beyond is lost."""


def certify_many(
    certifier: Certifier,
    predict: PredictMany,
    images: Sequence[Tensor],
    *,
    seeds: Sequence[int],
    batch_size: int = 256,
    states: Mapping[int, State] | None = None,
    save: Save | None = None,
) -> list[Certificate]:
    """A certificate for each (3, H, W) picture in [0, 1]; all of one size, on one device.

    seeds: one stream per picture. states: place -> where an earlier call was interrupted. save: called after every
    batch with the states that it moved. Raises ValueError as `Certifier.__call__` does.
    """
    for image in images:
        check_image(image)
    held = {place: certifier.resumed(seed, (states or {}).get(place)) for place, seed in enumerate(seeds)}
    open_ = [place for place in held if not certifier.done(held[place])]
    while open_:
        share = max(min(LEAST, batch_size), batch_size // len(open_))
        turn = open_[: max(1, batch_size // share)]
        moved = _round(certifier, predict, images, {place: held[place] for place in turn}, share)
        held |= moved
        if save is not None:
            save(moved)
        open_ = [place for place in open_ if not certifier.done(held[place])]
    return [certifier.certificate(held[place]) for place in sorted(held)]


def _round(
    certifier: Certifier, predict: PredictMany, images: Sequence[Tensor], states: Mapping[int, State], share: int
) -> dict[int, State]:
    """One batch: up to `share` samples of each picture."""
    wanted = {place: certifier.request(state, share) for place, state in states.items()}
    owners = [place for place, request in wanted.items() for _ in range(request.size)]
    found = list(predict(_copies(certifier, images, states, wanted), owners))
    if len(found) != len(owners):
        raise ValueError(f"predict gave {len(found)} answers for {len(owners)} pictures")
    moved = {}
    for place, request in wanted.items():
        mine, found = found[: request.size], found[request.size :]
        moved[place] = certifier.take(states[place], mine)
    return moved


def _copies(
    certifier: Certifier, images: Sequence[Tensor], states: Mapping[int, State], wanted: Mapping[int, Request]
) -> Tensor:
    """(B, 3, H, W) the pictures' noisy copies one after the other, as `noisy` makes them, drawn where they are used."""
    import torch

    first, sizes = images[next(iter(wanted))], [request.size for request in wanted.values()]
    drawn = torch.empty((sum(sizes), *first.shape))
    for part, (place, request) in zip(drawn.split(sizes), wanted.items(), strict=True):
        fill(part, states[place].seed, request.phase, request.start)
    copies = drawn.to(first).mul_(certifier.sigma)
    for part, place in zip(copies.split(sizes), wanted, strict=True):
        part.add_(images[place])
    return copies
