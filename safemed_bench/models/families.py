"""What some families leave unsaid in their files: a prompt layout where a processor has none, and what is refused."""

from __future__ import annotations

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
"""Chat templates by processor class, for checkpoints that come with none. They ask one question about one image."""


def refusal(config: Any) -> str | None:
    """Why checkpoints of this configuration cannot be served, None where they can."""
    text = config.get_text_config(decoder=True)
    if (
        config.is_encoder_decoder
        or text.is_encoder_decoder
        or not getattr(config, "use_decoder_only_language_model", True)
    ):
        return (
            f"its language model ({text.model_type}) is an encoder-decoder, whose reply is no continuation of the "
            "prompt: scores and attack objectives would mean something else; take a decoder-only one of the family"
        )
    return None
