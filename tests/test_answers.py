"""Strict extraction: what is not in the asked form is invalid, and a cut-off reply is told apart."""

import re

import pytest

from safemed_bench.core.types import Question
from safemed_bench.models.answers import extract, fork, split_at_letter
from safemed_bench.models.prompts import PROMPTS, get_prompt, problem_text

QUESTION = Question("q", "", "", "What is shown?", ("cyst, simple", "normal"), 1, "CT", "t", "s", "test")


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("instruct", "<answer>B</answer>", (1, "valid")),
        ("instruct", " <answer> B </answer> ", (1, "valid")),
        ("instruct", "<answer>(B)</answer>", (1, "valid")),
        ("instruct", "B", (None, "invalid")),
        ("instruct", "", (None, "invalid")),
        ("instruct", "<answer>b</answer>", (None, "invalid")),
        ("instruct", "<answer>C</answer>", (None, "invalid")),  # only two options
        ("instruct", "<answer>A</answer><answer>B</answer>", (None, "invalid")),
        ("instruct", "<answer>A</answer> or <answer>maybe B", (None, "invalid")),
        ("instruct", "<answer>A or B</answer>", (None, "invalid")),
        ("instruct", "<answer>B</answer> because", (None, "invalid")),
        ("bare", "B", (1, "valid")),
        ("bare", " B. ", (1, "valid")),
        ("bare", "The answer is B", (None, "invalid")),
        ("bare", "Because", (None, "invalid")),
        ("think", "<think>it is a cyst</think><answer>A</answer>", (0, "valid")),
        ("think", "<answer>A</answer>", (None, "invalid")),
        ("think", "<think>it is<answer>A</answer>", (None, "invalid")),
        ("think", "<think>a</think><think>b</think><answer>A</answer>", (None, "invalid")),
    ],
)
def test_extraction(prompt, text, expected):
    assert extract(text, get_prompt(prompt), 2, finished=True) == expected


def test_a_cut_off_reply_is_truncated_not_invalid():
    assert extract("<think>this image is", get_prompt("think"), 2, finished=False) == (None, "truncated")


@pytest.mark.parametrize("name", sorted(PROMPTS))
def test_every_prompts_own_reply_is_valid(name):
    prompt = PROMPTS[name]
    assert extract(prompt.reply("B", "so normal B"), prompt, 2, finished=True) == (1, "valid")
    assert prompt.reply("B", "r").startswith(prompt.answer_prefix("r"))
    assert "A) cyst, simple, B) normal" in prompt.user_text(QUESTION)


def test_problem_text_is_med_r1s_layout():
    assert problem_text(QUESTION) == "What is shown? A) cyst, simple, B) normal"


def test_a_reply_is_split_around_its_letter():
    assert split_at_letter("<think>A or B</think> <answer> B </answer>") == (
        "<think>A or B</think> <answer> ",
        " </answer>",
    )
    assert split_at_letter("B") is None


def _merging(text):
    """A tokenizer that takes a sign together with the letter after it, as Qwen's does with `>A`."""
    return [hash(part) for part in re.findall(r"[^\w\s]?\w+|[^\w\s]| ", text)]


@pytest.mark.parametrize(
    ("head", "tail"), [("<answer>", "</answer>"), ("<think>x</think> <answer> ", " </answer>"), ("", "")]
)
def test_letters_are_found_where_a_tokenizer_parts_them(head, tail):
    tokens, letters = fork(_merging, head, tail)
    assert len(set(letters)) == 4
    for letter, token in zip("ABCD", letters, strict=True):
        assert [*tokens, token] == _merging(head + letter + tail)[: len(tokens) + 1]
