# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""Products of many rows with an activation at their end: one pass less over what is widest (sm_90)."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


class TileConfig(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8


GATED = TileConfig(128, 128, 64, 8, 3)
GELU = TileConfig(128, 256, 64, 8, 4)


@triton.jit
def tile_place(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of a tile: GROUP rows of tiles at a time, so that those in flight share their operands."""
    per_group = GROUP * tiles_n
    first = tile // per_group * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    return first + tile % per_group % size, tile % per_group // size


@triton.jit
def gated_tiles_kernel(
    x_desc, w_desc, out_desc, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Each program: every num_programs-th tile of silu(x Wgᵀ) · (x Wuᵀ)."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    dtype: tl.constexpr = out_desc.dtype
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = tile_place(tile, tiles_m, tiles_n, GROUP)
        gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([m * BLOCK_M, k])
            gate = tl.dot(x, w_desc.load([n * BLOCK_N, k]).T, gate)
            up = tl.dot(x, w_desc.load([N + n * BLOCK_N, k]).T, up)
        # Rounded wherever separate ops would round.
        gate = gate.to(dtype).to(tl.float32)
        gate = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32)
        out_desc.store([m * BLOCK_M, n * BLOCK_N], (gate * up.to(dtype).to(tl.float32)).to(dtype))


@triton.jit
def gelu_part(acc, bias_ptr, cols, N, dtype: tl.constexpr):
    """quick_gelu(acc + bias), rounded wherever separate ops would round."""
    bias = tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    y = (acc + bias[None, :]).to(dtype).to(tl.float32)
    return (y * tl.sigmoid(1.702 * y)).to(dtype)


@triton.jit
def gelu_tiles_kernel(
    x_desc, w_desc, out_desc, bias_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Each program: every num_programs-th tile of quick_gelu(x Wᵀ + b), stored in two halves to save memory."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    half: tl.constexpr = BLOCK_N // 2
    dtype: tl.constexpr = out_desc.dtype
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        m, n = tile_place(tile, tiles_m, tiles_n, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            acc = tl.dot(x_desc.load([m * BLOCK_M, k]), w_desc.load([n * BLOCK_N, k]).T, acc)
        low, high = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, half)), (0, 2, 1)))
        cols = n * BLOCK_N + tl.arange(0, half)
        out_desc.store([m * BLOCK_M, n * BLOCK_N], gelu_part(low, bias_ptr, cols, N, dtype))
        out_desc.store([m * BLOCK_M, n * BLOCK_N + half], gelu_part(high, bias_ptr, cols + half, N, dtype))


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; a few elsewhere, so that a program has several tiles in tests."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def _descriptor(matrix: Tensor, rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, cols])


def gated_tiles(x: Tensor, weight: Tensor, config: TileConfig = GATED) -> Tensor:
    """silu(x Wgᵀ) · (x Wuᵀ): x [M, K], weight [2 N, K] → [M, N]; rows of 16 bytes' multiples."""
    rows, count = x.shape[0], weight.shape[0] // 2
    out = torch.empty((rows, count), dtype=x.dtype, device=x.device)
    m, n, k = config[:3]
    tiles = triton.cdiv(rows, m) * triton.cdiv(count, n)
    gated_tiles_kernel[(min(processors(x.device), tiles),)](
        _descriptor(x, m, k), _descriptor(weight, n, k), _descriptor(out, m, n), rows, count, x.shape[1],
        BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP=config.group,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out


def gelu_tiles(x: Tensor, weight: Tensor, bias: Tensor, config: TileConfig = GELU) -> Tensor:
    """quick_gelu(x Wᵀ + b): x [M, K], weight [N, K], bias [N] → [M, N]; rows of 16 bytes' multiples."""
    rows, count = x.shape[0], weight.shape[0]
    out = torch.empty((rows, count), dtype=x.dtype, device=x.device)
    m, n, k = config[:3]
    tiles = triton.cdiv(rows, m) * triton.cdiv(count, n)
    gelu_tiles_kernel[(min(processors(x.device), tiles),)](
        _descriptor(x, m, k), _descriptor(weight, n, k), _descriptor(out, m, n // 2), bias, rows, count, x.shape[1],
        BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP=config.group,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out
