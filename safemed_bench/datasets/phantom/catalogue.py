"""What there is to see: modalities, their regions, and the sign by which each disease shows.

Every answer is one word. Looks follow the textbook where 64 pixels allow it: a liver cyst is a dark spot on CT, an
abscess has a bright rim, melanoma of the nail is a dark band along it, malaria is a ring inside a red cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import pi
from typing import Literal

Shape = Literal["spot", "ring", "streak", "cluster"]
Polarity = Literal["bright", "dark"]

NORMAL = "normal"
GRADES = ("mild", "moderate", "severe")
SIZES = {"mild": "small", "moderate": "medium", "severe": "large"}


@dataclass(frozen=True)
class Sign:
    """How a disease shows. angle: of a streak, radians from the image's x axis; None where any will do."""

    polarity: Polarity
    shape: Shape
    angle: float | None = None


@dataclass(frozen=True)
class Modality:
    """name: the word used in options. on_disk: OmniMedVQA's own `modality_type`, as it is spelled there."""

    name: str
    on_disk: str
    regions: tuple[str, str]


MODALITIES = (
    Modality("CT", "CT(Computed Tomography)", ("liver", "lung")),
    Modality("MRI", "MR (Mag-netic Resonance Imaging)", ("brain", "knee")),
    Modality("X-ray", "X-Ray", ("chest", "femur")),
    Modality("ultrasound", "ultrasound", ("breast", "thyroid")),
    Modality("dermoscopy", "Dermoscopy", ("trunk", "nail")),
    Modality("fundus", "Fundus Photography", ("macula", "disc")),
    Modality("OCT", "OCT (Optical Coherence Tomography", ("fovea", "cornea")),
    Modality("microscopy", "Microscopy Images", ("blood", "colon")),
)

DISEASES: dict[str, dict[str, Sign]] = {
    "liver": {
        "cyst": Sign("dark", "spot"),
        "abscess": Sign("bright", "ring"),
        "calcification": Sign("bright", "cluster"),
    },
    "lung": {
        "nodule": Sign("bright", "spot"),
        "cavity": Sign("bright", "ring"),
        "fibrosis": Sign("bright", "streak"),
    },
    "brain": {
        "tumor": Sign("bright", "ring"),
        "hemorrhage": Sign("dark", "spot"),
        "sclerosis": Sign("bright", "cluster"),
    },
    "knee": {
        "cyst": Sign("bright", "spot"),
        "fracture": Sign("dark", "streak", 0.0),
        "necrosis": Sign("dark", "ring"),
    },
    "chest": {
        "nodule": Sign("bright", "spot"),
        "cavity": Sign("bright", "ring"),
        "calcification": Sign("bright", "cluster"),
    },
    "femur": {
        "fracture": Sign("dark", "streak", 0.0),
        "cyst": Sign("dark", "spot"),
        "sclerosis": Sign("bright", "spot"),
    },
    "breast": {
        "cyst": Sign("dark", "spot"),
        "abscess": Sign("bright", "ring"),
        "calcification": Sign("bright", "cluster"),
    },
    "thyroid": {
        "nodule": Sign("bright", "spot"),
        "cyst": Sign("dark", "spot"),
        "fibrosis": Sign("bright", "streak"),
    },
    "trunk": {
        "nevus": Sign("dark", "spot"),
        "melanoma": Sign("dark", "cluster"),
        "carcinoma": Sign("bright", "ring"),
    },
    "nail": {
        "melanoma": Sign("dark", "streak", pi / 2),
        "hemorrhage": Sign("dark", "spot"),
        "fungus": Sign("bright", "cluster"),
    },
    "macula": {
        "drusen": Sign("bright", "cluster"),
        "hemorrhage": Sign("dark", "spot"),
        "edema": Sign("bright", "ring"),
    },
    "disc": {
        "hemorrhage": Sign("dark", "streak"),
        "nevus": Sign("dark", "spot"),
        "drusen": Sign("bright", "cluster"),
    },
    "fovea": {
        "edema": Sign("dark", "cluster"),
        "hole": Sign("dark", "streak", pi / 2),
        "drusen": Sign("bright", "spot"),
    },
    "cornea": {
        "scar": Sign("bright", "streak", 0.0),
        "edema": Sign("dark", "cluster"),
        "ulcer": Sign("dark", "spot"),
    },
    "blood": {
        "malaria": Sign("dark", "ring"),
        "leukemia": Sign("dark", "spot"),
        "sickle": Sign("dark", "streak"),
    },
    "colon": {
        "carcinoma": Sign("dark", "cluster"),
        "necrosis": Sign("bright", "spot"),
        "fibrosis": Sign("bright", "streak"),
    },
}


def conditions_of(region: str) -> tuple[str, ...]:
    """The four conditions of a region, `normal` first."""
    return (NORMAL, *DISEASES[region])
