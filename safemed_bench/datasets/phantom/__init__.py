"""The embedded default: generated images of all eight modalities, in OmniMedVQA's own on-disk layout."""

from .catalogue import DISEASES, GRADES, MODALITIES, NORMAL
from .prepare import generate_arrays, index_of, prepare
from .questions import WORD_PATTERN, WORDS, questions_for, rationale, words_of
from .render import Case, render
from .spec import GENERATOR_VERSION, SPLITS, Difficulty, PhantomSpec

__all__ = [
    "DISEASES",
    "GENERATOR_VERSION",
    "GRADES",
    "MODALITIES",
    "NORMAL",
    "SPLITS",
    "WORDS",
    "WORD_PATTERN",
    "Case",
    "Difficulty",
    "PhantomSpec",
    "generate_arrays",
    "index_of",
    "prepare",
    "questions_for",
    "rationale",
    "render",
    "words_of",
]
