"""The reference pages: their tables are what the code says, and their examples are valid and leave no key out."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from safemed_bench.datasets.phantom import PhantomSpec
from safemed_bench.suite.schema import Suite
from safemed_bench.training.config import TrainConfig

DOCS = Path(__file__).parents[1] / "docs"
SPEC = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
assert SPEC and SPEC.loader
generate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(generate)
LEAST = {"name": "least", "models": ["sft"], "conditions": ["clean"]}
INTERNAL = {("ConditionSpec", "kind")}
"""Keys that are not written for themselves."""


@pytest.mark.parametrize("page", generate.PAGES, ids=lambda page: page.name)
def test_a_page_says_what_the_code_says(page: Path) -> None:
    text = page.read_text()
    assert generate.filled(text) == text, f"docs/{page.name} is old: run `python docs/generate.py`"


def test_every_table_has_a_place_and_an_old_one_would_be_noticed() -> None:
    text = "".join(page.read_text() for page in generate.PAGES)
    assert {name for _, name, _ in generate.PLACE.findall(text)} == set(generate.TABLES)
    assert generate.filled(text.replace("Radii, on the", "Radii on the")) == text


def test_a_key_is_told_with_its_type_bounds_default_and_meaning() -> None:
    text = generate.table(generate.PARTS["run"]) + generate.table(generate.PARTS["conditions"])
    assert "| `fail_on_error` | number ≥ 0, ≤ 1 | `0` | Share of units that may end in an error. |" in text
    assert "| `batch_size` | whole number or `auto` | `auto` |" in text and "| `steps` | whole number ≥ 1 |  |" in text
    assert "| `step_size` | number > 0 |" in text and "| `dtype` | `auto`, `fp32`, `bf16`, `fp16` |" in text


def blocks(page: str) -> list[dict[str, Any]]:
    return [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)]


def test_every_example_is_valid_and_every_key_has_one() -> None:
    suites = [Suite.model_validate(LEAST | block) for block in blocks("suites.md")]
    for suite in suites:
        PhantomSpec.from_mapping(suite.data.phantom)
    trained = [TrainConfig.model_validate(block) for block in blocks("training_reference.md")]
    shown = {found for part in (*suites, *trained) for found in set_keys(part)}
    missing = {(p.__name__, key) for p in generate.PARTS.values() for key in p.model_fields} - shown - INTERNAL
    assert not missing, f"no example on the page for {sorted(missing)}"


def set_keys(part: Any) -> Iterator[tuple[str, str]]:
    if isinstance(part, tuple):
        for item in part:
            yield from set_keys(item)
    if isinstance(part, BaseModel):
        for key in part.model_fields_set:
            yield type(part).__name__, key
            yield from set_keys(getattr(part, key))


def test_every_section_is_on_a_page() -> None:
    def sections(part: type[BaseModel]) -> Iterator[type[BaseModel]]:
        yield part
        for field in part.model_fields.values():
            for inner in nested(field.annotation):
                yield from sections(inner)

    known = set(generate.PARTS.values())
    assert known == {*sections(Suite), *sections(TrainConfig)}


def nested(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from nested(inner)


# --- links ---


@pytest.mark.parametrize("page", [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text().replace("\n", " ")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.is_file(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
