"""What is measured of a family: test_families.py asserts it, docs/families.py writes it into docs/models.md."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from families import NATIVE
from torch import Tensor

from safemed_bench.attacks import build_objective
from safemed_bench.attacks.base import AttackResult
from safemed_bench.attacks.pgd import PGD
from safemed_bench.core.errors import ModelError
from safemed_bench.core.types import Question, ThreatModel
from safemed_bench.models import load_model
from safemed_bench.models.base import Batch
from safemed_bench.models.huggingface import HuggingFaceVLM

STEMS = (
    "What is shown?",
    "Which imaging modality was most probably used to acquire the picture that you see here?",
    "Is it normal?",
)
THREAT = ThreatModel("linf", 8 / 255)
STEPS = 10


def load(
    family: str, folder: Path, *, device: str = "cpu", resolution: tuple[int, int] | None = None, **more: Any
) -> HuggingFaceVLM:
    """As a suite would load it, start-up check included; on the family's native canvas unless `resolution` is given."""
    options = {"revision": None, "prompt": None, "decode": None, "max_new_tokens": 6, "dtype": None, "adapter": None}
    spec: Any = SimpleNamespace(**({"name": family, "path": str(folder), "quantize": None} | options | more))
    model = load_model(spec, resolution or NATIVE[family], device=device)
    assert isinstance(model, HuggingFaceVLM)
    return model


def questions(count: int = len(STEMS)) -> list[Question]:
    """Prompts of different lengths and with 2 to 4 options, so that padding and absent options occur."""
    return [
        Question(
            id=str(i),
            image=f"{i}.png",
            image_sha256=hashlib.sha256(bytes([i])).hexdigest(),
            question=STEMS[i % len(STEMS)],
            options=("cyst", "normal", "fracture of the rib", "mass")[: 2 + i % 3],
            answer=i % 2,
            modality="CT",
            question_type="Disease Diagnosis",
            source="made up",
            split="test",
        )
        for i in range(count)
    ]


def prepared(model: HuggingFaceVLM, count: int = len(STEMS)) -> Batch:
    canvas = np.random.default_rng(5).integers(0, 256, (count, 3, *model.resolution), dtype=np.uint8)
    return model.prepare(questions(count), torch.from_numpy(canvas))


def processed(model: HuggingFaceVLM, question: Question, canvas: Tensor) -> dict[str, Tensor]:
    """What the family's own processor makes of a question in one call, template and tokens included."""
    image = canvas.permute(1, 2, 0).numpy()
    parts = [{"type": "image", "image": image}, {"type": "text", "text": model.prompt.user_text(question)}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = model.processor.apply_chat_template([{"role": "user", "content": parts}], **options)
    # Those that a user drops too: the model's forward does not take them, or would compute a loss.
    unused = {"labels", "num_patches", *model.processor.unused_input_names}
    return {k: v for k, v in inputs.items() if k not in unused}


def map_error(model: HuggingFaceVLM, batch: Batch) -> float:
    """Largest difference of the pixel map from the family's own processor, in its normalised units."""
    real = [
        processed(model, q, canvas)["pixel_values"] for q, canvas in zip(batch.questions, batch.canvas, strict=True)
    ]
    return float((model.pixel_map(batch.pixels) - torch.cat(real)).abs().max())


def straight_through(model: HuggingFaceVLM, batch: Batch) -> float:
    """Cosine of the gradient that an attack follows with that of the map without rounding; 1 if nothing is rounded."""
    gradients, own = [], model.pixel_map
    for pixel_map in (own, own.smooth()):
        model.pixel_map = pixel_map
        pixels = batch.pixels.requires_grad_()
        loss = model.option_logits(batch, pixels)[:, 0].sum()
        gradients.append(torch.autograd.grad(loss, pixels)[0].flatten())
    model.pixel_map = own
    return float(torch.cosine_similarity(gradients[0], gradients[1], dim=0))


def attacked(model: HuggingFaceVLM, count: int = 6) -> tuple[Batch, AttackResult]:
    """PGD on questions whose key is the model's own clean answer, so that every one is attacked."""
    batch = prepared(model, count)
    clean = model.answer(batch, batch.pixels)
    keyed = [replace(q, answer=a.index) for q, a in zip(batch.questions, clean, strict=True)]
    batch = replace(batch, questions=tuple(keyed))
    draws = [torch.Generator().manual_seed(i) for i in range(count)]
    attack = PGD(steps=STEPS)
    return batch, attack(model, batch, build_objective("answer"), THREAT, generators=draws, clean_answers=clean)


def replies(model: HuggingFaceVLM, batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Our greedy reply to each question of a batch, and that of the stock model to the question alone."""
    found, end = [], model.model.generation_config.eos_token_id
    for i, answer in enumerate(model.answer(batch, batch.pixels)):
        inputs = processed(model, batch.questions[i], batch.canvas[i])
        out = model.model.generate(**inputs, max_new_tokens=model.card.max_new_tokens, do_sample=False)
        stock = out[0, inputs["input_ids"].shape[1] :].tolist()
        found.append((list(answer.tokens), [token for token in stock if token != end]))
    return found


def fooled_by_noise(model: HuggingFaceVLM, batch: Batch) -> int:
    """Questions answered otherwise where each pixel is moved by eps one way or the other, at random."""
    sign = torch.randint(0, 2, batch.canvas.shape, generator=torch.Generator().manual_seed(9)) * 2 - 1
    answers = model.answer(batch, (batch.pixels + THREAT.eps * sign).clamp(0, 1))
    return sum(a.index != q.answer for a, q in zip(answers, batch.questions, strict=True))


@dataclass(frozen=True)
class Measured:
    """A row of the family table. half: for bf16 and fp16 whether the start-up check passes, "" or the reason."""

    family: str
    side: int
    resizes: int
    map: float
    gradient: float
    cosine: float
    batching: float
    attacked: int
    fooled: int
    noise: int
    replies: int
    same_replies: int
    half: dict[str, str]


def measure(family: str, folder: Path) -> Measured:
    model = load(family, folder)
    batch = prepared(model)
    checked = model.self_check(batch)
    keyed, result = attacked(model)
    reasoning = load(family, folder, prompt="think", decode="generate")
    pairs = replies(reasoning, reasoning.prepare(batch.questions, batch.canvas))
    half = {}
    for dtype in ("bf16", "fp16"):
        try:
            load(family, folder, dtype=dtype)
            half[dtype] = ""
        except ModelError as error:
            half[dtype] = str(error)
    return Measured(
        family,
        NATIVE[family],
        len(model.pixel_map.resizes),
        max(map_error(model, keyed), model.pixel_map.error),
        checked["gradient"],
        straight_through(model, batch),
        checked["batching"],
        int(result.attacked.sum()),
        int(result.success.sum()),
        fooled_by_noise(model, keyed),
        len(pairs),
        sum(ours == stock for ours, stock in pairs),
        half,
    )
