"""How many questions go through a model at once. Never part of a result: seeds are per question, not per batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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


@dataclass
class BatchSizer:
    """Runs work in batches, halves them when memory runs out, and remembers what fitted per kind of work.

    start: questions per batch to begin with, None for as many as there are. `forget` frees what a failed batch held,
    `say` is told of every halving.
    """

    start: int | None
    forget: Callable[[], None] = lambda: None
    say: Callable[[str], None] = lambda message: None
    _fits: dict[str, int] = field(default_factory=dict)

    def map(self, kind: str, items: Sequence[T], work: Callable[[Sequence[T]], None]) -> None:
        """`work` on consecutive runs of `items`. A run that did not fit is done again in halves.

        Raises the out-of-memory error itself where a single item does not fit.
        """
        size = min(self._fits.get(kind, self.start or len(items)), len(items))
        done = 0
        while done < len(items):
            try:
                work(items[done : done + size])
            except Exception as error:
                if size == 1 or not is_out_of_memory(error):
                    raise
            else:
                done += size
                continue
            # outside the handler, so that the traceback no longer holds the batch's memory
            size = max(1, size // 2)
            self._fits[kind] = size
            self.forget()
            self.say(f"out of memory; batch size for {kind} is now {size}")
