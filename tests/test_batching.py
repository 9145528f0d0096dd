"""How many questions go through at once: the largest batch that fits is found with the work itself."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from safemed_bench.run.batching import BatchSizer


class Memory:
    """Work that really needs memory: `limit` items at once go through, more raise as torch does."""

    def __init__(self, limit: int) -> None:
        self.limit, self.sizes, self.done = limit, [], []  # type: ignore[var-annotated]

    def __call__(self, rows: Sequence[int]) -> None:
        self.sizes.append(len(rows))
        if len(rows) > self.limit:
            raise torch.OutOfMemoryError("tried to allocate")
        self.done += rows


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 8, 13, 20, 31, 100, 1000])
def test_the_probe_finds_the_largest_batch_by_doubling(limit: int) -> None:
    """Every item exactly once and in order; in the end a batch within a quarter of what fits; few failures."""
    memory = Memory(limit)
    sizer = BatchSizer(None, probe=8)
    for _ in range(12):
        memory.done.clear()
        sizer.map("pgd", range(200), memory)
        assert memory.done == list(range(200))
    failed = [size for size in memory.sizes if size > limit]
    assert len(failed) <= 4
    largest = min(limit, 200)
    assert largest <= max(size for size in memory.sizes[-20:] if size <= limit) * 1.25 + 1
    settled = len(memory.sizes)
    sizer.map("pgd", range(200), memory)
    assert all(size <= limit for size in memory.sizes[settled:]), "what did not fit is not tried again"


def test_the_probe_follows_what_no_longer_fits() -> None:
    memory = Memory(40)
    sizer = BatchSizer(None, probe=8)
    sizer.map("pgd", range(300), memory)
    memory.limit = 3  # longer prompts
    memory.sizes.clear()
    sizer.map("pgd", range(300), memory)
    assert memory.done == [*range(300), *range(300)] and memory.sizes[-2] == 3
    assert sum(size > 3 for size in memory.sizes) <= 6


def test_a_batch_size_that_was_asked_for_is_not_exceeded() -> None:
    memory = Memory(100)
    BatchSizer(16).map("pgd", range(64), memory)
    assert memory.sizes == [16] * 4


def test_a_single_item_that_does_not_fit_is_relieved_once() -> None:
    """Activations computed twice, say; then the search for what fits begins again."""
    memory, said = Memory(0), list[str]()

    def relieve() -> bool:
        changed, memory.limit = memory.limit == 0, 4
        return changed

    sizer = BatchSizer(None, say=said.append, probe=8, relieve=relieve)
    sizer.map("pgd", range(10), memory)
    assert memory.done == list(range(10)) and 4 in memory.sizes
    assert any("computed twice" in line for line in said)
    memory.limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        BatchSizer(None, probe=8, relieve=lambda: False).map("pgd", range(10), memory)
