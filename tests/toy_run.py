"""A small plan over real image files and toy models; as a script, a run that a test can kill."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from safemed_bench.core.registry import load_plugin_file
from safemed_bench.core.types import Question
from safemed_bench.datasets.base import Dataset
from safemed_bench.models.card import resolve
from safemed_bench.run import RunOutcome, execute
from safemed_bench.run.progress import PlainReporter, QuietReporter
from safemed_bench.suite.plan import Plan, build_plan
from safemed_bench.suite.schema import Suite

PLUGIN = Path(__file__).parent / "toy_plugin.py"
SIDE = 16
OPTIONS = ("cyst", "mass", "normal", "nodule")
PGD = {"attack": "pgd", "steps": 5}
COHEN = {"certify": "cohen", "sigma": 0.25, "n": 100, "n0": 20}


def toy_dataset(folder: Path, count: int = 12) -> Dataset:
    """`count` questions in two modalities on PNG files; the files are the same for the same count."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    questions = []
    for i in range(count):
        path = folder / f"{i}.png"
        coarse = draw.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path)
        options = OPTIONS[: 2 + i % 3]
        questions.append(
            Question(
                id=f"q{i}",
                image=str(path),
                image_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                question="What is shown?",
                options=options,
                answer=i % 2,
                modality=("CT", "MRI")[i % 2],
                question_type="diagnosis",
                source="toy",
                split="test",
            )
        )
    return Dataset("toy", "TOY IMAGES", "f00d", tuple(questions), ())


def toy_plan(
    dataset: Dataset,
    models: tuple[Any, ...] = ("toy",),
    conditions: tuple[Any, ...] = ("clean",),
    *,
    pools: Mapping[str, Sequence[Question]] | None = None,
    **run: Any,
) -> Plan:
    load_plugin_file(PLUGIN)
    suite = Suite.model_validate(
        {
            "name": "toy",
            "data": {"resolution": SIDE},
            "threat": {"eps": [8 / 255]},
            "models": list(models),
            "conditions": list(conditions),
            "run": {"chunk": 4, "workers": 1, "device": "cpu"} | run,
        }
    )
    return build_plan(suite, dataset, [resolve(spec) for spec in suite.models], pools=pools)


def toy_execute(plan: Plan, output: Path, **options: Any) -> RunOutcome:
    return execute(plan, output, **({"reporter": QuietReporter(), "plugins": [PLUGIN]} | options))


def records(folder: Path, name: str = "records.jsonl") -> list[dict[str, Any]]:
    """Records of a run folder without the one field that time may change."""
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


if __name__ == "__main__":
    images, output, workers, *certify = sys.argv[1:]
    what = (("toy_patient",), (COHEN,)) if certify else (("toy_slow",), ("clean", PGD))
    slow = toy_plan(toy_dataset(Path(images)), *what, batch_size=16 if certify else "auto")
    try:
        execute(slow, Path(output), workers=int(workers), plugins=[PLUGIN], reporter=PlainReporter(every=0.2))
    except Exception as error:
        print(error, file=sys.stderr)
        os._exit(getattr(error, "exit_code", 1))
