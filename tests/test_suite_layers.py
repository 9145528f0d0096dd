"""Suites from several places: `extends`, environment, `--set`, flags and sweeps, and which word counts."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_suites import MINIMAL, Write, name_entries, only, writer

from safemed_bench.suite import load_suite, load_suites
from safemed_bench.suite.loader import Override
from safemed_bench.suite.schema import ModelSpec


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return writer(tmp_path)


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> None:
    name_entries(monkeypatch)


# --- extends ---


def test_extends_merges_mappings_and_replaces_lists(write: Write) -> None:
    write("title: base\nrun: {seed: 3, chunk: 7}\n" + MINIMAL, "base.yaml")
    suite = load_suite(write("extends: base.yaml\nrun: {seed: 4}\nconditions: [blank]\n", "child.yaml"), env={})
    assert (suite.name, suite.title) == ("child", "base")
    assert (suite.run.seed, suite.run.chunk) == (4, 7)
    assert [c.kind for c in suite.conditions] == ["blank"] and suite.models[0].name == "m"


def test_extends_takes_several_the_later_over_the_earlier(write: Write) -> None:
    write("run: {seed: 1, chunk: 2}\n" + MINIMAL, "a.yaml")
    write("run: {seed: 5}\n", "b.yaml")
    assert load_suite(write("extends: [a, b]\n"), env={}).run.seed == 5


def test_extends_of_a_shipped_name(write: Write, entries: None) -> None:
    suite = load_suite(write("extends: omnimed_fgsm\nthreat: {eps: [1/255]}\n"), env={})
    assert suite.threat.headline == 1 / 255, "the headline of the other eps must not be inherited"
    assert [c.label for c in suite.conditions][-1] == "fgsm"


def test_a_problem_in_the_base_is_named_there(write: Write) -> None:
    base = write("run:\n  chunk: many\n" + MINIMAL, "base.yaml")
    found = only(write("extends: base.yaml\nrun: {seed: 1}\n", "child.yaml"))
    assert (found.file, found.line, found.column, found.key) == (str(base), 2, 10, "run.chunk")


def test_extends_in_a_circle(write: Write) -> None:
    write("extends: b.yaml\n", "a.yaml")
    found = only(write("run: {}\nextends: a.yaml\n", "b.yaml"))
    assert found.key == "extends" and "goes in a circle: b.yaml -> a.yaml -> b.yaml" in found.message
    own = write("extends: own.yaml\n", "own.yaml")
    assert (only(own).line, only(own).column) == (1, 10)


def test_extends_of_what_is_not_there(write: Write) -> None:
    found = only(write("run: {}\nextends: omnimed_pg\n" + MINIMAL))
    assert (found.line, found.column, found.key) == (2, 10, "extends")
    assert "Did you mean 'omnimed_pgd'?" in found.message
    assert "must be a file or suite name" in only(write("extends: 3\n")).message


# --- environment ---


def test_environment_in_values(write: Write) -> None:
    text = 'title: "${env:WHO:nobody} and ${env:YOU}"\nrun: {seed: "${env:S:5}", workers: "${env:W:auto}"}\n'
    path = write(text + MINIMAL)
    suite = load_suite(path, env={"YOU": "you", "S": "9"})
    assert (suite.title, suite.run.seed, suite.run.workers) == ("nobody and you", 9, "auto")


def test_environment_gives_lists(write: Write) -> None:
    path = write('threat: {eps: "${env:EPS:[1/255]}"}\n' + MINIMAL)
    assert load_suite(path, env={"EPS": "[2/255, 3/255]"}).threat.eps == (2 / 255, 3 / 255)


def test_environment_that_is_not_set_or_not_understood(write: Write) -> None:
    found = only(write("data:\n  root: ${env:NOWHERE}\n" + MINIMAL))
    assert (found.line, found.column, found.key) == (2, 9, "data.root")
    assert "environment variable NOWHERE is not set" in found.message
    assert "only ${env:NAME}" in only(write("title: ${HOME}\n" + MINIMAL)).message


def test_a_wrong_safemed_variable_is_named(write: Write) -> None:
    found = only(write(MINIMAL), env={"SAFEMED_WORKERS": "some", "SAFEMED_DEVICE": ""})
    assert (found.file, found.key) == ("$SAFEMED_WORKERS", "run.workers")


# --- --set, flags, precedence ---


def test_set_reaches_lists_and_short_forms(write: Write, entries: None) -> None:
    path = write("extends: omnimed_pgd\n")
    sets = ("models.2.prompt=think", "conditions.5.steps=40", "data.per_modality=all", "threat.eps=[1/255, 2/255]")
    suite = load_suite(path, sets, {})
    assert suite.models[2] == ModelSpec(name="cot", prompt="think")
    assert suite.conditions[5].steps == 40 and suite.data.per_modality == "all"
    assert suite.threat.headline == 2 / 255


@pytest.mark.parametrize(
    ("item", "key", "words"),
    [
        ("run.seed", "run.seed", "must be written key.path=value"),
        ("=3", "=3", "must be written key.path=value"),
        ("run.seed=[", "run.seed", "the value is not YAML"),
        ("run.sed=3", "run.sed", "Did you mean 'seed'?"),
        ("models.4.prompt=think", "models.4.prompt", "is a list of 1"),
        ("models.x.prompt=think", "models.x.prompt", "is a list of 1"),
        ("run.seed.x=1", "run.seed.x", "holds one value"),
        ("threat.eps=[300]", "threat.eps", "on the [0, 1] pixel scale"),
    ],
)
def test_wrong_sets(write: Write, item: str, key: str, words: str) -> None:
    found = only(write("run: {seed: 1}\n" + MINIMAL), item)
    assert (found.file, found.key) == ("--set", key)
    assert words in found.message
    assert str(found).startswith(f"--set  {key}: ")


def test_precedence(write: Write) -> None:
    """Command line > --set > SAFEMED_* > suite > extends > defaults."""
    write("run: {seed: 1}\n", "base.yaml")
    low = write("extends: base\n" + MINIMAL, "low.yaml")
    suite = write("extends: base\nrun: {seed: 2}\n" + MINIMAL)
    env, sets, flags = {"SAFEMED_SEED": "3"}, ("run.seed=4",), (Override(("run", "seed"), 5, "--seed"),)
    assert load_suite(write(MINIMAL, "none.yaml"), env={}).run.seed == 0
    assert load_suite(low, env={}).run.seed == 1
    assert load_suite(suite, env={}).run.seed == 2
    assert load_suite(suite, env=env).run.seed == 3
    assert load_suite(suite, sets, env).run.seed == 4
    assert load_suite(suite, sets, env, flags).run.seed == 5


# --- sweeps ---


def test_a_sweep_is_a_suite_for_each_point(write: Write) -> None:
    text = "name: s\nthreat: {eps: [4/255], headline: 4/255}\n"
    text += "sweep: {threat.eps: [[2/255], [4/255, 8/255]], run.seed: [0, 1]}\n"
    path = write(text + MINIMAL)
    suites = load_suites(path, env={})
    assert [s.name for s in suites] == [
        "s-eps=2-255-seed=0",
        "s-eps=2-255-seed=1",
        "s-eps=4-255+8-255-seed=0",
        "s-eps=4-255+8-255-seed=1",
    ]
    assert [(s.threat.eps[0], s.run.seed) for s in suites[1:3]] == [(2 / 255, 1), (4 / 255, 0)]
    assert "gives 4 suites" in only(path).message


def test_a_word_from_outside_ends_its_sweep(write: Write) -> None:
    path = write("sweep: {run.seed: [0, 1], run.chunk: [5, 6]}\n" + MINIMAL)
    assert [(s.run.seed, s.run.chunk) for s in load_suites(path, ["run.seed=9"], {})] == [(9, 5), (9, 6)]


@pytest.mark.parametrize(
    ("sweep", "key", "words"),
    [
        ("[1]", "sweep", "must be a mapping"),
        ("{run.seed: 3}", "sweep.run.seed", "must be a list of values"),
        ("{run.seed: []}", "sweep.run.seed", "must be a list of values"),
        ("{run.sed: [1]}", "run.sed", "Did you mean 'seed'?"),
        ("{run.seed: [1, x]}", "run.seed", "must be a whole number"),
    ],
)
def test_wrong_sweeps(write: Write, sweep: str, key: str, words: str) -> None:
    found = only(write(f"sweep: {sweep}\n" + MINIMAL))
    assert (found.line, found.key) == (1, key) and words in found.message
