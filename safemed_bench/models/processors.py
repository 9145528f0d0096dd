"""Loading a Hugging Face processor, also where torchvision (hence video) is not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, AutoTokenizer

# Not from the top level: some releases hide it there where torchvision is absent, although PIL would do.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.processing_utils import ProcessorMixin

from ..core.errors import ModelError
from .families import TEMPLATES

LOAD_ERRORS = (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError)
"""What `from_pretrained` raises on missing files, broken JSON, absent libraries and unknown classes."""


def without_video(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """The same processor class with no video part: it loads, checks and saves images and text only.

    It keeps its parent's name, because `save_pretrained` writes that name and `AutoProcessor` looks it up.
    """

    def get_attributes(cls: type[ProcessorMixin]) -> list[str]:
        return [name for name in processor_class.get_attributes() if name != "video_processor"]

    members = {
        "get_attributes": classmethod(get_attributes),
        "__module__": processor_class.__module__,
        # Not SmolVLM's own, which asks the video part for its defaults.
        "apply_chat_template": ProcessorMixin.apply_chat_template,
    }
    return type(processor_class.__name__, (processor_class,), members)


def load_processor(path_or_id: str | Path, revision: str | None = None, backend: str = "pil") -> ProcessorMixin:
    """The processor (image processor + tokenizer + chat template) of a model folder or hub id.

    backend: `pil` (default) or `torchvision`. They differ when they resize, so one is pinned whatever is
    installed; families that have only one of them get that one. Where a video processor is demanded and cannot
    be built, the processor comes without. Honours HF_HUB_OFFLINE. The tokenizer pads on the left.

    Raises:
        ModelError: nothing there, files missing or broken, not the processor of an image-text model, no chat template.
    """
    name, options = str(path_or_id), {} if revision is None else {"revision": revision}
    try:
        image_processor = AutoImageProcessor.from_pretrained(name, backend=backend, **options)
        processor = _load(name, image_processor, options)
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:400]
        raise ModelError(f"cannot load the processor of '{name}': {type(error).__name__}: {reason}") from error
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    if processor.chat_template is None:
        processor.chat_template = processor.tokenizer.chat_template or TEMPLATES.get(type(processor).__name__)
    if processor.chat_template is None:
        raise ModelError(f"'{name}' has no chat template: put a chat_template.jinja with its prompt layout beside it")
    return processor


def image_settings(processor: Any) -> dict[str, Any]:
    """What a processor's class passes on to its image processor with each call (InternVL: tiles, Gemma 3: none)."""
    own = getattr(type(processor), "images_kwargs", None)
    if own is None:  # where transformers before 5.2x kept it
        own = getattr(getattr(processor, "valid_processor_kwargs", None), "_defaults", {}).get("images_kwargs", {})
    return dict(own)


def _load(name: str, image_processor: Any, options: dict[str, Any]) -> ProcessorMixin:
    try:
        processor = AutoProcessor.from_pretrained(name, **options)
    except (ImportError, OSError):  # no torchvision for the video processor, or no file of its settings
        config = AutoConfig.from_pretrained(name, **options)
        if type(config) not in PROCESSOR_MAPPING:
            raise
        found: Any = PROCESSOR_MAPPING[type(config)]
        processor_class = without_video(found)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        parts = {"image_processor": image_processor, "tokenizer": tokenizer}
        settings, _ = processor_class.get_processor_dict(name, **options)
        arguments = [parts[attribute] for attribute in processor_class.get_attributes()]
        processor = processor_class.from_args_and_dict(arguments, settings, video_processor=None)
    missing = [part for part in ("image_processor", "tokenizer") if not hasattr(processor, part)]
    if missing:
        raise ValueError(f"it has no {' and no '.join(missing)}, so it is not a vision-language model's")
    processor.image_processor = image_processor
    return processor
