"""Attention over the paged KV cache: decode, prefill, mixed batches and cross-attention."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_core.kernels.paged_attention_cpu import CpuPlan, paged_attention_cpu, plan_cpu
from mm_core.kernels.shared_prefixes import SharedPrefixes

__all__ = ["CpuPlan", "SharedPrefixes", "paged_attention", "paged_attention_triton", "plan_cpu"]


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    *,
    max_q_len: int,
    max_kv_len: int,
    scale: float,
    causal: bool = True,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    plan: CpuPlan | None = None,
    num_decodes: int = 0,
    shared: SharedPrefixes | None = None,
    fresh: tuple[Tensor, Tensor] | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """softmax(scale * q k^T + bias) v for every sequence of a batch (Vaswani et al. 2017, eq. 1), in float32.

    q: [T, Hq, D], any row strides, last dim contiguous; the queries of all sequences one after another.
    k_cache, v_cache: [num_blocks, block_size, Hkv, D], block_size a multiple of 16, any strides with the
        last dim contiguous. Hq is a multiple of Hkv; head h reads KV head h // (Hq / Hkv).
    block_tables: [S, max_blocks] int32; key j of sequence s lies in block block_tables[s, j // block_size].
    cu_seqlens_q: [S + 1] int32, starting at 0; sequence s owns rows [cu[s], cu[s + 1]). None is allowed.
    kv_lens: [S] int32, the keys that exist, those of this chunk included.
    max_q_len, max_kv_len: host-side bounds of the two; max_q_len == 1 takes the decode kernel.
    causal: query i sits at position kv_len - q_len + i and sees keys up to it. Otherwise every query sees
        all kv_len keys, and kv_len has nothing to do with q_len (cross-attention).
    bias: [Hb, P, K] float, Hb in {1, Hq}, any strides (0 too), indexed by head, query and key. The query's
        index is its position when causal, and its row within the sequence, i, when not.
    out: [T, Hq, D] to write to, last dim contiguous; new if None. Rows outside cu_seqlens_q are not written.

    plan: `plan_cpu` of the same tables, for callers with many layers; without a GPU only.
    num_decodes: the first so many sequences have exactly one row each: on a GPU they take the decode kernel
        and the rest the prefill kernel.
    shared: what those sequences (all of them where max_q_len == 1) have in common; ignored without a GPU,
        and where there is a bias.
    fresh: keys and values [T, Hkv, D] of this step's own tokens, q's rows, as they stand in the cache: each
        sequence's last ones. Long chunks are faster read from there. For causal attention.
    scales: of caches in float8_e4m3fn, those of k and of v, as in `kv_write`: a key is its e4m3 numbers times
        2^(its head's byte - 127).

    Queries that see no key give zeros.
    """
    if q.device.type != "cuda":
        plan = plan or plan_cpu(block_tables, cu_seqlens_q, kv_lens, k_cache.shape[1])
        return paged_attention_cpu(q, k_cache, v_cache, plan, scale, causal, bias, out, scales)
    return paged_attention_triton(
        q, k_cache, v_cache, block_tables, cu_seqlens_q, kv_lens,
        max_q_len=max_q_len, max_kv_len=max_kv_len, scale=scale, causal=causal, bias=bias, out=out,
        num_decodes=num_decodes, shared=shared, fresh=fresh, scales=scales,
    )  # fmt: skip


def paged_attention_triton(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    *,
    max_q_len: int,
    max_kv_len: int,
    scale: float,
    causal: bool = True,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    num_decodes: int = 0,
    shared: SharedPrefixes | None = None,
    fresh: tuple[Tensor, Tensor] | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`paged_attention` by its Triton kernels, whatever the device."""
    from mm_core.kernels._triton.attention_decode import decode
    from mm_core.kernels._triton.attention_packed import packed, packed_pays
    from mm_core.kernels._triton.attention_prefill import prefill
    from mm_core.kernels._triton.attention_shared import attend_shared

    result = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    count = kv_lens.shape[0]
    singles = count if max_q_len == 1 else num_decodes
    if singles:
        rows = (q, k_cache, v_cache, block_tables[:singles], cu_seqlens_q[: singles + 1])
        part = None
        if shared is not None and bias is None:
            part = attend_shared(
                *rows, shared.members, shared.bounds, shared.lens, max_kv_len=max_kv_len, scale=scale, scales=scales
            )
        decode(
            *rows, kv_lens[:singles], result,
            max_kv_len=max_kv_len, scale=scale, causal=causal, bias=bias, shared=part, scales=scales,
        )  # fmt: skip
    if singles == count:
        return result
    tables, bounds, lens = block_tables[singles:], cu_seqlens_q[singles:], kv_lens[singles:]
    plain = causal and bias is None
    if fresh is not None and plain and packed_pays(q, fresh, k_cache, scale, max_q_len, max_kv_len):
        packed(
            q, *fresh, bounds, result, max_seqlen=max_q_len, scale=scale, causal=True,
            caches=(k_cache, v_cache), block_tables=tables, kv_lens=lens, first_row=singles, scales=scales,
        )  # fmt: skip
    else:
        prefill(
            q, k_cache, v_cache, bounds, result, max_q_len=max_q_len, scale=scale, causal=causal,
            block_tables=tables, kv_lens=lens, bias=bias, first_row=singles, scales=scales,
        )  # fmt: skip
    return result
