"""One entry is shown the images that were made against another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toy_run import SIDE, records, toy_dataset, toy_execute, toy_plan

from safemed_bench.core.errors import SuiteError
from safemed_bench.datasets.images import load_canvas
from safemed_bench.report.run import write_page
from safemed_bench.report.source import read_source
from safemed_bench.results.frames import Condition
from safemed_bench.run import artefacts
from safemed_bench.suite import load_suite
from safemed_bench.suite.plan import Plan

ATTACK = {"attack": "pgd", "steps": 5, "objectives": ["answer"]}
SHOWN = {**ATTACK, "transfer": "toy"}
OWN, GIVEN = "pgd[answer]@linf:8/255", "pgd<-toy[answer]@linf:8/255"


def planned(folder: Path, *conditions: Any, **run: Any) -> Plan:
    """`other` is a second entry with the same weights as `toy`; `toy_cot` has others."""
    models = ("toy", {"name": "other", "entry": "toy"}, "toy_cot")
    return toy_plan(toy_dataset(folder / "images"), models, ("clean", *conditions), **run)


def of(folder: Path, model: str, condition: str) -> dict[str, dict[str, Any]]:
    return {r["question_id"]: r for r in records(folder) if (r["model"], r["condition"]) == (model, condition)}


def verdicts(folder: Path, model: str) -> dict[str, dict[str, Any]]:
    """What is found of the images shown, without the scores: another batch rounds these otherwise."""
    shown = of(folder, model, GIVEN)
    return {name: {k: v for k, v in record.items() if k != "option_logprobs"} for name, record in shown.items()}


def image(folder: Path, record: dict[str, Any]) -> np.ndarray:
    path = folder.parent / "images" / f"{record['question_id'][1:]}.png"
    canvas = np.ascontiguousarray(load_canvas(path, SIDE, "pad").transpose(2, 0, 1))
    return artefacts.load(folder, record["artefact"], canvas)


def test_the_images_shown_are_those_that_were_made_against_the_source(tmp_path: Path) -> None:
    toy_execute(planned(tmp_path, ATTACK, SHOWN), tmp_path / "run")
    own, twin = of(tmp_path / "run", "toy", OWN), of(tmp_path / "run", "other", GIVEN)
    given = of(tmp_path / "run", "toy_cot", GIVEN)
    assert not of(tmp_path / "run", "toy", GIVEN)
    assert set(own) == set(twin) == set(given) == {f"q{i}" for i in range(12)}
    assert any(r["linf"] for r in own.values())
    for name, record in own.items():
        assert np.array_equal(image(tmp_path / "run", record), image(tmp_path / "run", given[name]))
        assert not given[name]["error"] and given[name]["linf"] <= 8 / 255 + 1e-9
        assert (twin[name]["answer"], twin[name]["correct"]) == (record["answer"], record["correct"])
    assert any(r["clean_correct"] and not r["correct"] for r in twin.values())


def test_neither_order_nor_workers_nor_a_source_that_is_not_measured_change_a_record(tmp_path: Path) -> None:
    toy_execute(planned(tmp_path, ATTACK, SHOWN), tmp_path / "first")
    for name, conditions, options in (
        ("before", (SHOWN, ATTACK), {"workers": 2, "batch_size": 1}),
        ("alone", (SHOWN,), {}),
    ):
        plan = planned(tmp_path, *conditions)
        assert bool(plan.notes) == (name == "alone")
        toy_execute(plan, tmp_path / name, **options)
        for model in ("other", "toy_cot"):
            assert verdicts(tmp_path / name, model) == verdicts(tmp_path / "first", model)


def test_lost_images_of_the_source_are_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    toy_execute(planned(tmp_path, ATTACK), folder)
    shutil.rmtree(folder / "artefacts")
    toy_execute(planned(tmp_path, ATTACK, SHOWN), folder)
    toy_execute(planned(tmp_path, ATTACK, SHOWN), tmp_path / "whole")
    assert of(folder, "toy_cot", GIVEN) == of(tmp_path / "whole", "toy_cot", GIVEN)


def test_a_transferred_image_is_held_to_the_threat_model(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    toy_execute(planned(tmp_path, ATTACK), folder)
    for file in (folder / "artefacts").glob("toy_pgd*/*.npz"):
        with np.load(file) as held:
            delta, ids = held["delta"], held["question_ids"]
        np.savez_compressed(file, delta=np.clip(delta.astype(np.int16) * 4, -127, 127), question_ids=ids)
    toy_execute(planned(tmp_path, ATTACK, SHOWN), folder)
    moved = {r["question_id"] for r in of(folder, "toy", OWN).values() if r["linf"]}
    assert moved and {r["question_id"] for r in of(folder, "toy_cot", GIVEN).values() if r["error"]} == moved


def test_what_is_made_of_the_records(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    toy_execute(planned(tmp_path, ATTACK, SHOWN), folder)
    parsed = Condition.parse(GIVEN)
    assert (parsed.attack, parsed.source, parsed.objective, parsed.words) == ("pgd", "toy", "answer", "PGD from toy")
    source = read_source(folder)
    page = write_page(source).read_text()
    assert "Do attacks transfer" in page and "PGD from toy" in page
    said = {(e["model"], e["condition"], e["metric"], e["modality"]): e["value"] for e in source.summary["estimates"]}
    accuracy = {c: said["toy_cot", c, "accuracy", "all"] for c in ("worst@linf:8/255", OWN, GIVEN)}
    assert accuracy["worst@linf:8/255"] <= min(accuracy[OWN], accuracy[GIVEN])
    lines = [line.split(",") for line in (folder / "tables" / "transfer.csv").read_text().splitlines()]
    table = {line[2]: line for line in lines if line[0] == "TOY IMAGES"}
    head = next(line for line in lines if line[0] == "data")
    row = {name: table["toy"][head.index(name)] for name in ("toy", "other", "toy_cot")}
    assert row["toy"] == row["other"] and float(row["toy_cot"]) == pytest.approx(accuracy[GIVEN], abs=1e-5)
    cell = next(c for c in json.loads((folder / "run.json").read_text())["cells"] if c["condition"] == GIVEN)
    assert cell["attack"] == {"name": "pgd", "source": "toy", "steps": 5}


@pytest.mark.parametrize(
    ("condition", "models", "message"),
    [
        ("{attack: pgd, transfer: stf}", "[sft, cot]", "'stf' is not an entry of this suite. Did you mean 'sft'"),
        ("{attack: pgd, transfer: sft}", "[sft]", "no other entry is shown"),
        ("{attack: pgd, transfer: sft}", "[sft, {name: cot, resolution: 32}]", "nothing is resized"),
        ("{certify: cohen, sigma: 0.1, transfer: sft}", "[sft, cot]", "certify takes no transfer"),
    ],
)
def test_what_cannot_be_shown_is_refused(tmp_path: Path, condition: str, models: str, message: str) -> None:
    file = tmp_path / "suite.yaml"
    file.write_text(f"name: x\nmodels: {models}\nconditions:\n  - {condition}\n")
    with pytest.raises(SuiteError, match=message):
        load_suite(str(file))
