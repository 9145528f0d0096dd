"""The decision slot, proved: of all places that tell the options apart, the one whose change moves the answer.

A rationale may name an option early as a finding and decide later, from the image again. The earliest place is then of
no use to an attack, whatever is made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..core.types import Answer
from ..models.base import Batch, VisionLanguageModel
from .base import Objective, Prepared
from .objectives import RationaleAnswer, either, own_tokens, slot_margin
from .slots import Slot, find_slots

PLACES = 4
"""Places of a rationale that are tried, from the last one back: what is said last is nearest to the answer."""


@dataclass(frozen=True)
class DecisiveSlot(Objective):
    """Margin between the options at the place of the model's own rationale where a rival's token moves the answer.

    At each place that `find_slots` knows, each rival's token is put and the model goes on by itself on the clean image;
    the place that moves the answer with most of them is taken, the earliest of equals. The record's extra says which:
    `slot` (position in the reply) and `moves` (share of the rivals); or `fallback`, as of `decision_slot`. Of a model
    without `completed`, which cannot be made to go on, the last place is taken and `moves` is None.
    """

    name: ClassVar[str] = "decisive_slot"
    reasoning_only: ClassVar[bool] = True
    fallback: ClassVar[Objective] = RationaleAnswer()

    def prepare(self, model: VisionLanguageModel, batch: Batch, clean_answers: Sequence[Answer]) -> Prepared:
        replies = [own_tokens(model, answer) for answer in clean_answers]
        places = [
            find_slots(q.options, q.answer, reply, model.encode, model.decode_text)[-PLACES:]
            for q, reply in zip(batch.questions, replies, strict=True)
        ]
        shares = self._moves(model, batch, replies, places)
        if shares is None:
            slots = [held[-1] if held else None for held in places]
        else:
            slots = [
                max(held, key=lambda slot: (shares[i, slot], -slot.position), default=None)
                for i, held in enumerate(places)
            ]

        def fallback(rest: Sequence[int]) -> Prepared:
            return self.fallback.prepare(model, batch.select(rest), [clean_answers[i] for i in rest])

        def note(i: int, slot: Slot | None) -> dict[str, Any]:
            if slot is None:
                return {"fallback": self.fallback.name}
            return {"slot": slot.position, "moves": None if shares is None else round(shares[i, slot], 3)}

        notes = tuple(note(i, slot) for i, slot in enumerate(slots))
        return either(slots, lambda at: slot_margin(model, batch, replies, slots, at), fallback, notes)

    def _moves(
        self,
        model: VisionLanguageModel,
        batch: Batch,
        replies: Sequence[tuple[int, ...]],
        places: Sequence[Sequence[Slot]],
    ) -> dict[tuple[int, Slot], float] | None:
        """(question, slot) -> the share of the slot's rivals that move the answer, 0 where it has none; None where the
        model cannot go on."""
        go_on = getattr(model, "completed", None)
        if go_on is None:
            return None
        trials = [(i, slot, rival) for i, held in enumerate(places) for slot in held for rival in slot.candidates[1:]]
        shares = {(i, slot): 0.0 for i, held in enumerate(places) for slot in held}
        if trials:
            rows = batch.select([i for i, _, _ in trials])
            begun = [(*replies[i][: slot.position], rival) for i, slot, rival in trials]
            found = go_on(rows, rows.pixels, begun)
            for (i, slot, _), answer in zip(trials, found, strict=True):
                shares[i, slot] += (answer != batch.questions[i].answer) / len(slot.candidates[1:])
        return shares
