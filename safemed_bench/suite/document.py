"""YAML as plain values that remember where each of them stands, through merges and overrides."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..core.errors import Problem, SuiteError

Key = tuple[str | int, ...]
ENV = re.compile(r"\$\{env:([A-Za-z_]\w*)(?::([^}]*))?\}")
DEPTH = 40


class Place(NamedTuple):
    """File, line and column; the last two count from 1, and are 0 for what does not come from a file."""

    file: str
    line: int = 0
    column: int = 0


@dataclass
class Document:
    """A mapping; `values` and `keys` hold the place of every value and of every mapping key by its path."""

    value: dict[str, Any] = field(default_factory=dict)
    values: dict[Key, Place] = field(default_factory=dict)
    keys: dict[Key, Place] = field(default_factory=dict)

    def place(self, path: Sequence[str | int], *, of_key: bool = False) -> Place:
        """Where `path` stands, or the nearest thing around it that stands anywhere."""
        if of_key and tuple(path) in self.keys:
            return self.keys[tuple(path)]
        for stop in range(len(path), -1, -1):
            if tuple(path[:stop]) in self.values:
                return self.values[tuple(path[:stop])]
        return Place("")

    def forget(self, path: Key) -> None:
        """Drop what is known of the places at and below `path`."""
        for table in (self.values, self.keys):
            for known in [k for k in table if k[: len(path)] == path]:
                del table[known]

    def drop(self, path: Key) -> None:
        """Remove a key of a mapping, if it is there."""
        target: Any = self.value
        for part in path[:-1]:
            target = target.get(part) if isinstance(target, dict) else None
        if isinstance(target, dict) and path[-1] in target:
            del target[path[-1]]
            self.forget(path)

    def set(self, path: Key, value: Any, place: Place) -> None:
        """Put `value` at `path`, making mappings on the way. Raises KeyError(reason) where the way is blocked."""
        target: Any = self.value
        for depth, part in enumerate(path[:-1]):
            here = path[: depth + 1]
            step = _index(target, part, here)
            if isinstance(target, dict) and target.get(step) is None:
                target[step] = {}
                self.values[here] = place
            elif isinstance(target[step], str) and here[0] == "models" and depth == 1:
                target[step] = {"name": target[step]}  # the short form of an entry
            target = target[step]
        target[_index(target, path[-1], path)] = copy.deepcopy(value)
        self.forget(path)
        self.values[path] = self.keys[path] = place


def _index(target: Any, part: str | int, path: Key) -> str | int:
    if isinstance(target, dict):
        return str(part)
    if isinstance(target, list):
        if isinstance(part, int) and 0 <= part < len(target):
            return part
        raise KeyError(f"is a list of {len(target)}: '{part}' is not one of its places, 0 to {len(target) - 1}")
    raise KeyError(f"'{'.'.join(map(str, path[:-1]))}' holds one value and has no keys")


def parse_path(text: str) -> Key:
    """`models.0.prompt` -> ("models", 0, "prompt")."""
    return tuple(int(part) if part.isdigit() else part for part in text.split("."))


def merge(base: Document, top: Document) -> Document:
    """`top` over `base`: mappings are merged key by key, everything else is replaced."""
    result = Document(copy.deepcopy(base.value), dict(base.values), dict(base.keys))

    def into(target: dict[str, Any], source: Mapping[str, Any], path: Key) -> None:
        for key, item in source.items():
            here = (*path, key)
            if isinstance(item, dict) and isinstance(target.get(key), dict):
                into(target[key], item, here)
            else:
                result.forget(here)
                target[key] = copy.deepcopy(item)

    into(result.value, top.value, ())
    result.values |= top.values
    result.keys |= top.keys
    return result


def read(path: Path, shown: str, env: Mapping[str, str], problems: list[Problem]) -> Document:
    """Parse one file. What can be worked around goes to `problems`; what cannot raises SuiteError."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SuiteError([Problem(shown, 0, 0, "", f"not UTF-8 text: byte {error.start}")]) from error
    except OSError as error:
        raise SuiteError([Problem(shown, 0, 0, "", f"cannot be read: {error.strerror}")]) from error
    loader = None
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise SuiteError([Problem(shown, 1, 1, "", "the file is empty")])
        if not isinstance(node, yaml.MappingNode):
            raise SuiteError([Problem(shown, 1, 1, "", "must be a mapping of keys")])
        return _Reader(shown, env, problems, loader).document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        what = " ".join(filter(None, (error.context, error.problem)))
        raise SuiteError([Problem(shown, line, column, "", f"not YAML: {what}")]) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise SuiteError([Problem(shown, line, 1, "", f"not YAML: {error.reason}")]) from error
    finally:
        if loader is not None:
            loader.dispose()


class _Reader:
    """Turns YAML nodes into values, noting places, substituting the environment, refusing keys that stand twice."""

    def __init__(self, file: str, env: Mapping[str, str], problems: list[Problem], loader: yaml.SafeLoader) -> None:
        self.file, self.env, self.problems, self.loader = file, env, problems, loader
        self.result = Document()
        self._flat: set[int] = set()

    def document(self, node: yaml.MappingNode) -> Document:
        self.result.value = self._value(node, ())
        return self.result

    def _value(self, node: yaml.Node, path: Key) -> Any:
        self.result.values[path] = self._place(node)
        if len(path) > DEPTH:
            raise SuiteError([self._problem(node, path, "is nested too deeply; does an alias contain itself?")])
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*path, i)) for i, item in enumerate(node.value)]
        value = self.loader.construct_object(node)
        return self._substitute(value, node, path) if isinstance(value, str) else value

    def _mapping(self, node: yaml.MappingNode, path: Key) -> dict[str, Any]:
        if id(node) not in self._flat:  # an alias brings the same node again
            self._flat.add(id(node))
            self._refuse_twins(node, path)
            self.loader.flatten_mapping(node)
        result: dict[str, Any] = {}
        for key, item in node.value:
            name = str(key.value)
            self.result.keys[*path, name] = self._place(key)
            result[name] = self._value(item, (*path, name))
        return result

    def _refuse_twins(self, node: yaml.MappingNode, path: Key) -> None:
        first: dict[str, int] = {}
        for key, _ in node.value:
            name = str(key.value)
            if name in first:
                message = f"stands twice; first at line {first[name]}"
                self.problems.append(self._problem(key, (*path, name), message))
            first.setdefault(name, key.start_mark.line + 1)

    def _substitute(self, text: str, node: yaml.Node, path: Key) -> Any:
        """Environment values are text; only a whole value in square brackets is read as a YAML list."""

        def replace(match: re.Match[str]) -> str:
            name, default = match.groups()
            if name not in self.env and default is None:
                hint = f"write ${{env:{name}:default}} to give a default"
                self.problems.append(self._problem(node, path, f"environment variable {name} is not set; {hint}"))
            return self.env.get(name, default or "")

        result = ENV.sub(replace, text)
        if result == text and "${" in text:
            self.problems.append(self._problem(node, path, f"'{text}': only ${{env:NAME}} and ${{env:NAME:default}}"))
        if result != text and result.startswith("[") and result.endswith("]"):
            return yaml.safe_load(result)
        return result

    def _place(self, node: yaml.Node) -> Place:
        return Place(self.file, node.start_mark.line + 1, node.start_mark.column + 1)

    def _problem(self, node: yaml.Node, path: Key, message: str) -> Problem:
        return Problem(*self._place(node), ".".join(map(str, path)), message)
