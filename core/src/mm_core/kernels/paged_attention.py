"""Attention over the paged KV cache: decode, prefill, mixed batches and cross-attention."""

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of a prefill chunk that share one mask on the CPU: bounds its size, and skips keys none of them sees.
CPU_CHUNK = 512


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

    Queries that see no key give zeros.
    """
    if q.device.type != "cuda":
        return _paged_attention_cpu(q, k_cache, v_cache, block_tables, cu_seqlens_q, kv_lens, scale, causal, bias, out)
    return paged_attention_triton(
        q, k_cache, v_cache, block_tables, cu_seqlens_q, kv_lens,
        max_q_len=max_q_len, max_kv_len=max_kv_len, scale=scale, causal=causal, bias=bias, out=out,
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
) -> Tensor:
    """`paged_attention` by its Triton kernels, whatever the device."""
    from mm_core.kernels._triton.attention_decode import decode
    from mm_core.kernels._triton.attention_prefill import prefill

    result = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if max_q_len == 1:
        decode(
            q, k_cache, v_cache, block_tables, cu_seqlens_q, kv_lens, result,
            max_kv_len=max_kv_len, scale=scale, causal=causal, bias=bias,
        )  # fmt: skip
    else:
        prefill(
            q, k_cache, v_cache, cu_seqlens_q, result, max_q_len=max_q_len, scale=scale, causal=causal,
            block_tables=block_tables, kv_lens=kv_lens, bias=bias,
        )  # fmt: skip
    return result


def _paged_attention_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    kv_lens: Tensor,
    scale: float,
    causal: bool,
    bias: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """Single-token sequences together in a few calls, longer ones one by one."""
    result = torch.empty(q.shape, dtype=q.dtype) if out is None else out
    bounds: list[int] = cu_seqlens_q.tolist()
    lengths: list[int] = kv_lens.tolist()
    singles: list[int] = []
    for seq, kv_len in enumerate(lengths):
        start, end = bounds[seq], bounds[seq + 1]
        if kv_len == 0:
            result[start:end] = 0
        elif end - start == 1:
            singles.append(seq)
        elif end > start:
            k = _gather(k_cache, block_tables[seq], kv_len)
            v = _gather(v_cache, block_tables[seq], kv_len)
            _attend_one(q[start:end], k, v, result[start:end], scale, causal, bias)
    for seqs in _similar(singles, lengths):
        lens = [lengths[seq] for seq in seqs]
        k, v = _gather_many(k_cache, v_cache, block_tables, seqs, lens)
        rows = [bounds[seq] for seq in seqs]
        # The rows of a batch that only decodes are its queries as they stand.
        whole = len(rows) == q.shape[0]
        attended = _attend_singles(q if whole else q[rows], k, v, lens, scale, causal, bias)
        if whole and out is None:
            return attended
        result[rows] = attended
    return result


def _similar(seqs: list[int], lengths: list[int]) -> list[list[int]]:
    """Groups whose shortest has at least half the keys of its longest: padding at most doubles the work."""
    groups: list[list[int]] = []
    if not seqs or 2 * min(lengths[seq] for seq in seqs) >= max(lengths[seq] for seq in seqs):
        return [seqs] if seqs else []
    for seq in sorted(seqs, key=lambda seq: -lengths[seq]):
        if groups and 2 * lengths[seq] >= lengths[groups[-1][0]]:
            groups[-1].append(seq)
        else:
            groups.append([seq])
    return groups


def _gather(cache: Tensor, table: Tensor, kv_len: int) -> Tensor:
    """[kv_len, Hkv, D] of one sequence: a view where its blocks lie one after another."""
    block_size = cache.shape[1]
    count = -(-kv_len // block_size)
    blocks: list[int] = table[:count].tolist()
    if blocks == list(range(blocks[0], blocks[0] + count)):
        picked = cache[blocks[0] : blocks[0] + count]
    else:
        picked = cache.index_select(0, table[:count])
    return picked.flatten(0, 1)[:kv_len]


def _gather_many(
    k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, seqs: list[int], lens: list[int]
) -> tuple[Tensor, Tensor]:
    """K and V [S, N, Hkv, D], N the longest; places past a sequence's end repeat its last key."""
    if len(seqs) == 1:
        table = block_tables[seqs[0]]
        return _gather(k_cache, table, lens[0])[None], _gather(v_cache, table, lens[0])[None]
    _, block_size, num_heads, head_size = k_cache.shape
    longest = max(lens)
    # Not past the end: what lies there may be NaN, which no mask removes.
    tokens = torch.arange(longest)[None, :]
    if min(lens) < longest:
        tokens = torch.minimum(tokens, torch.tensor(lens)[:, None] - 1)
    else:
        tokens = tokens.expand(len(seqs), -1)
    tables = block_tables if seqs == list(range(block_tables.shape[0])) else block_tables[seqs]
    slots = tables.long().gather(1, tokens // block_size) * block_size + tokens % block_size

    def pick(cache: Tensor) -> Tensor:
        if cache.stride(0) == block_size * cache.stride(1):
            rows = cache.flatten(0, 1).index_select(0, slots.view(-1))
        else:
            rows = cache[slots.view(-1) // block_size, slots.view(-1) % block_size]
        return rows.view(len(seqs), longest, num_heads, head_size)

    return pick(k_cache), pick(v_cache)


def _attend_singles(
    q: Tensor, k: Tensor, v: Tensor, lens: list[int], scale: float, causal: bool, bias: Tensor | None
) -> Tensor:
    """One query a sequence: q [S, Hq, D], k and v [S, N, Hkv, D] -> [S, Hq, D].

    The query heads of one KV head stand in as its queries: no key is copied for them.
    """
    count, num_heads, head_size = q.shape
    num_kv_heads, longest = k.shape[2], k.shape[1]
    group = num_heads // num_kv_heads
    mask: Tensor | None = None
    if min(lens) < longest:
        mask = (torch.arange(longest) < torch.tensor(lens)[:, None])[:, None, None, :]
    if bias is not None:
        row = torch.tensor(lens) - 1 if causal else torch.zeros(count, dtype=torch.long)
        added = bias[:, row, :longest].float().transpose(0, 1)  # [S, Hb, N]
        added = added.view(count, num_kv_heads, group, -1) if bias.shape[0] > 1 else added[:, None]
        mask = added if mask is None else added.masked_fill(~mask, float("-inf"))
    out = F.scaled_dot_product_attention(
        q.reshape(count, num_kv_heads, group, head_size), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype), scale=scale,
    )  # fmt: skip
    return out.reshape(count, num_heads, head_size)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, out: Tensor, scale: float, causal: bool, bias: Tensor | None) -> None:
    """One sequence's chunk: q and out [M, Hq, D], k and v [N, Hkv, D]."""
    q_len, kv_len = q.shape[0], k.shape[0]
    hidden = max(0, q_len - kv_len) if causal else 0
    out[:hidden] = 0  # queries before the first key
    keys, values = (x.transpose(0, 1)[None] for x in (k, v))  # [1, Hkv, N, D]
    grouped = q.shape[1] != k.shape[1]
    if bias is None and (not causal or q_len - hidden == kv_len):
        whole = F.scaled_dot_product_attention(
            q[hidden:].transpose(0, 1)[None], keys, values, is_causal=causal, scale=scale, enable_gqa=grouped
        )
        out[hidden:] = whole[0].transpose(0, 1)
        return
    shift = kv_len - q_len
    for start in range(hidden, q_len, CPU_CHUNK):
        end = min(start + CPU_CHUNK, q_len)
        visible = shift + end if causal else kv_len
        rows = torch.arange(start, end) + (shift if causal else 0)
        mask = torch.arange(visible) <= rows[:, None] if causal else None
        if bias is not None:
            added = bias[:, rows[0] : rows[-1] + 1, :visible].to(q.dtype)
            mask = added if mask is None else added.masked_fill(~mask, float("-inf"))
            mask = mask[None]
        part = F.scaled_dot_product_attention(
            q[start:end].transpose(0, 1)[None], keys[:, :, :visible], values[:, :, :visible],
            attn_mask=mask, scale=scale, enable_gqa=grouped,
        )  # fmt: skip
        out[start:end] = part[0].transpose(0, 1)
