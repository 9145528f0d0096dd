"""Images of a chunk from their files, and of the next one while this one is computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..core.errors import DataError
from ..core.types import Question
from ..datasets.images import load_canvas
from .messages import Job, Settings

Canvas = NDArray[np.uint8]
Read = tuple[dict[int, Canvas], dict[int, str]]
"""Position -> (3, H, W) uint8 canvas, and position -> why there is none."""

_Key = tuple[str, str, int]


class Images:
    """The images that a worker's jobs show. What the job ahead shows is read by threads while this one is computed.

    readers: threads. At most two jobs' images are held.
    """

    def __init__(self, settings: Settings, readers: int = 1) -> None:
        self._settings = settings
        self._pool = ThreadPoolExecutor(readers, thread_name_prefix="images")
        self._ahead: Job | None = None
        self._begun: dict[_Key, Future[Canvas | str]] = {}

    def expect(self, job: Job | None) -> None:
        """What will probably be read next; begun as soon as the present job has its own."""
        self._ahead = job

    def read(self, job: Job) -> Read:
        """The images of its questions or, where they are shown others' images, of these."""
        self._forget_all_but(job, self._ahead)
        own = self._begin(job)
        try:
            told = [own[key].result() for key, _ in self._shown(job)]
        except Exception:
            self._begun = {}  # the next try reads anew
            raise
        self._begun = self._begin(self._ahead, own) if self._ahead else {}
        return _sorted(told)

    def close(self) -> None:
        """Read nothing more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _forget_all_but(self, *jobs: Job | None) -> None:
        """So that nobody waits for images that were expected in vain."""
        wanted = {key for job in jobs if job for key, _ in self._shown(job)}
        for key in self._begun.keys() - wanted:
            self._begun.pop(key).cancel()

    def _begin(
        self, job: Job, at_hand: dict[_Key, Future[Canvas | str]] | None = None
    ) -> dict[_Key, Future[Canvas | str]]:
        """Each of the job's images once, as far as it is not read or begun already."""
        known, begun = self._begun | (at_hand or {}), dict[_Key, Future[Canvas | str]]()
        for key, question in self._shown(job):
            if key not in begun:
                begun[key] = known.get(key) or self._pool.submit(_canvas, question, key[2], self._settings.fit)
        return begun

    def _shown(self, job: Job) -> list[tuple[_Key, Question]]:
        side = job.model.resolution or self._settings.resolution
        return [((q.image, q.image_error, side), q) for q in job.donors or job.questions]


def read_canvases(questions: Sequence[Question], side: int, fit: str, readers: int = 1) -> Read:
    """All of them now. readers: threads that read the files."""
    if readers == 1:
        return _sorted([_canvas(question, side, fit) for question in questions])
    with ThreadPoolExecutor(readers) as pool:
        return _sorted(pool.map(lambda question: _canvas(question, side, fit), questions))


def _canvas(question: Question, side: int, fit: str) -> Canvas | str:
    """The canvas, or why there is none."""
    if question.image_error:
        return question.image_error
    try:
        canvas = load_canvas(Path(question.image), side, fit)
    except (DataError, OSError) as error:
        return f"{question.image}: {error}" if question.image not in str(error) else str(error)
    return np.ascontiguousarray(canvas.transpose(2, 0, 1))


def _sorted(told: Iterable[Canvas | str]) -> Read:
    told = list(told)
    found = {i: canvas for i, canvas in enumerate(told) if not isinstance(canvas, str)}
    return found, {i: text for i, text in enumerate(told) if isinstance(text, str)}
