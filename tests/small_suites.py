"""Suites in a few words, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safemed_bench.core import registry
from safemed_bench.core.errors import Problem, SuiteError
from safemed_bench.suite import load_suite

MINIMAL = "models: [{name: m, path: /weights}]\nconditions: [clean]\n"
Write = Callable[..., Path]


def writer(folder: Path) -> Write:
    """Puts a suite's text into a file there."""

    def put(text: str, name: str = "suite.yaml") -> Path:
        path = folder / name
        path.write_text(text)
        return path

    return put


def name_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The names of the default entries, whether their weights are in this checkout or not."""
    list(registry.models)
    for name in ("sft", "instruct", "cot", "safemed-r1"):
        monkeypatch.setitem(registry.models._items, name, Path("/weights") / name)


def problems(path: Path | str, *sets: str, env: dict[str, str] | None = None, flags: Any = ()) -> tuple[Problem, ...]:
    with pytest.raises(SuiteError) as caught:
        load_suite(path, sets, env or {}, flags)
    assert caught.value.exit_code == 2
    return caught.value.problems


def only(path: Path | str, *sets: str, env: dict[str, str] | None = None) -> Problem:
    found = problems(path, *sets, env=env)
    assert len(found) == 1, found
    return found[0]
