"""Model cards: what an entry is, known without loading it (and without torch)."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ..core import registry
from ..core.errors import ModelError, UsageError
from .prompts import get_prompt

if TYPE_CHECKING:
    from ..suite.api import ApiSpec

Decode = Literal["logprob", "generate"]
Quantize = Literal["int8", "nf4"]

ENTRY_FILE = "entry.json"
EXTRACTION_VERSION = 1
SETTINGS = ("revision", "prompt", "decode", "max_new_tokens", "dtype", "adapter", "quantize")
"""What a suite may set of an entry, beside its name, folder and canvas."""


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
    quantize: Quantize | None


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
    quantize: Quantize | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def resolve(spec: Spec) -> ModelCard:
    """The card of a suite's model entry: a registered name, a local folder, a Hugging Face hub id, or a server's.

    Raises ModelError where the weights are not on this machine, saying where they were looked for.
    """
    if (api := getattr(spec, "api", None)) is not None:
        return _served(spec, api)
    if spec.path is None:
        return _registered(spec)
    return card_from_folder(spec.name, locate(spec.path, spec.revision), spec)


def _registered(spec: Spec) -> ModelCard:
    """Our own entries are registered as folders; a plugin registers a function or class that builds the model."""
    name = registered_name(spec)
    item = registry.models.get(name)
    if isinstance(item, str | Path):
        return card_from_folder(spec.name, Path(item), spec)
    reasons = bool(getattr(item, "reasons", False))
    prompt: str = spec.prompt or str(getattr(item, "prompt", "instruct"))
    own: Decode = getattr(item, "decode", None) or ("generate" if reasons else "logprob")
    decode: Decode = spec.decode or own
    builder_settings(item, spec)
    identity = str(getattr(item, "fingerprint", "") or getattr(item, "__qualname__", name))
    return ModelCard(
        name=spec.name,
        path="",
        prompt=prompt,
        decode=decode,
        max_new_tokens=spec.max_new_tokens or 256,
        reasons=reasons,
        fingerprint=_digest(f"{identity}\x1f{registry.models.source(name)}".encode()),
        description=(item.__doc__ or "").strip().split("\n")[0],
        dtype=spec.dtype,
    )


AS_SERVED = "as served"
API_VERSION = 1
"""Of the code that makes a request and reads its reply; goes into fingerprints."""


def _served(spec: Spec, api: ApiSpec) -> ModelCard:
    """An entry behind an API. Its fingerprint is of the address, the model's name there and all that a request says;
    of the weights there can be none."""
    prompt, most = get_prompt(spec.prompt or "instruct"), spec.max_new_tokens or 256
    asked = [
        api.base_url,
        api.model,
        prompt.template,
        most,
        api.temperature,
        api.seed,
        api.logprobs,
        api.omit,
        api.body,
    ]
    identity = json.dumps([*asked, EXTRACTION_VERSION, API_VERSION], sort_keys=True)
    return ModelCard(
        name=spec.name,
        path="",
        prompt=prompt.name,
        decode="generate",
        max_new_tokens=most,
        reasons=prompt.reasons,
        fingerprint=_digest(identity.encode()),
        description=f"{api.model}, as {api.base_url} answers",
        dtype=AS_SERVED,
    )


def registered_name(spec: Spec) -> str:
    """What the registry knows a suite's entry by; its own name may be one that only tables use."""
    return getattr(spec, "entry", None) or spec.name


def builder_settings(builder: Callable[..., Any], spec: Spec, dtype: str | None = None) -> dict[str, Any]:
    """What the suite sets of a plugin model, to be passed to its builder by name; `dtype` is that of the run.

    Raises UsageError for a setting that the builder has no parameter for: the card would tell of something that was
    never done.
    """
    parameters = inspect.signature(builder).parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    given = {name: value for name in SETTINGS if (value := getattr(spec, name, None)) not in (None, "auto")}
    if refused := [name for name in given if name not in parameters and not open_ended]:
        raise UsageError(
            f"models.{spec.name}.{refused[0]}: the plugin that builds '{spec.name}' takes no `{refused[0]}`, so that "
            "the setting would have no effect. Leave it out, or give the builder a parameter of that name"
        )
    return ({"dtype": dtype} if dtype and "dtype" in parameters else {}) | given


def locate(path: str, revision: str | None = None) -> Path:
    """The local folder of a path or hub id; a hub id must already be in the local Hugging Face cache."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} is not a model folder: config.json is missing")
        if not any(map(_is_weights, folder.iterdir())):
            raise ModelError(f"{folder} has no weights: it holds no *.safetensors, *.bin or *.pt")
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
    missing = [] if (found / "config.json").is_file() else ["config.json"]
    missing += [] if any(map(_is_weights, found.iterdir())) else ["weights (*.safetensors, *.bin or *.pt)"]
    if missing:
        raise ModelError(f"{path}: the cached copy {found} is incomplete, it lacks {', '.join(missing)}")
    return found


_TRAINER_STATE = frozenset({"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"})


def _is_weights(file: Path) -> bool:
    return file.suffix in {".safetensors", ".bin", ".pt"} and file.name not in _TRAINER_STATE


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
        for key in SETTINGS[1:]  # a folder has no revision
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
        quantize=values.get("quantize"),
    )
    return replace(card, fingerprint=_fingerprint(card, prompt.template))


def _fingerprint(card: ModelCard, template: str) -> str:
    weights = folder_digest(card.path)
    if card.adapter and not Path(card.adapter).is_dir():
        raise ModelError(f"adapter folder not found: {card.adapter}")
    adapter = folder_digest(card.adapter) if card.adapter else ""
    parts = [weights, adapter, template, card.decode, card.max_new_tokens, EXTRACTION_VERSION]
    parts += [card.quantize] if card.quantize else []  # records of whole weights keep their keys
    return _digest("\x1f".join(map(str, parts)).encode())


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=12).hexdigest()


def folder_digest(folder: str) -> str:
    """Hash of all weights, their indexes, configs and tokenizer files in a model folder."""
    texts = {".json", ".jinja", ".txt", ".model"}
    parts = [Path(folder), *Path(folder).glob("qformer_tokenizer")]  # InstructBLIP's second tokenizer
    files = sorted(p for part in parts for p in part.iterdir() if p.suffix in texts or _is_weights(p))
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
