"""Certifiers: the catalogue, readable without torch.

A certifier says for one picture what the smoothed model answers and in which L2 ball that answer cannot change. Both
count answers on noisy copies of the picture; they differ in how many they need and in how a count becomes a proof.
Others add theirs with `core.registry.certifiers.register`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from ..core import registry
from ..core.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from .base import Certifier

CODE_VERSION = 1
"""Goes into unit keys; raised whenever a change here can change a record."""


@dataclass(frozen=True, slots=True)
class CertifierInfo:
    """target: `module:Class`. parameters: what a suite may set."""

    target: str
    summary: str
    parameters: tuple[str, ...]


CERTIFIERS: dict[str, CertifierInfo] = {
    "cohen": CertifierInfo(
        "safemed_bench.certify.cohen:Cohen",
        "randomized smoothing with a fixed number of samples and the Clopper-Pearson bound (Cohen, 1902.02918)",
        ("sigma", "n", "n0", "alpha", "radii"),
    ),
    "sequential": CertifierInfo(
        "safemed_bench.certify.sequential:Sequential",
        "the same with a test that stops as soon as it has decided, valid at any stopping time (mixture e-process)",
        ("sigma", "n", "n0", "alpha", "radii"),
    ),
}

for _name, _certifier in CERTIFIERS.items():
    registry.certifiers.lazy(_name, _certifier.target)


def build_certifier(name: str, parameters: Mapping[str, Any] | None = None) -> Certifier:
    """A certifier from its registered name and parameters. Raises UsageError where one is wrong or missing."""
    kind = registry.certifiers.get(name)
    parameters = dict(parameters or {})
    declared = {field.name: field for field in fields(kind)} if is_dataclass(kind) else {}
    known = tuple(declared or parameters)
    for key in parameters:
        if key not in known:
            raise UsageError(f"certifier '{name}' has no parameter '{key}'.{did_you_mean(key, known)}")
    for key, field in declared.items():
        if key not in parameters and field.default is MISSING and field.default_factory is MISSING:
            raise UsageError(f"certifier '{name}' needs the parameter '{key}'")
    return kind(**parameters)
