"""The eight imaging modalities of OmniMedVQA, from every spelling in use to `core.types.MODALITIES`."""

from __future__ import annotations

import re

from ..core.types import MODALITIES

# Matched as a prefix of the lower-case letters and digits of a name. Longer words first: "microscopy" must not be
# taken for "mr", "optical coherence tomography" not for "tomography".
_SPELLINGS = (
    ("opticalcoherencetomography", "OCT"),
    ("computedtomography", "CT"),
    ("magneticresonance", "MRI"),
    ("microscop", "Microscopy"),
    ("histopatholog", "Microscopy"),
    ("dermoscop", "Dermoscopy"),
    ("dermatoscop", "Dermoscopy"),
    ("ultraso", "Ultrasound"),
    ("sonograph", "Ultrasound"),
    ("fundus", "Fundus Photography"),
    ("xray", "X-Ray"),
    ("radiograph", "X-Ray"),
)
_SHORT = {
    "ct": "CT",
    "ctscan": "CT",
    "mr": "MRI",
    "mri": "MRI",
    "cxr": "X-Ray",
    "us": "Ultrasound",
    "fp": "Fundus Photography",
    "cfp": "Fundus Photography",
    "oct": "OCT",
    "der": "Dermoscopy",
    "micro": "Microscopy",
}


def normalise(name: str) -> str:
    """`CT(Computed Tomography)` -> `CT`, `MR (Mag-netic Resonance Imaging)` -> `MRI`; an unknown name stays itself.

    A name counts by the word before its bracket, or whole: OmniMedVQA writes `OCT (Optical Coherence Tomography`.
    """
    before_bracket = re.split(r"[(\[]", name, maxsplit=1)[0]
    for part in (before_bracket, name):
        letters = re.sub(r"[^a-z0-9]", "", part.lower())
        if letters in _SHORT:
            return _SHORT[letters]
        for spelling, modality in _SPELLINGS:
            if letters.startswith(spelling):
                return modality
    return name.strip()


def is_known(name: str) -> bool:
    return name in MODALITIES


def rank(name: str) -> tuple[int, str]:
    """Sort key: the eight in the house's order, then others by name."""
    return (MODALITIES.index(name) if name in MODALITIES else len(MODALITIES), name)
