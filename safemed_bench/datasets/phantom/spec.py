"""What a phantom set is: its parameters, and the hash that names it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...core.errors import UsageError, did_you_mean
from .catalogue import MODALITIES

GENERATOR_VERSION = 3
"""Goes up whenever the same parameters would give other images or other questions."""

SPLITS = ("train", "validation", "test")

Range = tuple[float, float]


@dataclass(frozen=True)
class Difficulty:
    """How hard the images are. Lengths are pixels of a 64-pixel image and scale with the size; levels are of [0, 1].

    Signs stay far above the usual threat (8/255 = .03): a model that reads them is robust, a model that fits the
    nuisance around them is not.
    """

    anatomy: Range = (0.34, 0.56)
    """Contrast and colour of normal anatomy as a part of the painted ones, uniform per image: a flat acquisition, in
    which organs stand out from their surroundings less than signs do from organs."""
    contrast: Range = (0.28, 0.48)
    """Amplitude of a sign against its tissue, uniform."""
    radius_mild: Range = (3.2, 3.9)
    """Radius of a mild sign, pixels. The three ranges leave gaps, so that a grade is never a matter of opinion."""
    radius_moderate: Range = (5.1, 5.8)
    radius_severe: Range = (7.2, 8.0)
    noise: Range = (0.012, 0.035)
    """Sigma of the white noise, uniform per image."""
    speckle: Range = (0.08, 0.16)
    """Sigma of the multiplicative grain of ultrasound and OCT, uniform per image."""
    shift: float = 0.10
    """Largest shift of the anatomy in each direction, as a part of half the image."""
    scale: float = 0.07
    """Largest relative change of the anatomy's size. The sign's size does not follow it."""
    rotation: float = 0.12
    """Largest rotation of the anatomy, radians."""
    gain: float = 0.10
    """Largest relative change of brightness."""
    bias: float = 0.10
    """Sigma of the slow multiplicative field over the image."""
    texture: float = 0.03
    """Sigma of the slow additive texture of tissue."""
    clutter: float = 0.13
    """Amplitude of vessels, ribs, hairs and cells."""


@dataclass(frozen=True)
class PhantomSpec:
    """All that decides a phantom set. `train`, `validation`, `test`: images per modality; `size`: pixels per side."""

    seed: int = 0
    size: int = 64
    train: int = 7500
    validation: int = 50
    test: int = 100
    difficulty: Difficulty = Difficulty()

    def __post_init__(self) -> None:
        if self.size < 32:
            raise UsageError(f"phantom size must be at least 32 pixels, not {self.size}")
        if min(self.train, self.validation, self.test) < 0:
            raise UsageError("phantom image counts must not be negative")

    def count(self, split: str) -> int:
        """Number of images of a split, over all modalities."""
        check_split(split)
        return len(MODALITIES) * int(getattr(self, split))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def fingerprint(self) -> str:
        """16 hex digits that depend on every parameter and on GENERATOR_VERSION."""
        text = json.dumps({"version": GENERATOR_VERSION, **self.to_dict()}, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> PhantomSpec:
        """From plain values, as a suite holds them; `difficulty` may be a mapping too. UsageError on an unknown key."""
        values = dict(values)
        hardness = values.pop("difficulty", None) or {}
        if isinstance(hardness, Mapping):
            _check_keys(hardness, Difficulty, "phantom.difficulty")
            pairs: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in hardness.items()}
            hardness = Difficulty(**pairs)
        _check_keys(values, cls, "phantom")
        return cls(**values, difficulty=hardness)


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise UsageError(f"unknown phantom split '{split}'.{did_you_mean(split, SPLITS)}")


def _check_keys(values: Mapping[str, Any], kind: type, where: str) -> None:
    known = [f.name for f in fields(kind)]
    for key in values:
        if key not in known:
            raise UsageError(f"{where}: unknown parameter '{key}'.{did_you_mean(key, known)}")
