"""Deliberately broken models and attacks, each through the real runner: its diagnostic must trip, and sound toys pass.

Faults that the Hugging Face adapter refuses at start-up are tested with it (test_families.py).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_model import ToyVLM
from toy_run import PLUGIN, SIDE, toy_dataset, toy_execute

from safemed_bench.core.registry import load_plugin_file
from safemed_bench.core.types import PROBE
from safemed_bench.datasets.base import Dataset
from safemed_bench.datasets.images import load_canvas
from safemed_bench.models.card import resolve
from safemed_bench.results import load_records, load_run, summarise
from safemed_bench.results.diagnostics import CHECKS
from safemed_bench.results.terminal import checks
from safemed_bench.suite.plan import Plan, build_plan
from safemed_bench.suite.schema import Suite

FAULTS = Path(__file__).parent / "fault_plugin.py"
SOUND = ("toy", "toy_cot")
MODELS = {
    "quantised": "dead-gradients",
    "saturated": "dead-gradients",
    "detached": "dead-gradients",
    "random_logits": "loss-noise",
    "unsteady": "repeat-run",
    "mute": "readable-answers",
    "sightless": "image-reliance",
}
ATTACKS: dict[str, tuple[dict[str, Any], str]] = {
    "small ball": ({"attack": "normalised_eps", "steps": 10}, "budget-used"),
    "large ball": ({"attack": "unscaled_eps"}, "constraint-audit"),
    "clamped": ({"attack": "normalised_clamp"}, "zero-eps-equals-clean"),
    "lost": ({"attack": "forgetful", "steps": 20}, "iterative-not-weaker-than-fgsm"),
    "own label": ({"attack": "pgd", "steps": 10, "objectives": ["own_argmax"]}, "unseen-success"),
}


def dataset_of(folder: Path, count: int = 48) -> Dataset:
    """Questions whose true option is what the sound toy answers, save every sixth."""
    made = toy_dataset(folder, count)
    canvas = np.stack([load_canvas(Path(q.image), SIDE, "pad").transpose(2, 0, 1) for q in made.questions])
    model = ToyVLM(resolution=(SIDE, SIDE))
    batch = model.prepare(made.questions, torch.from_numpy(np.ascontiguousarray(canvas)))
    found = model.answer(batch, batch.pixels)
    questions = tuple(
        replace(q, answer=((a.index or 0) + (i % 6 == 5)) % len(q.options))
        for i, (q, a) in enumerate(zip(made.questions, found, strict=True))
    )
    return replace(made, questions=questions)


def plan_of(dataset: Dataset, level: str) -> Plan:
    for plugin in (PLUGIN, FAULTS):
        load_plugin_file(plugin)
    honest = [*SOUND, *MODELS]
    suite = Suite.model_validate(
        {
            "name": "faults",
            "data": {"resolution": SIDE},
            "threat": {"eps": [8 / 255]},
            "models": [*honest, *({"name": name, "entry": "toy"} for name in ATTACKS)],
            "conditions": [
                "clean",
                "blank",
                "noise",
                {"attack": "fgsm", "objectives": "strong"},
                {"attack": "pgd", "steps": 10, "objectives": "strong", "models": honest},
                {"attack": "square", "params": {"queries": 20}, "models": list(SOUND)},
                *(spec | {"models": [name]} for name, (spec, _) in ATTACKS.items()),
            ],
            "diagnostics": {"level": level, "share": 0.25},
            "run": {"chunk": 24, "workers": 1, "device": "cpu"},
        }
    )
    return build_plan(suite, dataset, [resolve(spec) for spec in suite.models])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return dataset_of(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def folder(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "run"
    toy_execute(plan_of(dataset, "probe"), folder, plugins=[PLUGIN, FAULTS])
    return folder


@pytest.fixture(scope="module")
def summary(folder: Path) -> dict[str, Any]:
    return summarise(folder)


def said(summary: dict[str, Any], model: str) -> dict[str, tuple[str, str]]:
    return {r["id"]: (r["status"], r["evidence"]) for r in summary["diagnostics"] if r["model"] == model}


@pytest.mark.parametrize("model", SOUND)
def test_a_sound_model_trips_no_fail(summary: dict[str, Any], model: str) -> None:
    found = said(summary, model)
    assert not {name: text for name, (status, text) in found.items() if status == "fail"}
    elsewhere = {"monotone-in-eps", "monotone-in-effort", "certified-below-empirical"}
    of_standing = {"budget-used", "convergence"}  # there may be no question left that stands
    assert found.keys() | of_standing == CHECKS.keys() - elsewhere


@pytest.mark.parametrize(("model", "check"), [*MODELS.items(), *((name, c) for name, (_, c) in ATTACKS.items())])
def test_a_planted_fault_is_caught(summary: dict[str, Any], model: str, check: str) -> None:
    found = said(summary, model)
    assert found[check][0] == "fail", found


def test_probes_change_no_unit_and_enter_no_table(dataset: Dataset, folder: Path, summary: dict[str, Any]) -> None:
    with_probes, without = plan_of(dataset, "probe"), plan_of(dataset, "records")
    keys = [unit.key for unit in without.units]
    assert {unit.key for unit in with_probes.units} > {*keys}
    assert [u.key for u in with_probes.units if not u.cell.partition("/")[2].startswith(PROBE)] == keys
    assert not any(c.name.startswith(PROBE) for v in load_run(folder).verdicts for c in v.conditions)
    assert not any(row["condition"].startswith(PROBE) for row in summary["estimates"])
    assert "linf:255/255" not in summary["threat"]["labels"]
    records = load_records(folder)
    probes = records[records["condition"].str.startswith(PROBE)]
    taken = summary["probes"]
    assert taken["records"] == len(probes) == len([*with_probes.units]) - len(keys) > 0
    assert taken["share_of_seconds"] == pytest.approx(probes["seconds"].sum() / records["seconds"].sum(), abs=1e-6)
    assert probes.groupby(["model", "condition"]).size().unique().tolist() == [12]


def test_the_terminal_names_what_did_not_pass(summary: dict[str, Any]) -> None:
    lines = list(checks(summary))
    failed = sum(row["status"] == "fail" for row in summary["diagnostics"])
    passed = sum(row["status"] == "pass" for row in summary["diagnostics"])
    assert [line.startswith("FAIL") for line in lines].count(True) == failed
    assert any(line.startswith("FAIL sightless: image-reliance: gain ") for line in lines)
    assert lines[-1].startswith(f"diagnostics: {passed} of {len(summary['diagnostics'])} checks passed")


def test_every_check_has_its_paragraph() -> None:
    text = (Path(__file__).parents[1] / "docs" / "diagnostics.md").read_text()
    headings = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert headings == [*CHECKS]
