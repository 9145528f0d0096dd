"""Training configs: what is wrong is named with its place, and they are layered as suites are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from safemed_bench.core.errors import Problem, SuiteError
from safemed_bench.training.checkpoint import config_digest
from safemed_bench.training.config import TrainConfig, load_config

REPO = Path(__file__).parents[1]
MINIMAL = """
stages:
  - {name: binding, steps: 4, tasks: [{kind: binding}, {kind: stated, prompts: [bare]}]}
  - name: mixed
    steps: 6
    tasks:
      - {kind: answer, letter_weight: 2}
"""
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def put(text: str, name: str = "trial.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return put


def problems(path: Path | str, *sets: str) -> tuple[Problem, ...]:
    with pytest.raises(SuiteError) as caught:
        load_config(path, sets)
    assert caught.value.exit_code == 2
    return caught.value.problems


def only(path: Path | str, *sets: str) -> Problem:
    found = problems(path, *sets)
    assert len(found) == 1, found
    return found[0]


def test_the_shipped_configs_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    monkeypatch.setenv("SAFEMED_OMNIMEDVQA", "/data")
    names = {load_config(file).name for file in sorted(Path("suites/train").glob("*.yaml"))}
    assert names >= {"base", "sft", "instruct", "cot"}
    assert load_config("cot") == load_config("suites/train/cot.yaml"), "found by name"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("seed: -1", r"trial.yaml:8:7  seed: "),
        ("sed: 1", r"trial.yaml:8:1  sed: unknown key. Did you mean 'seed'"),
        ("log_every: [", r"trial.yaml:9:1  not YAML"),
        ("log_every: 0", r"log_every: must be greater than or equal to 1, not 0"),
        ("seed: 1\nseed: 2", r"trial.yaml:9:1  seed: stands twice; first at line 8"),
        ("data: {images: many}", r"8:16  data.images: must be a whole number, not text"),
        ("data: {scale: 3}", r"8:8  data.scale: unknown key"),
        ("data: {phase: 3, augmnt: 1}", r"8:18  data.augmnt: unknown key. Did you mean 'augment'"),
        ("export_dtype: flaot16", r"export_dtype: must be float16 or float32, not 'flaot16'. Did you mean 'float16'"),
    ],
)
def test_bad_configs_name_the_line(write: Write, change: str, message: str) -> None:
    with pytest.raises(SuiteError, match=message):
        load_config(write(f"{MINIMAL}{change}\n"))


def test_an_unknown_key_deep_inside_is_looked_for_among_its_neighbours(write: Write) -> None:
    found = only(write(MINIMAL.replace("letter_weight", "leter_weight")))
    assert (found.line, found.column, found.key) == (7, 24, "stages.1.tasks.0.leter_weight")
    assert found.message == "unknown key. Did you mean 'letter_weight'?"
    stage = only(write(MINIMAL.replace("    steps: 6", "    steps: 6\n    warmupp: 1")))
    assert (stage.line, stage.key) == (6, "stages.1.warmupp") and "'warmup'" in stage.message
    foreign = only(write(MINIMAL.replace("    steps: 6", "    steps: 6\n    seed: 1"))).message
    assert "Did you mean" not in foreign and "learning_rate" in foreign and "log_every" not in foreign


def test_unknown_prompt_is_named(write: Write) -> None:
    found = only(write(MINIMAL.replace("kind: answer,", "kind: answer, prompts: [think_breif],")))
    assert found.key == "stages.1.tasks.0.prompts" and found.line == 7
    assert found.message == "unknown prompt 'think_breif'. Did you mean 'think_brief'?"


def test_everything_that_is_wrong_is_said_at_once(write: Write) -> None:
    found = problems(write(f"{MINIMAL}sed: 1\nwarm: 2\ninit: ${{env:NOWHERE}}\n"), "log_every=no", "x")
    assert [(p.file[-10:], p.line, p.key) for p in found] == [
        ("--set", 0, "log_every"),
        ("--set", 0, "x"),
        ("trial.yaml", 8, "sed"),
        ("trial.yaml", 9, "warm"),
        ("trial.yaml", 10, "init"),
    ]


def test_environment(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(f'{MINIMAL}init: ${{env:START:tiny}}\nseed: ${{env:SEED}}\ndata: {{root: "${{env:ROOT:}}"}}\n')
    monkeypatch.setenv("SEED", "7")
    config = load_config(path)
    assert (config.init, config.seed, config.data.root) == ("tiny", 7, None)
    monkeypatch.delenv("SEED")
    found = only(path)
    assert (found.line, found.key) == (9, "seed") and "variable SEED is not set" in found.message


def test_extends(write: Write) -> None:
    base = write(f"{MINIMAL}seed: 3\ndata: {{images: 8, fit: stretch}}\n", "base.yaml")
    child = write("extends: base\ndata: {images: 9}\n", "child.yaml")
    config = load_config(child)
    assert (config.name, config.seed, config.data.images, config.data.fit) == ("child", 3, 9, "stretch")
    base.write_text(base.read_text() + "sed: 3\n")
    found = only(child)
    assert (found.file, found.line, found.message) == (str(base), 10, "unknown key. Did you mean 'seed'?")
    assert "Did you mean 'extends'" in only(write(f"{MINIMAL}extend: base\n")).message
    assert "goes in a circle" in only(write("extends: own\n", "own.yaml")).message
    missing = only(write(f"extends: suite_of_none\n{MINIMAL}"))
    assert (missing.line, missing.column) == (1, 10) and "no such training config" in missing.message


def test_set_reaches_the_items_of_lists(write: Write) -> None:
    path = write(MINIMAL)
    sets = ("stages.1.learning_rate=1/400", "stages.0.tasks.1.weight=3", "stages.1.steps=2", "data.split_file=s.json")
    config = load_config(path, sets)
    assert (config.stages[1].learning_rate, config.stages[0].tasks[1].weight, config.total_steps) == (0.0025, 3, 6)
    assert config.data.split_file == "s.json"
    found = only(path, "stages.2.steps=3")
    assert (found.file, found.key) == ("--set", "stages.2.steps") and "is a list of 2" in found.message
    assert only(path, "stages.0.steps=0").key == "stages.0.steps"


def test_a_missing_file(tmp_path: Path) -> None:
    assert only(tmp_path / "trial.yaml").message.startswith("no such training config")
    assert "Did you mean 'instruct'?" in only("instrct").message


LATE = ("data.split_file=s.json", "precision=bf16", "stages.1.tasks.0.question_types=[Lesion Grading]")


@pytest.mark.parametrize("late", LATE)
def test_a_late_come_key_that_is_not_used_leaves_no_trace(write: Write, late: str) -> None:
    """Checkpoints are kept by a hash of the config: a new key that is not used must not orphan them."""
    key = late.partition("=")[0].rpartition(".")[2]
    plain, used = load_config(write(MINIMAL)), load_config(write(MINIMAL), (late,))
    assert key not in str(plain.model_dump(mode="json")) and key in str(used.model_dump(mode="json"))
    assert config_digest(plain) != config_digest(used)
    for config in (plain, used):
        assert TrainConfig.model_validate(config.model_dump(mode="json")) == config
