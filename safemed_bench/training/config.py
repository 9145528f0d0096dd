"""A training run as YAML: which model, which data, which stages. Every field says what it does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, field_validator, model_serializer, model_validator

from ..core.errors import Problem, SuiteError, did_you_mean
from ..models.prompts import PROMPTS
from ..suite.checks import validated
from ..suite.layers import Kind, apply, in_order, parse_sets
from ..suite.values import Count, Number, Text, Whole
from .settings import AdversarySettings, GRPOSettings, LoraSettings, Settings, without_default

CONFIGS = Kind("training config", Path("suites/train"))


class TaskConfig(Settings):
    """One kind of training example; a batch holds one kind, drawn by weight."""

    kind: Literal["answer", "rationale", "open", "caption", "binding", "stated"] = Field(
        description="answer: question -> letter. rationale: question -> <think>rationale</think> letter. "
        "open: question without options -> the answer's text. caption: what is to be seen, without a question. "
        "binding: text only, letters of options from their words. stated: text only, the question tells the answer."
    )
    prompts: tuple[str, ...] = Field(default=("instruct",), description="Prompt templates (models/prompts.py).")
    weight: Number = Field(default=1.0, gt=0, description="Relative share of batches.")
    question_types: tuple[Text, ...] = Field(
        default=(), description="Only questions of these types; empty for all. A second task with the hard ones."
    )
    letter_weight: Number = Field(
        1.0, gt=0, description="Loss weight of the tokens that name the option's letter; others have 1."
    )

    @field_validator("prompts")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in PROMPTS:
                raise ValueError(f"unknown prompt '{name}'.{did_you_mean(name, list(PROMPTS))}")
        return names

    @model_serializer(mode="wrap")
    def _plain(self, default: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_default(default(self), "question_types")


class StageConfig(Settings):
    """Optimisation with one mixture of tasks and one learning-rate cycle."""

    name: Text = Field(description="Name in logs and checkpoints.")
    tasks: tuple[TaskConfig, ...] = Field(min_length=1, description="Mixture of tasks.")
    steps: Count = Field(description="Optimiser steps.")
    batch_size: Count = Field(default=64, description="Examples per step over all processes.")
    learning_rate: Number = Field(default=1e-3, gt=0, description="AdamW's peak rate; linear warm-up, cosine to 0.")
    warmup: Whole = Field(default=50, description="Warm-up steps.")
    weight_decay: Number = Field(default=0.01, ge=0, description="Decoupled weight decay (arXiv 1711.05101).")
    max_grad_norm: Number = Field(default=1.0, gt=0, description="Gradient norm is clipped to this.")
    adversary: AdversarySettings | None = Field(None, description="Attack on the images of each batch; none: clean.")
    noise: tuple[Number, ...] = Field(
        default=(),
        description="Gaussian noise on every image, one of these sigmas drawn per image, on the [0, 1] pixel "
        "scale: for entries that are to be smoothed and certified (1906.04584).",
    )
    grpo: GRPOSettings | None = Field(None, description="Policy optimisation instead of supervised fine-tuning.")

    @field_validator("noise")
    @classmethod
    def _sigmas(cls, sigmas: tuple[float, ...]) -> tuple[float, ...]:
        if any(sigma < 0 for sigma in sigmas):
            raise ValueError("a sigma must not be negative")
        return sigmas

    @model_validator(mode="after")
    def _fits(self) -> StageConfig:
        inner = self.adversary.objective if self.adversary else None
        if self.grpo is None:
            if inner not in (None, "reply"):
                raise ValueError(f"adversary.objective '{inner}' needs rollouts: give the stage a `grpo` part")
            return self
        if inner == "reply":
            raise ValueError("adversary.objective 'reply' needs taught replies; AT-GRPO has rollout_nll")
        if self.grpo.rollouts != "clean" and self.adversary is None:
            raise ValueError(f"grpo.rollouts '{self.grpo.rollouts}' need an `adversary`")
        if [task.kind for task in self.tasks] != ["answer"] and [task.kind for task in self.tasks] != ["rationale"]:
            raise ValueError("a `grpo` stage has one task, of kind answer or rationale")
        return self

    @model_serializer(mode="wrap")
    def _plain(self, default: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = default(self)
        for key in ("adversary", "noise", "grpo"):
            values = without_default(values, key)
        return values


class DataConfig(Settings):
    """Training data; the same loader as the benchmark's, on its train and validation splits."""

    name: Literal["phantom", "omnimedvqa"] = Field(default="phantom", description="Generated images, or a folder.")
    root: Path | None = Field(default=None, description="OmniMedVQA folder, for omnimedvqa; empty for none.")
    scheme: Text = Field(default="auto", description="Split scheme (datasets/splits.py).")
    split_file: Text | None = Field(default=None, description="Split file for scheme file, below root.")
    images: Count = Field(default=60_000, description="Training images to generate (phantom).")
    resolution: Count = Field(default=64, description="Side of the square canvas, pixels.")
    fit: Literal["pad", "stretch"] = Field(default="pad", description="How an image is brought onto the canvas.")
    phantom: dict[str, Any] = Field(default_factory=dict, description="Phantom parameters: seed, difficulty.")
    augment: bool = Field(default=False, description="Random flips and small shifts of training images.")

    @field_validator("root", "split_file", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return None if value == "" else value

    @model_serializer(mode="wrap")
    def _plain(self, default: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_default(default(self), "split_file")


class TrainConfig(Settings):
    """A training run. `safemed-bench train FILE` reads this."""

    name: Text = Field(description="Entry name; also the default output folder under runs/.")
    description: Text = Field(default="", description="One line for the model card.")
    init: Text = Field(
        "tiny", description="'tiny' for random weights, else an entry name or model folder to start from."
    )
    architecture: dict[str, Any] = Field(default_factory=dict, description="Sizes for init 'tiny' (models/tiny.py).")
    data: DataConfig = Field(default_factory=lambda: DataConfig(), description="Training data.")
    stages: tuple[StageConfig, ...] = Field(min_length=1, description="Run in order.")
    prompt: Text = Field(default="instruct", description="Prompt the finished entry is deployed with.")
    decode: Literal["logprob", "generate"] | None = Field(
        None, description="How its verdict is read; default by prompt."
    )
    max_new_tokens: Count = Field(default=64, description="Generation limit of the finished entry, tokens.")
    lora: LoraSettings | None = Field(None, description="Train low-rank adapters instead of all weights.")
    gradient_checkpointing: bool = Field(default=False, description="Compute activations twice to save memory.")
    seed: Whole = Field(default=0, description="Seed of weights, batches and tasks.")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto",
        description="Arithmetic of the forward pass; trained weights and optimiser are always float32. "
        "auto: bfloat16 autocast on a GPU that has it, float32 elsewhere.",
    )
    output: Path | None = Field(
        None, description="Folder of checkpoints and of the finished entry (default runs/NAME)."
    )
    log_every: Count = Field(default=50, description="Steps between lines in metrics.jsonl.")
    eval_every: Count = Field(
        default=500, description="Steps between validations; the first comes at step 100 at the latest."
    )
    eval_questions: Whole = Field(default=200, description="Validation questions, stratified; 0 for none.")
    save_every: Count = Field(default=500, description="Steps between checkpoints (the last two are kept).")
    export_dtype: Literal["float16", "float32"] = Field(default="float16", description="Dtype of the saved weights.")

    @model_validator(mode="after")
    def _rewarded_as_deployed(self) -> TrainConfig:
        for stage in self.stages:
            if stage.grpo and stage.tasks[0].prompts != (self.prompt,):
                raise ValueError(
                    f"stage '{stage.name}': a `grpo` stage is rewarded for what is deployed, prompts: [{self.prompt}]"
                )
        return self

    @model_serializer(mode="wrap")
    def _plain(self, default: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = without_default(default(self), "precision", "auto")
        return without_default(without_default(values, "lora"), "gradient_checkpointing", False)

    @property
    def folder(self) -> Path:
        return self.output or Path("runs") / self.name

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read and validate a training file, or a name in suites/train; `overrides` are `key.path=value` with YAML values.

    The file may say `extends` and `${env:NAME:default}`, as suites do. Raises SuiteError with every problem, each as
    `file:line:col  key: what is wrong`.
    """
    problems: list[Problem] = []
    document = CONFIGS.read(str(path), os.environ, problems)
    apply(document, parse_sets(overrides, problems), problems)
    config = validated(TrainConfig, document, problems, ("extends",))
    if config is None or problems:
        raise SuiteError(in_order(problems))
    return config
