"""Numbers of single rows on their way to the device: gathered on the host, sent in one copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_core.runner.upload import upload


class Column:
    """One array of a `Columns`, int64 or float64; `tensor` holds it on the device once it was sent."""

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self.values = values
        self.tensor: Tensor = torch.empty(0)

    def __len__(self) -> int:
        return len(self.values)


class Columns:
    """Gathers arrays of 8-byte numbers for one asynchronous copy."""

    def __init__(self) -> None:
        self._columns: list[Column] = []

    def ints(self, values: Sequence[int] | np.ndarray[Any, Any]) -> Column:
        """An int64 column [n]."""
        return self._add(np.asarray(values, np.int64))

    def floats(self, values: Sequence[float]) -> Column:
        """A float64 column [n]."""
        return self._add(np.asarray(values, np.float64))

    def _add(self, values: np.ndarray[Any, Any]) -> Column:
        self._columns.append(Column(values))
        return self._columns[-1]

    def send(self, device: torch.device) -> None:
        """Start the copy; work on the current stream may use every column's tensor from now on."""
        sent = upload([column.values.view(np.int32) for column in self._columns], device)
        for column, tensor in zip(self._columns, sent, strict=True):
            column.tensor = tensor.view(torch.int64 if column.values.dtype == np.int64 else torch.float64)
        self._columns = []
