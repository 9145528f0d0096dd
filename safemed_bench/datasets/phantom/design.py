"""Which case stands at which index: balanced over every stretch of images, and the same for any number of them.

Modalities take turns. Within a modality images come in rounds of eight: both regions times their four conditions,
the first four of a round holding each condition once and each region twice. Over three rounds each disease has each
grade once. Answer positions follow Latin squares over conditions and rounds. So counts are equal, not only in
expectation, up to what is left of the last round.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from ...core.seeds import derive_seed
from .catalogue import GRADES, MODALITIES, NORMAL, Modality, conditions_of

ROUND = 8
CYCLE = 12
"""Rounds after which all squares close: grades in 3, positions in 4, both in 12."""
PAIRS = (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2)))
"""The three ways to part four conditions into two pairs."""


@dataclass(frozen=True)
class Slot:
    """What an index is given. Positions count options from 0.

    rival: the one other condition a two-option disease question offers, None where all four are offered.
    """

    modality: Modality
    region: str
    condition: str
    grade: str | None
    modality_position: int
    region_position: int
    disease_position: int
    grade_position: int
    rival: str | None


def slot(seed: int, split: str, index: int) -> Slot:
    """The slot of image `index` (from 0) of a split."""
    within, m = divmod(index, len(MODALITIES))
    cycle, place = divmod(within, ROUND * CYCLE)
    return _cycle(seed, split, m, cycle)[place]


@lru_cache(maxsize=64)
def _cycle(seed: int, split: str, m: int, cycle: int) -> tuple[Slot, ...]:
    rng = np.random.default_rng(derive_seed("phantom design", seed, split, m, cycle))
    squares = [[_Squares(rng, part) for part in range(CYCLE // 4)] for _ in MODALITIES[m].regions]
    slots = []
    for turn in range(CYCLE):
        for r, c in _round_order(rng):
            slots.append(_make(MODALITIES[m], r, c, turn, squares[r][turn // 4], squares[r]))
    return tuple(slots)


class _Squares:
    """Latin squares of one region over four rounds (positions) and over three (grades)."""

    def __init__(self, rng: np.random.Generator, part: int) -> None:
        self.modality = _latin(rng, 4)
        self.region = _latin(rng, 4)
        self.disease = _latin(rng, 4)
        self.grades = [_latin(rng, 3) for _ in range(CYCLE // 3)]
        self.grade_positions = [_latin(rng, 3) for _ in range(CYCLE // 3)]
        self.pairing = PAIRS[part]
        self.pair_flips = rng.integers(2, size=2)


def _latin(rng: np.random.Generator, n: int) -> np.ndarray:
    """(n, n) Latin square over range(n), its rows, columns and symbols in random order."""
    rows, columns, symbols = (rng.permutation(n) for _ in range(3))
    return symbols[(rows[:, None] + columns[None, :]) % n]


def _round_order(rng: np.random.Generator) -> list[tuple[int, int]]:
    """The eight (region, condition) of a round; each half has every condition once and every region twice."""
    first = rng.permutation([0, 0, 1, 1])
    halves = [[(int(r), c) for c, r in enumerate(regions)] for regions in (first, 1 - first)]
    return [half[i] for half in halves for i in rng.permutation(4)]


def _make(modality: Modality, r: int, c: int, turn: int, now: _Squares, parts: list[_Squares]) -> Slot:
    region = modality.regions[r]
    conditions = conditions_of(region)
    grade, grade_position = None, 0
    if conditions[c] != NORMAL:
        third, row = divmod(turn, 3)
        grade = GRADES[parts[0].grades[third][row, c - 1]]
        grade_position = int(parts[0].grade_positions[third][row, c - 1])
    position, rival = int(now.disease[turn % 4, c]), None
    if turn % 4 == 3:  # one round in four asks for one of two: the same pair, in the same order, for both its members
        which = next(i for i, pair in enumerate(now.pairing) if c in pair)
        pair = now.pairing[which]
        rival = conditions[pair[1 - pair.index(c)]]
        position = int(pair.index(c) ^ now.pair_flips[which])
    return Slot(
        modality,
        region,
        conditions[c],
        grade,
        int(now.modality[turn % 4, c]),
        int(now.region[turn % 4, c]),
        position,
        grade_position,
        rival,
    )
