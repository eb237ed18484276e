"""Writing new keys and values into the paged KV cache."""

from torch import Tensor


def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Writes row t of k and v to slot slot_mapping[t] of the caches, cast to their dtype.

    k, v: [T, Hkv, D]; k_cache, v_cache: [num_blocks, block_size, Hkv, D]; any strides, last dim contiguous.
    slot_mapping: [T] int64, block * block_size + offset; -1 skips the row. No slot may occur twice.
    """
    run = kv_write_triton if k.device.type == "cuda" else _kv_write_cpu
    run(k, v, k_cache, v_cache, slot_mapping)


def kv_write_triton(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """`kv_write` by its Triton kernel, whatever the device."""
    from mm_core.kernels._triton import kv_write as impl

    impl.kv_write(k, v, k_cache, v_cache, slot_mapping)


def _kv_write_cpu(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    kept = slot_mapping >= 0
    if not bool(kept.all()):
        k, v, slot_mapping = k[kept], v[kept], slot_mapping[kept]
    block_size = k_cache.shape[1]
    for rows, cache in ((k, k_cache), (v, v_cache)):
        if cache.stride(0) == block_size * cache.stride(1):
            cache.flatten(0, 1).index_copy_(0, slot_mapping, rows.to(cache.dtype))
        else:
            cache[slot_mapping // block_size, slot_mapping % block_size] = rows.to(cache.dtype)
