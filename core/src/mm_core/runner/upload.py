"""Many small int32 arrays to the device in one copy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_core.runner.batch import Ints

# Each array starts at a multiple of this many values: kernels are compiled for aligned pointers.
ALIGN = 64

_PINNED_POWERS = range(9, 23)  # 512 bytes to 4 MiB
_PINNED_EACH = 6


def aligned(count: int) -> int:
    """Values an array of `count` takes in a packed buffer."""
    return -(-count // ALIGN) * ALIGN


def packed_size(shapes: Sequence[tuple[int, ...]]) -> int:
    """Values in a packed buffer of arrays of these shapes."""
    return sum(aligned(math.prod(shape)) for shape in shapes)


def pack(arrays: Sequence[Ints], pinned: bool) -> Tensor:
    """One int32 buffer on the host with all arrays, each at an aligned place.

    Pinned memory comes from torch's cache, which keeps a buffer until the copies out of it are done.
    """
    buffer = torch.empty(packed_size([a.shape for a in arrays]), dtype=torch.int32, pin_memory=pinned)
    view: np.ndarray[Any, Any] = buffer.numpy()
    at = 0
    for array in arrays:
        view[at : at + array.size] = array.reshape(-1)
        at += aligned(array.size)
    return buffer


def split(buffer: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """Views of a packed buffer, in the order they were packed."""
    views = []
    at = 0
    for shape in shapes:
        count = math.prod(shape)
        views.append(buffer[at : at + count].view(shape))
        at += aligned(count)
    return views


def reserve_pinned() -> None:
    """Make torch hold pinned memory for the copies of a few steps: it keeps sizes that are powers of two."""
    held = [
        torch.empty(2**power, dtype=torch.uint8, pin_memory=True)
        for power in _PINNED_POWERS
        for _ in range(_PINNED_EACH)
    ]
    del held


def upload(arrays: Sequence[Ints], device: torch.device) -> list[Tensor]:
    """The arrays on the device, in one asynchronous copy."""
    on_gpu = device.type == "cuda"
    buffer = pack(arrays, on_gpu)
    if on_gpu:
        buffer = buffer.to(device, non_blocking=True)
    return split(buffer, [a.shape for a in arrays])
