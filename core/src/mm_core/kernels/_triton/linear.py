# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""y = x Wᵀ + b for one row: a stream of W through the registers of plain programs."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mm_core.kernels._triton.launch import can_start_early, launch_options


class GemvConfig(NamedTuple):
    """How `gemv` cuts the weight: rows and columns a program holds at once.

    early: start while the kernel before still runs, and load the first tile of W before waiting for it.
    """

    block_n: int
    block_k: int
    num_warps: int
    early: bool = True


@triton.jit
def weight_tile(w_ptr, rows, used_rows, cols, K, stride_w):
    """[rows, cols] of W, zeros outside."""
    mask = used_rows[:, None] & (cols < K)[None, :]
    return tl.load(w_ptr + rows[:, None] * stride_w + cols[None, :], mask=mask, other=0.0)


@triton.jit
def gemv_kernel(
    out_ptr,
    x_ptr,
    w_ptr,
    bias_ptr,
    N,
    K,
    stride_w,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program: BLOCK_N outputs. The next tile of W is on its way while one is multiplied."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    used = n < N
    rows = n.to(tl.int64)
    cols = tl.arange(0, BLOCK_K)
    w = weight_tile(w_ptr, rows, used, cols, K, stride_w)
    if GATED:
        u = weight_tile(w_ptr, rows + N, used, cols, K, stride_w)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + cols, mask=cols < K, other=0.0)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    acc_u = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for _ in range(0, K, BLOCK_K):
        cols += BLOCK_K
        next_w = weight_tile(w_ptr, rows, used, cols, K, stride_w)
        if GATED:
            next_u = weight_tile(w_ptr, rows + N, used, cols, K, stride_w)
        next_x = tl.load(x_ptr + cols, mask=cols < K, other=0.0)
        wide = x.to(tl.float32)[None, :]
        acc += w.to(tl.float32) * wide
        w = next_w
        if GATED:
            acc_u += u.to(tl.float32) * wide
            u = next_u
        x = next_x
    y = tl.sum(acc, axis=1)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=used, other=0.0).to(tl.float32)
    if GATED:
        y = y * tl.sigmoid(y) * tl.sum(acc_u, axis=1)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=used)


def gemv(x: Tensor, weight: Tensor, bias: Tensor | None, config: GemvConfig, *, gated: bool = False) -> Tensor:
    """x [1, K] contiguous, weight [N, K] with contiguous rows → [1, N]; gated: weight [2 F, K] → [1, F].

    Sums in float32 and rounds once. gated: silu(x Wgᵀ) · (x Wuᵀ), Wg being the first F rows.
    """
    early = config.early and can_start_early(x.device)
    count = weight.shape[0] // 2 if gated else weight.shape[0]
    out = torch.empty((1, count), dtype=x.dtype, device=x.device)
    gemv_kernel[(triton.cdiv(count, config.block_n),)](
        out,
        x,
        weight,
        bias,
        count,
        x.shape[1],
        weight.stride(0),
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GATED=gated,
        HAS_BIAS=bias is not None,
        EARLY=early,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
        **launch_options(early),
    )
    return out
