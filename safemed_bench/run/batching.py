"""How many questions go through a model at once. Never part of a result: seeds are per question, not per batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

T = TypeVar("T")


def slices(count: int, size: int) -> list[range]:
    """`count` positions cut into runs of `size`, the last one shorter."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an accelerator ran out of memory; older torch and cuBLAS only say so in words."""
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "cublas_status_alloc_failed" in text)


@dataclass(frozen=True)
class Fit:
    """What is known of one kind of work. good: the most items that went through at once, 0 for none yet. bad: the
    fewest that did not, None for none yet."""

    good: int = 0
    bad: int | None = None

    def fitted(self, size: int) -> Fit:
        return replace(self, good=max(self.good, size))

    def failed(self, size: int) -> Fit:
        """A size that fitted before may not fit now: prompts differ in length."""
        return Fit(self.good if self.good < size else 0, size if self.bad is None else min(self.bad, size))

    def halved(self, first: int) -> int:
        """The size to go on with where what fits is only made smaller."""
        return first if self.bad is None else max(1, self.bad // 2)

    def doubled(self, first: int) -> int:
        """The size to try next: twice what fitted, until something does not; then halfway between the two, until they
        are within a quarter."""
        if self.bad is None:
            return 2 * self.good or first
        if not self.good:
            return max(1, self.bad // 2)
        gap = self.bad - self.good
        return self.good + gap // 2 if gap > max(1, self.good // 4) else self.good


@dataclass
class BatchSizer:
    """Runs work in batches that fit into memory, and remembers what fitted per kind of work.

    start: questions per batch to begin with, None for as many as there are. probe: where memory is to be found out, the
    first batch of a search for the largest that fits; the search is made with the work itself, so that only what fails
    is done twice. `forget` frees what a failed batch held, `say` is told of every change, `relieve` makes the work need
    less memory and says whether it could; it is asked where a single item does not fit.
    """

    start: int | None
    forget: Callable[[], None] = lambda: None
    say: Callable[[str], None] = lambda message: None
    probe: int | None = None
    relieve: Callable[[], bool] = lambda: False
    _fits: dict[str, Fit] = field(default_factory=dict)

    def map(self, kind: str, items: Sequence[T], work: Callable[[Sequence[T]], None]) -> None:
        """`work` on consecutive runs of `items`. A run that did not fit is done again in smaller ones.

        Raises the out-of-memory error itself where a single item does not fit and nothing relieves it.
        """
        done = 0
        while done < len(items):
            fit = self._fits.get(kind, Fit())
            size = min(self._size(fit, len(items)), len(items) - done)
            try:
                work(items[done : done + size])
            except Exception as error:
                if not is_out_of_memory(error) or (size == 1 and not self.relieve()):
                    raise
            else:
                done += size
                self._fits[kind] = fit.fitted(size)
                continue
            # outside the handler, so that the traceback no longer holds the batch's memory
            self.forget()
            self._retreat(kind, fit.failed(size), size)

    def _size(self, fit: Fit, count: int) -> int:
        return fit.halved(self.start or count) if self.probe is None else fit.doubled(self.probe)

    def _retreat(self, kind: str, fit: Fit, size: int) -> None:
        """A smaller batch next time; after a single item, which now needs less, the search from its start."""
        if size == 1:
            self._fits.pop(kind, None)
            self.say(f"out of memory for a single question of {kind}: activations are now computed twice")
        else:
            self._fits[kind] = fit
            self.say(f"out of memory; batch size for {kind} is now {self._size(fit, size)}")
