"""The checkpoint loader's naming rules in a few lines, for tests of one module against its reference."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mm_core.hookspecs import WeightMap


def renamed(name: str, weight_map: WeightMap) -> tuple[str, int | None] | None:
    """(parameter name, shard or None) of a checkpoint's tensor; None where it is not the module's."""
    if any(re.match(pattern, name) for pattern in weight_map.ignore):
        return None
    for pattern, replacement in weight_map.rename:
        if re.match(pattern, name):
            name = re.sub(pattern, replacement, name, count=1)
            stem, _, leaf = name.rpartition(".")
            for suffix, fused, shard in weight_map.fused:
                if stem == suffix or stem.endswith("." + suffix):
                    return f"{stem.removesuffix(suffix)}{fused}.{leaf}", shard
            return name, None
    return None


def load_renamed(module: nn.Module, tensors: Mapping[str, Tensor], weight_map: WeightMap) -> set[str]:
    """Fill every parameter of `module`; returns the checkpoint names it did not use."""
    params = dict(module.named_parameters())
    filled: dict[str, int] = {}
    unused = set()
    for name, tensor in tensors.items():
        found = renamed(name, weight_map)
        if found is None:
            unused.add(name)
            continue
        target, shard = found
        if target in weight_map.tied:
            continue
        param = params[target]
        assert tuple(tensor.shape) == tuple(getattr(param, "checkpoint_shape", tensor.shape)), name
        with torch.no_grad():
            if shard is None:
                param.copy_(tensor.reshape(param.shape))
            else:
                param.split(list(param.shard_sizes))[shard].copy_(tensor)
        filled[target] = filled.get(target, 0) + tensor.numel()
    assert filled == {name: p.numel() for name, p in params.items()}
    return unused
