"""Fixtures that every test may use: the shared data where they are, and a cache of the session's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with `omnimed_mini` and `omnimedvqa_questions`; the test is skipped where there is none."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SAFEMED_SHARED_DATA") or beside)
    if not folder.is_dir():
        pytest.skip(f"no shared data: set SAFEMED_SHARED_DATA (looked in {folder})")
    return folder


@pytest.fixture(scope="session", autouse=True)
def private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tests, and the processes that they start, neither read nor write the user's cache, nor ask a model hub."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAFEMED_CACHE", str(folder))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder
