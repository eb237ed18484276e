"""Starting a kernel while the one before it on the stream still runs (programmatic dependent launch, sm_90).

A kernel launched so may run `gdc_launch_dependents()` at once, which lets the next such kernel start, and must
run `gdc_wait()` before it reads what earlier kernels wrote and before it writes anything. Weights may be read
before. In a CUDA graph this works as on a stream.
"""

from __future__ import annotations

from functools import cache

import torch


@cache
def can_start_early(device: torch.device) -> bool:
    """Whether the device knows `gdc_wait`; Triton's interpreter does not."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


def launch_options(early: bool) -> dict[str, bool]:
    """What the launch of such a kernel needs beside its arguments."""
    return {"launch_pdl": True} if early else {}
