"""data check, data prepare."""

from __future__ import annotations

import sys
from pathlib import Path

from ..core.errors import UsageError
from . import output as out


def check(root: str, *, as_json: bool) -> None:
    """Audit a data folder and print what was found."""
    from ..datasets.audit import audit, render

    found = audit(Path(root))
    if as_json:
        out.print_json(found.to_dict())
    else:
        out.results().print(render(found))


def prepare(name: str, output: str, *, seed: int, images: str | None, size: int, workers: int | None) -> None:
    """Write a generated data set to a folder, in OmniMedVQA's own layout."""
    from ..datasets.phantom import SPLITS, PhantomSpec
    from ..datasets.phantom import prepare as write

    if name != "phantom":
        raise UsageError(f"'{name}' cannot be prepared; phantom is the set that is generated")
    counts = parse_images(images) if images else {}
    spec = PhantomSpec.from_mapping({"seed": seed, "size": size, **counts})
    write(Path(output), spec, [s for s in SPLITS if spec.count(s)], workers, _tell if sys.stderr.isatty() else None)
    out.note(f"{sum(spec.count(s) for s in SPLITS):,} images in {output}")


def parse_images(text: str) -> dict[str, int]:
    """`100`: of the test split only; `train=200,test=100`: by split. Images per modality. Raises UsageError."""
    from ..datasets.phantom import SPLITS

    counts = dict.fromkeys(SPLITS, 0)
    for part in text.split(","):
        split, equals, number = part.rpartition("=")
        split = split.strip() if equals else "test"
        if split not in counts or not number.strip().isdigit():
            raise UsageError(f"--images {text}: must be a number, or split=number for {', '.join(SPLITS)}")
        counts[split] = int(number)
    return counts


def _tell(done: int, total: int) -> None:
    print(f"\r{done:,} of {total:,} images", end="\n" if done == total else "", file=sys.stderr, flush=True)
