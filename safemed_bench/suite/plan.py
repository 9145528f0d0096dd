"""A suite, its questions and its models as work: cells, units with keys, chunks of fixed composition."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ..attacks import fitted_on
from ..attacks.supplied import open_supplied
from ..core import registry
from ..core.errors import UsageError
from ..core.seeds import derive_seed
from ..core.types import FROM, FitSet, Question, Unit
from .conditions import CODE_VERSIONS, Condition, asked, conditions_for, corruptions_of, probes_of
from .fitting import choose_fit, unfitted
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
    chunks = tuple(chunk for cell in cells for chunk in _chunks(cell, suite, questions, donors, running))
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
    own = _cell_identity(cell, suite, dtype)
    fit = {name: FitSet(_digest([own, [*map(_asked_of, held)]]), name, held) for name, held in chosen.items()}
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
    cell: Cell, suite: Suite, questions: Sequence[Question], donors: Mapping[str, str], dtype: str
) -> Iterator[Chunk]:
    by_id = {question.id: question for question in questions}
    shared = _cell_identity(cell, suite, dtype)
    units, sources = [], []
    for question in asked(questions, cell.condition):
        donor = by_id[donors[question.id]] if cell.condition.kind == "shuffled" else None
        units.append(_unit(cell, shared, suite.run.seed, question, donor))
    if cell.source:
        theirs = _cell_identity(cell.source, suite, dtype)
        sources = [_unit(cell.source, theirs, suite.run.seed, by_id[unit.question_id], None) for unit in units]
    size = suite.run.chunk
    if cell.condition.kind == "certify":  # hundreds of answers each: smaller chunks keep all workers busy to the end
        size = min(size, max(LEAST_CHUNK, size // 4))
    for index, start in enumerate(range(0, len(units), size)):
        here = slice(start, start + size)
        yield Chunk(f"{cell.name}#{index:04d}", cell.name, index, tuple(units[here]), tuple(sources[here]))


def _unit(cell: Cell, shared: object, seed: int, question: Question, donor: Question | None) -> PlannedUnit:
    """The seed does not depend on the cell: at every eps, and for every model, a question starts the same way."""
    own = derive_seed("unit", seed, question.id)
    image = [_image(question), _image(donor) if donor else ""]
    text = [question.id, question.question, question.options, question.answer]
    text += [question.modality, question.question_type]
    said: list[object] = [shared, own, image, text]
    said += [fit.key] if (fit := cell.fit.get(question.modality)) else []
    return PlannedUnit(_digest(said), question.id, cell.name, own, donor.id if donor else "")


def _cell_identity(cell: Cell, suite: Suite, dtype: str) -> list[object]:
    """All that a record of this cell depends on or says, beside its question; workers and batch size are not in it."""
    card, condition, data = cell.card, cell.condition, suite.data
    own = cell.model.dtype or card.dtype
    model = [
        card.fingerprint,
        card.prompt,
        card.decode,
        card.max_new_tokens,
        own if own not in (None, "auto") else dtype,
    ]
    if smooth := cell.model.smooth:
        model += ["smooth", CODE_VERSIONS["smooth"], smooth.sigma, smooth.n, smooth.alpha]
    threat = condition.threat
    attack: list[object] = [condition.kind, condition.attack, condition.objective, condition.params]
    attack += [condition.certifier] if condition.certifier else []
    attack += ["transfer", *_cell_identity(cell.source, suite, dtype)] if cell.source else []
    attack += [condition.corruption, condition.severity] if condition.corruption else []
    ball = [threat.norm, threat.eps, threat.bounds] if threat else []
    side = cell.model.resolution or data.resolution
    return [cell.name, model, attack, ball, side, data.fit, condition.versions, *_plugin_sources(condition)]


def _plugin_sources(condition: Condition) -> list[str]:
    """Hashes of attack, objective, certifier or corruption where these are plugins, and of images made elsewhere:
    CODE_VERSIONS knows nothing of them."""
    if condition.certifier:
        source = registry.certifiers.source(condition.certifier)
        return [source] if source else []
    if condition.corruption:
        source = registry.corruptions.source(condition.corruption)
        return [source] if source else []
    if not condition.attack:
        return []
    if condition.attack == "external":  # another folder's images, or other ones in the same folder, are other work
        return [open_supplied(dict(condition.params)["path"]).digest()]
    sources = [registry.attacks.source(condition.attack)]
    sources += [registry.objectives.source(condition.objective)] if condition.objective else []
    return sources if any(sources) else []


def _asked_of(question: Question) -> list[object]:
    return [question.id, _image(question), question.question, question.options, question.answer]


def _image(question: Question) -> str:
    return question.image_sha256 or f"{question.image} {question.image_error}"


def _digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def _repeated(names: Iterable[str]) -> str:
    seen: set[str] = set()
    return next((name for name in names if name in seen or seen.add(name)), "")  # type: ignore[func-returns-value]
