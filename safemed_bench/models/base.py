"""The model interface (DESIGN, section 5): what attacks, certifiers, trainers and the runner see of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..core.types import Answer, Question
from .transfer import upload

Decode = Literal["logprob", "generate"]
Text = str | Sequence[int]
"""A continuation: text, or the token ids that `encode` gives for it."""


@dataclass(frozen=True)
class Batch:
    """Questions made ready for a model; keeps the text with its image whatever is selected or repeated.

    canvas: (B, 3, H, W) uint8, the native image at the suite's resolution, before any processor.
    inputs: the model's own tensors with B as first dimension (left-padded token ids, attention mask, ...).
    """

    questions: tuple[Question, ...]
    canvas: Tensor
    inputs: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def pixels(self) -> Tensor:
        """(B, 3, H, W) float32 in [0, 1]: the canvas as the attack sees it."""
        return self.canvas.float() / 255

    @property
    def targets(self) -> Tensor:
        """(B,) index of the true option."""
        return torch.tensor([q.answer for q in self.questions], device=self.canvas.device)

    def select(self, index: Tensor | Sequence[int]) -> Batch:
        rows = torch.as_tensor(index, dtype=torch.long).cpu()
        on = rows.to(self.canvas.device)
        questions = tuple(self.questions[i] for i in rows.tolist())
        return Batch(questions, self.canvas[on], {k: v[on] for k, v in self.inputs.items()})

    def repeat(self, times: int) -> Batch:
        """Each question `times` times in a row (a a b b, as groups of rollouts want it)."""
        return self.select(torch.arange(len(self)).repeat_interleave(times))

    def to(self, device: torch.device | str) -> Batch:
        inputs = {k: upload(v, device) for k, v in self.inputs.items()}
        return replace(self, canvas=upload(self.canvas, device), inputs=inputs)


@runtime_checkable
class VisionLanguageModel(Protocol):
    """A white-box vision-language model. `pixels` is always (B, 3, H, W) float in [0, 1], before any processor.

    name: the entry's name. reasons: whether it writes a rationale before its answer. decode: how its verdict is read.
    resolution: (height, width) of the canvas. fingerprint: hash of weights, processor, prompt and answer extraction.
    """

    name: str
    reasons: bool
    decode: Decode
    resolution: tuple[int, int]
    fingerprint: str
    device: torch.device

    def prepare(self, questions: Sequence[Question], canvas: Tensor) -> Batch:
        """Questions and their (B, 3, H, W) uint8 canvases to a batch on the model's device."""
        ...

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a continuation, without special tokens."""
        ...

    def decode_text(self, tokens: Sequence[int]) -> str: ...

    def answer_prefix(self, rationale: str | None = None) -> str:
        """The continuation right before the letter: `<answer>` or `<think> rationale </think> <answer>`."""
        ...

    def next_token_logits(self, batch: Batch, pixels: Tensor, text: Sequence[Text], candidates: Tensor) -> Tensor:
        """(B, K) log-probabilities of `candidates` (B, K token ids; -1 = absent, gives -inf) right after `text`.

        Differentiable in pixels.
        """
        ...

    def option_logits(self, batch: Batch, pixels: Tensor, text: Sequence[Text] | None = None) -> Tensor:
        """(B, K) log-probabilities of the options' letters after `text`, -inf where an option is absent.

        Without `text` the prefix is `answer_prefix()`. Differentiable in pixels.
        """
        ...

    def token_loss(
        self,
        batch: Batch,
        pixels: Tensor,
        text: Sequence[Text],
        weights: Sequence[Sequence[float]] | None = None,
    ) -> Tensor:
        """(B,) mean negative log-likelihood, in nats per token, of each continuation; differentiable in pixels.

        `weights` gives one non-negative weight per token; the mean is then weighted.
        """
        ...

    def answer(self, batch: Batch, pixels: Tensor, *, generator: torch.Generator | None = None) -> list[Answer]:
        """The deployed path: 8-bit image, the model's own processor, decode, extract. No gradient.

        `pixels` is rounded to the 8-bit grid first. Raises nothing for a bad answer: that is Answer.status.
        """
        ...

    def self_check(self, batch: Batch) -> dict[str, Any]:
        """Pixel map = processor, gradient non-zero and equal to a finite difference, single = batched.

        Returns the measured errors; raises ModelError where one is out of tolerance.
        """
        ...
