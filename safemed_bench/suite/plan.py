"""A suite, its questions and its models as work: cells, units with keys, chunks of fixed composition."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ..attacks import fitted_on
from ..attacks.supplied import open_supplied
from ..core.errors import UsageError
from ..core.types import FROM, FitSet, Question, Unit
from .conditions import Condition, asked, conditions_for, corruptions_of, probes_of
from .fitting import choose_fit, unfitted
from .keys import Asked, cell_identity, fit_key, unit_key
from .schema import ModelSpec, Suite
from .served import Requests, requests_of, served_notes
from .shuffle import choose_donors

if TYPE_CHECKING:
    from ..datasets.base import Dataset
    from ..models.card import ModelCard

LEAST_CHUNK = 4


@dataclass(frozen=True, slots=True)
class Cell:
    """One model under one condition; `name` is `<model>/<condition>`.

    source: where the images were made against another entry, the cell that makes them. It is the other entry's own,
    under the same attack, and may or may not be one of the plan's. fit: what its attack is fitted on, by modality.
    """

    name: str
    model: ModelSpec
    card: ModelCard
    condition: Condition
    source: Cell | None = None
    fit: Mapping[str, FitSet] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PlannedUnit(Unit):
    """`donor`: id of the question whose image is shown, for `shuffled` only."""

    donor: str = ""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive units of one cell, always computed together. `index` counts chunks within the cell from 0.

    sources: the units of the cell's source on the same questions.
    """

    id: str
    cell: str
    index: int
    units: tuple[PlannedUnit, ...]
    sources: tuple[PlannedUnit, ...] = ()


@dataclass(frozen=True)
class Plan:
    """All the work of a suite. Equal suites, questions and models give equal plans.

    dtype: of weights and activations, "auto" where it is left to the worker. notes: what the reader should know, such
    as an objective that does not apply to an entry.
    """

    suite: Suite
    dataset: Dataset
    cells: tuple[Cell, ...]
    chunks: tuple[Chunk, ...]
    dtype: str = "auto"
    notes: tuple[str, ...] = ()

    @property
    def units(self) -> Iterator[PlannedUnit]:
        return (unit for chunk in self.chunks for unit in chunk.units)

    @property
    def cards(self) -> tuple[ModelCard, ...]:
        return tuple({cell.card.name: cell.card for cell in self.cells}.values())

    @cached_property
    def requests(self) -> Mapping[str, Requests]:
        """Entry -> the requests it takes, for the entries that a server answers for."""
        return requests_of(self.cells, Counter(unit.cell for unit in self.units))

    @cached_property
    def questions(self) -> Mapping[str, Question]:
        """Question id -> question."""
        return {question.id: question for question in self.dataset.questions}

    @cached_property
    def cells_by_name(self) -> Mapping[str, Cell]:
        return {cell.name: cell for cell in self.cells}


def build_plan(
    suite: Suite,
    dataset: Dataset,
    cards: Sequence[ModelCard | None],
    *,
    dtype: str | None = None,
    notes: Sequence[str] = (),
    pools: Mapping[str, Sequence[Question]] | None = None,
) -> Plan:
    """Cells, units and chunks of a suite. `cards` has one card per entry of `suite.models`, in that order.

    None for a card leaves its entry out; the caller says why in `notes`, which come before the plan's own. `dtype` is
    the resolved run.dtype; without it the suite's word goes into the keys. pools: split -> its questions, for attacks
    that are fitted on some (stratified, as `datasets.load` gives them). Raises UsageError where there is no question,
    where questions share an id, or where there is nothing to fit an attack on.
    """
    questions = dataset.questions
    if not questions:
        raise UsageError(f"{dataset.stamp}: no question is left to ask; see data.split, data.filter and --limit")
    if len({q.id for q in questions}) < len(questions):
        raise UsageError(f"{dataset.stamp}: question ids are not unique")
    said = list(notes)
    cells: list[Cell] = []
    here = {model.name: (model, card) for model, card in zip(suite.models, cards, strict=True) if card is not None}
    others = {name: card for name, (_, card) in here.items()}
    for model, card in here.values():
        conditions = tuple(conditions_for(suite, card, said, model, others))
        for condition in (*conditions, *probes_of(suite, model, conditions)):
            if not asked(questions, condition):
                continue
            source = _source(condition, *here[condition.source]) if condition.source else None
            cells.append(Cell(f"{card.name}/{condition.name}", model, card, condition, source))
    if twice := _repeated(cell.name for cell in cells):
        raise UsageError(f"the suite gives two cells the name {twice}; give one condition another `name`")
    said += [*_missing_images(cells, questions), *_unmeasured_sources(cells), *_nobodys(suite, questions)]
    donors = choose_donors(questions, suite.run.seed)
    running = dtype or suite.run.dtype
    cells = [_with_fit(cell, suite, running, questions, pools or {}) for cell in cells]
    said += unfitted([cell.fit for cell in cells if cell.fit], questions)
    spelled = {question.id: Asked.of(question, suite.run.seed) for question in questions}
    chunks = tuple(chunk for cell in cells for chunk in _chunks(cell, suite, spelled, donors, running))
    plan = Plan(suite, dataset, tuple(cells), chunks, running, tuple(said))
    return replace(plan, notes=(*said, *served_notes(cells, plan.requests)))


def _with_fit(
    cell: Cell, suite: Suite, dtype: str, questions: Sequence[Question], pools: Mapping[str, Sequence[Question]]
) -> Cell:
    """The cell, and its source, with the questions that their attack is fitted on."""
    if cell.source:
        cell = replace(cell, source=_with_fit(cell.source, suite, dtype, questions, pools))
    if not (wanted := fitted_on(cell.condition.attack, dict(cell.condition.params))):
        return cell
    split, count = wanted
    if not (chosen := choose_fit(pools.get(split, ()), count, questions)):
        raise UsageError(f"{cell.name}: split {split} has no question to fit '{cell.condition.attack}' on")
    own = cell_identity(cell, suite, dtype)
    fit = {name: FitSet(fit_key(own, held), name, held) for name, held in chosen.items()}
    return replace(cell, fit=fit)


def _missing_images(cells: Sequence[Cell], questions: Sequence[Question]) -> list[str]:
    """A note for each set of images made elsewhere that lacks some of the questions."""
    notes = {}
    for condition in (cell.condition for cell in cells if cell.condition.attack == "external"):
        supplied = open_supplied(path := dict(condition.params)["path"])
        if missing := [q.id for q in questions if q.id not in supplied]:
            named = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            notes[path] = f"{path} has no image for {len(missing)} of {len(questions)} questions: {named}"
    return list(notes.values())


def _source(condition: Condition, model: ModelSpec, card: ModelCard) -> Cell:
    """The cell that makes the images which `condition` shows to another entry."""
    own = replace(condition, name=condition.name.replace(f"{FROM}{condition.source}", "", 1), source="")
    return Cell(f"{card.name}/{own.name}", model, card, own)


def _unmeasured_sources(cells: Sequence[Cell]) -> list[str]:
    """A note where images are transferred that no cell of the plan makes, by name or with other settings."""
    planned = {(cell.name, cell.condition) for cell in cells}
    sources = {cell.source.name: cell.source for cell in cells if cell.source}
    alone = [name for name, cell in sources.items() if (name, cell.condition) not in planned]
    return [f"no cell of this run is {name}: its images are made for the transfer alone" for name in alone]


def _nobodys(suite: Suite, questions: Sequence[Question]) -> list[str]:
    """A note on the corruptions that happen to none of the questions' pictures."""
    found = [c for spec in suite.conditions if spec.kind == "corruption" for c in corruptions_of(spec)]
    names = dict.fromkeys(c.corruption for c in found if not asked(questions, c))
    return [f"left out, for no question is of a modality they happen to: {', '.join(names)}"] if names else []


def _chunks(
    cell: Cell, suite: Suite, spelled: Mapping[str, Asked], donors: Mapping[str, str], dtype: str
) -> Iterator[Chunk]:
    """spelled: question id -> the question, in the data set's order."""
    here = [q.id for q in asked([one.question for one in spelled.values()], cell.condition)]
    units = _units(cell, cell_identity(cell, suite, dtype), here, spelled, donors)
    sources = _units(cell.source, cell_identity(cell.source, suite, dtype), here, spelled, {}) if cell.source else []
    size = suite.run.chunk
    if cell.condition.kind == "certify":  # hundreds of answers each: smaller chunks keep all workers busy to the end
        size = min(size, max(LEAST_CHUNK, size // 4))
    for index, start in enumerate(range(0, len(units), size)):
        part = slice(start, start + size)
        yield Chunk(f"{cell.name}#{index:04d}", cell.name, index, tuple(units[part]), tuple(sources[part]))


def _units(
    cell: Cell, shared: str, ids: Sequence[str], spelled: Mapping[str, Asked], donors: Mapping[str, str]
) -> list[PlannedUnit]:
    shuffled, units = cell.condition.kind == "shuffled", []
    for name in ids:
        own, donor = spelled[name], spelled[donors[name]] if shuffled else None
        fit = cell.fit.get(own.question.modality)
        key = unit_key(shared, own, donor, fit.key if fit else "")
        units.append(PlannedUnit(key, name, cell.name, own.seed, donor.question.id if donor else ""))
    return units


def _repeated(names: Iterable[str]) -> str:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), "")  # type: ignore[func-returns-value]
