"""What a suite may say of certificates and smoothed entries, and what is said of mistakes, and where."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from test_suite import marked
from toy_run import toy_dataset

from safemed_bench.certify.evidence import needed_probability, sequential_needs
from safemed_bench.core.errors import Problem, SuiteError
from safemed_bench.models.card import resolve
from safemed_bench.suite import dump_suite, load_suite
from safemed_bench.suite.plan import build_plan
from safemed_bench.suite.schema import Suite

MODELS = """\
models:
  - sft
  - {name: safe, entry: cot, smooth: {sigma: 0.25, n: 50}}
"""
LEAST = sequential_needs(float(needed_probability(0.9, 0.25)), 0.001)


def problem(tmp_path: Path, text: str) -> Problem:
    path = tmp_path / "suite.yaml"
    path.write_text(text)
    with pytest.raises(SuiteError) as caught:
        load_suite(path, env={})
    assert caught.value.exit_code == 2 and len(caught.value.problems) == 1, caught.value.problems
    (found,) = caught.value.problems
    assert Path(found.file) == path
    return found


BAD = {
    "unknown certifier": ("{^certify: sequental, sigma: 0.25}", "unknown certifier 'sequental'. Did you mean"),
    "no sigma": ("{^certify: sequential}", "needs `sigma`, for entry 'sft' is not smoothed"),
    "another sigma": (
        "{certify: sequential, ^sigma: 0.5, models: [safe]}",
        "entry 'safe' is smoothed with sigma 0.25; leave `sigma` out",
    ),
    "pixel scale": ("{certify: sequential, ^sigma: 64}", "[0, 1] pixel scale. Did you mean 64/255?"),
    "sigma 0": ("{certify: sequential, ^sigma: 0}", "must be greater than 0"),
    "no number": ("{certify: sequential, ^sigma: much}", "'much' is not a number"),
    "N below N0": (
        "{^certify: cohen, sigma: 0.25, n: 50}",
        "n = 50 test samples are fewer than the n0 = 100 that select; the smallest n that will do is 100",
    ),
    "alpha 0": ("{certify: cohen, sigma: 0.25, ^alpha: 0}", "must be greater than 0"),
    "alpha 1": ("{certify: cohen, sigma: 0.25, ^alpha: 1}", "must be less than 1"),
    "alpha 1/2": ("{^certify: sequential, sigma: 0.25, alpha: 0.5}", "alpha must be below 1/e"),
    "out of reach": (
        "{^certify: sequential, sigma: 0.25, radii: [0.1, 0.9], n: 100}",
        f"n = 100 can never certify radius 0.9 at sigma = 0.25 and alpha = 0.001, even if all samples agree; "
        f"the smallest n that can is {LEAST}",
    ),
    "out of reach of a smoothed entry": (
        "{^certify: sequential, models: [safe], radii: [0.9], n: 100}",
        f"the smallest n that can is {LEAST}",
    ),
    "out of any reach": (
        "{^certify: sequential, models: [sft], sigma: 0.01, radii: [1]}",
        "100 sigma: out of reach of any n",
    ),
    "unknown entry": ("{certify: sequential, sigma: 0.25, models: [^saef]}", "'saef' is not an entry of this suite"),
    "unknown entry of an attack": ("{attack: pgd, models: [^sftt]}", "Did you mean 'sft'?"),
    "unknown parameter": ("{certify: cohen, sigma: 0.25, ^samples: 9}", "unknown key"),
    "unknown in params": ("{^certify: cohen, sigma: 0.25, params: {radi: 1}}", "has no parameter 'radi'. Did you mean"),
    "twice": ("^{certify: cohen, sigma: 0.25, params: {n: 500}}", "n stands beside `certify`, not under params"),
    "per_modality of an attack": ("^{attack: pgd, per_modality: 3}", "attack takes no per_modality"),
    "steps of a certifier": ("^{certify: cohen, sigma: 0.25, steps: 3}", "certify takes no steps"),
    "per_modality 0": ("{certify: cohen, sigma: 0.25, ^per_modality: 0}", "must be greater than or equal to 1"),
    "smoothadv without noise": (
        "{^attack: smoothadv}",
        "needs `params: {sigma: ...}`, for entry 'sft'",
    ),
    "smoothadv on the wrong scale": ("{attack: smoothadv, params: {^sigma: 64}}", "Did you mean 64/255?"),
    "smoothadv and a word": ("{attack: eot, params: {^sigma: 1/4}}", "must be a number, not '1/4'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_in_a_condition_is_named_where_it_stands(tmp_path: Path, name: str) -> None:
    condition, words = BAD[name]
    text, line, column = marked(MODELS + "conditions:\n  - clean\n  - " + condition + "\n")
    found = problem(tmp_path, text)
    assert words in found.message
    # a value is pointed at where it stands, a key where it begins
    key = text.splitlines()[line - 1][column - 1 :].partition(":")[0]
    value = column + len(key) + 2 if condition.startswith("{") and ":" in condition.partition("^")[2] else column
    assert (found.line, found.column) in ((line, column), (line, value))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            "^{name: x, entry: sft, path: /weights}",
            "`path` a folder; give one of them",
        ),
        ("{name: x, ^entry: stf}", "unknown model 'stf'. Did you mean 'sft'?"),
        ("{name: x, entry: sft, smooth: {^sigma: 64}}", "Did you mean 64/255?"),
        ("{name: x, entry: sft, smooth: {^sigma: 0}}", "must be greater than 0"),
        ("{name: x, entry: sft, ^smooth: {n: 100}}", "is missing"),
        ("{name: x, entry: sft, smooth: {sigma: 0.25, ^alpha: 1}}", "must be less than 1"),
        ("{name: x, entry: sft, smooth: {sigma: 0.25, ^copies: 9}}", "unknown key"),
        ("{name: x, entry: sft, ^smooth: {sigma: 0.25, n: 10}}", "the smallest n that does not is 11"),
    ],
)
def test_a_mistake_in_an_entry_is_named_where_it_stands(tmp_path: Path, entry: str, words: str) -> None:
    text, line, column = marked("models:\n  - " + entry + "\nconditions: [clean]\n")
    found = problem(tmp_path, text)
    assert words in found.message and found.line == line
    key = text.splitlines()[line - 1][column - 1 :].partition(":")[0]
    assert found.column in (column, column + len(key) + 2)


GOOD = (
    MODELS
    + """\
threat: {norm: l2, eps: [0.25, 0.5]}
conditions:
  - clean
  - {certify: sequential, models: [safe], radii: [0.25, 0.5], per_modality: 2}
  - {certify: cohen, sigma: 1/4, models: [sft], n: 1000}
  - {certify: cohen, sigma: 0.5, models: [sft], n: 1000, name: far}
  - {attack: smoothadv, models: [safe], steps: 5, params: {draws: 2}}
  - {attack: smoothadv, models: [sft], steps: 5, params: {sigma: 0.25}}
"""
)


def test_a_good_suite_becomes_cells_of_its_entries(tmp_path: Path) -> None:
    path = tmp_path / "suite.yaml"
    path.write_text(GOOD)
    suite = load_suite(path, env={})
    assert Suite.model_validate(yaml.safe_load(dump_suite(suite))) == suite
    plan = build_plan(suite, toy_dataset(tmp_path / "images"), [resolve(m) for m in suite.models])
    names = {cell.name: cell.condition for cell in plan.cells if cell.condition.kind == "certify"}
    assert list(names) == [
        "sft/certify[sigma=0.25]",
        "sft/certify[far sigma=0.5]",
        "safe/certify[sigma=0.25]",
    ]
    assert dict(names["safe/certify[sigma=0.25]"].params) == {"sigma": 0.25, "radii": (0.25, 0.5)}
    assert dict(names["sft/certify[far sigma=0.5]"].params) == {"sigma": 0.5, "n": 1000}
    counts = {cell: sum(len(c.units) for c in plan.chunks if c.cell == cell) for cell in names}
    assert list(counts.values()) == [12, 12, 4]
    asked = [u.question_id for c in plan.chunks if c.cell == "safe/certify[sigma=0.25]" for u in c.units]
    assert asked == ["q0", "q1", "q2", "q3"], "the first of each modality"


def test_what_a_certificate_depends_on_is_in_its_key(tmp_path: Path) -> None:
    dataset = toy_dataset(tmp_path)

    def keys(smooth: dict | None, **condition: object) -> set[str]:
        entry = {"name": "sft"} | ({"smooth": smooth} if smooth else {})
        suite = Suite.model_validate(
            {"name": "s", "models": [entry], "conditions": [{"certify": "sequential", **condition}]}
        )
        return {u.key for u in build_plan(suite, dataset, [resolve(m) for m in suite.models]).units}

    plain = keys(None, sigma=0.25)
    assert keys(None, sigma=0.25) == plain
    others = [
        keys(None, sigma=0.5),
        keys(None, sigma=0.25, n=5000),
        keys(None, sigma=0.25, n0=50),
        keys(None, sigma=0.25, alpha=0.01),
        keys(None, sigma=0.25, radii=[0.1]),
        keys(None, sigma=0.25, certify="cohen"),
        keys({"sigma": 0.25}),
        keys({"sigma": 0.25, "n": 50}),
    ]
    assert len(set.union(plain, *others)) == 9 * 12
    few = keys(None, sigma=0.25, per_modality=1)
    assert len(few) == 2 and few < plain, "a question costs nothing again when more are asked"


def test_conditions_for_bare_and_for_smoothed_entries(tmp_path: Path) -> None:
    conditions = """\
conditions:
  - clean
  - {kind: noise, models: bare}
  - {attack: pgd, models: bare}
  - {attack: pgd, models: smoothed, objectives: [answer]}
  - {certify: sequential, models: smoothed, per_modality: 1}
threat: {eps: [4/255]}
"""
    path = tmp_path / "suite.yaml"
    path.write_text("name: s\n" + MODELS + conditions)
    suite = load_suite(path, env={})
    assert load_suite_of(dump_suite(suite), tmp_path) == suite
    plan = build_plan(suite, toy_dataset(tmp_path, 6), [resolve(model) for model in suite.models])
    found: dict[str, list[str]] = {}
    for cell in plan.cells:
        found.setdefault(cell.model.name, []).append(cell.condition.name)
    assert found["sft"] == ["clean", "noise@linf:4/255", "pgd[answer]@linf:4/255"]
    assert found["safe"] == ["clean", "pgd[answer]@linf:4/255", "certify[sigma=0.25]"]
    certified = [unit for chunk in plan.chunks if "certify" in chunk.cell for unit in chunk.units]
    assert len(certified) == len({q.modality for q in plan.dataset.questions}) < 6


def load_suite_of(text: str, folder: Path) -> Suite:
    (folder / "again.yaml").write_text(text)
    return load_suite(folder / "again.yaml", env={})


def test_a_word_that_is_neither_bare_nor_smoothed(tmp_path: Path) -> None:
    text = "name: s\n" + MODELS + "conditions:\n  - {attack: pgd, models: smothed}\n"
    assert "must be `bare`, `smoothed` or a list of entries" in problem(tmp_path, text).message
