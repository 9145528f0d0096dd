"""Token ids, masks and positions of prompts and continuations, flush right.

`inputs` are always `input_ids` and `attention_mask` (B, L) with `position_ids` (B, L), or (B, 3, L) for multimodal
rotary embeddings; what else a family's prompts carry stays as it is. Rows are padded on the left, so that the last
column of every row is where something is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

INPUTS = ("input_ids", "attention_mask", "position_ids")


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(B, L) ids and mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(r)) + list(r) for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask


def join(
    inputs: dict[str, Tensor], rows: Sequence[Sequence[int]], pad: int
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Prompts and their continuations `rows`: joined inputs, continuation ids and mask (B, T), T >= 1 columns."""
    prompt, mask, positions = (inputs[k] for k in INPUTS)
    width = max(1, max(map(len, rows)))
    tail = torch.full((len(rows), width), pad)
    tail_mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        tail[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
        tail_mask[i, width - len(row) :] = 1
    tail, tail_mask = tail.to(prompt.device), tail_mask.to(prompt.device)
    # Shift each prompt right over the columns that its shorter continuation leaves free.
    shift = width - tail_mask.sum(1, keepdim=True)
    column = torch.arange(prompt.shape[1] + width, device=prompt.device)[None] - shift
    inside = (column >= 0) & (column < prompt.shape[1])
    source = column.clamp(0, prompt.shape[1] - 1)
    ids = torch.where(inside, prompt.gather(1, source), pad)
    ids[:, -width:] = torch.where(tail_mask.bool(), tail, ids[:, -width:])
    joined_mask = torch.where(inside, mask.gather(1, source), 0)
    joined_mask[:, -width:] = joined_mask[:, -width:].where(~tail_mask.bool(), 1)
    joined = {
        **inputs,
        "input_ids": ids,
        "attention_mask": joined_mask,
        "position_ids": _extend(positions, source, column, prompt.shape[1]),
    }
    return joined, tail, tail_mask


def behind(inputs: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """Inputs of what follows the first `length` tokens of each row, whose keys and values are known already.

    Ids and positions lose these columns. The mask (B, L) keeps its width: the known tokens come first, then the
    padding that stood before them. Who may see whom depends on mask and order alone, so that nothing changes.
    """
    ids, mask, positions = (inputs[k] for k in INPUTS)
    padding = (mask == 0).sum(1, keepdim=True)
    column = torch.arange(ids.shape[1] - length, device=ids.device)[None]
    source = torch.where(column < padding, column, column + length)
    index = source[:, None].expand(-1, positions.shape[1], -1) if positions.ndim == 3 else source
    return {
        **inputs,
        "input_ids": ids.gather(1, source),
        "attention_mask": torch.cat([mask.new_ones(len(mask), length), mask.gather(1, source)], 1),
        "position_ids": positions.gather(-1, index),
    }


def _extend(positions: Tensor, source: Tensor, column: Tensor, length: int) -> Tensor:
    """Position ids of the joined sequence: the prompt's own, then counting on from its largest."""
    many = positions.ndim == 3
    rows = positions if many else positions[:, None]
    index = source[:, None].expand(-1, rows.shape[1], -1)
    last = rows.amax((1, 2))[:, None, None]
    after = last + (column - length + 1)[:, None]
    out = torch.where((column >= length)[:, None], after, rows.gather(2, index))
    return out if many else out[:, 0]
