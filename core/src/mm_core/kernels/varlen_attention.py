"""Attention inside each of many packed segments, without a cache: encoder towers."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

# On a CPU: segments this long are worth a loop over heads, and so many scores at a time stay in its caches.
_LONG = 256
_SCORES = 2**20


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    scale: float,
    causal: bool = False,
) -> Tensor:
    """softmax(scale * q k^T) v inside each segment (Vaswani et al. 2017, eq. 1), in float32.

    q: [T, Hq, D]; k, v: [T, Hkv, D], Hq a multiple of Hkv; any strides with the last dim contiguous.
    cu_seqlens: [S + 1] int32 starting at 0; segment s is rows [cu[s], cu[s + 1]) of all three, e.g. one image
        or one attention window of an image. Empty segments are allowed.
    max_seqlen: host-side bound of the segments' lengths.
    Returns [T, Hq, D]; rows outside cu_seqlens are undefined.
    """
    if q.device.type != "cuda":
        return _varlen_attention_cpu(q, k, v, cu_seqlens, scale, causal)
    return varlen_attention_triton(q, k, v, cu_seqlens, max_seqlen=max_seqlen, scale=scale, causal=causal)


def varlen_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    scale: float,
    causal: bool = False,
) -> Tensor:
    """`varlen_attention` by its Triton kernels, whatever the device."""
    from mm_core.kernels._triton.attention_packed import packable, packed
    from mm_core.kernels._triton.attention_prefill import prefill

    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if packable(q, k, v, scale):
        packed(q, k, v, cu_seqlens, out, max_seqlen=max_seqlen, scale=scale, causal=causal)
    else:
        prefill(q, k, v, cu_seqlens, out, max_q_len=max_seqlen, scale=scale, causal=causal)
    return out


def _varlen_attention_cpu(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, causal: bool) -> Tensor:
    """One call for all neighbouring segments of one length, so that 300 windows cost one call."""
    out = torch.empty(q.shape, dtype=q.dtype)
    for start, count, length in _runs(cu_seqlens.tolist()):
        end = start + count * length
        # [T', H, D] -> [count, H, length, D]
        queries, keys, values = (x[start:end].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        if q.dtype == torch.bfloat16 and not causal and length >= _LONG and q.shape[1] == k.shape[1]:
            _attend_long(queries, keys, values, scale, out[start:end].view(count, length, *q.shape[1:]).transpose(1, 2))
            continue
        part = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        out[start:end] = part.transpose(1, 2).flatten(0, 1)
    return out


def _attend_long(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None:
    """[S, H, N, D] each, head by head: whole matrix products in bfloat16, which a CPU runs 1.7 times as
    fast as its fused attention (1,024 rows of 64). Scores and probabilities are rounded to bfloat16."""
    length = q.shape[2]
    chunks = -(-length // max(_SCORES // length, 1))
    rows = -(-length // chunks)
    # One buffer for all: fresh memory costs as much as the product that fills it.
    buffer = q.new_empty((rows, length))
    for segment in range(q.shape[0]):
        for head in range(q.shape[1]):
            keys = k[segment, head].contiguous().t()
            values = v[segment, head].contiguous()
            queries, target = q[segment, head] * scale, out[segment, head]
            for first in range(0, length, rows):
                scores = buffer[: min(rows, length - first)]
                torch.mm(queries[first : first + rows], keys, out=scores)
                torch.softmax(scores, -1, out=scores)
                target[first : first + rows] = torch.mm(scores, values)


def _runs(bounds: list[int]) -> list[tuple[int, int, int]]:
    """(first row, number of segments, their length) for each run of equally long neighbours."""
    runs: list[tuple[int, int, int]] = []
    for start, end in itertools.pairwise(bounds):
        length = end - start
        if length == 0:
            continue
        if runs and runs[-1][2] == length:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, length)
        else:
            runs.append((start, 1, length))
    return runs
