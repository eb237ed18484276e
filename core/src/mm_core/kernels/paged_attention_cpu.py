"""The CPU path of `paged_attention`: torch's fused attention, single-token sequences together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_core.kernels.fp8 import dequantise

# Rows of a prefill chunk that share one mask: bounds its size, and skips keys none of them sees.
CPU_CHUNK = 512
# Keys of a sequence from which on it is served alone, from where its keys lie: a copy for a call with others
# takes longer than the call.
_LONG = 512


@dataclass(frozen=True)
class _Singles:
    """Sequences with one query each that one call serves: their rows, keys' slots and mask.

    slots: [S * longest] int64 into the flattened cache, places past a sequence's end repeating its
    last key (what lies past the end may be NaN, which no mask removes); None for one sequence.
    """

    seqs: list[int]
    rows: list[int]
    lens: list[int]
    longest: int
    slots: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True)
class CpuPlan:
    """What the CPU path derives from a batch's block tables: the same for all layers of a step."""

    bounds: list[int]
    lengths: list[int]
    blocks: list[list[int]]
    chunks: list[int]
    singles: list[_Singles]


def plan_cpu(block_tables: Tensor, cu_seqlens_q: Tensor, kv_lens: Tensor, block_size: int) -> CpuPlan:
    """The plan of a batch, arguments as `paged_attention`'s. Make it once a step, pass it to every layer."""
    bounds: list[int] = cu_seqlens_q.tolist()
    lengths: list[int] = kv_lens.tolist()
    blocks = [row[: -(-n // block_size)] for row, n in zip(block_tables.tolist(), lengths, strict=True)]
    queries = [end - start for start, end in pairwise(bounds)]
    singles = [s for s, n in enumerate(queries) if n == 1 and lengths[s] > 0]
    chunks = [s for s, n in enumerate(queries) if n > 0 and not (n == 1 and lengths[s] > 0)]
    groups = [_plan_singles(g, bounds, lengths, block_tables, block_size) for g in _similar(singles, lengths)]
    return CpuPlan(bounds, lengths, blocks, chunks, groups)


def _similar(seqs: list[int], lengths: list[int]) -> list[list[int]]:
    """Groups whose shortest has at least half the keys of its longest: padding at most doubles the work. Long
    sequences have none beside them."""
    groups: list[list[int]] = [[seq] for seq in seqs if lengths[seq] >= _LONG]
    seqs = [seq for seq in seqs if lengths[seq] < _LONG]
    if not seqs or 2 * min(lengths[seq] for seq in seqs) >= max(lengths[seq] for seq in seqs):
        return [*groups, seqs] if seqs else groups
    own = len(groups)
    for seq in sorted(seqs, key=lambda seq: -lengths[seq]):
        if len(groups) > own and 2 * lengths[seq] >= lengths[groups[-1][0]]:
            groups[-1].append(seq)
        else:
            groups.append([seq])
    return groups


def _plan_singles(
    seqs: list[int], bounds: list[int], lengths: list[int], block_tables: Tensor, block_size: int
) -> _Singles:
    lens = [lengths[s] for s in seqs]
    rows, longest = [bounds[s] for s in seqs], max(lens)
    if len(seqs) == 1:
        return _Singles(seqs, rows, lens, longest, None, None)
    limits = torch.tensor(lens)[:, None]
    tokens = torch.minimum(torch.arange(longest)[None, :], limits - 1)
    blocks = block_tables[seqs].long().gather(1, tokens // block_size)
    mask = (torch.arange(longest) < limits)[:, None, None, :] if min(lens) < longest else None
    return _Singles(seqs, rows, lens, longest, (blocks * block_size + tokens % block_size).view(-1), mask)


def paged_attention_cpu(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: CpuPlan,
    scale: float,
    causal: bool,
    bias: Tensor | None,
    out: Tensor | None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Single-token sequences together in a few calls, longer ones one by one."""
    cached = _Cached(k_cache, v_cache, scales, plan, q.dtype)
    # The rows of a batch that only decodes are its queries as they stand.
    whole = len(plan.singles) == 1 and plan.singles[0].rows == list(range(q.shape[0]))
    if whole and out is None:
        return _attend_singles(q, *cached.of_group(plan.singles[0]), plan.singles[0], scale, causal, bias)
    result = torch.empty(q.shape, dtype=q.dtype) if out is None else out
    for seq in plan.chunks:
        start, end, kv_len = plan.bounds[seq], plan.bounds[seq + 1], plan.lengths[seq]
        if kv_len == 0:
            result[start:end] = 0
            continue
        _attend_one(q[start:end], *cached.of_sequence(seq, kv_len), result[start:end], scale, causal, bias)
    for group in plan.singles:
        result[group.rows] = _attend_singles(q[group.rows], *cached.of_group(group), group, scale, causal, bias)
    return result


@dataclass(frozen=True)
class _Cached:
    """Keys and values out of the cache; of an fp8 one as the numbers they stand for, in dtype."""

    k_cache: Tensor
    v_cache: Tensor
    scales: tuple[Tensor, Tensor] | None
    plan: CpuPlan
    dtype: torch.dtype

    def of_sequence(self, seq: int, kv_len: int) -> tuple[Tensor, Tensor]:
        """Of one sequence, [kv_len, Hkv, D] each."""
        k, v = self._read(functools.partial(_gather, blocks=self.plan.blocks[seq], kv_len=kv_len))
        return k, v

    def of_group(self, group: _Singles) -> tuple[Tensor, Tensor]:
        """Of a group, [S, longest, Hkv, D] each."""
        k, v = self._read(functools.partial(_pick, plan=self.plan, group=group))
        return k, v

    def _read(self, pick: Callable[[Tensor], Tensor]) -> list[Tensor]:
        caches = (self.k_cache, self.v_cache)
        if self.scales is None:
            return [pick(cache) for cache in caches]
        bytes_of = [cache.view(torch.uint8) for cache in caches]  # few operations take an fp8 tensor
        pairs = zip(bytes_of, self.scales, strict=True)
        return [dequantise(pick(codes), pick(exponents), self.dtype) for codes, exponents in pairs]


def _gather(cache: Tensor, blocks: list[int], kv_len: int) -> Tensor:
    """[kv_len, Hkv, ...] of one sequence: a view where its blocks lie one after another."""
    if blocks == list(range(blocks[0], blocks[0] + len(blocks))):
        picked = cache[blocks[0] : blocks[0] + len(blocks)]
    else:
        picked = cache.index_select(0, torch.tensor(blocks))
    return picked.flatten(0, 1)[:kv_len]


def _pick(cache: Tensor, plan: CpuPlan, group: _Singles) -> Tensor:
    """Keys or values [S, longest, Hkv, ...] of a group."""
    if group.slots is None:
        return _gather(cache, plan.blocks[group.seqs[0]], group.longest)[None]
    block_size = cache.shape[1]
    if cache.stride(0) == block_size * cache.stride(1):
        rows = cache.flatten(0, 1).index_select(0, group.slots)
    else:
        rows = cache[group.slots // block_size, group.slots % block_size]
    return rows.view(len(group.seqs), group.longest, *cache.shape[2:])


def _attend_singles(
    q: Tensor, k: Tensor, v: Tensor, group: _Singles, scale: float, causal: bool, bias: Tensor | None
) -> Tensor:
    """One query a sequence: q [S, Hq, D], k and v [S, longest, Hkv, D] -> [S, Hq, D].

    The query heads of one KV head stand in as its queries: no key is copied for them.
    """
    count, num_heads, head_size = q.shape
    num_kv_heads, longest = k.shape[2], k.shape[1]
    heads = num_heads // num_kv_heads
    if count == 1 and longest >= _LONG and bias is None and q.dtype == k.dtype == torch.bfloat16:
        return _attend_long(q[0] * scale, k[0], v[0])[None]
    mask = group.mask
    if bias is not None:
        row = torch.tensor(group.lens) - 1 if causal else torch.zeros(count, dtype=torch.long)
        added = bias[:, row, :longest].float().transpose(0, 1)  # [S, Hb, N]
        added = added.view(count, num_kv_heads, heads, -1) if bias.shape[0] > 1 else added[:, None]
        mask = added if mask is None else added.masked_fill(~mask, float("-inf"))
    out = F.scaled_dot_product_attention(
        q.reshape(count, num_kv_heads, heads, head_size), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=mask if mask is None or mask.dtype == torch.bool else mask.to(q.dtype), scale=scale,
    )  # fmt: skip
    return out.reshape(count, num_heads, head_size)


def _attend_long(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One scaled query q [Hq, D] over many keys [N, Hkv, D] in bfloat16 -> [Hq, D]. All heads are one product,
    each query in its head's place of a row of zeros: that reads keys and values once, as they lie, and takes
    an eighth of the time of torch's fused attention (1,500 keys, 8 heads of 64)."""
    heads = k.shape[1]
    grouped = q.view(heads, -1, q.shape[1])  # by the KV head they read
    wide = q.new_zeros((heads, grouped.shape[1], heads, q.shape[1]))
    wide.diagonal(dim1=0, dim2=2).copy_(grouped.permute(1, 2, 0))
    shares = torch.softmax(torch.mm(wide.view(len(q), -1), k.flatten(1).t()), -1)
    out = torch.mm(shares, v.flatten(1)).view(wide.shape).diagonal(dim1=0, dim2=2)
    return out.permute(2, 0, 1).reshape(q.shape)


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
