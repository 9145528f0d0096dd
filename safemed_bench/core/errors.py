"""Every error a user can meet. The CLI turns each into one message and one exit code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches


class SafeMedError(Exception):
    """Base of all errors that are not bugs. `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(SafeMedError):
    """Wrong flag, unknown name, value out of range."""

    exit_code = 2


class DataError(SafeMedError):
    """A data folder, a question file or an image that cannot be used as it is."""

    exit_code = 2


class ModelError(SafeMedError):
    """A model that is absent, cannot be loaded, or fails its start-up self-check."""

    exit_code = 2


class AccessError(ModelError):
    """A server that answers no request at all: it refuses the key, or has no such model."""


class IncompleteError(SafeMedError):
    """The run stopped, or ended with more missing records than allowed. What is done is on disk."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a file; `line` and `column` count from 1, 0 where they are not known."""

    file: str
    line: int
    column: int
    key: str
    message: str

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return f"{place}  {self.key}: {self.message}" if self.key else f"{place}  {self.message}"


class SuiteError(UsageError):
    """An invalid suite or training config; carries all problems at once."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """` Did you mean 'x'?` where a known name is close, else the list of known names."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(sorted(known))}." if known else ""
