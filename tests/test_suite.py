"""Suites from YAML: what a good one is, everything that can be wrong with one, and where it is said to stand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from small_suites import MINIMAL, Write, name_entries, only, problems, writer

from safemed_bench.core.errors import SuiteError
from safemed_bench.suite import dump_suite, load_suite
from safemed_bench.suite.schema import ConditionSpec, DataSpec, ModelSpec, RunSpec, Suite, ThreatSpec
from safemed_bench.suite.values import parse_number

REPO = Path(__file__).parents[1]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return writer(tmp_path)


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch) -> None:
    name_entries(monkeypatch)


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
