"""Questions through Hugging Face `datasets`: the Arrow copy of what was parsed, and roots that are tables."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from test_omnimedvqa import record, spec, write_root, write_splits

from safemed_bench.core.errors import DataError
from safemed_bench.datasets import arrow, load, omnimedvqa
from safemed_bench.datasets.base import Contents


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAFEMED_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


@pytest.fixture
def no_json(monkeypatch: pytest.MonkeyPatch) -> Any:
    """From here on, nothing is parsed."""

    def off() -> None:
        def parse(*_: Any) -> Contents:
            raise AssertionError("parsed again")

        monkeypatch.setattr(omnimedvqa, "_parse", parse)

    return off


ROWS = [
    record(0, split="train"),
    record(1, split="test", option_C=None, option_D=None, modality_type=None, modality="OCT"),
    record(2, gt_answer="?"),
    record(3, question_id=None, modality_type="Thermography", medr1_split="val", question="Größe?\n肺"),
]


def test_the_second_read_parses_nothing_and_gives_the_same(
    tmp_path: Path, cache: Path, no_json: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    root = write_root(tmp_path / "data", ROWS, images=False)
    first = omnimedvqa.read(root)
    assert len(first.entries) == 3 and len(first.problems) == 2
    no_json()
    assert omnimedvqa.read(root) == first and omnimedvqa.read(root, strict=False) == first
    assert capfd.readouterr().err == "", "no progress bars"


def test_the_copy_is_memory_mapped_and_typed(tmp_path: Path, cache: Path) -> None:
    import datasets as hf

    omnimedvqa.read(write_root(tmp_path / "data", ROWS, images=False))
    (folder,) = cache.glob("questions-*")
    table = hf.Dataset.load_from_disk(folder)
    assert table.cache_files and len(table) == 3
    assert table.features["options"] == hf.List(hf.Value("string")) and table.features["image"] == hf.Value("string")
    assert not hf.are_progress_bars_disabled(), "the user's setting is left"


def test_a_changed_file_is_parsed_again_and_the_old_copy_goes(tmp_path: Path, cache: Path) -> None:
    root = write_root(tmp_path / "data", ROWS[:1], images=False)
    assert len(omnimedvqa.read(root).entries) == 1
    write_root(root, ROWS[:2], images=False)
    assert len(omnimedvqa.read(root).entries) == 2
    write_splits(root, [ROWS[0], ROWS[1] | {"option_C": "x"}])
    assert [e.medr1 for e in omnimedvqa.read(root).entries] == ["train", "test"]
    marks = next((root / "Splits/modality/test").glob("*.json"))
    marks.write_text("[ ]")
    os.utime(marks, ns=(0, 0))
    assert [e.medr1 for e in omnimedvqa.read(root).entries] == ["train", ""]
    assert len([*cache.glob("questions-*")]) == 1


@pytest.mark.parametrize("file", ["contents.json", "data-00000-of-00001.arrow", "state.json"])
def test_a_damaged_copy_is_made_anew(tmp_path: Path, cache: Path, file: str) -> None:
    root = write_root(tmp_path / "data", ROWS, images=False)
    first = omnimedvqa.read(root)
    (folder,) = cache.glob("questions-*")
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: len(whole) // 2])
    assert arrow.recall(folder) is None
    assert omnimedvqa.read(root) == first == arrow.recall(folder)


def test_a_broken_file_is_never_kept(tmp_path: Path, cache: Path) -> None:
    root = write_root(tmp_path / "data", ROWS, images=False)
    (root / "QA_information/Open-access/Bad.json").write_text("[")
    assert len(omnimedvqa.read(root, strict=False).problems) == 3
    with pytest.raises(DataError, match=r"Bad\.json:1:2"):
        omnimedvqa.read(root)
    assert not [*cache.glob("questions-*")]


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path, cache: Path) -> None:
    cache.write_text("in the way")
    assert len(omnimedvqa.read(write_root(tmp_path / "data", ROWS, images=False)).entries) == 3


def test_text_that_arrow_cannot_hold_is_read_all_the_same(tmp_path: Path, cache: Path) -> None:
    root = write_root(tmp_path / "data", [record(0, question="half \ud800 a pair")], images=False)
    assert omnimedvqa.read(root) == omnimedvqa.read(root) and not [*cache.glob("questions-*")]


def test_a_link_to_nothing_is_named(tmp_path: Path, cache: Path) -> None:
    root = write_root(tmp_path / "data", ROWS, images=False)
    (root / "QA_information/Open-access/Gone.json").symlink_to(tmp_path / "gone.json")
    with pytest.raises(DataError, match=r"Gone\.json: cannot be read"):
        omnimedvqa.read(root)


# --- roots that are tables ---


@pytest.mark.parametrize("form", ["parquet", "hub", "disk", "splits"])
def test_what_to_hf_gives_reads_back(tmp_path: Path, cache: Path, form: str, capfd: pytest.CaptureFixture[str]) -> None:
    import datasets as hf
    from datasets.table import embed_table_storage

    data = load(spec(write_root(tmp_path / "data", [record(n, split="test") for n in range(3)])))
    table, root = data.to_hf(), tmp_path / "table"
    root.mkdir()
    with arrow._no_progress_bars():
        if form == "parquet":
            table.to_parquet(root / "questions.parquet")  # images stay where they are
        elif form == "hub":
            (root / "data").mkdir()
            held = table.remove_columns("split").with_format("arrow").map(embed_table_storage, batched=True)
            held.to_parquet(root / "data" / "test-00000-of-00001.parquet")
        elif form == "disk":
            table.save_to_disk(root)
        else:
            hf.DatasetDict({"test": table.remove_columns("split")}).save_to_disk(root)
    if form != "parquet":
        shutil.rmtree(tmp_path / "data")
    again = load(spec(root))
    assert again.fingerprint == data.fingerprint and not again.problems
    assert [(q.modality, q.question_type, q.source) for q in again.questions] == [
        (q.modality, q.question_type, q.source) for q in data.questions
    ]
    assert again.stamp == "OmniMedVQA at table, split test (record)"
    assert load(spec(root)) == again and capfd.readouterr().err == ""


def test_a_table_with_the_official_columns(tmp_path: Path, cache: Path) -> None:
    import datasets as hf

    root = write_root(tmp_path, ROWS, images=False)
    official = omnimedvqa.read(root)
    columns = {key: [row.get(key) for row in ROWS] for key in dict.fromkeys(key for row in ROWS for key in row)}
    with arrow._no_progress_bars():
        hf.Dataset.from_dict(columns).to_parquet(root / "omnimedvqa.parquet")
    shutil.rmtree(root / "QA_information")
    contents = omnimedvqa.read(root)
    assert contents.layout == "table" and contents.entries == official.entries
    assert [p.message for p in contents.problems] == [p.message for p in official.problems]


def test_a_table_that_is_none_is_named(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "bad.parquet").write_text("PAR1 not at all")
    with pytest.raises(DataError, match=r"bad\.parquet  not a table that can be read"):
        omnimedvqa.read(tmp_path)
    (problem,) = omnimedvqa.read(tmp_path, strict=False).problems
    assert problem.file.endswith("bad.parquet")
    (tmp_path / "bad.parquet").unlink()
    (tmp_path / "state.json").write_text(json.dumps({}))
    with pytest.raises(DataError, match="not a table that can be read"):
        omnimedvqa.read(tmp_path)
