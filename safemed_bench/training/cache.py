"""A cache that grows in blocks. The stock one copies all keys and values of every layer for each new token."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

BLOCK = 64
"""Tokens of room that are made at a time."""


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """One layer of a `DynamicCache`; keys and values are views of tensors with room to spare. Without gradients."""

    _rooms: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (N, heads, t, d) keys and values; all of them so far."""
        held, new = (self.keys, self.values), (key_states, value_states)
        length = self.keys.shape[-2]
        width = length + key_states.shape[-2]
        rooms = self._rooms
        # Whoever selects or repeats rows puts other tensors in the views' place.
        if rooms is None or rooms[0].data_ptr() != self.keys.data_ptr() or rooms[0].shape[-2] < width:
            self._rooms = rooms = (_room(self.keys, width), _room(self.values, width))
            for room, old in zip(rooms, held, strict=True):
                room[..., :length, :] = old
        for room, states in zip(rooms, new, strict=True):
            room[..., length:width, :] = states
        self.keys, self.values = (room[..., :width, :] for room in rooms)
        return self.keys, self.values


def _room(held: Tensor, width: int) -> Tensor:
    return held.new_empty(*held.shape[:-2], width + BLOCK, held.shape[-1])


def make_room(cache: Any) -> None:
    """Let the plain layers of a filled transformers cache grow in blocks; others (sliding windows) stay as they are."""
    for layer in getattr(cache, "layers", ()):
        if type(layer) is DynamicLayer and layer.is_initialized:
            layer.__class__ = RoomyLayer
