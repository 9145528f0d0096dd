"""Tensors from the host to a device."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`; to a GPU from pinned memory, so that the host goes on while it is copied.

    Work that is queued on the device afterwards waits for the copy; the pinned memory is not used again before its end.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
