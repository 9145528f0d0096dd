"""Strict answer extraction: what is not in the asked form is invalid, never force-matched (METHOD, Attack 7)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from ..core.types import LETTERS, Status
from .prompts import Prompt

_TAGGED = re.compile(r"<answer>\s*\(?([A-Z])\)?\.?\s*</answer>")
_BARE = re.compile(r"\s*\(?([A-Z])\)?\.?\s*")


def extract(text: str, prompt: Prompt, n_options: int, *, finished: bool) -> tuple[int | None, Status]:
    """The option index that a generated reply names, and whether the reply is valid.

    `text` is the reply without special tokens; `finished` is False where generation ran into its token limit.
    A tagged prompt wants exactly one `<answer>X</answer>` (before it, for a reasoning prompt, one closed `<think>`);
    an untagged one wants the letter alone. A letter beyond the options is invalid. A reply cut off before it gave an
    answer is "truncated".
    """
    if prompt.tagged:
        letters = _TAGGED.findall(text)
        well_formed = len(letters) == 1 and text.count("<answer>") == 1 and text.rstrip().endswith("</answer>")
        if prompt.reasons:
            well_formed = well_formed and text.lstrip().startswith("<think>") and text.count("</think>") == 1
    else:
        match = _BARE.fullmatch(text)
        letters, well_formed = ([match[1]] if match else []), match is not None
    if well_formed and letters[0] in LETTERS[:n_options]:
        return LETTERS.index(letters[0]), "valid"
    return None, "invalid" if finished else "truncated"


def split_at_letter(text: str) -> tuple[str, str] | None:
    """What stands before and after the first letter in `<answer>` tags; None where there is no such letter."""
    match = _TAGGED.search(text)
    return (text[: match.start(1)], text[match.end(1) :]) if match else None


def letter_place(text: str, prompt: Prompt) -> int | None:
    """Where the letter of a reply stands: in `<answer>` tags, or alone; None where there is none."""
    if prompt.tagged:
        found = split_at_letter(text)
        return len(found[0]) if found else None
    match = _BARE.fullmatch(text)
    return match.start(1) if match else None


def fork(encode: Callable[[str], Sequence[int]], head: str, tail: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where a tokenizer parts the letters: tokens common to `head A tail`, `head B tail`, ..., and the next of each.

    A letter is not a token of its own everywhere (Qwen's has `>A`), so the place is found from whole replies.
    """
    rows = [tuple(encode(head + letter + tail)) for letter in LETTERS]
    common = 0
    while len({row[common] for row in rows}) == 1:
        common += 1
    return rows[0][:common], tuple(row[common] for row in rows)
