"""Random weights for benchmarks and tests, where no checkpoint's weights are needed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from mm_core.checkpoint.names import tie
from mm_core.hashing import encode_fields, get_hasher
from mm_core.hookspecs import WeightMap

if TYPE_CHECKING:
    from torch import Tensor, nn

_EMBEDDINGS = ("embed_tokens", "token_embedding", "wte", "word_embeddings")


def init_dummy_weights(module: nn.Module, seed: int, *, weight_map: WeightMap | None = None) -> None:
    """Fill all parameters with random numbers that keep activations in range.

    Each parameter has its own stream, from `seed` and its name: the same numbers on the same kind
    of device, whatever else the module holds. Numbers are made on the parameter's device. With
    `weight_map`, its tied parameters are made one.
    """
    import torch

    hasher = get_hasher("xxh3_128")
    for name, param in module.named_parameters():
        if not param.is_floating_point():
            continue
        key = int.from_bytes(hasher(encode_fields((seed, name)))[:8], "little") >> 1
        generator = torch.Generator(device=param.device).manual_seed(key)
        mean, std = _scale(name, param)
        with torch.no_grad():
            param.data.normal_(mean, std, generator=generator)
    if weight_map is not None:
        tie(module, weight_map)


def _scale(name: str, param: Tensor) -> tuple[float, float]:
    """Mean and standard deviation: norms near 1, biases small, matrices scaled by their fan-in."""
    if param.dim() < 2:
        return (0.0, 0.02) if name.endswith("bias") else (1.0, 0.1)
    fan_in = math.prod(param.shape[1:])
    # Embeddings larger than fan-in scaling, about 0.25 at width 256: with small ones, greedy
    # output repeats a single token and a test or benchmark sees nothing.
    gain = 4.0 if any(part in _EMBEDDINGS for part in name.split(".")) else 1.0
    return 0.0, gain / math.sqrt(max(1, fan_in))
