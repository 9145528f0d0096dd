"""The examples of docs/plugins.md, taken out of the page and run as it says, with a few questions."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from safemed_bench import cli
from safemed_bench.certify.evidence import clopper_pearson_low
from safemed_bench.core.errors import DataError, ModelError, UsageError
from safemed_bench.core.types import Question
from safemed_bench.datasets import ask
from safemed_bench.suite.schema import DataSpec

REPO = Path(__file__).parents[1]
PAGE, README = (REPO / "docs" / "plugins.md").read_text(), (REPO / "README.md").read_text()
ZOO = REPO / "safemed_bench" / "models" / "zoo"
BLOCKS = {
    match[2]: match[3] for match in re.finditer(r"```(python|yaml|toml)\n# (\S+)\n(.*?)```", PAGE, flags=re.DOTALL)
}
COMMANDS = {
    line.split()[2]: line for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
}
FEW = ("data.per_modality=1", "data.phantom.test=8", "threat.eps=[8/255]", "run.workers=1", "run.device=cpu")
LINES = 16
"""Of code, imports and docstring apart: about ten."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every block of the page as the file that its first line names."""
    for name in [n for n in os.environ if n.startswith("SAFEMED_") and n != "SAFEMED_CACHE"]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    for name, text in BLOCKS.items():
        Path(name).write_text(text)
    return tmp_path


def follow(file: str, *more: str) -> list[dict[str, Any]]:
    """Run the page's command for a suite, and return the records; none may be an error."""
    program, *arguments = shlex.split(COMMANDS[file])
    assert program == "safemed-bench"
    assert cli.invoke([*arguments, *more, "--quiet"]) == 0
    return read(Path("reports") / Path(file).stem.replace("_", "-"))


def read(run: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    assert records and not [r["error"] for r in records if r["error"]]
    return records


def few(*more: str) -> list[str]:
    return [word for value in (*FEW, *more) for word in ("--set", value)]


def by_condition(records: list[dict[str, Any]], field: str = "correct") -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for record in records:
        found.setdefault(record["condition"], []).append(record[field])
    return found


def attacked(records: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Records of an attack on what was right; with at least one success among them."""
    found = [r for r in records if r["condition"].startswith(name) and r["clean_correct"]]
    assert found and all(0 < r["linf"] <= 8 / 255 + 1e-9 for r in found if not r["correct"])
    assert any(not r["correct"] for r in found)
    return found


def test_every_example_is_run_here_and_short() -> None:
    run = {"my_model", "my_quantised", "my_attack", "my_objective", "my_data", "my_certifier", "my_training"}
    assert {Path(name).stem for name in COMMANDS} == run
    assert {Path(name).stem for name in BLOCKS} == {*run, "my_reward", "pyproject"}
    for name in (n for n in BLOCKS if n.endswith(".py")):
        code = [x for x in BLOCKS[name].splitlines() if x.strip() and not x.startswith(("import", "from", '    """'))]
        assert len(code) <= LINES, f"{name} has {len(code)} lines of code"


def test_a_model_that_scores_options_meets_every_kind_of_attack() -> None:
    records = follow("my_model.yaml", *few("data.per_modality=2"))
    assert {r["model"] for r in records} == {"my-model"} and {r["status"] for r in records} == {"valid"}
    assert set(by_condition(records)) >= {"clean", "blank", "pgd[answer]@linf:8/255", "square@linf:8/255"}
    assert all(r["steps"] > 0 and r["loss_trace"] for r in attacked(records, "pgd"))
    # a blank image has one mean colour, so that nothing but the options can tell its answers apart
    blank = [r for r in records if r["condition"] == "blank"]
    assert len({round(r["option_logprobs"][0], 4) for r in blank if r["n_options"] == 4}) == 1


def test_a_checkpoint_changed_in_code_answers_differently_from_what_it_was() -> None:
    records = follow("my_quantised.yaml", *few())
    clean = {(r["model"], r["question_id"]): r["option_logprobs"] for r in records if r["condition"] == "clean"}
    assert {model for model, _ in clean} == {"sft", "sft-4bit"}
    apart = [np.abs(np.subtract(v, clean["sft-4bit", q])).max() for (m, q), v in clean.items() if m == "sft"]
    assert len(apart) == 8 and min(apart) > 0
    attacked([r for r in records if r["model"] == "sft-4bit"], "pgd")


def test_an_attack_climbs_takes_its_parameters_and_is_judged_like_ours() -> None:
    records = follow("my_attack.yaml", *few())
    mine = attacked(records, "my-attack[answer]")
    assert {r["steps"] for r in mine} == {5}
    assert all(max(r["loss_trace"]) > r["loss_trace"][0] for r in mine)


def test_an_objective_is_maximised_by_our_attacks() -> None:
    records = follow("my_objective.yaml", *few())
    trace = [r["loss_trace"] for r in attacked(records, "pgd[doubt]")]
    assert all(0 <= value <= 1 for row in trace for value in row), "a probability"
    assert "pgd[answer]@linf:8/255" in by_condition(records)


def test_a_data_set_is_split_stratified_hashed_and_asked(folder: Path) -> None:
    write_questions(folder / "my_images")
    records = follow("my_data.yaml", *few()[6:])
    assert {r["question_id"] for r in records} == {"t0", "t1", "t2", "t3"} and {r["modality"] for r in records} == {
        "CT"
    }
    assert all(len(r["image_sha256"]) == 64 for r in records)
    summary = json.loads((folder / "reports" / "my-data" / "summary.json").read_text())
    prior = [e for e in summary["estimates"] if e["metric"] == "text_prior" and e["modality"] == "all"]
    assert prior[0]["value"] == 1.0, "the train split holds the same texts"
    assert "my-data, split test" in (folder / "reports" / "my-data" / "tables" / "overall.md").read_text()


def write_questions(root: Path) -> None:
    """Four test questions of one image each, and the same texts in train."""
    root.mkdir()
    draw = np.random.default_rng(0)
    with (root / "questions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["id", "image", "question", "options", "answer", "modality", "type", "split"])
        for i in range(4):
            Image.fromarray(draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(root / f"{i}.png")
            for split in ("test", "train"):
                text = [f"What is shown in figure {i}?", "cyst|mass, large|normal", i % 3]
                rows.writerow(
                    [f"{split[:1] if split == 'test' else 'train'}{i}", f"{i}.png", *text, "ct", "Diagnosis", split]
                )


def test_a_certifier_proves_less_than_the_exact_bound_and_refuses_too_few_samples(
    capsys: pytest.CaptureFixture[str],
) -> None:
    records = follow("my_certifier.yaml", *few("data.per_modality=1"))
    held = [r for r in records if r["condition"] == "certify[sigma=0.25]"]
    assert {r["samples"] for r in held} == {70} and any(r["radius"] > 0 for r in held)
    for record in held:
        count = record["extra"]["counts"].get(str(record["extra"]["candidate"]), 0)
        assert record["extra"]["p_low"] == pytest.approx(max(count / 60 - (math.log(1000) / 120) ** 0.5, 0))
        assert record["extra"]["p_low"] <= clopper_pearson_low(count, 60, 0.001)
    wanted = ["--set", "conditions.1.n=20", "--plugin", "my_certifier.py"]
    assert cli.invoke(["validate", "my_certifier.yaml", *wanted]) == 2
    assert "the smallest n that can is" in capsys.readouterr().err


def test_a_reward_is_trained_for(folder: Path) -> None:
    small = ["data.images=8", "stages.0.steps=1", "stages.0.batch_size=2", "stages.0.grpo.group_size=2"]
    small += ["eval_questions=0", "log_every=1", f"output={folder / 'run'}"]
    _, *arguments = shlex.split(COMMANDS["my_training.yaml"])
    assert cli.invoke([*arguments, "--quiet", *(w for s in small for w in ("--set", s))]) == 0
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["reward/brief/clean"] for line in lines if "reward/brief/clean" in line]
    assert rewards and all(0 < value < 1 for value in rewards)


def test_the_readme_shows_the_same_and_a_suite_that_runs(folder: Path) -> None:
    for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        name, _, text = code.partition("\n")
        assert BLOCKS[name.removeprefix("# ")] == text
    (suite,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    Path("my_suite.yaml").write_text(suite)
    mine = (f"models.0.path={ZOO / 'sft'}", "models.0.prompt=bare", "data.root=", "data.resolution=64")
    small = ("conditions.3.steps=2", "conditions.3.params.apgd_steps=2", "conditions.3.params.queries=2")
    assert "safemed-bench run my_suite.yaml\n" in README
    assert cli.invoke(["run", "my_suite.yaml", "--quiet", *few(*mine, *small)]) == 0
    records = read(folder / "reports" / "my_suite")
    assert {r["model"] for r in records} == {"mine"}
    assert all(r["extra"]["stage"] for r in attacked(records, "safemed-attack") if not r["correct"])


def test_entry_points_of_an_installed_package_need_no_flag(folder: Path) -> None:
    package = tomllib.loads(BLOCKS["pyproject.toml"])["project"]
    meta = folder / f"{package['name'].replace('-', '_')}-{package['version']}.dist-info"
    meta.mkdir()
    (meta / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package['name']}\nVersion: {package['version']}\n")
    groups = package["entry-points"].items()
    lines = [f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in points.items()) for group, points in groups]
    (meta / "entry_points.txt").write_text("\n".join(lines))
    Path("both.yaml").write_text("name: both\nmodels: [my-model]\nconditions: [clean, {attack: my-attack, steps: 3}]\n")
    paths = os.pathsep.join([str(folder), str(REPO)])
    done = subprocess.run(
        [sys.executable, "-m", "safemed_bench", "run", "both.yaml", "--quiet", *few("data.per_modality=2")],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    attacked(read(folder / "reports" / "both"), "my-attack")


# --- what stands behind them ---


def question(**changes: Any) -> Question:
    values = {"id": "q", "options": ("a", "b"), "answer": 0, "split": "test"} | changes
    return Question(
        values["id"], "no.png", "", "?", values["options"], values["answer"], "CT", "t", "s", values["split"]
    )


@pytest.mark.parametrize(
    ("questions", "said"),
    [
        ([question(), question()], "'q': the id stands twice"),
        ([question(options=tuple("abcde"))], "5 options; 2 to 4 can be asked"),
        ([question(answer=2)], "answer 2 is none of 2 options"),
        ([question(split="train")], "no question in split 'test'"),
        ([question()], "none of 1 images is there"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(questions: list[Question], said: str) -> None:
    with pytest.raises(DataError, match=said):
        ask(DataSpec(name="mine"), "mine", questions)


def test_a_scheme_of_other_splits_is_refused() -> None:
    with pytest.raises(UsageError, match="say themselves"):
        ask(DataSpec(name="mine", scheme="rebalanced"), "mine", [question()])


def test_a_scorer_masks_absent_options_and_refuses_what_is_no_score() -> None:
    import torch

    from safemed_bench.models.scorer import OptionScorer

    class Constant(OptionScorer):
        def __init__(self, given: torch.Tensor) -> None:
            super().__init__((4, 4))
            self.given = given

        def scores(self, questions: Any, pixels: torch.Tensor) -> torch.Tensor:
            return self.given

    asked = [question(), question(id="r", options=("a", "b", "c"))]
    canvas = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    model = Constant(torch.tensor([[1.0, 0.0, 9.0], [0.0, 1.0, 9.0]]))
    batch = model.prepare(asked, canvas)
    scores = model.option_logits(batch, batch.pixels)
    assert scores.shape == (2, 4) and torch.isinf(scores[0, 2:]).all() and torch.isinf(scores[1, 3])
    assert torch.allclose(scores.exp().sum(1), torch.ones(2))
    assert [a.index for a in model.answer(batch, batch.pixels)] == [0, 2]
    letters = [model.encode(text)[0] for text in "AC"]
    assert torch.allclose(model.token_loss(batch, batch.pixels, ["A", "C"]), -scores[[0, 1], letters])
    with pytest.raises(ModelError, match="no gradient"):
        model.self_check(batch)
    with pytest.raises(ModelError, match=r"must give \(2, 3 or more\), not \(2, 2\)"):
        Constant(torch.zeros(2, 2)).option_logits(batch, batch.pixels)
