"""Prompt token ids as the model's own processor makes them, without touching pixels once per question.

The processor is asked once, on a probe image, what an image placeholder expands to at this canvas size; after that
prompts are tokenised as text and the expansion is put in. The start-up self-check compares with the real processor.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import ModelError

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
        self._type_of = {
            key: torch.tensor(sorted(set(probe["input_ids"][0][probe[key][0] == 1].tolist()))) for key in self.keys
        }
        self.ids = lru_cache(maxsize=4096)(self._ids)

    @property
    def before_image(self) -> tuple[int, ...]:
        """Token ids that every prompt with an image begins with, up to the image's own."""
        at = _find(self._template_ids("probe", image=True), self._expansion[0])
        one, other = self.ids("probe", image=True)[:at], self.ids("What is shown?", image=True)[:at]
        return one if one == other else ()

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
        return tuple(ids[:at] + new + ids[at + len(old) :])

    def _template(self, user_text: str, *, image: bool) -> str:
        parts: list[dict[str, str]] = [{"type": "image"}] if image else []
        message = {"role": "user", "content": [*parts, {"type": "text", "text": user_text}]}
        return str(self.processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False))

    def _template_ids(self, user_text: str, *, image: bool) -> list[int]:
        return list(
            self.tokenizer(self._template(user_text, image=image), add_special_tokens=self._special)["input_ids"]
        )

    def token_types(self, ids: Tensor) -> dict[str, Tensor]:
        """The token-type inputs that the family wants (1 = image token), for any (B, L) ids."""
        return {key: torch.isin(ids, kinds.to(ids.device)).long() for key, kinds in self._type_of.items()}


def _difference(short: list[int], long: list[int]) -> tuple[list[int], list[int]]:
    """The shortest replacement (old, new) that turns `short` into `long`; both lists are of token ids."""
    start = 0
    while start < len(short) and short[start] == long[start]:
        start += 1
    end = 0
    while end < len(short) - start and short[-1 - end] == long[-1 - end]:
        end += 1
    old, new = short[start : len(short) - end], long[start : len(long) - end]
    if not old:  # pure repetition of the placeholder: keep one token on each side to find the place again
        start = max(start - 1, 0)
        old, new = short[start : len(short) - end], long[start : len(long) - end]
    if not old:
        raise ModelError("the chat template puts no image placeholder into the prompt")
    return old, new


def _find(ids: list[int], part: list[int]) -> int:
    for i in range(len(ids) - len(part) + 1):
        if ids[i : i + len(part)] == part:
            return i
    raise ModelError("the image placeholder was not found in the tokenised prompt")
