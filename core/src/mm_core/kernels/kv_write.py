"""Writing new keys and values into the paged KV cache."""

import torch
from torch import Tensor

from mm_core.kernels.fp8 import dequantise, quantise

Scales = tuple[Tensor, Tensor]
"""Of k and of v: [num_blocks, block_size, Hkv] uint8, exponents of the scales of an fp8 cache; any strides."""


def kv_write(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, scales: Scales | None = None
) -> None:
    """Writes row t of k and v to slot slot_mapping[t] of the caches, cast to their dtype.

    k, v: [T, Hkv, D]; k_cache, v_cache: [num_blocks, block_size, Hkv, D]; any strides, last dim contiguous.
    slot_mapping: [T] int64, block * block_size + offset; -1 skips the row. No slot may occur twice.
    scales: of caches in float8_e4m3fn. Then k and v, of one dtype, are rounded in place to what the cache holds
        of them, so that a token's keys and values are the same whether they are read from here or from there:
        x = code * 2^(byte - 127), with the least power of two that maps the head's largest magnitude to 448 or
        less (`mm_core.kernels.fp8`). NaN and infinities become NaN.
    """
    run = kv_write_triton if k.device.type == "cuda" else _kv_write_cpu
    run(k, v, k_cache, v_cache, slot_mapping, scales)


def kv_write_triton(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, scales: Scales | None = None
) -> None:
    """`kv_write` by its Triton kernel, whatever the device."""
    from mm_core.kernels._triton import kv_write as impl

    impl.kv_write(k, v, k_cache, v_cache, slot_mapping, scales)


def _kv_write_cpu(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor, scales: Scales | None
) -> None:
    kept = slot_mapping >= 0
    everything = bool(kept.all())
    slots = slot_mapping if everything else slot_mapping[kept]
    rows = (k, v) if everything else (k[kept], v[kept])
    if scales is None:
        _scatter(rows[0].to(k_cache.dtype), k_cache, slots)
        _scatter(rows[1].to(v_cache.dtype), v_cache, slots)
        return
    codes, exponents = quantise(torch.stack(rows))
    rounded = dequantise(codes, exponents, k.dtype)
    for which, (cache, given) in enumerate(((k_cache, k), (v_cache, v))):
        _scatter(codes[which].view(torch.uint8), cache.view(torch.uint8), slots)
        _scatter(exponents[which], scales[which], slots)
        if everything:
            given.copy_(rounded[which])
        else:
            given[kept] = rounded[which]


def _scatter(rows: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Rows [T, ...] to places of [num_blocks, block_size, ...]."""
    block_size = cache.shape[1]
    if cache.stride(0) == block_size * cache.stride(1):
        cache.flatten(0, 1).index_copy_(0, slots, rows)
    else:
        cache[slots // block_size, slots % block_size] = rows
