"""What a unit's key is made of: everything that can change its record, and nothing else.

A plan of OmniMedVQA has more than a million units, so what is the same for many of them is spelled once.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..attacks.supplied import open_supplied
from ..core import registry
from ..core.seeds import derive_seed
from ..core.types import Question
from .conditions import CODE_VERSIONS, Condition

if TYPE_CHECKING:
    from .plan import Cell
    from .schema import Suite


@dataclass(frozen=True, slots=True)
class Asked:
    """A question as it enters the keys of all its cells. image, text: JSON.

    The seed does not depend on the cell: at every eps, and for every model, a question starts the same way.
    """

    question: Question
    seed: int
    image: str
    text: str

    @classmethod
    def of(cls, question: Question, seed: int) -> Asked:
        """`seed` is the suite's."""
        text = [question.id, question.question, question.options, question.answer]
        text += [question.modality, question.question_type]
        return cls(question, derive_seed("unit", seed, question.id), _json(_image(question)), _json(text))


def unit_key(shared: str, asked: Asked, donor: Asked | None, fit: str) -> str:
    """32 hex digits. shared: `cell_identity`. donor: whose image is shown, None for the question's own. fit: key of
    what the attack is fitted on, "" where it is on nothing."""
    image = f"[{asked.image}, {donor.image if donor else _NOBODY}]"
    more = f", {_json(fit)}" if fit else ""
    return _hash(f"[{shared}, {asked.seed}, {image}, {asked.text}{more}]")


def fit_key(shared: str, questions: tuple[Question, ...]) -> str:
    """Of the questions that the attack of a cell with this `cell_identity` is fitted on."""
    held = [[q.id, _image(q), q.question, q.options, q.answer] for q in questions]
    return _hash(f"[{shared}, {_json(held)}]")


def cell_identity(cell: Cell, suite: Suite, dtype: str) -> str:
    """JSON of all that a record of this cell depends on or says, beside its question; workers and batch size are not
    in it."""
    return _json(_identity(cell, suite, dtype))


def _identity(cell: Cell, suite: Suite, dtype: str) -> list[object]:
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
    attack += ["transfer", *_identity(cell.source, suite, dtype)] if cell.source else []
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


def _image(question: Question) -> str:
    return question.image_sha256 or f"{question.image} {question.image_error}"


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


_NOBODY = _json("")


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
