"""Training: stages of supervised fine-tuning and of AT-GRPO as YAML; produces the folders that models/ loads."""

from __future__ import annotations

from pathlib import Path


def train(path: str | Path, overrides: tuple[str, ...] = (), *, resume: bool = True, quiet: bool = False) -> Path:
    """Run the training config at `path`; returns the folder of the finished entry."""
    from .config import load_config

    config = load_config(path, overrides)
    from .trainer import train as run

    return run(config, resume=resume, quiet=quiet)
