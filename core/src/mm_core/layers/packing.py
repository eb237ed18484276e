"""Weights reordered once for the CPU's matrix kernels.

oneDNN multiplies small batches by a weight in its own blocked layout up to twice as fast as by a
plain one, because nothing is repacked at every call. Modules pack in `finish_loading()`, which the
engine calls on every module once the weights are there.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Below this, the call's fixed cost (about 12 µs) outweighs the faster product
MIN_ELEMENTS = 2**17


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
