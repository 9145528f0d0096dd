"""Measure every model family and write the table of docs/models.md: `python docs/families.py` (about a minute).

Builds each family's tiny random-weight model (tests/families.py), loads it through the one adapter as a suite would,
and measures what tests/test_families.py asserts. Ends with 1 where a family fails. tests/test_models_page.py holds the
page to the list of families, not to the digits.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from families import FAMILIES, build, lacks  # noqa: E402
from measured_family import STEPS, THREAT, Measured, measure  # noqa: E402
from transformers.utils import logging  # noqa: E402

from safemed_bench.core.types import format_eps  # noqa: E402

PAGE = HERE / "models.md"
PLACE = re.compile(r"(<!-- measured: families -->\n).*?(<!-- end -->)", re.DOTALL)
NAMES = {
    "qwen2_vl": "Qwen2-VL",
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen3_vl": "Qwen3-VL",
    "llava": "LLaVA 1.5",
    "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision",
    "internvl": "InternVL3",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM",
    "gemma3": "Gemma 3, MedGemma",
    "paligemma2": "PaliGemma 2",
    "blip2": "BLIP-2 (OPT)",
    "instructblip": "InstructBLIP (Vicuna)",
    "mllama": "Llama 3.2 Vision (Mllama)",
    "pixtral": "Pixtral",
    "mistral3": "Mistral 3",
}
COLUMNS = (
    "family",
    "canvas",
    "resampled",
    "map error",
    "gradient",
    "batching",
    "PGD",
    "noise",
    "replies",
    "bf16",
    "fp16",
)
MAP, GRADIENT, COSINE, BATCHING = 1e-5, 0.05, 0.99, 1e-4
"""What a family must keep: those of the start-up check, and the cosine of test_families.py."""


def row(found: Measured) -> tuple[str, ...]:
    """A line of the table; what is out of bounds is in bold."""
    return (
        NAMES[found.family],
        str(found.side),
        "thumbnail" if found.resizes else "nothing",
        bounded(found.map, found.map <= MAP),
        bounded(found.gradient, found.gradient <= GRADIENT and found.cosine >= COSINE),
        bounded(found.batching, found.batching <= BATCHING),
        mark(f"{found.fooled}/{found.attacked}", found.fooled > found.noise),
        f"{found.noise}/{found.attacked}",
        mark(f"{found.same_replies}/{found.replies}", found.same_replies == found.replies),
        *(mark("no" if reason else "yes", not reason) for reason in found.half.values()),
    )


def bounded(value: float, within: bool) -> str:
    return mark(f"{value:.0e}" if value else "0", within)


def mark(text: str, good: bool) -> str:
    return text if good else f"**{text}**"


def left_out(family: str, reason: str) -> tuple[str, ...]:
    return (NAMES[family], f"not measured: {reason.partition(': ')[2]}", *[""] * (len(COLUMNS) - 2))


def table(rows: Iterable[tuple[str, ...]]) -> str:
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def provenance() -> str:
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch", "pillow"))
    return (
        f"\n\nMeasured on a CPU ({platform.machine()}) with Python {platform.python_version()}, {versions}; float32 "
        f"but for the last two columns; PGD of {STEPS} steps at {THREAT.norm} {format_eps(THREAT.eps)}, objective "
        "`answer`."
    )


def measured() -> list[tuple[str, ...]]:
    rows = []
    for family in FAMILIES:
        reason = lacks(family)
        with tempfile.TemporaryDirectory() as folder:
            rows.append(left_out(family, reason) if reason else row(measure(family, build(family, Path(folder)))))
        print(" | ".join(rows[-1]), file=sys.stderr)
    return rows


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    rows = measured()
    written = f"{table(rows)}{provenance()}\n"
    PAGE.write_text(PLACE.sub(lambda place: f"{place[1]}{written}{place[2]}", PAGE.read_text()))
    sys.exit(1 if "**" in table(rows) else 0)


if __name__ == "__main__":
    main()
