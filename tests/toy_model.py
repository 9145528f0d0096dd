"""A real, differentiable, very small vision-language model, so that attacks are tested in milliseconds.

A conv net looks at the image; a fixed grammar writes `<answer>B</answer>` or, with `reasons`,
`<think>shows WORDS</think><answer>B</answer>`, where WORDS is the option that the image speaks for and the letter
follows the words rather than the image. So, as in large models, a rationale leaks its answer to whoever is
teacher-forced with it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from safemed_bench.core.seeds import derive_seed
from safemed_bench.core.types import LETTERS, Answer, Question
from safemed_bench.models.answers import extract
from safemed_bench.models.base import Batch, Decode, Text
from safemed_bench.models.prompts import PROMPTS

TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<end>")
WORDS = ("shows", "unknown", "cyst", "mass", "normal", "nodule", "left", "right", "lung", "kidney", "brain", "skin")
VOCABULARY = (*TAGS, *LETTERS, *WORDS)
TOKEN = {word: i for i, word in enumerate(VOCABULARY)}
END = TOKEN["<end>"]
POOLS = (("cyst", "mass", "normal", "nodule"), ("left lung", "left kidney", "right lung", "right kidney"))
FIXED = 12.0
"""Logit of what the grammar demands, and of the letter that the written words stand for."""


class ToyVLM(nn.Module):
    """Implements models.base.VisionLanguageModel. `forwards` counts the images that went through the conv net."""

    def __init__(
        self,
        *,
        reasons: bool = False,
        decode: Decode | None = None,
        resolution: tuple[int, int] = (16, 16),
        device: torch.device | str = "cpu",
        seed: int = 0,
        sharpness: float = 1.0,
    ) -> None:
        super().__init__()
        self.name, self.reasons = ("toy_cot" if reasons else "toy"), reasons
        self.decode: Decode = decode or ("generate" if reasons else "logprob")
        self.resolution, self.device = resolution, torch.device(device)
        self.fingerprint = f"toy-{reasons}-{self.decode}-{seed}-{sharpness}"
        self.prompt = PROMPTS["think" if reasons else "instruct"]
        self.forwards = self.deployed = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            cells = (resolution[0] // 4) * (resolution[1] // 4)
            self.net = nn.Sequential(
                nn.Conv2d(3, 8, 4, stride=4), nn.GELU(), nn.Conv2d(8, 8, 1), nn.GELU(), nn.Flatten()
            )
            self.words = nn.Linear(8 * cells, len(VOCABULARY), bias=False)
        nn.init.normal_(self.words.weight, 0, 0.25 * sharpness, generator=torch.Generator().manual_seed(seed))
        self.to(self.device)

    # -- text

    def prepare(self, questions: Sequence[Question], canvas: Tensor) -> Batch:
        width = max(len(self.encode(o)) for q in questions for o in q.options) if questions else 1
        table = torch.full((len(questions), len(LETTERS), width), -1)
        for i, question in enumerate(questions):
            for k, option in enumerate(question.options):
                ids = self.encode(option)
                table[i, k, : len(ids)] = torch.tensor(ids)
        return Batch(tuple(questions), canvas, {"options": table}).to(self.device)

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(TOKEN.get(word, TOKEN["unknown"]) for word in re.findall(r"</?\w+>|\w+", text))

    def decode_text(self, tokens: Sequence[int]) -> str:
        text = " ".join(VOCABULARY[t] for t in tokens if t != END)
        return re.sub(r" ?(</?\w+>) ?", r"\1", text)

    def answer_prefix(self, rationale: str | None = None) -> str:
        return self.prompt.answer_prefix(rationale)

    # -- forward

    def _features(self, pixels: Tensor) -> Tensor:
        """(B, V) how much the image speaks for each word."""
        self.forwards += len(pixels)
        return self.words(self.net((pixels.to(self.words.weight.dtype) - 0.5) * 4))

    def _option_scores(self, features: Tensor, options: Tensor) -> Tensor:
        """(K,) of one question: the mean over an option's words, -inf where there is no option."""
        there = options >= 0
        scores = (features[options.clamp(min=0)] * there).sum(-1) / there.sum(-1).clamp(min=1)
        return scores.masked_fill(~there.any(-1), -torch.inf)

    def _next(self, features: Tensor, options: Tensor, tokens: Sequence[int]) -> Tensor:
        """(V,) logits of the next token of one reply."""
        demanded = {
            None: "<think>" if self.reasons else "<answer>",
            "<think>": "shows",
            "</think>": "<answer>",
            "</answer>": "<end>",
            **dict.fromkeys(LETTERS, "</answer>"),
        }
        last = VOCABULARY[tokens[-1]] if tokens else None
        logits = torch.full_like(features, -FIXED)
        if last in demanded:
            logits[TOKEN[demanded[last]]] = FIXED
            return logits
        scores = self._option_scores(features, options)
        spoken = list(tokens[tokens.index(TOKEN["shows"]) + 1 :]) if TOKEN["shows"] in tokens else []
        if last == "<answer>":
            spoken = [t for t in spoken if VOCABULARY[t] not in TAGS]
            for k, option in enumerate(options.tolist()):
                if option[0] >= 0:
                    said = FIXED if self.reasons and [t for t in option if t >= 0] == spoken else 0.0
                    logits[TOKEN[LETTERS[k]]] = said + scores[k]
            return logits
        # Inside the rationale: one more word of an option that goes on like this, or its end.
        spellings = [[t for t in option if t >= 0] for option in options.tolist()]
        fitting = {k: ids for k, ids in enumerate(spellings) if ids and ids[: len(spoken)] == spoken}
        following: dict[int, list[Tensor]] = {} if fitting else {TOKEN["</think>"]: [logits.new_tensor(FIXED)]}
        for k, ids in fitting.items():
            token = ids[len(spoken)] if len(ids) > len(spoken) else TOKEN["</think>"]
            following.setdefault(token, []).append(scores[k])
        for token, values in following.items():
            logits[token] = torch.stack(values).amax()
        return logits

    def _ids(self, text: Text) -> list[int]:
        return list(self.encode(text)) if isinstance(text, str) else list(text)

    def next_token_logits(self, batch: Batch, pixels: Tensor, text: Sequence[Text], candidates: Tensor) -> Tensor:
        options = batch.inputs["options"]
        rows = [self._next(f, options[i], self._ids(text[i])) for i, f in enumerate(self._features(pixels))]
        scores = torch.stack(rows).log_softmax(-1)
        candidates = candidates.to(self.device)
        return scores.gather(1, candidates.clamp(min=0)).masked_fill(candidates < 0, -torch.inf)

    def option_logits(self, batch: Batch, pixels: Tensor, text: Sequence[Text] | None = None) -> Tensor:
        letters = torch.tensor([TOKEN[letter] for letter in LETTERS], device=self.device).expand(len(batch), -1)
        candidates = letters.where(batch.inputs["options"][:, :, 0] >= 0, -1)
        prefix = [self.answer_prefix()] * len(batch) if text is None else text
        return self.next_token_logits(batch, pixels, prefix, candidates)

    def token_loss(
        self,
        batch: Batch,
        pixels: Tensor,
        text: Sequence[Text],
        weights: Sequence[Sequence[float]] | None = None,
    ) -> Tensor:
        losses = []
        for i, features in enumerate(self._features(pixels)):
            ids = self._ids(text[i])
            steps = [
                -self._next(features, batch.inputs["options"][i], ids[:n]).log_softmax(-1)[t] for n, t in enumerate(ids)
            ]
            weight = torch.tensor(weights[i] if weights is not None else [1.0] * len(ids), device=self.device)
            losses.append((torch.stack(steps) * weight).sum() / weight.sum())
        return torch.stack(losses)

    # -- the deployed path

    @torch.no_grad()
    def answer(self, batch: Batch, pixels: Tensor, *, generator: torch.Generator | None = None) -> list[Answer]:
        self.deployed += len(batch)
        pixels = (pixels * 255).round().clamp(0, 255) / 255
        answers = []
        for i, (features, question) in enumerate(zip(self._features(pixels), batch.questions, strict=True)):
            options, reply = batch.inputs["options"][i], []
            while len(reply) < 12 and END not in reply:
                reply.append(int(self._next(features, options, reply).argmax()))
            done, tokens = END in reply, tuple(t for t in reply if t != END)
            text = self.decode_text(tokens)
            letter, status = extract(text, self.prompt, len(question.options), finished=done)
            head, tag, _ = text.partition("<answer>")
            prefix = self._ids(head + tag)
            scores = self._next(features, options, prefix).log_softmax(-1)
            logprobs = tuple(float(scores[TOKEN[LETTERS[k]]]) for k in range(len(question.options)))
            if self.decode == "logprob":
                best = max(range(len(logprobs)), key=logprobs.__getitem__)
                answers.append(Answer(best, "valid", text, logprobs, letter, tokens))
            else:
                answers.append(Answer(letter, status, text, logprobs, letter, tokens))
        return answers

    @torch.no_grad()
    def completed(self, batch: Batch, pixels: Tensor, texts: Sequence[tuple[int, ...]]) -> list[int | None]:
        found = []
        for i, (features, question) in enumerate(zip(self._features(pixels), batch.questions, strict=True)):
            reply = list(texts[i])
            while len(reply) < 12 and END not in reply:
                reply.append(int(self._next(features, batch.inputs["options"][i], reply).argmax()))
            text = self.decode_text([t for t in reply if t != END])
            found.append(extract(text, self.prompt, len(question.options), finished=END in reply)[0])
        return found

    def sample(
        self, batch: Batch, pixels: Tensor, count: int, *, temperature: float = 1.0
    ) -> list[list[tuple[int, ...]]]:
        replies = []
        with torch.no_grad():
            for i, (features, question) in enumerate(zip(self._features(pixels), batch.questions, strict=True)):
                draw = torch.Generator().manual_seed(derive_seed("toy sample", question.id))
                options, own = batch.inputs["options"][i], []
                for _ in range(count):
                    reply: list[int] = []
                    while len(reply) < 12 and END not in reply:
                        chances = (self._next(features, options, reply) / temperature).softmax(-1)
                        reply.append(int(torch.multinomial(chances, 1, generator=draw)))
                    own.append(tuple(t for t in reply if t != END))
                replies.append(own)
        return replies

    def self_check(self, batch: Batch) -> dict[str, Any]:
        return {}


def toy_questions(count: int, seed: int = 0) -> list[Question]:
    """Questions with 2 to 4 options; every other one has options of two words that share a beginning."""
    draw = torch.Generator().manual_seed(seed)
    questions = []
    for i in range(count):
        pool = POOLS[i % 2]
        order = torch.randperm(4, generator=draw).tolist()[: 2 + i % 3]
        options = tuple(pool[k] for k in order)
        questions.append(Question(f"q{i}", "", "", "What is shown?", options, 0, "CT", "diagnosis", "toy", "test"))
    return questions


def toy_canvas(count: int, resolution: tuple[int, int] = (16, 16), seed: int = 0) -> Tensor:
    """(B, 3, H, W) uint8, smooth random images with some values at both ends of the range."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 4, 4, generator=draw) * 1.4 - 0.2
    smooth = nn.functional.interpolate(coarse, size=resolution, mode="bilinear")
    return (smooth.clamp(0, 1) * 255).round().to(torch.uint8)


def toy_batch(model: ToyVLM, count: int, seed: int = 0, wrong_every: int = 5) -> tuple[Batch, list[Answer]]:
    """A batch whose true options are what the model answers, save each `wrong_every`-th; and these answers."""
    batch = model.prepare(toy_questions(count, seed), toy_canvas(count, model.resolution, seed))
    answers = model.answer(batch, batch.pixels)
    questions = []
    for i, (question, answer) in enumerate(zip(batch.questions, answers, strict=True)):
        right = answer.index if answer.index is not None else 0
        shift = 1 if wrong_every and i % wrong_every == wrong_every - 1 else 0
        questions.append(replace(question, answer=(right + shift) % len(question.options)))
    return Batch(tuple(questions), batch.canvas, batch.inputs), answers


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    """One stream per question, by its place in the whole set."""
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(count)]
