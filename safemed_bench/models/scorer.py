"""A model that scores options and writes nothing: a CLIP, a classifier, anything with one number per option.

To attacks, certifiers and tables it is a language model whose only words are the letters, and whose every reply is one
of them. A subclass writes one method.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.errors import ModelError
from ..core.types import LETTERS, Answer, Question
from .base import Batch, Decode, Text


class OptionScorer(ABC):
    """Implements models.base.VisionLanguageModel over `scores`.

    fingerprint: of what the code does not tell, above all the version of weights that lie elsewhere. Code is hashed
    anyway; "" says that there is nothing else.
    """

    reasons: ClassVar[bool] = False
    decode: Decode = "logprob"
    prompt: ClassVar[str] = "bare"
    fingerprint: str = ""

    def __init__(self, resolution: tuple[int, int], device: torch.device | str = "cpu") -> None:
        self.name, self.resolution, self.device = type(self).__name__, resolution, torch.device(device)

    @abstractmethod
    def scores(self, questions: Sequence[Question], pixels: Tensor) -> Tensor:
        """(B, K) logits of the options, K at least that of the question with the most; further columns are ignored.

        pixels: (B, 3, H, W) float in [0, 1] on `device`; a step outside is possible under noise. Differentiable in
        pixels, or gradient attacks find nothing and diagnostics say so.
        """

    def prepare(self, questions: Sequence[Question], canvas: Tensor) -> Batch:
        return Batch(tuple(questions), canvas, {}).to(self.device)

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(LETTERS.index(sign) for sign in text if sign in LETTERS)

    def decode_text(self, tokens: Sequence[int]) -> str:
        return "".join(LETTERS[token] for token in tokens)

    def answer_prefix(self, rationale: str | None = None) -> str:
        return ""

    def option_logits(self, batch: Batch, pixels: Tensor, text: Sequence[Text] | None = None) -> Tensor:
        """(B, 4) log-probabilities of the letters, -inf where there is no option. Raises ModelError on another shape.

        `text` changes nothing: there is no reply before the letter.
        """
        given = self.scores(batch.questions, pixels)
        counts = torch.tensor([len(q.options) for q in batch.questions], device=given.device)
        if given.ndim != 2 or len(given) != len(batch) or given.shape[1] < int(counts.max()):
            wanted = f"({len(batch)}, {int(counts.max())} or more)"
            raise ModelError(f"{self.name}: `scores` must give {wanted}, not {tuple(given.shape)}")
        given = torch.nn.functional.pad(given[:, : len(LETTERS)], (0, max(len(LETTERS) - given.shape[1], 0)))
        absent = torch.arange(len(LETTERS), device=given.device) >= counts[:, None]
        return given.masked_fill(absent, -torch.inf).log_softmax(1)

    def next_token_logits(self, batch: Batch, pixels: Tensor, text: Sequence[Text], candidates: Tensor) -> Tensor:
        scores = self.option_logits(batch, pixels)
        candidates = candidates.to(scores.device)
        return scores.gather(1, candidates.clamp(min=0)).masked_fill(candidates < 0, -torch.inf)

    def token_loss(
        self,
        batch: Batch,
        pixels: Tensor,
        text: Sequence[Text],
        weights: Sequence[Sequence[float]] | None = None,
    ) -> Tensor:
        """(B,) negative log-likelihood of each reply's letter, the only token that a reply has."""
        replies = [self.encode(reply) if isinstance(reply, str) else tuple(reply) for reply in text]
        if any(len(reply) != 1 for reply in replies):
            raise ValueError(f"{self.name} replies with one letter, not with {replies}")
        letters = torch.tensor(replies, dtype=torch.long)
        return -self.next_token_logits(batch, pixels, text, letters).squeeze(1)

    @torch.no_grad()
    def answer(self, batch: Batch, pixels: Tensor, *, generator: torch.Generator | None = None) -> list[Answer]:
        """The best option on the pixels rounded to the 8-bit grid; `generator` is not used."""
        images = (pixels.detach() * 255).round().clamp(0, 255) / 255
        answers = []
        for row, question in zip(self.option_logits(batch, images).tolist(), batch.questions, strict=True):
            logprobs = tuple(row[: len(question.options)])
            best = max(range(len(logprobs)), key=logprobs.__getitem__)
            answers.append(Answer(best, "valid", LETTERS[best], logprobs, best, (best,)))
        return answers

    def self_check(self, batch: Batch) -> dict[str, Any]:
        """The norm of the scores' gradient in the pixels; raises ModelError where there is none."""
        pixels = batch.pixels.requires_grad_(True)
        best = self.option_logits(batch, pixels).amax(1).sum()
        slope = torch.autograd.grad(best, pixels)[0].norm().item() if best.requires_grad else 0.0
        if not slope > 0:
            raise ModelError(f"{self.name}: the scores have no gradient in the pixels")
        return {"gradient": slope}
