"""Plugins: a decorator for ours, an entry point group for others', a file for a script."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from .errors import UsageError, did_you_mean

T = TypeVar("T")
OURS = __name__.partition(".")[0]
"""The package itself; whatever is defined elsewhere is a plugin."""


@dataclass(frozen=True, slots=True)
class _Reference:
    """`package.module:attribute`, imported only when the item is asked for."""

    target: str

    def resolve(self) -> Any:
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(module), attribute)

    def names(self, item: object) -> bool:
        return f"{getattr(item, '__module__', '')}:{getattr(item, '__qualname__', '')}" == self.target


class Registry(Generic[T]):
    """Names of one kind of plugin. Taking a name twice is an error; an unknown name says what was meant.

    `home` modules register ours when they are first needed, so listing a registry imports nothing before.
    With `lazy` a name stands for "module:attribute", so that names can be listed and checked without torch.
    """

    def __init__(self, kind: str, group: str, home: tuple[str, ...] = ()) -> None:
        self.kind, self.group, self._home = kind, group, home
        self._items: dict[str, T | _Reference] = {}
        self._loaded = False

    def register(self, name: str) -> Callable[[T], T]:
        def keep(item: T) -> T:
            self._keep(name, item)
            return item

        return keep

    def lazy(self, name: str, target: str) -> None:
        """Register `target`, written "package.module:attribute"; it is imported by the first `get`."""
        if ":" not in target:
            raise ValueError(f"{self.kind} '{name}': {target!r} is not 'module:attribute'")
        self._keep(name, _Reference(target))

    def _keep(self, name: str, item: T | _Reference) -> None:
        held = self._items.setdefault(name, item)
        if held is item or held == item or (isinstance(item, _Reference) and item.names(held)):
            return
        if not (isinstance(held, _Reference) and held.names(item)):
            raise UsageError(f"{self.kind} '{name}' is registered twice")
        self._items[name] = item

    def _load(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for module in self._home:
            importlib.import_module(module)
        for point in entry_points(group=self.group):
            self._keep(point.name, _Reference(point.value.split("[")[0].strip()))

    def get(self, name: str) -> T:
        self._load()
        if name not in self._items:
            raise UsageError(f"unknown {self.kind} '{name}'.{did_you_mean(name, list(self._items))}")
        item = self._items[name]
        if isinstance(item, _Reference):
            item = self._items[name] = item.resolve()
        return item

    def source(self, name: str) -> str:
        """Hash of the code of plugin `name`; "" for what ships with this package, and imports none of that."""
        self._load()
        held = self._items.get(name)
        if isinstance(held, _Reference) and _top(held.target.partition(":")[0]) == OURS:
            return ""
        return source_digest(self.get(name))

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._items

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._items))


models: Registry[Any] = Registry("model", "safemed_bench.models", ("safemed_bench.models.zoo",))
attacks: Registry[Any] = Registry("attack", "safemed_bench.attacks", ("safemed_bench.attacks",))
objectives: Registry[Any] = Registry("objective", "safemed_bench.objectives", ("safemed_bench.attacks",))
certifiers: Registry[Any] = Registry("certifier", "safemed_bench.certifiers", ("safemed_bench.certify",))
corruptions: Registry[Any] = Registry("corruption", "safemed_bench.corruptions", ("safemed_bench.corruptions",))
datasets: Registry[Any] = Registry("data set", "safemed_bench.datasets", ("safemed_bench.datasets",))
rewards: Registry[Any] = Registry("reward", "safemed_bench.rewards", ("safemed_bench.training.rewards",))


def load_plugin_file(path: str | Path) -> None:
    """Run a Python file whose decorators register plugins (`--plugin file.py`)."""
    path = Path(path).resolve()
    if not path.is_file():
        raise UsageError(f"plugin file not found: {path}")
    # by its whole path: two files of one name in two folders are two plugins
    name = f"safemed_plugin_{path.stem}_{_digest(str(path).encode())}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"cannot import plugin file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except UsageError:
        del sys.modules[name]
        raise
    except Exception as error:  # a stranger's file may raise anything
        del sys.modules[name]
        raise UsageError(f"plugin file {path} failed: {type(error).__name__}: {error}") from error


def source_digest(item: object) -> str:
    """Hash of the file that defines `item`, or of all Python files of its package; "" for ours and for no file.

    A loose file is hashed alone: what it imports from other loose files is not seen.
    """
    while isinstance(item, functools.partial):
        item = item.func
    name = str(getattr(item, "__module__", ""))
    module, top = sys.modules.get(name), sys.modules.get(_top(name))
    if module is None or _top(name) == OURS:
        return ""
    folders = [Path(folder) for folder in getattr(top, "__path__", ())]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    if not files and (file := getattr(module, "__file__", None)):
        files = [Path(file)]
    return _digest(b"\x1f".join(file.read_bytes() for file in files)) if files else ""


def _top(module: str) -> str:
    return module.partition(".")[0]


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
