"""The registry behind the names of models, attacks and all else."""

from __future__ import annotations

from typing import Any

import pytest

from safemed_bench.core import registry
from safemed_bench.core.errors import UsageError


def test_lazy_names_are_imported_when_asked_for() -> None:
    things: registry.Registry[Any] = registry.Registry("thing", "safemed_bench.tests_none")
    things.lazy("counter", "collections:Counter")
    things.lazy("counter", "collections:Counter")
    assert "counter" in things and [*things] == ["counter"]
    from collections import Counter

    things.register("counter")(Counter)  # the home module's own decorator names the same thing
    assert things.get("counter") is Counter
    with pytest.raises(UsageError, match="registered twice"):
        things.register("counter")(dict)
    with pytest.raises(UsageError, match="registered twice"):
        things.lazy("counter", "collections:OrderedDict")
    with pytest.raises(UsageError, match=r"unknown thing 'conter'. Did you mean 'counter'\?"):
        things.get("conter")
    with pytest.raises(ValueError, match="module:attribute"):
        things.lazy("other", "collections")
