"""GRPO steps side by side with TRL's trainer, on a CPU: `python benchmarks/grpo.py [--quick] [--json]`.

Same tiny Qwen3-VL (models/tiny.py), prompts, images, rollouts per prompt, tokens per rollout, beta, loss and optimiser.
After each step of TRL's own `train()` ours runs once, so that whatever else the machine does falls on both. A step is
sampling, rewards, reference, loss, backward and optimiser; AT-GRPO adds a PGD-3 on the pixels, with half of each group
on the attacked image. TRL has no adversarial step: its clean one is what it is held against.

`same_verdicts`: on TRL's first batch our entropy and gradient norm are the ones it logs (first case); the
attack through the cache finds the perturbation of full sequences (second); both sides of a part give equal numbers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import reporting
import torch
from PIL import Image
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForImageTextToText, TrainerCallback

from safemed_bench.core.types import Question
from safemed_bench.models import tiny
from safemed_bench.models.card import ModelCard
from safemed_bench.models.huggingface import HuggingFaceVLM
from safemed_bench.training.advantages import advantages
from safemed_bench.training.adversary import WeightedRollouts, generators, perturb
from safemed_bench.training.losses import policy_loss
from safemed_bench.training.policy import Policy
from safemed_bench.training.rollout import Rollouts, draws, sample
from safemed_bench.training.settings import AdversarySettings

SIDE = 64
Clock = Callable[[], float]
LEARNING_RATE, CLIP_NORM = 1e-6, 1.0
WORDS = ["cyst", "normal", "fracture", "mass", "pneumonia", "modality", "probably", "acquire", "letter", "question"]
TOLERANCE = {"entropy": 1e-4, "grad_norm": 1e-3}
"""Largest relative difference from what TRL logs (float32; its sums run in another order)."""


@dataclass(frozen=True)
class Size:
    """prompts and group: rollouts are prompts * group, of exactly `tokens` tokens. rounds: timed, after one warm-up."""

    prompts: int
    group: int
    tokens: int
    rounds: int
    beta: float


@dataclass(frozen=True)
class Case:
    """Seconds of every timed round."""

    name: str
    ours: Sequence[float]
    peer: str
    peers: Sequence[float]
    same: bool

    def row(self) -> dict[str, Any]:
        return reporting.row(self.name, self.ours, self.peer, self.peers, self.same)


def reward(completion_ids: Sequence[Sequence[int]]) -> list[float]:
    """A stand-in that costs nothing and differs between rollouts."""
    return [len(set(ids)) / len(ids) + sum(ids) % 7 for ids in completion_ids]


class Ours:
    """Our steps, on pieces of the trainer, with the weights that TRL starts from."""

    def __init__(self, model: Any, processor: Any, images: np.ndarray, questions: list[Question], size: Size) -> None:
        card = ModelCard("tiny", "", "think", "generate", size.tokens, True, "")
        self.vlm, self.size = HuggingFaceVLM(model, processor, card, (SIDE, SIDE)), size
        self.vlm.end_ids = (-1,)  # no rollout ends early: the same tokens on both sides
        self.policy = Policy(self.vlm)
        self.reference = {name: p.detach().clone() for name, p in self.policy.named_parameters()}
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
        self.texts = [self.vlm.prompt.user_text(q) for q in questions]
        self.inputs = self.vlm.compose(self.texts)
        self.pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        self.settings = AdversarySettings(eps=4 / 255, steps=3, rel_step=0.5, objective=None, curriculum=None)
        self.steps = 0

    def rollouts(self, pixels: Tensor, group: int) -> Rollouts:
        size = self.size
        parts = [draws(self.steps, p, n=group, max_new_tokens=size.tokens) for p in range(size.prompts)]
        values = self.vlm.pixel_map(pixels)
        return sample(self.policy, self.inputs, values, group, torch.cat(parts), max_new_tokens=size.tokens)

    def clean_step(self) -> None:
        self.inputs = self.vlm.compose(self.texts)
        found = self.rollouts(self.pixels, self.size.group)
        self._update(self.inputs, self.pixels, self.size.group, found.tokens, found.mask)

    def adversarial_step(self) -> None:
        """Half of each group on the clean image, half on the attacked one; the reference sees the clean one."""
        self.inputs, half = self.vlm.compose(self.texts), self.size.group // 2
        clean = self.rollouts(self.pixels, half)
        attacked = self.pixels + self.attack(clean)
        adversarial = self.rollouts(attacked, half)
        shape = (self.size.prompts, half, -1)
        tokens, mask = (
            torch.stack([a.view(shape), b.view(shape)], 1).flatten(0, 2)
            for a, b in ((clean.tokens, adversarial.tokens), (clean.mask, adversarial.mask))
        )
        shown = {name: value.repeat_interleave(2, 0) for name, value in self.inputs.items()}
        self._update(shown, torch.stack([self.pixels, attacked], 1).flatten(0, 1), half, tokens, mask)

    def attack(self, clean: Rollouts) -> Tensor:
        """(P, 3, H, W) perturbations by PGD-3 that make each prompt's first clean rollout unlikely."""
        count = self.size.prompts
        tokens, mask = (t.view(count, -1, t.shape[-1])[:, :1] for t in (clean.tokens, clean.mask))
        inner = WeightedRollouts(self.policy, self.inputs, tokens, mask, torch.ones(count, 1))
        seeds = generators(range(count), "benchmark", self.steps)
        return perturb(self.vlm, inner, self.pixels, self.settings, self.settings.eps, seeds).delta

    def _update(self, inputs: dict[str, Tensor], pixels: Tensor, group: int, tokens: Tensor, mask: Tensor) -> None:
        self.backward(inputs, pixels, group, tokens, mask)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1

    def backward(
        self, inputs: dict[str, Tensor], pixels: Tensor, group: int, tokens: Tensor, mask: Tensor
    ) -> dict[str, float]:
        """Clipped gradients of the loss of given rollouts; their entropy and gradient norm."""
        gains = advantages(torch.tensor(reward(tokens.tolist())), self.size.group)
        reference = None
        if self.size.beta:
            with torch.no_grad():  # one prefix on the clean image serves all rollouts of a prompt
                clean = (self.inputs, self.vlm.pixel_map(self.pixels), tokens, mask, self.size.group)
                reference = functional_call(self.policy, self.reference, clean).logps
        self.policy.train()
        out = self.policy(inputs, self.vlm.pixel_map(pixels), tokens, mask, group)
        logps = out.logps
        found = policy_loss(
            "dapo",
            logps,
            logps.detach(),
            gains,
            mask,
            ref_logps=reference,
            beta=self.size.beta if reference is not None else 0.0,
        )
        found.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), CLIP_NORM)
        return {"entropy": float(out.entropies.sum() / mask.sum()), "grad_norm": float(norm)}

    # -- parts -----------------------------------------------------------------------------------------------------

    def scored(self, tokens: Tensor, mask: Tensor, *, cached: bool) -> Tensor:
        """Gradient with respect to the pixels of the log-probabilities, forward and backward."""
        pixels = self.pixels.clone().requires_grad_()
        self.policy.cached = cached
        out = self.policy(self.inputs, self.vlm.pixel_map(pixels), tokens, mask, self.size.group)
        self.policy.cached = True
        out.logps.sum().backward()
        self.optimizer.zero_grad()
        assert pixels.grad is not None
        return pixels.grad

    def greedy(self) -> Tensor:
        uniforms = torch.zeros(self.size.prompts * self.size.group, self.size.tokens)
        values = self.vlm.pixel_map(self.pixels)
        arguments: dict[str, Any] = {"max_new_tokens": self.size.tokens, "temperature": 0.0}
        return sample(self.policy, self.inputs, values, self.size.group, uniforms, **arguments).tokens

    @torch.no_grad()
    def generated(self) -> Tensor:
        """The same by transformers' `generate`, every row with its own copy of prompt and image."""
        group, length = self.size.group, self.inputs["input_ids"].shape[1]
        repeated = {name: value.repeat_interleave(group, 0) for name, value in self.inputs.items()}
        arguments = self.vlm.arguments(repeated, self.vlm.pixel_map(self.pixels.repeat_interleave(group, 0)), 1)
        arguments = {k: v for k, v in arguments.items() if k not in ("position_ids", "logits_to_keep")}
        self.policy.eval()
        options = {"max_new_tokens": self.size.tokens, "min_new_tokens": self.size.tokens, "do_sample": False}
        return self.vlm.model.generate(**arguments, **options)[:, length:]  # type: ignore[operator]

    def attack_is_exact(self) -> bool:
        """Signs of vanishing gradients aside, the cached attack is that of full sequences."""
        rollouts = self.rollouts(self.pixels, self.size.group // 2)
        deltas = []
        for cached in (True, False):
            self.policy.cached = cached
            deltas.append(self.attack(rollouts))
        self.policy.cached = True
        return float(((deltas[0] - deltas[1]).abs() < 1e-6).float().mean()) > 0.99


class SideBySide(TrainerCallback):
    """Times each of TRL's steps, and after it each of ours."""

    def __init__(self, ours: Ours, first_batch: dict[str, Any], clock: Clock) -> None:
        self.ours, self.first_batch, self.clock = ours, first_batch, clock
        self.seconds: dict[str, list[float]] = {"trl": [], "clean": [], "adversarial": []}
        self.checked: dict[str, float] = {}

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = self.clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds["trl"].append(self.clock() - self.started)
        if not self.checked:
            self.checked = self._on_the_peer_s_batch()
        self.seconds["clean"].append(timed(self.clock, self.ours.clean_step))
        self.seconds["adversarial"].append(timed(self.clock, self.ours.adversarial_step))

    def _on_the_peer_s_batch(self) -> dict[str, float]:
        """Ours on TRL's first rollouts, from the same weights."""
        tokens = torch.tensor(self.first_batch["tokens"])
        assert self.first_batch["rows"] == [
            p for p in range(self.ours.size.prompts) for _ in range(self.ours.size.group)
        ]
        mask = torch.ones_like(tokens, dtype=torch.bool)
        found = self.ours.backward(self.ours.inputs, self.ours.pixels, self.ours.size.group, tokens, mask)
        self.ours.optimizer.zero_grad()
        return found


def timed(clock: Clock, work: Callable[[], Any]) -> float:
    started = clock()
    work()
    return clock() - started


def run(size: Size, folder: Path, clock: Clock) -> list[Case]:
    model, processor = tiny.build(WORDS, resolution=SIDE)
    tiny.save(model, processor, folder)
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (size.prompts, SIDE, SIDE, 3), dtype=np.uint8)
    asked = [" ".join(draw.choice(WORDS, 6 + i)) for i in range(size.prompts)]
    options = ("cyst", "normal", "fracture", "mass")
    questions = [Question(str(i), "", "", f"{text}?", options, 0, "CT", "", "", "") for i, text in enumerate(asked)]
    ours = Ours(model, processor, images, questions, size)
    first: dict[str, Any] = {}
    steps = SideBySide(ours, first, clock)
    trainer = peer_trainer(folder, processor, images, [ours.vlm.prompt.user_text(q) for q in questions], size, first)
    trainer.add_callback(steps)
    trainer.train()
    logged = trainer.state.log_history[0]
    same = all(abs(steps.checked[k] / logged[k] - 1) <= limit for k, limit in TOLERANCE.items())
    print(
        f"TRL's first step: { {k: logged[k] for k in TOLERANCE} }, ours on its rollouts: {steps.checked}",
        file=sys.stderr,
    )
    taken = {name: seconds[1:] for name, seconds in steps.seconds.items()}
    peer = f"TRL {peer_version()} GRPOTrainer, clean step"
    exact = ours.attack_is_exact()
    return [
        Case("GRPO step, clean", taken["clean"], peer, taken["trl"], same),
        Case("AT-GRPO step, PGD-3", taken["adversarial"], peer, taken["trl"], exact),
        *parts(ours, size, clock),
    ]


def parts(ours: Ours, size: Size, clock: Clock) -> list[Case]:
    """What encoding the prefix once per group saves, on the same model with the same fast vision path."""
    rollouts = ours.rollouts(ours.pixels, size.group)
    seconds: dict[str, list[float]] = {"cached": [], "full": [], "sample": [], "generate": []}
    for _ in range(size.rounds + 1):
        seconds["cached"].append(timed(clock, lambda: ours.scored(rollouts.tokens, rollouts.mask, cached=True)))
        seconds["full"].append(timed(clock, lambda: ours.scored(rollouts.tokens, rollouts.mask, cached=False)))
        seconds["sample"].append(timed(clock, ours.greedy))
        seconds["generate"].append(timed(clock, ours.generated))
    a, b = (ours.scored(rollouts.tokens, rollouts.mask, cached=cached) for cached in (True, False))
    same = bool((a - b).norm() <= 1e-4 * b.norm())
    as_generated = torch.equal(ours.greedy(), ours.generated())
    taken = {name: values[1:] for name, values in seconds.items()}
    return [
        Case("score and differentiate", taken["cached"], "full sequences, our model", taken["full"], same),
        Case("sample", taken["sample"], "transformers generate, our model", taken["generate"], as_generated),
    ]


def peer_version() -> str:
    from importlib.metadata import version

    return version("trl")


def peer_trainer(
    folder: Path, processor: Any, images: np.ndarray, texts: list[str], size: Size, first: dict[str, Any]
) -> Any:
    """TRL's trainer on the stock model; `first` gets the tokens of its first batch."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def scored(completion_ids: list[list[int]], row: list[int], **_: Any) -> list[float | None]:
        first.setdefault("tokens", completion_ids)
        first.setdefault("rows", row)
        return list(reward(completion_ids))

    rows = [
        {"prompt": [{"role": "user", "content": text}], "image": Image.fromarray(image), "row": i}
        for i, (image, text) in enumerate(zip(images, texts, strict=True))
    ]
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    # Placeholders of images would be refused by the stock forward; the end of a turn would cut the work short.
    barred = [config.image_token_id, config.video_token_id, config.text_config.eos_token_id]
    arguments = GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=size.prompts * size.group,
        num_generations=size.group,
        max_completion_length=size.tokens,
        beta=size.beta,
        loss_type="dapo",
        learning_rate=LEARNING_RATE,
        max_grad_norm=CLIP_NORM,
        max_steps=size.rounds + 1,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        shuffle_dataset=False,
        disable_tqdm=True,
        generation_kwargs={"suppress_tokens": barred},
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=scored,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
    )


def table(found: list[Case], size: Size) -> str:
    facts = (
        f"B {size.prompts}, G {size.group}, {size.tokens} tokens, beta {size.beta}, float32, "
        f"{torch.get_num_threads()} thread(s), median of {size.rounds}"
    )
    return reporting.table([case.row() for case in found], facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="half the prompts, two rounds: under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--prompts", type=int, help="per step; default 16, the trainer's, and 8 with --quick")
    for name, value in (("group", 8), ("tokens", 32)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument(
        "--beta", type=float, default=0.02, help="weight of the KL term; 0: no reference on either side"
    )
    parser.add_argument("--cpu-time", action="store_true", help="processor seconds, for a machine that is not idle")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    prompts = given.prompts or (8 if given.quick else 16)
    size = Size(prompts, given.group, given.tokens, 2 if given.quick else 5, given.beta)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        cases = run(size, Path(folder), time.process_time if given.cpu_time else time.perf_counter)
    print(table(cases, size), file=sys.stderr if given.json else sys.stdout)
    if given.json:
        print(json.dumps({"cases": [case.row() for case in cases]}))


if __name__ == "__main__":
    main()
