"""Any Hugging Face vision-language model behind the one interface of `base`.

Every family goes through one pixel map that is recovered by probing its image processor (pixels.py), so a new family
writes no pixel code. Text is composed once per question; prompt and continuation are joined flush right, so that the
answer position is the last column of every row and the LM head is applied only where something is read.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ModelError
from ..core.types import Answer, Question
from .answers import extract, fork, split_at_letter
from .attention import use_packed_vision_attention, use_preferred_attention
from .base import Batch, Decode, Text
from .card import ModelCard
from .chat import ChatFormat
from .families import needs_image
from .generation import generate
from .loading import compute_dtype, end_ids, keeps_columns, load_weights, placed, unwrapped
from .parallel import host_threads, in_threads
from .patches import use_linear_patches
from .pixels import PixelMap, image_processor_call
from .prefix import Prefix
from .processors import load_processor
from .prompts import PROMPTS, Prompt, get_prompt
from .qwen3_vl import Pass
from .recompute import recompute
from .selfcheck import probe_batch, self_check
from .sequences import INPUTS, behind, join, pad_left
from .shortcut import Shortcut
from .transfer import upload


class HuggingFaceVLM:
    """White-box adapter. Construct with `load` (checks itself) or directly from a model and its processor."""

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        card: ModelCard,
        resolution: tuple[int, int],
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        self.card, self.name, self.resolution = card, card.name, resolution
        self.prompt = get_prompt(card.prompt)
        self.reasons, self.fingerprint = card.reasons, card.fingerprint
        self.decode: Decode = card.decode
        self.device = torch.device(device)
        self.model, self.processor, self.tokenizer = placed(model, self.device), processor, processor.tokenizer
        if not self.prompt.image and needs_image(unwrapped(model), processor):
            raise ModelError(f"model '{card.name}' cannot be asked without an image: take another prompt than 'blind'")
        call = image_processor_call(processor)
        self.pixel_map = PixelMap.probe(call, resolution).to(self.device)
        self._process = in_threads(call, host_threads(self.device))
        self.chat = ChatFormat(processor, resolution)
        self._mrope: Any = next((m for m in model.modules() if hasattr(m, "get_rope_index")), None)
        self._head_on_slice = keeps_columns(model)
        self._fork = lru_cache(maxsize=4096)(partial(fork, self.encode))
        self.end_ids = end_ids(model, self.tokenizer)
        self.attention = use_preferred_attention(unwrapped(model), self.device, both_ways=self.chat.both_ways)
        use_packed_vision_attention(model)
        use_linear_patches(model)
        self.prefix, self.shortcut = Prefix.off("not asked for"), Shortcut.off("not asked for")
        self._pass: Pass | None = None

    @classmethod
    def load(
        cls, card: ModelCard, resolution: tuple[int, int], *, device: torch.device, dtype: str = "auto"
    ) -> HuggingFaceVLM:
        """Weights, processor and optional LoRA adapter of `card`; frozen, in eval mode.

        Raises ModelError where files are missing or broken, or where the probe refuses the processor.
        """
        model = load_weights(card, device, dtype)
        vlm = cls(model, load_processor(card.path), card, resolution, device=device)
        self_check(vlm, probe_batch(vlm))
        vlm.prefix, vlm.shortcut = Prefix.of(vlm), Shortcut.of(vlm)
        return vlm

    def save_memory(self) -> bool:
        """Compute activations twice instead of holding them, from now on; False where that is so already, or no help.

        Loss and gradient stay what they are; a step with a gradient takes about one forward pass more.
        """
        return recompute(self.model)

    @contextmanager
    def climbing(self) -> Iterator[None]:
        """What an attack is inside: passes with an image gradient, and no others, may take the entry's shortcut."""
        before = self._pass
        self._pass = before or self.shortcut.begin(self)
        try:
            yield
        finally:
            self._pass = before

    # -- text ----------------------------------------------------------------------------------------------------

    @property
    def wordings(self) -> tuple[str, ...]:
        """Names of the prompts that ask for a reply of the same shape, the entry's own first."""

        def shape(prompt: Prompt) -> tuple[bool, ...]:
            return prompt.reasons, prompt.tagged, prompt.image

        others = [name for name, p in PROMPTS.items() if shape(p) == shape(self.prompt) and name != self.prompt.name]
        return (self.prompt.name, *others)

    def prepare(self, questions: Sequence[Question], canvas: Tensor, *, wordings: Sequence[str] | None = None) -> Batch:
        """Questions and their (B, 3, H, W) uint8 canvases to a batch; token ids are padded on the left.

        wordings: for each question one of `wordings`; by default the entry's own.
        """
        if tuple(canvas.shape[-2:]) != self.resolution or canvas.dtype != torch.uint8:
            raise ValueError(f"canvas must be uint8 of {self.resolution}, not {canvas.dtype} {tuple(canvas.shape)}")
        prompts = [get_prompt(name) for name in wordings] if wordings else [self.prompt] * len(questions)
        texts = [prompt.user_text(q) for prompt, q in zip(prompts, questions, strict=True)]
        inputs = self.compose(texts, image=self.prompt.image)
        return Batch(tuple(questions), canvas, inputs).to(self.device)

    def compose(self, texts: Sequence[str], *, image: bool = True) -> dict[str, Tensor]:
        """User texts to left-padded `input_ids`, `attention_mask` (B, L) and `position_ids` on the model's device.

        And what else of the prompt the family's model reads (`ChatFormat.companions`).
        """
        rows = [self.chat.ids(text, image=image) for text in texts]
        if image and not all(self.prefix.begins(row) for row in rows):
            self.prefix = Prefix.off("prompts begin in different ways")
        ids, mask = pad_left(rows, self.pad_id)
        positions = self._positions(ids, mask, image)
        composed = dict(zip(INPUTS, (ids, mask, positions), strict=True)) | self.chat.companions(texts, image=image)
        return {k: upload(v, self.device) for k, v in composed.items()}

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a continuation, without special tokens."""
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))

    def decode_text(self, tokens: Sequence[int]) -> str:
        """Text of token ids; end and pad tokens are left out, tags stay."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def answer_prefix(self, rationale: str | None = None) -> str:
        """The continuation right before the letter."""
        return self.prompt.answer_prefix(rationale)

    @property
    def end_of_turn(self) -> int:
        """The token that ends a reply."""
        return self.end_ids[0]

    @property
    def rotary(self) -> bool:
        """Whether positions are (B, 3, L), for multimodal rotary embeddings."""
        return self._mrope is not None

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def _positions(self, ids: Tensor, mask: Tensor, image: bool) -> Tensor:
        """(B, 3, L) for multimodal rotary embeddings, else (B, L); padding gets 0 or 1, which attention ignores."""
        if not self.rotary:
            return (mask.cumsum(-1) - 1).clamp(min=0)
        extras = self.pixel_map.extras(len(ids)) if image else {}
        kinds = self.chat.token_types(ids)
        on = next(self.model.parameters()).device
        arguments = {"attention_mask": mask, **kinds, **extras}
        known = inspect.signature(self._mrope.get_rope_index).parameters
        positions, _ = self._mrope.get_rope_index(
            ids.to(on), **{k: v.to(on) for k, v in arguments.items() if k in known}
        )
        return positions.permute(1, 0, 2).to(ids.device)

    def _join(self, inputs: dict[str, Tensor], text: Sequence[Text]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Prompt and continuation flush right: model inputs, continuation ids and mask (B, T), T >= 1 columns."""
        return join(inputs, [self.encode(t) if isinstance(t, str) else tuple(t) for t in text], self.pad_id)

    # -- forward -------------------------------------------------------------------------------------------------

    def pixel_values(self, pixels: Tensor) -> Tensor | None:
        """What the image processor would give for (B, 3, H, W) pixels in [0, 1], None for a blind prompt."""
        return self.pixel_map(pixels) if self.prompt.image else None

    def arguments(self, inputs: dict[str, Tensor], pixel_values: Tensor | None, keep: int) -> dict[str, Any]:
        """What the model's own forward is given for these inputs; the LM head at the last `keep` columns if it can."""
        positions = inputs["position_ids"]
        arguments: dict[str, Any] = {
            **inputs,
            "position_ids": positions.permute(1, 0, 2) if positions.ndim == 3 else positions,
            **self.chat.token_types(inputs["input_ids"]),
        }
        if pixel_values is not None:
            arguments["pixel_values"] = pixel_values.to(compute_dtype(self.model))
            arguments |= self.pixel_map.extras(len(positions))
        return arguments | ({"logits_to_keep": keep} if self._head_on_slice else {})

    def _logits(self, inputs: dict[str, Tensor], pixel_values: Tensor | None, keep: int) -> Tensor:
        """(B, keep, V) logits at the last `keep` columns."""
        if self._pass is not None and pixel_values is not None and pixel_values.requires_grad:
            logits = self._pass(inputs, pixel_values, keep)
            if logits is not None:
                return logits
        cache = self.prefix.cache() if pixel_values is not None else None
        known: dict[str, Any] = {"use_cache": False}
        if cache is not None:
            inputs = behind(inputs, self.prefix.length)
            known = {"use_cache": True, "past_key_values": cache}
        return self.model(**self.arguments(inputs, pixel_values, keep), **known).logits[:, -keep:].float()

    def _score(self, batch: Batch, pixel_values: Tensor | None, text: Sequence[Text], candidates: Tensor) -> Tensor:
        inputs, _, _ = self._join(batch.inputs, text)
        scores = self._logits(inputs, pixel_values, 1)[:, -1].log_softmax(-1)
        candidates = candidates.to(self.device)
        return scores.gather(1, candidates.clamp(min=0)).masked_fill(candidates < 0, -torch.inf)

    def next_token_logits(self, batch: Batch, pixels: Tensor, text: Sequence[Text], candidates: Tensor) -> Tensor:
        """(B, K) log-probabilities of `candidates` (B, K; -1 = absent, gives -inf) right after `text`."""
        return self._score(batch, self.pixel_values(pixels), text, candidates)

    def option_logits(self, batch: Batch, pixels: Tensor, text: Sequence[Text] | None = None) -> Tensor:
        """(B, K) log-probabilities of the options' letters after `text` (default `answer_prefix()`)."""
        heads = [self.answer_prefix()] * len(batch) if text is None else [self._as_text(t) for t in text]
        return self._letter_scores(batch, self.pixel_values(pixels), [(h, self.prompt.closing) for h in heads])

    def _as_text(self, text: Text) -> str:
        return text if isinstance(text, str) else self.decode_text(text)

    def _letter_scores(self, batch: Batch, pixel_values: Tensor | None, around: Sequence[tuple[str, str]]) -> Tensor:
        """(B, K) log-probabilities of the letters between the given texts, -inf where an option is absent."""
        forks = [self._fork(head, tail) for head, tail in around]
        count = max(len(q.options) for q in batch.questions)
        candidates = [
            [letters[k] if k < len(q.options) else -1 for k in range(count)]
            for (_, letters), q in zip(forks, batch.questions, strict=True)
        ]
        return self._score(batch, pixel_values, [tokens for tokens, _ in forks], torch.tensor(candidates))

    def token_loss(
        self,
        batch: Batch,
        pixels: Tensor,
        text: Sequence[Text],
        weights: Sequence[Sequence[float]] | None = None,
    ) -> Tensor:
        """(B,) mean negative log-likelihood per token of each continuation, in nats; weighted mean with `weights`."""
        return self.reply_loss(batch.inputs, self.pixel_values(pixels), text, weights)

    def reply_loss(
        self,
        prompts: dict[str, Tensor],
        pixel_values: Tensor | None,
        text: Sequence[Text],
        weights: Sequence[Sequence[float]] | None = None,
    ) -> Tensor:
        """`token_loss` of replies to composed prompts, with or without an image; the trainer's entrance."""
        inputs, tail, mask = self._join(prompts, text)
        width = tail.shape[1]
        logits = self._logits(inputs, pixel_values, width + 1)[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tail, reduction="none")
        scale = mask.float()
        if weights is not None:
            for i, row in enumerate(weights):
                scale[i, width - len(row) :] = torch.tensor(row, device=self.device)
        return (loss * scale).sum(1) / scale.sum(1).clamp(min=1e-9)

    # -- the deployed path ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def answer(self, batch: Batch, pixels: Tensor, *, generator: torch.Generator | None = None) -> list[Answer]:
        """8-bit image, the model's own processor, greedy decoding, strict extraction; `generator` is not used."""
        processed = self.processed(pixels)
        replies = generate(self, batch, processed)
        extracted = [
            extract(self.decode_text(reply), self.prompt, len(q.options), finished=done)
            for (reply, done), q in zip(replies, batch.questions, strict=True)
        ]
        values = processed["pixel_values"] if self.prompt.image else None
        scores = self._letter_scores(batch, values, [self._around_letter(reply) for reply, _ in replies])
        answers = []
        for (reply, _), (index, status), row, q in zip(replies, extracted, scores, batch.questions, strict=True):
            logprobs = tuple(row[: len(q.options)].tolist())
            if self.decode == "logprob":
                best = int(row[: len(q.options)].argmax())
                verdict: tuple[int | None, Any] = (best, "valid")
            else:
                verdict = (index, status)
            answers.append(
                Answer(verdict[0], verdict[1], self.decode_text(reply), logprobs, letter=index, tokens=reply)
            )
        return answers

    @torch.no_grad()
    def verdicts(self, batch: Batch, pixels: Tensor) -> list[int | None]:
        """(B,) `Answer.index` of `answer`, without the texts and scores that a certificate has no use for."""
        if self.decode == "logprob" and self.reasons:
            return [answer.index for answer in self.answer(batch, pixels)]
        processed = self.processed(pixels)
        if self.decode == "logprob":
            values = processed["pixel_values"] if self.prompt.image else None
            scores = self._letter_scores(batch, values, [self._around_letter(())] * len(batch))
            return [int(row[: len(q.options)].argmax()) for row, q in zip(scores, batch.questions, strict=True)]
        return [
            extract(self.decode_text(reply), self.prompt, len(q.options), finished=done)[0]
            for (reply, done), q in zip(generate(self, batch, processed), batch.questions, strict=True)
        ]

    def processed(self, pixels: Tensor) -> dict[str, Tensor]:
        """What the model's own image processor gives for the pixels rounded to the 8-bit grid."""
        images = (pixels.detach() * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return {k: upload(v, self.device) for k, v in self._process(list(images)).items()}

    def _around_letter(self, reply: Sequence[int]) -> tuple[str, str]:
        """What stands around the letter of a reasoned reply; the plain form where it has none, or needs none."""
        found = split_at_letter(self.decode_text(reply)) if self.reasons else None
        return found or (self.answer_prefix(), self.prompt.closing)

    @torch.no_grad()
    def completed(self, batch: Batch, pixels: Tensor, texts: Sequence[tuple[int, ...]]) -> list[int | None]:
        """(B,) what the deployed path answers where its reply begins with `texts`, None where nothing is read."""
        begun = Batch(batch.questions, batch.canvas, self._join(batch.inputs, texts)[0])
        return [
            extract(self.decode_text((*text, *rest)), self.prompt, len(q.options), finished=done)[0]
            for text, (rest, done), q in zip(
                texts, generate(self, begun, self.processed(pixels)), batch.questions, strict=True
            )
        ]

    def sample(
        self, batch: Batch, pixels: Tensor, count: int, *, temperature: float = 1.0
    ) -> list[list[tuple[int, ...]]]:
        """`count` sampled replies to each question, as token ids; what is drawn depends on the question alone."""
        from ..training.rollout import draws, sample  # the trainer's sampler: its draws depend on no batch or device

        length = self.card.max_new_tokens
        uniforms = torch.cat([draws("sample", q.id, n=count, max_new_tokens=length) for q in batch.questions])
        with torch.no_grad():
            values = self.pixel_values(pixels)
        found = sample(
            self, batch.inputs, values, count, uniforms, max_new_tokens=length, temperature=temperature
        ).replies()
        return [found[i * count : (i + 1) * count] for i in range(len(batch))]

    def self_check(self, batch: Batch) -> dict[str, Any]:
        """Pixel map = processor, gradient = finite difference, single = batched (selfcheck.py)."""
        return self_check(self, batch)
