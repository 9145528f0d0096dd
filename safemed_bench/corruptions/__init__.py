"""Corruptions: what happens to pictures without an adversary, in five severities. A catalogue that needs no scipy.

Which kind belongs to which modality follows how such pictures are taken, after MedMNIST-C (arXiv 2406.17536); the five
severities are those of ImageNet-C (arXiv 1903.12261). Others add theirs with `core.registry.corruptions.register`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core import registry

if TYPE_CHECKING:
    from .base import Corruption

CODE_VERSION = 1
"""Goes into unit keys; raised whenever a change here can change a record."""

SEVERITIES = (1, 2, 3, 4, 5)
CAMERA = ("Dermoscopy", "Fundus Photography", "Microscopy")
"""Modalities whose pictures are photographs, with a lens and a lamp."""


@dataclass(frozen=True, slots=True)
class CorruptionInfo:
    """target: `module:Class`. modalities: whose pictures it happens to; () is every modality."""

    target: str
    summary: str
    modalities: tuple[str, ...] = ()


def _ours(target: str, summary: str, *modalities: str) -> CorruptionInfo:
    return CorruptionInfo(f"safemed_bench.corruptions.{target}", summary, modalities)


CORRUPTIONS: dict[str, CorruptionInfo] = {
    "gaussian_noise": _ours("noise:GaussianNoise", "electronic noise of the sensor", *CAMERA),
    "shot_noise": _ours("noise:ShotNoise", "few photons: Poisson noise", "CT", "X-Ray", "Microscopy"),
    "rician_noise": _ours("noise:RicianNoise", "noise of a magnitude image", "MRI"),
    "speckle_noise": _ours("noise:SpeckleNoise", "interference of coherent waves: grains", "Ultrasound", "OCT"),
    "gaussian_blur": _ours("blur:GaussianBlur", "low resolution", "CT", "MRI", "X-Ray", "Ultrasound"),
    "defocus_blur": _ours("blur:DefocusBlur", "out of focus", *CAMERA, "OCT"),
    "motion_blur": _ours(
        "blur:MotionBlur", "movement during the exposure", "CT", "X-Ray", "Ultrasound", "OCT", *CAMERA
    ),
    "motion_ghosting": _ours("blur:MotionGhosting", "movement between the lines of k-space", "MRI"),
    "contrast": _ours("tone:Contrast", "low contrast"),
    "exposure": _ours("tone:Exposure", "too bright or too dark: gain", "X-Ray", "Ultrasound", *CAMERA),
    "bias_field": _ours("tone:BiasField", "uneven sensitivity of the coils", "MRI"),
    "vignetting": _ours("tone:Vignetting", "light that falls off from a point beside the centre", *CAMERA),
    "jpeg": _ours("coding:Jpeg", "JPEG compression"),
    "pixelate": _ours("coding:Pixelate", "a small copy enlarged"),
    "hair": _ours("objects:Hair", "hairs across the skin", "Dermoscopy"),
    "bubbles": _ours("objects:Bubbles", "air bubbles in gel or under the cover slip", "Dermoscopy", "Microscopy"),
    "glare": _ours("objects:Glare", "reflections of the lamp", "Dermoscopy", "Fundus Photography"),
}

for _name, _corruption in CORRUPTIONS.items():
    registry.corruptions.lazy(_name, _corruption.target)


def known() -> tuple[str, ...]:
    """Every registered kind: ours in the order of the catalogue, then those of plugins by name."""
    return (*CORRUPTIONS, *(name for name in registry.corruptions if name not in CORRUPTIONS))


def modalities_of(name: str) -> tuple[str, ...]:
    """Modalities that kind `name` happens to, () for every one. Raises UsageError for an unknown name."""
    if name in CORRUPTIONS:
        return CORRUPTIONS[name].modalities
    return tuple(registry.corruptions.get(name).modalities)


def for_modality(modality: str) -> Iterator[str]:
    """The kinds that happen to pictures of `modality`; to one that nobody knows, those that happen to all."""
    for name in known():
        if not (happens := modalities_of(name)) or modality in happens:
            yield name


def chosen(which: str | Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Kind -> modalities, () for every one, of what a suite says: `modality`, `all`, or names."""
    names = known() if isinstance(which, str) else which
    return {name: () if which == "all" else modalities_of(name) for name in names}


def build_corruption(name: str) -> Corruption:
    """A corruption from its registered name. Raises UsageError for an unknown one."""
    return registry.corruptions.get(name)()
