"""SafeMed-Bench: how well a medical vision-language model holds up when somebody tampers with the picture.

The public API is imported when it is first used, so that `import safemed_bench` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .core.errors import SafeMedError
    from .core.types import Answer, Estimate, Question, Record, ThreatModel, Unit
    from .models import load_model
    from .results import summarise
    from .run import execute
    from .suite import Plan, Suite, build_plan, load_suite, load_suites
    from .training import train

_HOME = {
    "SafeMedError": "core.errors",
    "Answer": "core.types",
    "Estimate": "core.types",
    "Question": "core.types",
    "Record": "core.types",
    "ThreatModel": "core.types",
    "Unit": "core.types",
    "load_model": "models",
    "summarise": "results",
    "execute": "run",
    "Plan": "suite",
    "Suite": "suite",
    "build_plan": "suite",
    "load_suite": "suite",
    "load_suites": "suite",
    "train": "training",
}

__all__ = [
    "Answer",
    "Estimate",
    "Plan",
    "Question",
    "Record",
    "SafeMedError",
    "Suite",
    "ThreatModel",
    "Unit",
    "__version__",
    "build_plan",
    "execute",
    "load_model",
    "load_suite",
    "load_suites",
    "summarise",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'safemed_bench' has no attribute '{name}'")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
