"""Prompt token ids as the model's own processor makes them, without touching pixels once per question.

The processor is asked once, on a probe image, what an image placeholder expands to at this canvas size; after that
prompts are tokenised as text and the expansion is put in. The start-up self-check compares with the real processor.
What else a family's model wants to know of its tokens is recovered from the same probe.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ModelError
from .families import reads_suffix

TYPE_KEYS = ("mm_token_type_ids", "token_type_ids")


class ChatFormat:
    """The chat template of one processor at one canvas size."""

    def __init__(self, processor: Any, resolution: tuple[int, int]) -> None:
        self.processor, self.tokenizer, self.resolution = processor, processor.tokenizer, resolution
        bos = self.tokenizer.bos_token
        # A template that writes the first token itself must not get a second one from the tokenizer (Gemma).
        self._special = not (bos and self._template("probe", image=True).startswith(bos))
        probe = self.with_processor("probe")
        self.keys = tuple(k for k in TYPE_KEYS if k in probe)
        placeholder = self._template_ids("probe", image=True)
        self._expansion = _difference(placeholder, probe["input_ids"][0].tolist())
        ids = probe["input_ids"][0]
        self._type_of = {key: torch.tensor(sorted(set(ids[probe[key][0] == 1].tolist()))) for key in self.keys}
        # PaliGemma's prompt is a prefix that sees itself whole; what comes after its last token is not of that type.
        self._prefix_end = int(ids[-1]) if reads_suffix(processor) else None
        self._rows = self._rows_of(probe)
        self.ids = lru_cache(maxsize=4096)(self._ids)

    @property
    def before_image(self) -> tuple[int, ...]:
        """Token ids that every prompt with an image begins with, up to the image's own."""
        at = _find(self._template_ids("probe", image=True), self._expansion[0])
        one, other = self.ids("probe", image=True)[:at], self.ids("What is shown?", image=True)[:at]
        return one if one == other else ()

    @property
    def both_ways(self) -> bool:
        """Whether tokens of a prompt see later ones too, which a family tells by such types (Gemma 3, PaliGemma)."""
        return "token_type_ids" in self.keys

    def with_processor(self, user_text: str) -> dict[str, Tensor]:
        """What the real processor gives for one probe image and this text."""
        image = np.zeros((*self.resolution, 3), dtype=np.uint8)
        text = self._template(user_text, image=True)
        return dict(self.processor(images=[image], text=[text], return_tensors="pt", add_special_tokens=self._special))

    def _ids(self, user_text: str, *, image: bool = True) -> tuple[int, ...]:
        """Token ids of the whole prompt up to where the reply begins."""
        ids = self._template_ids(user_text, image=image)
        if not image:
            return tuple(ids)
        old, new = self._expansion
        at = _find(ids, old)
        whole = tuple(ids[:at] + new + ids[at + len(old) :])
        if self._prefix_end is not None and whole.index(self._prefix_end) != len(whole) - 1:
            raise ModelError(f"the text of a prompt holds the token that ends it: {user_text!r}")
        return whole

    def _rows_of(self, probe: dict[str, Tensor]) -> dict[str, tuple[int, Tensor]]:
        """Inputs with more than a number per token (Mllama's cross-attention mask): image token, rows from it on."""
        found, shape = {}, probe["input_ids"].shape
        for key, value in probe.items():
            if value.ndim < 3 or value.shape[:2] != shape or key in self.processor.image_processor.model_input_names:
                continue
            begin = int(value[0].flatten(1).any(1).nonzero()[0])
            if not (value[0, begin:] == value[0, begin]).all():
                raise ModelError(f"'{key}' of the processor is not the same for every token after the image")
            found[key] = (int(probe["input_ids"][0, begin]), value[0, begin])
        return found

    def _template(self, user_text: str, *, image: bool) -> str:
        parts: list[dict[str, str]] = [{"type": "image"}] if image else []
        message = {"role": "user", "content": [*parts, {"type": "text", "text": user_text}]}
        return str(self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False))

    def _template_ids(self, user_text: str, *, image: bool) -> list[int]:
        text = self._template(user_text, image=image)
        layout = getattr(self.processor, "prepare_inputs_layout", None)
        if image and layout is not None:  # PaliGemma's and Mllama's put in a BOS here
            text = layout(images=[np.zeros((*self.resolution, 3), np.uint8)], text=[text])[1][0]
        return list(self.tokenizer(text, add_special_tokens=self._special)["input_ids"])

    def token_types(self, ids: Tensor) -> dict[str, Tensor]:
        """What the family's model wants to know of each token of any (B, L) ids, beside the ids.

        Types are 1 for image tokens, and for PaliGemma 1 after the prompt. Rows of a mask stand from the image on.
        """
        types = {key: torch.isin(ids, kinds.to(ids.device)).long() for key, kinds in self._type_of.items()}
        if self._prefix_end is not None:
            ends = (ids == self._prefix_end).long()
            types = dict.fromkeys(types, (ends.cumsum(-1) - ends).clamp(max=1))
        for key, (token, row) in self._rows.items():
            since = (ids == token).cumsum(-1).clamp(max=1)
            types[key] = since.view(*ids.shape, *[1] * row.ndim) * row.to(ids.device)
        return types

    def companions(self, user_texts: Sequence[str], *, image: bool = True) -> dict[str, Tensor]:
        """Inputs that carry the prompt a second time: InstructBLIP's Q-Former reads it with a tokenizer of its own."""
        tokenizer = getattr(self.processor, "qformer_tokenizer", None)
        if tokenizer is None or not image:
            return {}
        texts = [self._template(text, image=True) for text in user_texts]
        found = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=self._special)
        return {f"qformer_{key}": found[key] for key in ("input_ids", "attention_mask")}


def _difference(short: list[int], long: list[int]) -> tuple[list[int], list[int]]:
    """The shortest replacement (old, new) that turns `short` into `long`; both lists are of token ids."""
    start = 0
    while start < len(short) and short[start] == long[start]:
        start += 1
    end = 0
    while end < len(short) - start and short[-1 - end] == long[-1 - end]:
        end += 1
    old, new = short[start : len(short) - end], long[start : len(long) - end]
    if not old:  # pure repetition of the placeholder, or an image before all text: keep a token beside it as a mark
        start, end = (start - 1, end) if start else (0, end - 1)
        old, new = short[start : len(short) - end], long[start : len(long) - end]
    if not old:
        raise ModelError("the chat template puts no image placeholder into the prompt")
    return old, new


def _find(ids: list[int], part: list[int]) -> int:
    for i in range(len(ids) - len(part) + 1):
        if ids[i : i + len(part)] == part:
            return i
    raise ModelError("the image placeholder was not found in the tokenised prompt")
