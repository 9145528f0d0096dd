"""Suites from YAML: everything that can be wrong with one, where it is said to stand, and which word counts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from safemed_bench.core import registry
from safemed_bench.core.errors import Problem, SuiteError, UsageError
from safemed_bench.suite import dump_suite, load_suite, load_suites
from safemed_bench.suite.loader import Override
from safemed_bench.suite.schema import ConditionSpec, DataSpec, ModelSpec, RunSpec, Suite, ThreatSpec
from safemed_bench.suite.values import parse_number

REPO = Path(__file__).parents[1]
MINIMAL = "models: [{name: m, path: /weights}]\nconditions: [clean]\n"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(text: str, name: str = "suite.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return put


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The names of the default entries, whether their weights are in this checkout or not."""
    list(registry.models)
    for name in ("sft", "instruct", "cot", "safemed-r1"):
        monkeypatch.setitem(registry.models._items, name, Path("/weights") / name)
    yield


def problems(path: Path | str, *sets: str, env: dict[str, str] | None = None, flags: Any = ()) -> tuple[Problem, ...]:
    with pytest.raises(SuiteError) as caught:
        load_suite(path, sets, env or {}, flags)
    assert caught.value.exit_code == 2
    return caught.value.problems


def only(path: Path | str, *sets: str, env: dict[str, str] | None = None) -> Problem:
    found = problems(path, *sets, env=env)
    assert len(found) == 1, found
    return found[0]


# --- what a good suite is ---


def test_the_shipped_suites_are_valid(entries: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    files = sorted(Path("suites").glob("*.yaml"))
    assert {file.stem for file in files} >= {"omnimed_pgd", "omnimed_fgsm", "omnimed_pgd_real"}
    for file in files:
        suite = load_suite(file, env={})
        assert suite.name == file.stem
        assert load_suite_text(dump_suite(suite)) == suite


def load_suite_text(text: str) -> Suite:
    return Suite.model_validate(yaml.safe_load(text))


def test_the_default_suite_says_what_the_readme_says(entries: None) -> None:
    suite = load_suite(REPO / "suites" / "omnimed_pgd.yaml", env={})
    bare = ["sft", "instruct", "cot", "safemed-r1"]
    assert [m.name for m in suite.models] == [*bare, "safemed-r1-smoothed"]
    assert [m.name for m in suite.models if m.smooth is None] == bare
    assert suite.threat.eps == (2 / 255, 4 / 255, 8 / 255) and suite.threat.headline == 4 / 255
    assert suite.data.root is None and suite.data.per_modality == 25 and suite.data.resolution == 64
    labels = ["clean", "blank", "shuffled", "noise", "fgsm", "pgd", "pgd", "certify"]
    assert [c.label for c in suite.conditions] == labels
    assert suite.conditions[-2].parameters == {"steps": 20, "restarts": 1}
    certificate = suite.conditions[-1]
    assert certificate.is_for("any", smoothed=True) and not certificate.is_for("any")


def test_every_field_has_a_description() -> None:
    for part in (Suite, DataSpec, ThreatSpec, ModelSpec, ConditionSpec, RunSpec):
        for name, field in part.model_fields.items():
            assert field.description, f"{part.__name__}.{name}"


@pytest.mark.parametrize(
    ("text", "value"), [("8/255", 8 / 255), ("1e-3", 1e-3), (" 4 / 255 ", 4 / 255), (0.5, 0.5), (1, 1.0)]
)
def test_numbers_and_fractions(text: object, value: float) -> None:
    assert parse_number(text) == value


def test_reading_suites_and_names_imports_no_torch(write: Write) -> None:
    path = write(MINIMAL)
    code = f"import sys; from safemed_bench.suite import load_suite; load_suite({str(path)!r}); "
    code += "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=REPO).returncode == 0


# --- what is wrong, and where ---


def marked(text: str) -> tuple[str, int, int]:
    """The text without its `^`, and the line and column where it stood."""
    before, _, after = text.partition("^")
    return before + after, before.count("\n") + 1, len(before.rpartition("\n")[2]) + 1


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("^thread: {}", "thread", "unknown key. Did you mean 'threat'?"),
        ("data:\n  ^spilt: test", "data.spilt", "unknown key. Did you mean 'split'?"),
        ("data:\n  split: ^tets", "data.split", "Did you mean 'test'?"),
        ("data: {resolution: ^big}", "data.resolution", "must be a whole number, not text ('big')"),
        ("data: {resolution: ^0}", "data.resolution", "greater than or equal to 1"),
        ("data: {per_modality: ^0}", "data.per_modality", "must be `all` or a whole number from 1"),
        ("data: {per_modality: ^yes}", "data.per_modality", "not true/false"),
        ("data: {name: ^omnimed}", "data.name", "unknown data set 'omnimed'. Did you mean 'omnimedvqa'?"),
        ("data: {root: ^/no/where}", "data.root", "no such folder: /no/where"),
        ("data: {root: /tmp, split_file: ^gone.json}", "data.split_file", "no such file: /tmp/gone.json"),
        ("data: {scheme: medr1, split_file: ^a.json}", "data.split_file", "a split file belongs to `scheme: file`"),
        ("data: {filter: ^{modal: CT}}", "data.filter", "unknown filter 'modal'"),
        ("data: {phantom: ^{sed: 1}}", "data.phantom", "Did you mean 'seed'?"),
        ("threat: {eps: [ ^8/0 ]}", "threat.eps.0", "'8/0' is not a number or a fraction"),
        ("threat: {eps: [1/255,\n  ^x/255]}", "threat.eps.1", "'x/255' is not a number"),
        ("threat: {eps: ^[8]}", "threat.eps", "Did you mean 8/255?"),
        ("threat: {eps: ^[]}", "threat.eps", "must not be empty"),
        ("threat: {eps: ^[0.1, 0.1]}", "threat.eps", "stands twice"),
        ("threat: {eps: [8/255], headline: ^4/255}", "threat.headline", "4/255 is not one of eps: 8/255"),
        ("threat: {norm: ^l0}", "threat.norm", "must be linf, l2 or l1, not 'l0'"),
        ("run: {seed: ^-1}", "run.seed", "greater than or equal to 0"),
        ("run: {workers: ^0}", "run.workers", "must be `auto` or a whole number from 1, not 0"),
        ("run: {device: ^gpu}", "run.device", "unknown device 'gpu'"),
        ("run: {dtype: ^fp8}", "run.dtype", "must be auto, fp32, bf16 or fp16, not 'fp8'"),
        ("run: {fail_on_error: ^2}", "run.fail_on_error", "less than or equal to 1"),
        ("data: ^3", "data", "must be a mapping of keys, not 3"),
        ("name: ^a/b", "name", "must be a plain word"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(write: Write, text: str, key: str, words: str) -> None:
    text, line, column = marked(text)
    path = write(f"{text}\n{MINIMAL}")
    found = only(path)
    assert (found.file, found.line, found.column, found.key) == (str(path), line, column, key)
    assert words in found.message


@pytest.mark.parametrize(
    ("models", "key", "words"),
    [
        ("[^cto]", "models.0.name", "unknown model 'cto'"),
        ("[^3]", "models.0", "a model is a name, or a mapping"),
        ("[^{prompt: think}]", "models.0.name", "is missing"),
        ("[{path: /w/x, prompt: ^thnk}]", "models.0.prompt", "unknown prompt 'thnk'. Did you mean 'think'?"),
        ("^[]", "models", "must not be empty"),
        ("^[{path: /a/m}, {path: /b/m}]", "models", "'m' stands twice"),
    ],
)
def test_wrong_models(write: Write, models: str, key: str, words: str) -> None:
    text, line, column = marked(f"models: {models}\nconditions: [clean]\n")
    found = only(write(text))
    assert (found.line, found.column, found.key) == (line, column, key)
    assert words in found.message


@pytest.mark.parametrize(
    ("condition", "key", "words"),
    [
        ("^blnak", "", "Did you mean 'blank'?"),
        ("^pgd", "", "Attacks are written `- attack: pgd`"),
        ("^{steps: 3}", "", "a condition is a word, or a mapping with `attack`"),
        ("{attack: ^pdg}", ".attack", "unknown attack 'pdg'. Did you mean 'pgd'?"),
        ("{attack: pgd, ^step: 3}", ".step", "Did you mean 'steps'?"),
        ("{attack: pgd, steps: ^0}", ".steps", "greater than or equal to 1, not 0"),
        ("{attack: square, objectives: ^[answer]}", ".objectives", "attack 'square' takes no objectives"),
        ("{attack: safemed-attack, restarts: ^3}", ".restarts", "attack 'safemed-attack' has no parameter 'restarts'"),
        ("{attack: fgsm, steps: ^3}", ".steps", "attack 'fgsm' has no parameter 'steps'"),
        ("{attack: pgd, params: {momentum: ^1}}", ".params.momentum", "no parameter 'momentum'"),
        ("{attack: pgd, objectives: [^answr]}", ".objectives.0", "Did you mean 'answer'?"),
        ("{attack: pgd, objectives: ^[]}", ".objectives", "must be `all`, `strong`, an objective, or a list"),
    ],
)
def test_wrong_conditions(write: Write, condition: str, key: str, words: str) -> None:
    text, line, column = marked(f"models: [{{path: /m}}]\nconditions: [{condition}]\n")
    found = only(write(text))
    assert (found.line, found.column, found.key) == (line, column, f"conditions.0{key}")
    assert words in found.message


def test_one_condition_may_not_stand_twice(write: Write) -> None:
    head = "models: [{path: /m}]\nconditions: [{attack: pgd}, {attack: pgd, steps: 100"
    assert "'pgd' stands twice" in only(write(f"{head}}}]\n")).message
    labels = [c.label for c in load_suite(write(f"{head}, name: pgd100}}]\n"), env={}).conditions]
    assert labels == ["pgd", "pgd100"]
    apart = "models: [{path: /m}]\nconditions: [{attack: pgd, at: headline}, {attack: pgd, at: other, steps: 5}]\n"
    assert [c.label for c in load_suite(write(apart), env={}).conditions] == ["pgd", "pgd"]
    assert "'pgd' stands twice" in only(write(apart.replace("other", "all"))).message


def test_everything_that_is_wrong_is_said_at_once(write: Write) -> None:
    path = write("data: {split: tets, resolution: x}\nrun:\n  sed: 1\nmodels: [{path: /m}]\nconditions: [cleen]\n")
    found = problems(path, "threat.eps=[x]")
    assert [(p.file, p.line, p.key) for p in found] == [
        ("--set", 0, "threat.eps.0"),
        (str(path), 1, "data.split"),
        (str(path), 1, "data.resolution"),
        (str(path), 3, "run.sed"),
        (str(path), 5, "conditions.0"),
    ]
    with pytest.raises(SuiteError) as caught:
        load_suite(path, env={})
    assert f"{path}:3:3  run.sed: unknown key. Did you mean 'seed'?" in str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    [
        ("a: [1, 2\nb: 3\n", 2, 2, "not YAML"),
        ("a: 1\n\tb: 2\n", 2, 1, "not YAML"),
        ("a: 'x\n", 2, 1, "not YAML"),
        ("a: \x01\n", 1, 1, "not YAML"),
        ("", 1, 1, "the file is empty"),
        ("- a\n", 1, 1, "must be a mapping"),
        ("a: *b\n", 1, 4, "undefined alias"),
        ("a: &a [*a]\n", 0, 0, "nested too deeply"),
    ],
)
def test_what_is_no_yaml(write: Write, text: str, line: int, column: int, words: str) -> None:
    found = only(write(text))
    assert words in found.message
    if line:
        assert (found.line, found.column) == (line, column)


def test_files_that_cannot_be_read(write: Write, tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"a: \xff\xfe\n")
    assert "not UTF-8 text: byte 3" in only(path).message
    assert "neither a file nor a shipped name" in only(tmp_path / "absent.yaml").message
    assert "Did you mean 'omnimed_pgd'?" in only("omnimed_pdg").message


def test_a_key_that_stands_twice(write: Write) -> None:
    found = only(write("run:\n  seed: 1\n  chunk: 3\n  seed: 2\n" + MINIMAL))
    assert (found.line, found.column, found.key, found.message) == (4, 3, "run.seed", "stands twice; first at line 2")


def test_merge_keys_and_aliases_are_no_twins(write: Write) -> None:
    text = "x-m: &m {path: /w, dtype: bf16}\nmodels: [{<<: *m, name: a}, {<<: *m, name: b, dtype: fp32}]\n"
    found = only(write(text + "conditions: [clean]\n"))
    assert found.key == "x-m"
    text = "models: [&m {path: /w, name: a, dtype: bf16}, {<<: *m, name: b}]\nconditions: [clean]\n"
    assert [m.dtype for m in load_suite(write(text), env={}).models] == ["bf16", "bf16"]


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


# --- the registry behind the names ---


def test_lazy_names_are_imported_when_asked_for() -> None:
    things: registry.Registry[Any] = registry.Registry("thing", "safemed_bench.tests_none")
    things.lazy("counter", "collections:Counter")
    things.lazy("counter", "collections:Counter")
    assert "counter" in things and [*things] == ["counter"]
    from collections import Counter

    things.register("counter")(Counter)  # the home module's own decorator names the same thing
    assert things.get("counter") is Counter
    with pytest.raises(UsageError, match="registered twice"):
        things.register("counter")(dict)
    with pytest.raises(UsageError, match="registered twice"):
        things.lazy("counter", "collections:OrderedDict")
    with pytest.raises(UsageError, match=r"unknown thing 'conter'. Did you mean 'counter'\?"):
        things.get("conter")
    with pytest.raises(ValueError, match="module:attribute"):
        things.lazy("other", "collections")
