"""Images of a chunk from their files."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..core.errors import DataError
from ..core.types import Question
from ..datasets.images import load_canvas


def read_canvases(
    questions: Sequence[Question], side: int, fit: str, readers: int = 1
) -> tuple[dict[int, NDArray[np.uint8]], dict[int, str]]:
    """Position -> (3, H, W) uint8 canvas, and position -> why there is none. readers: threads that read the files."""

    def read(question: Question) -> NDArray[np.uint8] | str:
        if question.image_error:
            return question.image_error
        try:
            canvas = load_canvas(Path(question.image), side, fit)
        except (DataError, OSError) as error:
            return f"{question.image}: {error}" if question.image not in str(error) else str(error)
        return np.ascontiguousarray(canvas.transpose(2, 0, 1))

    if readers == 1:
        told = [read(question) for question in questions]
    else:
        with ThreadPoolExecutor(readers) as pool:
            told = list(pool.map(read, questions))
    found = {i: canvas for i, canvas in enumerate(told) if not isinstance(canvas, str)}
    return found, {i: text for i, text in enumerate(told) if isinstance(text, str)}
