"""What some families leave unsaid in their files: a prompt layout where a processor has none, and what is refused."""

from __future__ import annotations

import inspect
from typing import Any

_TEXT = "{% for c in messages[0]['content'] if c['type'] == 'text' %}{{ c['text'] | replace('\\n', ' ') }}{% endfor %}"
_IMAGE = "{% for c in messages[0]['content'] if c['type'] == 'image' %}<image>{% endfor %}"
_BLIP = f"Question: {_TEXT} Answer:"

TEMPLATES = {
    # big_vision's configs/proj/paligemma: the task prefix of visual question answering; a newline ends the prompt.
    "PaliGemmaProcessor": f"{_IMAGE}answer en {_TEXT}",
    # The layout of the papers (arXiv 2301.12597, 2305.06500); the processor puts the image in front by itself.
    "Blip2Processor": _BLIP,
    "InstructBlipProcessor": _BLIP,
}
"""Chat templates by processor class, for checkpoints that come with none. They ask one question about one image.
What is changed here changes prompts: raise card.EXTRACTION_VERSION, so that records are measured again."""


def reads_suffix(processor: Any) -> bool:
    """Whether a prompt is a prefix that sees itself whole, and the reply another type of token: PaliGemma."""
    return "suffix" in inspect.signature(type(processor).__call__).parameters


def needs_image(model: Any, processor: Any) -> bool:
    """Whether the family cannot be asked without an image: its forward or its processor insists on one."""
    pixels = inspect.signature(model.forward).parameters.get("pixel_values")
    return reads_suffix(processor) or (pixels is not None and pixels.default is inspect.Parameter.empty)


def refusal(config: Any) -> str | None:
    """Why checkpoints of this configuration cannot be served, None where they can."""
    text = config.get_text_config(decoder=True)
    both = any(getattr(part, "is_encoder_decoder", False) for part in (config, text))
    if both or not getattr(config, "use_decoder_only_language_model", True):
        return (
            f"its language model ({text.model_type}) is an encoder-decoder, whose reply is no continuation of the "
            "prompt: scores and attack objectives would mean something else; take a decoder-only one of the family"
        )
    return None
