"""Plans: which cells there are, what a key depends on, how chunks are cut, whose image is shown."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from safemed_bench.core import registry
from safemed_bench.core.errors import UsageError
from safemed_bench.core.types import Question
from safemed_bench.datasets.base import Dataset
from safemed_bench.models.card import ModelCard
from safemed_bench.suite.conditions import CODE_VERSIONS, conditions_for
from safemed_bench.suite.plan import Plan, build_plan
from safemed_bench.suite.schema import Suite
from safemed_bench.suite.shuffle import choose_donors

PGD = {"attack": "pgd", "steps": 20}


def question(number: int, modality: str = "CT", image: str | None = None, error: str = "") -> Question:
    sha = "" if error else hashlib.sha256((image or str(number)).encode()).hexdigest()
    return Question(
        id=f"q{number}",
        image=f"/images/{image or number}.png",
        image_sha256=sha,
        question="What is shown?",
        options=("cyst", "mass", "normal"),
        answer=number % 3,
        modality=modality,
        question_type="Disease Diagnosis",
        source="toy",
        split="test",
        image_error=error,
    )


def dataset(*questions: Question) -> Dataset:
    return Dataset("toy", "TOY", "f00d", questions or tuple(question(i, ("CT", "MRI")[i % 2]) for i in range(10)))


def card(name: str = "m", reasons: bool = False, **values: Any) -> ModelCard:
    decode = "generate" if reasons else "logprob"
    return ModelCard(name, "/weights", "instruct", decode, 64, reasons, "abc", **values)


def suite(**values: Any) -> Suite:
    base = {"name": "s", "models": [{"name": "m", "path": "/weights"}], "conditions": ["clean"], "run": {"chunk": 4}}
    return Suite.model_validate(base | values)


def plan(asked: Dataset | None = None, entry: ModelCard | None = None, dtype: str = "fp32", **values: Any) -> Plan:
    return build_plan(suite(**values), asked or dataset(), [entry or card()], dtype=dtype)


def names(**values: Any) -> list[str]:
    reasons = values.pop("reasons", False)
    return [condition.name for condition in conditions_for(suite(**values), card(reasons=reasons))]


# --- cells ---


def test_the_names_of_conditions() -> None:
    threat = {"eps": ["2/255", 0.1]}
    found = names(conditions=["clean", "blank", "shuffled", "noise", {"attack": "fgsm"}, PGD], threat=threat)
    assert found == [
        "clean",
        "blank",
        "shuffled",
        "noise@linf:2/255",
        "noise@linf:0.1",
        "fgsm[answer]@linf:2/255",
        "fgsm[answer]@linf:0.1",
        "pgd[answer]@linf:2/255",
        "pgd[answer]@linf:0.1",
    ]


def test_a_reasoning_entry_meets_every_standard_objective() -> None:
    threat = {"norm": "l2", "eps": [0.5]}
    assert names(conditions=[PGD], threat=threat, reasons=True) == [
        "pgd[answer]@l2:0.5",
        "pgd[rationale_answer]@l2:0.5",
        "pgd[decision_slot]@l2:0.5",
        "pgd[no_think]@l2:0.5",
    ]
    chosen = [PGD | {"objectives": ["margin", "no_think"]}]
    assert names(conditions=chosen, threat=threat, reasons=True) == ["pgd[margin]@l2:0.5", "pgd[no_think]@l2:0.5"]


def test_strong_objectives_and_the_eps_they_are_used_at() -> None:
    conditions = [PGD | {"at": "headline"}, PGD | {"at": "other", "objectives": "strong"}]
    threat = {"eps": ["2/255", "8/255"], "headline": "8/255"}
    strong = ["pgd[rationale_answer]@linf:2/255", "pgd[decision_slot]@linf:2/255"]
    found = names(conditions=conditions, threat=threat, reasons=True)
    assert [name for name in found if "8/255" not in name] == strong and len(found) == 6
    assert names(conditions=conditions, threat=threat) == ["pgd[answer]@linf:8/255", "pgd[answer]@linf:2/255"]
    assert names(conditions=[conditions[1], "clean"], threat={"eps": ["8/255"]}) == ["clean"]


def test_a_black_box_and_a_cascade_are_one_cell_at_each_eps() -> None:
    threat = {"eps": ["2/255", "4/255"]}
    found = names(conditions=[{"attack": "safemed-attack"}, {"attack": "square", "at": "headline"}], threat=threat)
    assert found == ["safemed-attack@linf:2/255", "safemed-attack@linf:4/255", "square@linf:4/255"]
    made = plan(conditions=[{"attack": "safemed-attack", "steps": 5, "params": {"queries": 9}}], threat=threat)
    condition = made.cells[0].condition
    assert (condition.attack, condition.objective) == ("safemed-attack", "")
    assert condition.params == (("queries", 9), ("steps", 5))
    assert names(conditions=[{"attack": "square"}], threat={"norm": "l1", "eps": [12]}) == ["square@l1:12"]


def test_an_objective_that_does_not_apply_is_left_out_and_said() -> None:
    mixed = plan(conditions=[PGD | {"objectives": ["decision_slot", "answer"]}])
    assert {cell.condition.objective for cell in mixed.cells} == {"answer"}
    assert mixed.notes == ("m does not reason: pgd goes without decision_slot",)
    none = plan(conditions=["clean", PGD | {"objectives": "decision_slot"}])
    assert [cell.name for cell in none.cells] == ["m/clean"]
    assert "m is not attacked by pgd: no objective of it applies" in none.notes


def test_cells_carry_what_the_attack_needs() -> None:
    spec = PGD | {"name": "strong", "restarts": 3, "params": {"keep": "last"}}
    cell = plan(conditions=[spec], threat={"eps": ["8/255"]}).cells[0]
    assert cell.name == "m/strong[answer]@linf:8/255"
    assert (cell.condition.attack, cell.condition.objective) == ("pgd", "answer")
    assert cell.condition.params == (("keep", "last"), ("restarts", 3), ("steps", 20))
    assert cell.condition.threat is not None and cell.condition.threat.eps == 8 / 255


def test_models_come_one_after_the_other() -> None:
    models = [{"name": n, "path": "/w"} for n in ("a", "b")]
    built = build_plan(suite(models=models, conditions=["clean", "blank"]), dataset(), [card("a"), card("b", True)])
    assert [cell.name for cell in built.cells] == ["a/clean", "a/blank", "b/clean", "b/blank"]
    assert [c.name for c in built.cards] == ["a", "b"]


def test_an_entry_without_a_card_is_left_out_and_changes_no_key() -> None:
    models = [{"name": n, "path": "/w"} for n in ("a", "b")]
    asked = suite(models=models, conditions=["clean", "blank"])
    both = build_plan(asked, dataset(), [card("a"), card("b")])
    one = build_plan(asked, dataset(), [None, card("b")], notes=["LEFT OUT a: not here"])
    assert [cell.name for cell in one.cells] == ["b/clean", "b/blank"]
    assert [u.key for u in one.units] == [u.key for u in both.units if u.cell.startswith("b/")]
    assert one.suite == asked and one.notes == ("LEFT OUT a: not here",)


def test_nothing_to_ask_and_ids_that_are_not_unique() -> None:
    with pytest.raises(UsageError, match="no question is left"):
        build_plan(suite(), Dataset("toy", "TOY", "f00d", ()), [card()])
    with pytest.raises(UsageError, match="not unique"):
        plan(dataset(question(1), question(1)))


# --- keys ---


@dataclass(frozen=True)
class Change:
    """One thing that differs from the plan of PGD on ten questions."""

    suite: dict[str, Any] | None = None
    card: dict[str, Any] | None = None
    question: dict[str, Any] | None = None
    dtype: str = "fp32"


BASE: dict[str, Any] = {"conditions": [PGD], "threat": {"eps": ["4/255"]}}
CHANGES = {
    "name of the entry": Change(card={"name": "other"}),
    "name of the condition": Change(suite={"conditions": [PGD | {"name": "other"}]}),
    "modality": Change(question={"modality": "OCT"}),
    "weights": Change(card={"fingerprint": "other"}),
    "prompt": Change(card={"prompt": "think"}),
    "decode": Change(card={"decode": "generate"}),
    "max_new_tokens": Change(card={"max_new_tokens": 65}),
    "own dtype": Change(card={"dtype": "bf16"}),
    "run dtype": Change(dtype="bf16"),
    "steps": Change(suite={"conditions": [PGD | {"steps": 21}]}),
    "attack": Change(suite={"conditions": [{"attack": "fgsm"}]}),
    "objective": Change(suite={"conditions": [PGD | {"objectives": "margin"}]}),
    "kind": Change(suite={"conditions": ["noise"]}),
    "eps": Change(suite={"threat": {"eps": ["5/255"]}}),
    "norm": Change(suite={"threat": {"norm": "l2", "eps": ["4/255"]}}),
    "resolution": Change(suite={"data": {"resolution": 65}}),
    "fit": Change(suite={"data": {"fit": "stretch"}}),
    "seed": Change(suite={"run": {"chunk": 4, "seed": 1}}),
    "image": Change(question={"image_sha256": "other"}),
    "text": Change(question={"question": "What is this?"}),
    "options": Change(question={"options": ("cyst", "mass", "edema")}),
    "answer": Change(question={"answer": 2}),
    "id": Change(question={"id": "other"}),
}


def first_key(change: Change) -> str:
    questions = list(dataset().questions)
    questions[0] = replace(questions[0], **(change.question or {}))
    entry = replace(card(), **(change.card or {}))
    return next(plan(dataset(*questions), entry, change.dtype, **(BASE | (change.suite or {}))).units).key


@pytest.mark.parametrize("name", CHANGES)
def test_a_key_depends_on_all_that_can_change_a_record(name: str) -> None:
    assert first_key(CHANGES[name]) != first_key(Change())


@pytest.mark.parametrize(
    "change",
    [
        Change(suite={"run": {"chunk": 3, "workers": 7, "batch_size": 2, "device": "cuda", "fail_on_error": 0.5}}),
        Change(suite={"title": "another", "data": {"per_modality": "all", "split": "train"}}),
        Change(suite={"conditions": ["clean", PGD, {"attack": "fgsm"}]}),
        Change(card={"path": "/moved", "description": "words"}),
        Change(question={"image": "/moved.png", "source": "x", "split": "train"}),
    ],
)
def test_and_on_nothing_else(change: Change) -> None:
    keys = {unit.key for unit in plan(None, None, **BASE).units}
    questions = list(dataset().questions)
    questions[0] = replace(questions[0], **(change.question or {}))
    entry = replace(card(), **(change.card or {}))
    assert keys <= {unit.key for unit in plan(dataset(*questions), entry, **(BASE | (change.suite or {}))).units}


def test_a_code_version_changes_the_keys_of_its_part_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def keys() -> dict[str, set[str]]:
        built = plan(conditions=["clean", "blank", PGD], threat={"eps": ["4/255"]})
        return {cell.condition.kind: {u.key for u in built.units if u.cell == cell.name} for cell in built.cells}

    before = keys()
    monkeypatch.setitem(CODE_VERSIONS, "attack", 99)  # type: ignore[arg-type]
    after = keys()
    assert after["clean"] == before["clean"] and after["blank"] == before["blank"]
    assert not after["attack"] & before["attack"]


def test_keys_are_unique_and_plans_repeat() -> None:
    conditions = ["clean", "blank", "shuffled", "noise", {"attack": "fgsm"}, PGD]
    one, two = plan(conditions=conditions), plan(conditions=conditions)
    keys = [unit.key for unit in one.units]
    assert len(set(keys)) == len(keys) == 10 * len(one.cells)
    assert one.chunks == two.chunks


def test_keys_and_seeds_do_not_drift() -> None:
    """A change here makes every finished run start again: raise a version in CODE_VERSIONS instead, knowingly."""
    unit = next(plan(conditions=["clean"]).units)
    assert (unit.seed, unit.key) == (6132180901873831636, "c5c6e253a7d06e88ee6d4562c37293aa")


def test_a_question_starts_the_same_way_in_every_cell_and_set() -> None:
    built = plan(conditions=["noise", PGD])
    seeds = {unit.question_id: set() for unit in built.units}
    for unit in built.units:
        seeds[unit.question_id].add(unit.seed)
    assert all(len(found) == 1 for found in seeds.values())
    alone = plan(dataset(*dataset().questions[3:5]), conditions=["noise"])
    assert {u.question_id: u.seed for u in alone.units}.items() <= {u.question_id: u.seed for u in built.units}.items()


@pytest.mark.parametrize("kind", ["attacks", "objectives"])
def test_editing_a_plugin_changes_the_keys_of_the_cells_that_use_it(kind: str, tmp_path: Path) -> None:
    name = f"own_{kind}"
    file = tmp_path / "plugin.py"
    body = "class Own:\n    reasoning_only = False\n    strength = 1\n"
    file.write_text(f"from safemed_bench.core.registry import {kind}\n\n@{kind}.register({name!r})\n{body}")
    registry.load_plugin_file(file)
    own = {"attack": name, "objectives": "answer"} if kind == "attacks" else PGD | {"objectives": name, "name": "own"}

    def keys() -> dict[str, set[str]]:
        built = plan(conditions=["clean", PGD, own], threat={"eps": ["4/255"]})
        return {cell.name: {u.key for u in built.units if u.cell == cell.name} for cell in built.cells}

    before = keys()
    assert keys() == before
    file.write_text(file.read_text().replace("strength = 1", "strength = 2"))
    changed = [cell for cell, found in keys().items() if found != before[cell]]
    assert len(before) == 3 and len(changed) == 1 and "own" in changed[0]


# --- chunks ---


def test_chunks_are_cut_in_the_order_of_the_questions() -> None:
    built = plan(conditions=["clean", "blank"])
    assert [(c.id, c.index, len(c.units)) for c in built.chunks] == [
        ("m/clean#0000", 0, 4),
        ("m/clean#0001", 1, 4),
        ("m/clean#0002", 2, 2),
        ("m/blank#0000", 0, 4),
        ("m/blank#0001", 1, 4),
        ("m/blank#0002", 2, 2),
    ]
    assert [u.question_id for c in built.chunks[:3] for u in c.units] == [q.id for q in built.dataset.questions]
    assert all(unit.cell == chunk.cell for chunk in built.chunks for unit in chunk.units)


# --- shuffled ---


def test_only_shuffled_units_have_donors() -> None:
    built = plan(conditions=["clean", "shuffled"])
    by_cell = {cell.name: [u for u in built.units if u.cell == cell.name] for cell in built.cells}
    assert all(unit.donor == "" for unit in by_cell["m/clean"])
    for unit in by_cell["m/shuffled"]:
        own, donor = built.questions[unit.question_id], built.questions[unit.donor]
        assert own.modality == donor.modality and own.image_sha256 != donor.image_sha256


def test_a_donors_image_is_part_of_the_key() -> None:
    def keys(last: str) -> dict[str, str]:
        built = plan(dataset(question(0), question(1, image=last)), conditions=["shuffled"])
        return {unit.question_id: unit.key for unit in built.units}

    assert keys("x")["q0"] != keys("y")["q0"]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 5)), min_size=1, max_size=40), st.integers(0, 9))
@settings(deadline=None, max_examples=150)
def test_nobody_is_shown_its_own_image_where_that_can_be_helped(rows: list[tuple[str, int]], seed: int) -> None:
    questions = [question(i, modality, f"{modality}{image}") for i, (modality, image) in enumerate(rows)]
    by_id = {q.id: q for q in questions}
    donors = choose_donors(questions, seed)
    assert donors == choose_donors(questions[::-1], seed), "the order of the questions makes no difference"
    for modality in {q.modality for q in questions}:
        group = [q for q in questions if q.modality == modality]
        images = Counter(q.image_sha256 for q in group)
        used = Counter(donors[q.id] for q in group)
        if max(images.values()) * 2 <= len(group):
            assert set(used.values()) == {1} and set(used) == {q.id for q in group}, "a derangement"
        for q in group:
            donor = by_id[donors[q.id]]
            if len(images) > 1:
                assert donor.modality == modality
            if len({x.image_sha256 for x in questions}) > 1:
                assert donor.image_sha256 != q.image_sha256


def test_donors_depend_on_the_seed_and_skip_unreadable_images() -> None:
    questions = [question(i) for i in range(20)]
    assert choose_donors(questions, 0) != choose_donors(questions, 1)
    broken = [*questions[:3], question(99, error="missing")]
    donors = choose_donors(broken, 0)
    assert "q99" not in donors.values() and donors["q99"] in {"q0", "q1", "q2"}
    assert choose_donors([question(0)], 0) == {"q0": "q0"}


@pytest.mark.parametrize("name", ["worst", "noise", "clean"])
def test_no_attack_takes_the_name_of_another_row(name: str) -> None:
    with pytest.raises(ValueError, match="would be taken for another row"):
        suite(conditions=[PGD | {"name": name}])
