"""Rewards on replies as models write them: right, wrong, hedged, cut off, without a thought."""

from __future__ import annotations

import subprocess
import sys

import pytest

from safemed_bench.core import registry
from safemed_bench.core.errors import UsageError
from safemed_bench.core.types import Question
from safemed_bench.models.prompts import PROMPTS, get_prompt
from safemed_bench.training.rewards import total

QUESTION = Question("q", "", "", "What is shown?", ("cyst", "normal", "nodule"), 1, "CT", "t", "s", "train")
ALL = {"accuracy": 1.0, "format": 0.2, "gated": 0.5}


@pytest.mark.parametrize(
    ("prompt", "text", "accuracy", "form", "gated"),
    [
        ("think", "<think>so normal B</think><answer>B</answer>", 1, 1, 1),
        ("think", "<think>so cyst A</think> <answer>A</answer>", 0, 1, 0),
        ("think", "<answer>B</answer>", 1, 0, 0),  # right, without a rationale
        ("think", "<think>normal<answer>B</answer>", 1, 0, 0),
        ("think", "<think>normal</think><answer>B</answer> or so", 1, 0, 0),
        ("think", "<think>so B", 0, 0, 0),
        ("think", "<think>B</think><answer>B", 0, 0, 0),
        ("think", "<think><answer>A</answer></think><answer>B</answer>", 0, 0, 0),
        ("instruct", "<answer> (B). </answer>", 1, 1, 1),
        ("instruct", "The answer is <answer>B</answer>", 1, 1, 1),
        ("instruct", "<answer>B</answer><answer>B</answer>", 1, 0, 0),
        ("instruct", "<answer>A</answer><answer>B</answer>", 0, 0, 0),  # hedging
        ("instruct", "<answer>A or B</answer>", 0, 0, 0),
        ("instruct", "<answer>b</answer>", 0, 0, 0),
        ("instruct", "<answer>D</answer>", 0, 0, 0),  # no such option
        ("instruct", "<answer></answer>", 0, 0, 0),
        ("instruct", "B", 0, 0, 0),
        ("instruct", "", 0, 0, 0),
        ("bare", "B", 1, 1, 1),
        ("bare", " (B).\n", 1, 1, 1),
        ("bare", "B) normal", 1, 0, 0),
        ("bare", "A", 0, 1, 0),
        ("bare", "A or B", 0, 0, 0),
        ("bare", "Bone", 0, 0, 0),
        ("bare", "The answer is B", 0, 0, 0),
        ("bare", "D", 0, 0, 0),
        ("bare", "", 0, 0, 0),
    ],
)
def test_each_reward(prompt, text, accuracy, form, gated):
    for finished in (True, False):
        score = total(ALL, text, finished, QUESTION, get_prompt(prompt))
        assert score.values == {"accuracy": accuracy, "format": form, "gated": gated}
        assert score.total == pytest.approx(accuracy + 0.2 * form + 0.5 * gated)


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_every_prompts_own_reply_earns_all(name):
    prompt = PROMPTS[name]
    assert total(ALL, prompt.reply("B", "so normal B"), True, QUESTION, prompt).total == pytest.approx(1.7)
    assert total(ALL, prompt.reply("A", "so normal B"), True, QUESTION, prompt).total == pytest.approx(0.2)


def test_only_the_article_is_not_an_answer():
    question = Question("q", "", "", "?", ("cyst", "normal"), 0, "CT", "t", "s", "train")
    assert total({"accuracy": 1}, "A cyst is shown", True, question, get_prompt("bare")).total == 0
    assert total({"accuracy": 1}, "A. cyst", True, question, get_prompt("bare")).total == 1


def test_a_long_run_of_tags_is_read_to_its_end():
    text = "<answer>B</answer>" * 3000
    assert total({"accuracy": 1}, text, False, QUESTION, get_prompt("instruct")).total == 1
    assert total({"accuracy": 1}, text + "<answer>C</answer>", False, QUESTION, get_prompt("instruct")).total == 0


def test_an_unknown_reward_says_what_was_meant():
    with pytest.raises(UsageError, match=r"unknown reward 'acuracy'\. Did you mean 'accuracy'"):
        total({"acuracy": 1.0}, "B", True, QUESTION, get_prompt("bare"))
    assert {"accuracy", "format", "gated"} <= set(registry.rewards)


def test_a_reward_of_ones_own(monkeypatch):
    monkeypatch.setattr(registry.rewards, "_items", dict(registry.rewards._items))

    @registry.rewards.register("short")
    def short(text, finished, question, prompt):
        return 1 / len(text) if text else float("nan")

    assert total({"short": 3.0, "accuracy": 1.0}, "B", True, QUESTION, get_prompt("bare")) == (
        4.0,
        {"short": 1.0, "accuracy": 1.0},
    )
    with pytest.raises(UsageError, match="reward 'short' gave nan"):
        total({"short": 3.0}, "", True, QUESTION, get_prompt("bare"))


def test_rewards_are_listed_without_torch():
    code = "import sys; from safemed_bench.core.registry import rewards; print(*rewards); exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"accuracy", "format", "gated"} <= set(done.stdout.split())
