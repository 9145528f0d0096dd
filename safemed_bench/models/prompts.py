"""Named prompt templates: what the model is asked, and the shape of the answer that is read back."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.errors import UsageError, did_you_mean
from ..core.types import LETTERS, Question


@dataclass(frozen=True, slots=True)
class Prompt:
    """One wording.

    template: has `{question}` (stem and options, `What is it? A) x, B) y`). reasons: the model writes a rationale in
    `<think>` first. tagged: the letter stands in `<answer>` tags, else the whole reply is the letter.
    image: False leaves the picture out (text-only prior).
    """

    name: str
    template: str
    reasons: bool
    tagged: bool = True
    image: bool = True

    def user_text(self, question: Question) -> str:
        return self.template.format(question=problem_text(question))

    def answer_prefix(self, rationale: str | None = None) -> str:
        """The continuation right before the letter."""
        think = f"<think>{rationale or ''}</think>" if self.reasons else ""
        return think + ("<answer>" if self.tagged else "")

    @property
    def closing(self) -> str:
        """What follows the letter."""
        return "</answer>" if self.tagged else ""

    def reply(self, letter: str, rationale: str | None = None) -> str:
        """The whole reply that this wording asks for; the target of supervised fine-tuning."""
        return self.answer_prefix(rationale) + letter + self.closing


def problem_text(question: Question) -> str:
    """Stem and options in Med-R1's layout: `What is shown? A) cyst, B) normal`."""
    options = ", ".join(f"{LETTERS[i]}) {text}" for i, text in enumerate(question.options))
    return f"{question.question} {options}"


PROMPTS: dict[str, Prompt] = {
    p.name: p
    for p in (
        Prompt("bare", "{question}", reasons=False, tagged=False),
        Prompt("instruct", "{question} Provide the correct letter inside <answer></answer> tags.", reasons=False),
        Prompt("instruct_choose", "{question} Choose one option and put its letter in <answer></answer>.", False),
        Prompt("instruct_look", "Look at the image. {question} Reply with <answer>letter</answer>.", False),
        # The evaluation wording of Med-R1 (arXiv 2503.13939), src/eval_vqa.
        Prompt(
            "think",
            "{question} Think through the question step by step in <think>...</think> tags. Then provide the correct "
            "single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags.",
            reasons=True,
        ),
        Prompt(
            "think_brief",
            "{question} Think in <think></think>, then answer in <answer></answer>.",
            reasons=True,
        ),
        Prompt(
            "blind",
            "{question} Provide the correct letter inside <answer></answer> tags.",
            reasons=False,
            image=False,
        ),
    )
}


def get_prompt(name: str) -> Prompt:
    if name not in PROMPTS:
        raise UsageError(f"unknown prompt '{name}'.{did_you_mean(name, list(PROMPTS))}")
    return PROMPTS[name]
