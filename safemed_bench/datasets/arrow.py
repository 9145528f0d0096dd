"""Questions as Hugging Face `datasets`: the schema, the Arrow copy of what was parsed, and roots that are tables.

`datasets` is imported where it is used, as that takes half a second.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ..core.errors import DataError, Problem
from ..core.types import LETTERS, Question
from .base import Contents, Entry, cache_folder

if TYPE_CHECKING:
    import datasets as hf

ASKED = ("id", "image", "question", "answer", "modality", "question_type", "source")
"""Columns that are fields of Question; `options` is the one that holds a list."""
MARKS = ("image_key", "split", "medr1", "modality_key", "raw_modality")
"""Columns that are fields of Entry."""
FACTS = "contents.json"


def features(names: Sequence[str], image: Any = None) -> hf.Features:
    """One fixed schema: text, but for `answer`, `options` (2 to 4 in one list), and `image` where it is to decode."""
    import datasets as hf

    text = hf.Value("string")
    held = dict.fromkeys(names, text) | {"options": hf.List(text), "answer": hf.Value("int64")}
    return hf.Features(held | ({"image": image} if image is not None else {}))


def to_hf(questions: Iterable[Question]) -> hf.Dataset:
    """Questions as rows whose `image` decodes to a PIL image; images that cannot be read are None."""
    import datasets as hf

    names = ("id", "question", "modality", "question_type", "source", "split", "image_sha256", "image_error")
    rows = [
        {name: getattr(q, name) for name in names}
        | {"image": None if q.image_error else q.image, "options": list(q.options), "answer": q.answer}
        for q in questions
    ]
    return hf.Dataset.from_list(rows, features=features(names, hf.Image()))


def to_table(entries: Sequence[Entry]) -> hf.Dataset:
    """Parsed questions as a table; `image` is a path."""
    import datasets as hf
    import pyarrow as pa

    asked = {name: [getattr(entry.question, name) for entry in entries] for name in ASKED}
    marks = {name: [getattr(entry, name) for entry in entries] for name in MARKS}
    options = {"options": [list(entry.question.options) for entry in entries]}
    schema = features((*ASKED, *MARKS)).arrow_schema
    # several times as fast as Dataset.from_dict, which looks at every value in Python
    return hf.Dataset(pa.Table.from_pydict(asked | marks | options, schema=schema))


def to_entries(table: hf.Dataset) -> tuple[Entry, ...]:
    """The same questions again. KeyError where a column is missing."""
    columns: Any = table.to_dict()
    asked, marks = ((columns[name] for name in names) for names in (ASKED, MARKS))
    rows = zip(zip(*asked, strict=True), columns["options"], zip(*marks, strict=True), strict=True)
    return tuple(Entry(_question(values, options), *rest) for values, options, rest in rows)


def _question(values: tuple[Any, ...], options: list[str]) -> Question:
    name, image, text, answer, modality, question_type, source = values
    return Question(name, image, "", text, tuple(options), answer, modality, question_type, source, "")


def kept_at(root: Path, sources: Iterable[Path], code: Iterable[ModuleType]) -> Path:
    """The folder of the Arrow copy: named by the root, and by path, size and time of change of all that was read and
    by the code that reads it."""
    digest = hashlib.blake2b(digest_size=8)
    for source in sources:
        with contextlib.suppress(OSError):  # one that is not there is told of when it is read
            status = source.stat()
            digest.update(f"{source}\n{status.st_size} {status.st_mtime_ns}\n".encode())
    for file in (__file__, *(module.__file__ for module in code)):
        digest.update(Path(str(file)).read_bytes())
    return cache_folder() / f"questions-{_name(root)}-{digest.hexdigest()}"


def _name(root: Path) -> str:
    return hashlib.blake2b(str(root).encode(), digest_size=8).hexdigest()


def keep(contents: Contents, folder: Path) -> None:
    """Write the Arrow copy, whole or not at all, and remove older ones of the same root."""
    facts = {
        "root": str(contents.root),
        "layout": contents.layout,
        "problems": [astuple(problem) for problem in contents.problems],
        "files": contents.files,
        "records": contents.records,
    }
    scratch = folder.with_suffix(f".{os.getpid()}.tmp")
    # A cache that cannot be written costs time only; half a surrogate pair, which JSON allows, is a ValueError.
    with contextlib.suppress(OSError, ValueError):
        with _no_progress_bars():
            to_table(contents.entries).save_to_disk(scratch)
        (scratch / FACTS).write_text(json.dumps(facts), "utf-8")
        for old in folder.parent.glob(f"questions-{_name(contents.root)}-*"):
            if old.suffix != ".tmp":
                shutil.rmtree(old, ignore_errors=True)
        scratch.replace(folder)
    shutil.rmtree(scratch, ignore_errors=True)


def recall(folder: Path) -> Contents | None:
    """What `keep` wrote, the table memory-mapped; None where there is none, or none that can be read."""
    if not (folder / FACTS).is_file():
        return None
    import datasets as hf

    try:
        facts = json.loads((folder / FACTS).read_text("utf-8"))
        entries = to_entries(hf.Dataset.load_from_disk(folder))
        problems = tuple(Problem(*values) for values in facts["problems"])
        return Contents(
            Path(facts["root"]), facts["layout"], entries, problems, tuple(facts["files"]), facts["records"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    import datasets as hf

    shown = not hf.are_progress_bars_disabled()
    hf.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            hf.enable_progress_bars()


def tables(root: Path) -> list[Path]:
    """The files that stand for tables in `root`: `state.json` of a `save_to_disk` folder, also of several splits, or
    *.parquet, also below `data/` as on the Hugging Face hub."""
    if (root / "dataset_dict.json").is_file():
        return sorted(root.glob("*/state.json"))
    if (root / "state.json").is_file():
        return [root / "state.json"]
    return sorted({*root.glob("*.parquet"), *root.glob("data/*.parquet")})


def records(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table as records with OmniMedVQA's own keys.

    Columns are those keys, or those of `to_hf`. A row without a split has that of its file's name
    (`train-00000.parquet`) or of its folder (`save_to_disk` of several). Images that are held as bytes are written to
    the cache folder. DataError where the table cannot be read.
    """
    import datasets as hf

    table = _open(file)
    for name, feature in table.features.items():
        if isinstance(feature, hf.Image):
            table = table.cast_column(name, hf.Image(decode=False))
    of_several = (file.parent.parent / "dataset_dict.json").is_file()
    split = file.parent.name if of_several else re.split(r"[-_.]", file.stem)[0]
    for row in table:
        record = _official(row)
        record["image_path"] = _image_path(record.get("image_path"))
        yield record if record.get("split") else record | {"split": split}


def _open(file: Path) -> hf.Dataset:
    import datasets as hf
    from pyarrow import parquet

    try:
        if file.suffix == ".parquet":
            return hf.Dataset(parquet.read_table(file, memory_map=True))
        return hf.Dataset.load_from_disk(file.parent)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"not a table that can be read ({error})") from error


def _official(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with `to_hf`'s columns under OmniMedVQA's keys; one that has these is left as it is."""
    record = dict(row)
    for theirs, ours in (("question_id", "id"), ("image_path", "image"), ("dataset", "source")):
        record.setdefault(theirs, row.get(ours))
    if isinstance(row.get("options"), list):
        record |= {f"option_{x}": text for x, text in zip(LETTERS, row["options"], strict=False)}
    if isinstance(answer := row.get("answer"), int) and answer in range(len(LETTERS)):
        record.setdefault("gt_letter", LETTERS[answer])
    return record


def _image_path(image: Any) -> Any:
    """A path as it is; bytes as the path of a file that holds them."""
    if not isinstance(image, Mapping):
        return image
    data, path = image.get("bytes"), image.get("path") or ""
    if data is None:
        return path
    name = hashlib.sha256(data).hexdigest() + Path(path).suffix
    file = cache_folder() / "images" / name[:2] / name
    try:
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}.tmp")
            part.write_bytes(data)
            part.replace(file)
    except OSError as error:
        raise DataError(f"cannot write its images to {file.parent} ({error}); set SAFEMED_CACHE") from error
    return str(file)
