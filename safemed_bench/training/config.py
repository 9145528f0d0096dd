"""A training run as YAML: which model, which data, which stages. Every field says what it does."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..core.errors import Problem, SuiteError, did_you_mean
from ..models.prompts import PROMPTS


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskConfig(_Model):
    """One kind of training example; a batch holds one kind, drawn by weight."""

    kind: Literal["answer", "rationale", "caption", "binding", "stated"] = Field(
        description="answer: question -> letter. rationale: question -> <think>rationale</think> letter. "
        "caption: what is to be seen, in words, without a question. "
        "binding: text only, letters of options from their words. stated: text only, the question tells the answer."
    )
    prompts: tuple[str, ...] = Field(default=("instruct",), description="Prompt templates (models/prompts.py).")
    weight: float = Field(default=1.0, gt=0, description="Relative share of batches.")
    letter_weight: float = Field(
        1.0, gt=0, description="Loss weight of the tokens that name the option's letter; others have 1."
    )

    @field_validator("prompts")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in PROMPTS:
                raise ValueError(f"unknown prompt '{name}'.{did_you_mean(name, list(PROMPTS))}")
        return names


class StageConfig(_Model):
    """Optimisation with one mixture of tasks and one learning-rate cycle."""

    name: str = Field(description="Name in logs and checkpoints.")
    tasks: tuple[TaskConfig, ...] = Field(min_length=1, description="Mixture of tasks.")
    steps: int = Field(gt=0, description="Optimiser steps.")
    batch_size: int = Field(default=64, gt=0, description="Examples per step over all processes.")
    learning_rate: float = Field(default=1e-3, gt=0, description="AdamW's peak rate; linear warm-up, cosine to 0.")
    warmup: int = Field(default=50, ge=0, description="Warm-up steps.")
    weight_decay: float = Field(default=0.01, ge=0, description="Decoupled weight decay (arXiv 1711.05101).")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradient norm is clipped to this.")


class DataConfig(_Model):
    """Training data; the same loader as the benchmark's, on its train and validation splits."""

    name: Literal["phantom", "omnimedvqa"] = Field(default="phantom", description="Generated images, or a folder.")
    root: Path | None = Field(default=None, description="OmniMedVQA folder, for omnimedvqa.")
    scheme: str = Field(default="auto", description="Split scheme (datasets/splits.py).")
    images: int = Field(default=60_000, gt=0, description="Training images to generate (phantom).")
    resolution: int = Field(default=64, gt=0, description="Side of the square canvas, pixels.")
    fit: Literal["pad", "stretch"] = Field(default="pad", description="How an image is brought onto the canvas.")
    phantom: dict[str, Any] = Field(default_factory=dict, description="Phantom parameters: seed, difficulty.")
    augment: bool = Field(default=False, description="Random flips and small shifts of training images.")


class TrainConfig(_Model):
    """A training run. `safemed-bench train FILE` reads this."""

    name: str = Field(description="Entry name; also the default output folder under runs/.")
    description: str = Field(default="", description="One line for the model card.")
    init: str = Field(
        "tiny", description="'tiny' for random weights, else an entry name or model folder to start from."
    )
    architecture: dict[str, Any] = Field(default_factory=dict, description="Sizes for init 'tiny' (models/tiny.py).")
    data: DataConfig = Field(default_factory=lambda: DataConfig(), description="Training data.")
    stages: tuple[StageConfig, ...] = Field(min_length=1, description="Run in order.")
    prompt: str = Field(default="instruct", description="Prompt the finished entry is deployed with.")
    decode: Literal["logprob", "generate"] | None = Field(
        None, description="How its verdict is read; default by prompt."
    )
    max_new_tokens: int = Field(default=64, gt=0, description="Generation limit of the finished entry, tokens.")
    seed: int = Field(default=0, ge=0, description="Seed of weights, batches and tasks.")
    output: Path | None = Field(
        None, description="Folder of checkpoints and of the finished entry (default runs/NAME)."
    )
    log_every: int = Field(default=50, gt=0, description="Steps between lines in metrics.jsonl.")
    eval_every: int = Field(default=500, gt=0, description="Steps between validations.")
    eval_questions: int = Field(default=200, ge=0, description="Validation questions, stratified; 0 for none.")
    save_every: int = Field(default=500, gt=0, description="Steps between checkpoints (the last two are kept).")
    export_dtype: Literal["float16", "float32"] = Field(default="float16", description="Dtype of the saved weights.")

    @property
    def folder(self) -> Path:
        return self.output or Path("runs") / self.name

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> TrainConfig:
    """Read and validate a training file; `overrides` are `key.path=value` with YAML values.

    Raises SuiteError with every problem, each as `file:line:col  key: what is wrong`.
    """
    path = Path(path)
    if not path.is_file():
        raise SuiteError([Problem(str(path), 0, 0, "", "no such training config")])
    text = re.sub(r"\$\{env:(\w+)(?::([^}]*))?\}", lambda m: os.environ.get(m[1], m[2] or ""), path.read_text())
    try:
        data, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (0, 0)
        raise SuiteError([Problem(str(path), line, column, "", f"not YAML: {error.problem}")]) from error
    if not isinstance(data, dict):
        raise SuiteError([Problem(str(path), 1, 1, "", "a training config is a mapping of keys")])
    for item in overrides:
        _override(data, item)
    try:
        return TrainConfig.model_validate(data)
    except ValidationError as error:
        raise SuiteError([_problem(str(path), node, e) for e in error.errors()]) from error


def _override(data: dict[str, Any], item: str) -> None:
    key, equals, value = item.partition("=")
    if not equals:
        raise SuiteError([Problem("--set", 0, 0, item, "expected key.path=value")])
    place: Any = data
    *parents, last = key.split(".")
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
    parsed = yaml.safe_load(value)
    if isinstance(place, list):
        place[int(last)] = parsed
    else:
        place[last] = parsed


def _problem(file: str, node: yaml.Node | None, error: Any) -> Problem:
    """A pydantic error at the line of its key in the YAML."""
    place, known = node, list(TrainConfig.model_fields)
    for part in error["loc"]:
        found = _child(place, part)
        if found is None:
            break
        place = found
    line, column = (place.start_mark.line + 1, place.start_mark.column + 1) if place is not None else (0, 0)
    key = ".".join(map(str, error["loc"]))
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = f"unknown key.{did_you_mean(str(error['loc'][-1]), known)}"
    return Problem(file, line, column, key, message)


def _child(node: yaml.Node | None, part: str | int) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        return next((value for key, value in node.value if key.value == part), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part]
    return None
