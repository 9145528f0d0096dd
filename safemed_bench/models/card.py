"""Model cards: what an entry is, known without loading it (and without torch)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

from ..core import registry
from ..core.errors import ModelError
from .prompts import get_prompt

Decode = Literal["logprob", "generate"]

ENTRY_FILE = "entry.json"
EXTRACTION_VERSION = 1


class Spec(Protocol):
    """What a suite says of a model; None means the entry's own default."""

    name: str
    path: str | None
    revision: str | None
    prompt: str | None
    decode: Decode | None
    max_new_tokens: int | None
    dtype: str | None
    adapter: str | None


@dataclass(frozen=True, slots=True)
class ModelCard:
    """An entry as the plan sees it.

    path: a local folder with weights, "" for a plugin that builds its model itself. reasons: writes a rationale.
    fingerprint: hash of weights, processor files, prompt wording and answer extraction.
    """

    name: str
    path: str
    prompt: str
    decode: Decode
    max_new_tokens: int
    reasons: bool
    fingerprint: str
    description: str = ""
    dtype: str | None = None
    adapter: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def resolve(spec: Spec) -> ModelCard:
    """The card of a suite's model entry: a registered name, a local folder, or a Hugging Face hub id.

    Raises ModelError where the weights are not on this machine, saying where they were looked for.
    """
    if spec.path is None:
        return _registered(spec)
    return card_from_folder(spec.name, locate(spec.path, spec.revision), spec)


def _registered(spec: Spec) -> ModelCard:
    """Our own entries are registered as folders; a plugin registers a function or class that builds the model."""
    item = registry.models.get(spec.name)
    if isinstance(item, str | Path):
        return card_from_folder(spec.name, Path(item), spec)
    reasons = bool(getattr(item, "reasons", False))
    prompt: str = spec.prompt or str(getattr(item, "prompt", "instruct"))
    own: Decode = getattr(item, "decode", None) or ("generate" if reasons else "logprob")
    decode: Decode = spec.decode or own
    source = f"{getattr(item, '__module__', '')}.{getattr(item, '__qualname__', spec.name)}"
    return ModelCard(
        name=spec.name,
        path="",
        prompt=prompt,
        decode=decode,
        max_new_tokens=spec.max_new_tokens or 256,
        reasons=reasons,
        fingerprint=str(getattr(item, "fingerprint", "") or _digest(source.encode())),
        description=(item.__doc__ or "").strip().split("\n")[0],
        dtype=spec.dtype,
    )


def locate(path: str, revision: str | None = None) -> Path:
    """The local folder of a path or hub id; a hub id must already be in the local Hugging Face cache."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} is not a model folder: config.json is missing")
        return folder
    if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") != 1:
        raise ModelError(f"model folder not found: {path} (a hub id has the form owner/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ModelError(
            f"{path}: no folder of that name, and not in the local Hugging Face cache"
            f"{f' at revision {revision}' if revision else ''}. Fetch it with `hf download {path}` on a machine with "
            "access, or give the folder that holds its config.json, *.safetensors and processor files as `path`."
        ) from error
    missing = [what for what, pattern in _NEEDED.items() if not any(found.glob(pattern))]
    if missing:
        raise ModelError(f"{path}: the cached copy {found} is incomplete, it lacks {', '.join(missing)}")
    return found


_NEEDED = {"config.json": "config.json", "weights (*.safetensors)": "*.safetensors"}


def card_from_folder(name: str, folder: Path, spec: Spec | None = None) -> ModelCard:
    """Card of a folder with weights; `entry.json` in it gives the entry's own prompt and decoding."""
    defaults: dict[str, Any] = {
        "prompt": "instruct",
        "decode": None,
        "max_new_tokens": 256,
        "description": "",
    }
    entry = folder / ENTRY_FILE
    if entry.is_file():
        try:
            defaults |= json.loads(entry.read_text())
        except json.JSONDecodeError as error:
            raise ModelError(f"{entry}:{error.lineno}:{error.colno}  not JSON: {error.msg}") from error
    given = {
        key: value
        for key in ("prompt", "decode", "max_new_tokens", "dtype", "adapter")
        if spec is not None and (value := getattr(spec, key, None)) is not None
    }
    values = defaults | given
    prompt = get_prompt(values["prompt"])
    card = ModelCard(
        name=name,
        path=str(folder),
        prompt=prompt.name,
        decode=values["decode"] or ("generate" if prompt.reasons else "logprob"),
        max_new_tokens=int(values["max_new_tokens"]),
        reasons=prompt.reasons,
        fingerprint="",
        description=values["description"],
        dtype=values.get("dtype"),
        adapter=values.get("adapter"),
    )
    return replace(card, fingerprint=_fingerprint(card, prompt.template))


def _fingerprint(card: ModelCard, template: str) -> str:
    weights = folder_digest(card.path)
    adapter = folder_digest(card.adapter) if card.adapter else ""
    parts = (weights, adapter, template, card.decode, card.max_new_tokens, EXTRACTION_VERSION)
    return _digest("\x1f".join(map(str, parts)).encode())


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def folder_digest(folder: str) -> str:
    """Hash of all weights, configs and tokenizer files in a model folder."""
    files = sorted(
        p for p in Path(folder).iterdir() if p.suffix in {".safetensors", ".json", ".jinja", ".txt", ".model"}
    )
    stamp = tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.name != ENTRY_FILE)
    return _digest_files(stamp)


@lru_cache(maxsize=64)
def _digest_files(stamp: tuple[tuple[str, int, int], ...]) -> str:
    total = hashlib.blake2b(digest_size=12)
    for path, size, _ in stamp:
        total.update(f"{Path(path).name}\x1f{size}\x1f".encode())
        with Path(path).open("rb") as file:
            while block := file.read(1 << 22):
                total.update(block)
    return total.hexdigest()
