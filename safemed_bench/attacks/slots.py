"""The decision slot: the place in a rationale where the chosen option is first told from the others.

Nothing is known of the rationale's template. Options are tokenised as they may stand in running text (with and
without a leading space, as written, in lower case, capitalised) and looked up among the reply's own tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

Encode = Callable[[str], tuple[int, ...]]
Decode = Callable[[Sequence[int]], str]

ANSWER_TAG = "<answer>"


class Slot(NamedTuple):
    """position: how many tokens of the reply stand before the slot. candidates: the chosen option's token there,
    then one of each option that would go on differently at this place; all distinct."""

    position: int
    candidates: tuple[int, ...]


class Form(NamedTuple):
    """One spelling of the chosen option: what to look up, and where in it the slot is.

    tokens: of the text to look up. offset: of the token that tells it from the others; may lie right behind
    `tokens` where the chosen text is the beginning of another option. rivals: the others' tokens at that place.
    """

    tokens: tuple[int, ...]
    offset: int
    rivals: tuple[int, ...]


def find_slot(options: Sequence[str], chosen: int, reply: Sequence[int], encode: Encode, decode: Decode) -> Slot | None:
    """The earliest place before the answer tag that tells option `chosen` from the others, if any.

    The option's whole text is looked for first, then the least run of its leading words that no other option begins
    with; a lone token would match pieces of unrelated words.
    """
    return next(iter(find_slots(options, chosen, reply, encode, decode)), None)


def find_slots(
    options: Sequence[str], chosen: int, reply: Sequence[int], encode: Encode, decode: Decode
) -> tuple[Slot, ...]:
    """All such places, the earliest first."""
    rationale = tuple(reply[: rationale_length(reply, decode)])
    for whole in (True, False):
        found: dict[int, Slot] = {}
        for form in _forms(options, chosen, encode, whole=whole):
            for slot in _locate(form, rationale, decode):
                found.setdefault(slot.position, slot)
        if found:
            return tuple(found[position] for position in sorted(found))
    return ()


def rationale_length(reply: Sequence[int], decode: Decode) -> int:
    """How many tokens of a reply stand before its answer tag; all of them where there is none."""
    # Text only grows with the tokens, so the first prefix that holds the tag is found by bisection.
    size = bisect_left(range(len(reply) + 1), True, key=lambda n: ANSWER_TAG in decode(reply[:n]))
    return max(size - 1, 0) if size <= len(reply) else len(reply)


def _spellings(text: str) -> list[str]:
    return [space + case for space in (" ", "") for case in (text, text.lower(), text[:1].upper() + text[1:])]


def _forms(options: Sequence[str], chosen: int, encode: Encode, *, whole: bool) -> list[Form]:
    forms = []
    for spelled in zip(*map(_spellings, options), strict=True):
        tokens = [encode(text) for text in spelled]
        own = tokens[chosen]
        others = [other for other in tokens if other != own]  # a repeated option cannot be told apart
        if not own or not others:
            continue
        offset = min(_shared(own, other) for other in others)
        here = own[offset : offset + 1]
        rivals = tuple(dict.fromkeys(o[offset] for o in others if len(o) > offset and o[offset : offset + 1] != here))
        if not whole:
            own = _leading_words(spelled[chosen], own, offset, encode)
        forms.append(Form(own, offset, rivals))
    return forms


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


def _leading_words(text: str, own: tuple[int, ...], offset: int, encode: Encode) -> tuple[int, ...]:
    """Tokens of the fewest leading words that hold the token at `offset`; else all of `own`."""
    for end in (i for i in range(1, len(text)) if text[i] == " "):
        start = encode(text[:end])
        if len(start) > offset and start == own[: len(start)]:
            return start
    return own


def _locate(form: Form, rationale: tuple[int, ...], decode: Decode) -> Iterator[Slot]:
    """The places where the form stands as whole words."""
    size = len(form.tokens)
    for start in range(len(rationale) - max(size, form.offset + 1) + 1):
        own = rationale[start + form.offset]
        if rationale[start : start + size] != form.tokens or own in form.rivals:
            continue
        if _is_whole(rationale, start, start + size, decode):
            yield Slot(start + form.offset, (own, *form.rivals))


def _is_whole(rationale: tuple[int, ...], start: int, end: int, decode: Decode) -> bool:
    """Whether tokens [start, end) are not a piece of a longer word."""
    before, through, after = (decode(rationale[:n]) for n in (start, end, end + 1))
    piece, rest = through[len(before) :], after[len(through) :]
    inside_left = before[-1:].isalnum() and piece[:1].isalnum()
    inside_right = through[-1:].isalnum() and rest[:1].isalnum()
    return not (inside_left or inside_right)
