"""Which options say that nothing is wrong: the direction of a clinical error. Rules on words, shown to be read."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NORMAL = re.compile(
    r"\b(normal|healthy|unremarkable)\b"
    r"|\b(no|nothing|without|free of|absence of)\b(?: [\w-]+){0,3}? ?"
    r"\b(abnormal\w*|findings?|diseases?|lesions?|tumou?rs?|cancer|patholog\w+|anomal\w+|retinopathy|pneumonia|fracture)\b",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"\b(not|non|no longer|isn't|never)[ -](a |in |entirely )?(normal|healthy|unremarkable)\b", re.IGNORECASE
)


def reads_normal(option: str) -> bool:
    """Whether an option says that nothing is wrong: `Normal`, `healthy lung`, `No tumor`, `No abnormality detected`."""
    return bool(_NORMAL.search(option)) and not _DENIED.search(option)


def opposite_options(options: Sequence[str], answer: int) -> tuple[int, ...]:
    """The wrong options whose clinical meaning is the other one than the true option's, in their order.

    Where a disease is true: the options that read normal. Where normal is true: those that do not. Empty where nothing
    reads normal, or everything does: the question has no clinical direction.
    """
    normal = [reads_normal(option) for option in options]
    return tuple(i for i, is_normal in enumerate(normal) if is_normal != normal[answer]) if any(normal) else ()
