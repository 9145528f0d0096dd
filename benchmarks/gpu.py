"""Models of published 3B and 4B shapes on one device: `python benchmarks/gpu.py [--quick] [--json]`.

Random weights of Qwen3-VL-4B (384 px) and Qwen2.5-VL-3B (392 px, the multiple of its merged patches next to 384), drawn
on the device in bfloat16; nothing is downloaded. In one run on the same questions: images/s of clean answers, PGD
steps, generation and certification, ours against a loop that takes one image at a time (for PGD the naive one:
`backward()` that also fills the gradients of all parameters, and the LM head at every position); peak memory; the share
of the device's own matrix rate, measured here with one large product, that a PGD step reaches; and one AT-GRPO step
with LoRA.

Without a GPU, or with --quick, the same code runs miniatures of both families in seconds: that checks the benchmark
and says nothing of a GPU. `same_verdicts`: equal answers or replies, or gradients that point the same way (`agree` is
the share of equal ones, or the cosine: rounding in bfloat16 moves what random weights hold for nearly equal).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import host
import lora_step
import numpy as np
import reporting
import torch
from meter import Meter, flops
from published import MINIATURES, SHAPES, Shape, build
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from safemed_bench.attacks.base import frozen
from safemed_bench.attacks.objectives import AnswerToken
from safemed_bench.attacks.pgd import PGD
from safemed_bench.attacks.pursuit import Pursuit
from safemed_bench.core.types import Question, ThreatModel
from safemed_bench.models.base import Batch
from safemed_bench.models.generation import generate
from safemed_bench.models.huggingface import HuggingFaceVLM
from safemed_bench.models.prefix import Prefix
from safemed_bench.models.recompute import recompute
from safemed_bench.models.smoothed import labels
from safemed_bench.run.batching import is_out_of_memory

SIGMA = 0.12
THREAT = ThreatModel("linf", 4 / 255)
SAME_DIRECTION = {torch.float32: 0.999}
"""Least cosine of our gradient and the naive loop's; 0.9 in half precision."""


@dataclass(frozen=True)
class Size:
    """batches: tried in turn for a PGD step, the fastest is told of. questions: of every other case. naive: images in
    the naive loop. tokens: generated per reply. rounds: timed, after one warm-up."""

    batches: tuple[int, ...]
    questions: int
    naive: int
    tokens: int
    rounds: int


GPU = Size((8, 16, 32, 64, 128), 32, 4, 128, 5)
MINIATURE = Size((2, 4), 4, 2, 8, 2)


def questions_of(shape: Shape, count: int) -> list[Question]:
    draw = np.random.default_rng(0)
    asked = [" ".join(draw.choice(shape.words, 12 + i % 5)) for i in range(count)]
    options = ("cyst", "normal", "fracture", "mass")
    return [Question(str(i), "", "", f"{text}?", options, i % 4, "CT", "", "", "") for i, text in enumerate(asked)]


class Bench:
    """One shape on one device."""

    def __init__(self, shape: Shape, size: Size, meter: Meter, dtype: torch.dtype) -> None:
        self.shape, self.size, self.meter, self.dtype = shape, size, meter, dtype
        self.vlm = build(shape, meter.device, dtype)
        self.vlm.prefix = Prefix.of(self.vlm, worth=0)  # also where a miniature is too small for it
        draw = torch.Generator().manual_seed(0)
        count = max(*size.batches, size.questions)
        self.canvas = torch.randint(0, 256, (count, 3, shape.side, shape.side), generator=draw, dtype=torch.uint8)
        self.questions = questions_of(shape, count)
        self.facts: dict[str, Any] = {"model": shape.name, "side": shape.side, "dtype": str(dtype).split(".")[-1]}
        self.facts["parameters"] = sum(p.numel() for p in self.vlm.model.parameters())

    def batch(self, vlm: Any, count: int) -> Batch:
        return vlm.prepare(self.questions[:count], self.canvas[:count])

    # -- PGD -------------------------------------------------------------------------------------------------------

    def pursuit(self, vlm: Any, count: int) -> Pursuit:
        """An attack on the answer token about to take its first step."""
        batch = self.batch(vlm, count)
        prepared = AnswerToken().prepare(vlm, batch, [])
        draws = [torch.Generator().manual_seed(i) for i in range(count)]
        return Pursuit(prepared, batch.pixels, batch.canvas, THREAT, draws)

    def step(self, pursuit: Pursuit) -> Callable[[], Tensor]:
        """One PGD step of the whole batch: forward, gradient in the pixels, move."""
        walk, rows = PGD(steps=10).walk(pursuit), pursuit.rows()
        delta = torch.zeros_like(pursuit.clean)

        def work() -> Tensor:
            reading, gradient = pursuit.read(rows, delta)
            walk.move(rows, delta, reading.loss, gradient)
            return gradient

        return work

    def naive(self, count: int) -> Callable[[], Tensor]:
        """The loop that everybody writes first: an image at a time, all parameters with gradients, all logits."""
        plain = copy.copy(self.vlm)
        plain._head_on_slice, plain.prefix = False, Prefix.off("the naive loop")
        batch = self.batch(plain, count)
        parameters = list(plain.model.parameters())

        def work() -> Tensor:
            gradients = []
            for parameter in parameters:
                parameter.requires_grad_(True)
            for i in range(count):
                one = batch.select([i])
                pixels = one.pixels.requires_grad_()
                scores = plain.option_logits(one, pixels)
                torch.nn.functional.cross_entropy(scores, one.targets).backward()
                gradients.append(pixels.grad)
                for parameter in parameters:
                    parameter.grad = None
            for parameter in parameters:
                parameter.requires_grad_(False)
            return torch.cat([g for g in gradients if g is not None])

        return work

    def attack(self) -> list[dict[str, Any]]:
        """Cases for the fastest batch, per image; memory and the share of the matrix rate in the facts."""
        meter, size = self.meter, self.size
        fastest, best, peaks = 0, float("inf"), {}
        for count in size.batches:
            try:
                step = self.step(self.pursuit(self.vlm, count))
                with frozen(self.vlm):
                    peaks[count] = meter.peak(step)
                    each = min(meter.seconds(step, size.rounds, warm=1)) / count
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                break
            if each < best:
                fastest, best = count, each
        with frozen(self.vlm):
            ours = meter.seconds(self.step(self.pursuit(self.vlm, fastest)), size.rounds, warm=1)
            few = self.step(self.pursuit(self.vlm, size.naive))()
            work = flops(self.step(self.pursuit(self.vlm, 1)))
        loop = self.naive(size.naive)
        naive_peak = meter.peak(loop)
        theirs = meter.seconds(loop, size.rounds, warm=1)
        agree = cosine(few, loop())
        rate = meter.matrix_rate(self.dtype)
        self.facts |= {
            "pgd_batch": fastest,
            "pgd_images_per_second": per_second(ours, fastest),
            "pgd_flops_per_image": work,
            "pgd_peak_gb": {str(count): gigabytes(peak) for count, peak in peaks.items()},
            "naive_peak_gb": gigabytes(naive_peak),
            "matrix_tflops": round(rate / 1e12, 3),
            "pgd_share_of_matrix_rate": round(work * per_second(ours, fastest) / rate, 4),
        }
        same = agree >= SAME_DIRECTION.get(self.dtype, 0.9)
        each, naive = ([s / n for s in taken] for taken, n in ((ours, fastest), (theirs, size.naive)))
        row = self.row("PGD step, an image", each, "naive loop", naive, same, agree)
        return [row, self.cached_prefix(fastest), self.computed_twice(fastest)]

    def cached_prefix(self, count: int) -> dict[str, Any]:
        """What the text before the image costs a step that reads it from a cache, against one that does not."""
        self.facts["prefix"] = self.vlm.prefix.reason
        whole = copy.copy(self.vlm)
        whole.prefix = Prefix.off("to compare with")
        ours, theirs = (self.step(self.pursuit(vlm, count)) for vlm in (self.vlm, whole))
        return self.in_turns("PGD step, prefix cached", ours, "whole prompt", theirs, count)

    def computed_twice(self, count: int) -> dict[str, Any]:
        """What it costs and spares to compute activations again in the backward pass."""
        step = self.step(self.pursuit(self.vlm, count))

        def again() -> Tensor:
            recompute(self.vlm.model)
            try:
                return step()
            finally:
                recompute(self.vlm.model, on=False)

        with frozen(self.vlm):
            self.facts["recomputed_peak_gb"] = {str(count): gigabytes(self.meter.peak(again))}
        return self.in_turns("PGD step, computed twice", again, "activations held", step, count)

    def in_turns(
        self, name: str, ours: Callable[[], Tensor], peer: str, theirs: Callable[[], Tensor], count: int
    ) -> dict[str, Any]:
        """Two ways to take a step that differ by little: by turns, so that whatever else goes on falls on both."""
        taken: list[list[float]] = [[], []]
        with frozen(self.vlm):
            for _ in range(2 * self.size.rounds + 1):
                for seconds, step in zip(taken, (ours, theirs), strict=True):
                    seconds += self.meter.seconds(step)
            agree = cosine(ours(), theirs())
        each, other = ([s / count for s in seconds[1:]] for seconds in taken)
        return self.row(name, each, peer, other, agree >= SAME_DIRECTION.get(self.dtype, 0.9), agree)

    # -- the deployed path -----------------------------------------------------------------------------------------

    def deployed(self) -> list[dict[str, Any]]:
        """Clean answers, generation and certification, batched against one at a time."""
        return [
            self.against_singles("clean answers", self.vlm, lambda vlm, b: [a.index for a in vlm.answer(b, b.pixels)]),
            self.against_singles(
                "generation", self.writer(), lambda vlm, b: [a.tokens for a in vlm.answer(b, b.pixels)]
            ),
            self.static_cache(),
            self.certification(),
        ]

    def writer(self) -> Any:
        """The same weights asked for a rationale; no reply ends early, so that all rounds do the same work."""
        vlm = build_on(self.vlm, self.size.tokens)
        vlm.end_ids = (self.shape.text["vocab_size"] - 1,)
        return vlm

    def against_singles(self, name: str, vlm: Any, ask: Callable[[Any, Batch], list[Any]]) -> dict[str, Any]:
        count, few = self.size.questions, self.size.naive
        batch = self.batch(vlm, count)
        ours = self.meter.seconds(lambda: ask(vlm, batch), self.size.rounds, warm=1)
        peak = self.meter.peak(lambda: ask(vlm, batch))
        singles = [batch.select([i]) for i in range(few)]
        theirs = self.meter.seconds(lambda: [ask(vlm, one) for one in singles], self.size.rounds, warm=1)
        together, alone = ask(vlm, batch)[:few], [ask(vlm, one)[0] for one in singles]
        agree = sum(a == b for a, b in zip(together, alone, strict=True)) / few
        self.note(name, ours, count, peak)
        each, single = [s / count for s in ours], [s / few for s in theirs]
        return self.row(f"{name}, an image", each, "one at a time", single, agree == 1, agree)

    def static_cache(self) -> dict[str, Any]:
        """Generation with a cache of its final size, against one that grows by a copy with every token."""
        count, vlm = self.size.questions, self.writer()
        batch = self.batch(vlm, count)
        processed = vlm.processed(batch.pixels)
        taken: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(self.size.rounds + 1):
            for static, seconds in taken.items():
                seconds += self.meter.seconds(lambda s=static: generate(vlm, batch, processed, static=s))
        fixed, grown = (generate(vlm, batch, processed, static=static) for static in taken)
        agree = sum(a == b for a, b in zip(fixed, grown, strict=True)) / count
        each, other = ([s / count for s in seconds[1:]] for seconds in taken.values())
        self.facts["tokens_per_second"] = round(per_second(taken[True][1:], count) * self.size.tokens, 1)
        return self.row("generation, static cache", each, "growing cache", other, agree == 1, agree)

    def compiled(self) -> dict[str, Any]:
        """The text layers through torch.compile: last of all, for it stays with the model. The facts tell how long it
        takes, and after how many steps it has paid for itself, if ever."""
        count = self.facts["pgd_batch"]
        step = self.step(self.pursuit(self.vlm, count))
        with frozen(self.vlm):
            eager = self.meter.seconds(step, self.size.rounds, warm=1)
            before = step()
            for layer in self.vlm.model.get_decoder().modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    layer.compile()
            (first,) = self.meter.seconds(step)
            ours = self.meter.seconds(step, self.size.rounds, warm=1)
            agree = cosine(step(), before)
        spared = float(np.median(eager) - np.median(ours))
        self.facts["compile_seconds"] = round(first, 2)
        self.facts["compile_pays_after_steps"] = round(first / spared) if spared > 0 else "never"
        each, other = ([s / count for s in taken] for taken in (ours, eager))
        same = agree >= SAME_DIRECTION.get(self.dtype, 0.9)
        return self.row("PGD step, compiled", each, "eager", other, same, agree)

    def certification(self) -> dict[str, Any]:
        """Labels of noisy copies of one question, without the texts and scores that a certificate has no use for."""
        count = self.size.questions
        batch = self.batch(self.vlm, 1).repeat(count)
        noise = torch.randn(batch.pixels.shape, generator=torch.Generator().manual_seed(1)).to(batch.pixels.device)
        noisy = batch.pixels + SIGMA * noise
        ours = self.meter.seconds(lambda: labels(self.vlm, batch, noisy), self.size.rounds, warm=1)
        peak = self.meter.peak(lambda: labels(self.vlm, batch, noisy))
        theirs = self.meter.seconds(lambda: self.vlm.answer(batch, noisy), self.size.rounds, warm=1)
        full = [-1 if a.index is None else a.index for a in self.vlm.answer(batch, noisy)]
        agree = sum(a == b for a, b in zip(labels(self.vlm, batch, noisy), full, strict=True)) / count
        self.note("certification", ours, count, peak)
        each, whole = ([s / count for s in taken] for taken in (ours, theirs))
        return self.row("certification, a sample", each, "full answers", whole, agree == 1, agree)

    # -- telling ---------------------------------------------------------------------------------------------------

    def note(self, name: str, seconds: Sequence[float], count: int, peak: int) -> None:
        key = name.replace(" ", "_")
        self.facts |= {f"{key}_images_per_second": per_second(seconds, count), f"{key}_peak_gb": gigabytes(peak)}

    def row(
        self, name: str, ours: Sequence[float], peer: str, theirs: Sequence[float], same: bool, agree: float
    ) -> dict[str, Any]:
        return reporting.row(f"{self.shape.name}: {name}", ours, peer, theirs, same, agree=round(agree, 4))


def build_on(vlm: Any, tokens: int) -> Any:
    """Another reading of the same model: `think`, `tokens` long."""
    card = replace(vlm.card, prompt="think", decode="generate", max_new_tokens=tokens, reasons=True)
    return HuggingFaceVLM(vlm.model, vlm.processor, card, vlm.resolution, device=vlm.device)


def cosine(left: Tensor, right: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(left.flatten().double(), right.flatten().double(), dim=0))


def per_second(seconds: Sequence[float], count: int) -> float:
    return round(count / float(np.median(seconds)), 3)


def gigabytes(size: int) -> float:
    return round(size / 1e9, 3)


def measure(
    shape: Shape, size: Size, meter: Meter, dtype: torch.dtype, compiled: bool
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    bench = Bench(shape, size, meter, dtype)
    cases = [*bench.attack(), *bench.deployed(), *host.cases(bench)]
    return [*cases, *([bench.compiled()] if compiled else [])], bench.facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=SHAPES, help="any number of times; default both")
    parser.add_argument("--quick", action="store_true", help="miniatures of both families, on the CPU: seconds")
    parser.add_argument("--device", help="default the first GPU, else the CPU, which takes miniatures only")
    parser.add_argument("--no-training", action="store_true", help="leave the AT-GRPO step out")
    parser.add_argument("--compile", action="store_true", help="also a PGD step through torch.compile; minutes")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds, for a machine that is not idle")
    given = parser.parse_args()
    device = torch.device("cpu" if given.quick else given.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    small = device.type == "cpu"
    if small:
        torch.set_num_threads(1)
    shapes, size = (MINIATURES, MINIATURE) if small else (SHAPES, GPU)
    dtype = torch.float32 if small else torch.bfloat16
    meter = Meter(device, given.cpu_time)
    cases: list[dict[str, Any]] = []
    details: list[dict[str, Any]] = []
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in given.model or SHAPES:
            found, facts = measure(shapes[name], size, meter, dtype, given.compile)
            cases += found
            details.append(facts)
            gc.collect()
        if not given.no_training:
            details.append(lora_step.measure(shapes["qwen3-vl-4b"], lora_step.SMALL if small else lora_step.GPU, meter))
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, miniatures: no figure of a GPU"
    text = reporting.table(cases, f"{machine}, torch {torch.__version__}, median of {size.rounds}")
    lines = [text, *("\n".join(["", *(f"{k:<32}{v}" for k, v in facts.items())]) for facts in details)]
    print("\n".join(lines), file=sys.stderr if given.json else sys.stdout)
    if given.json:
        print(json.dumps({"device": machine, "cases": cases, "details": details}))


if __name__ == "__main__":
    main()
