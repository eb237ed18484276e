"""Weights reordered once for the CPU's matrix kernels.

oneDNN multiplies small batches by a weight in its own blocked layout up to twice as fast as by a
plain one, because nothing is repacked at every call. On other devices, in other dtypes and for
small weights nothing happens.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

# Below this, the call's fixed cost (about 12 µs) outweighs the faster product
MIN_ELEMENTS = 2**17


@runtime_checkable
class Packable(Protocol):
    """A module that knows how to pack its own weights."""

    def pack_(self) -> None:
        """Replace weights by packed ones, in place, once."""
        ...


class PackedWeight:
    """A weight [out, in] in oneDNN's layout; the plain tensor may be dropped."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self._run = torch.ops.mkldnn._linear_pointwise.default

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + b, [..., in] → [..., out]."""
        y: Tensor = self._run(x, self._weight, bias, "none", [], "")
        return y


def pack(weight: Tensor) -> PackedWeight | None:
    """The packed weight, or None where packing gains nothing or this build of torch cannot."""
    packable = (
        weight.device.type == "cpu"
        and weight.dtype in (torch.float32, torch.bfloat16)
        and weight.numel() >= MIN_ELEMENTS
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    )
    return PackedWeight(weight) if packable else None


def pack_linears_(module: nn.Module) -> None:
    """Pack the projections of a loaded module for inference on the CPU.

    Plain weights are dropped as they are packed, so this comes after loading and is final.
    """
    for part in module.modules():
        if isinstance(part, Packable):
            part.pack_()
