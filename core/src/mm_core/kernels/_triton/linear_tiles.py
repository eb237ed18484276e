# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""act(x Wᵀ + b) for many rows on Hopper: the widest tensor of a feed-forward layer is written once, activated.

Programs, one a multiprocessor, take tiles of 128 rows of x by 256 rows of W in turns. In each, one warp only
loads, across the borders of tiles. Two groups of four warps have 64 of the rows each, and their own pace within
the depth of the ring: while one computes activations, the other multiplies. The columns of K are added in one
order whatever the number of rows, so a row's result depends on that row alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from mm_core.kernels._triton import linear_hopper
from mm_core.kernels._triton.linear_hopper import barrier, copy_in, descriptor, weight_descriptor
from mm_core.kernels.linear import Activation

# Named anew after Triton 3.6
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

ROWS = gl.constexpr(64)  # of x that four warps multiply: what the tensor cores take
COUNT = gl.constexpr(256)  # rows of W in a tile: as many as one instruction takes
GROUPS = gl.constexpr(2)  # of four warps
PART = gl.constexpr(128)  # columns of the output that are written at once


class TilesConfig(NamedTuple):
    """block_k columns a step, num_stages of them on their way.

    band: rows of tiles that are gone through together, column by column, so that the L2 cache keeps their x.
    buffers: parts of 64 x 128 of the output that four warps may have on their way to memory.
    """

    block_k: int = 64
    num_stages: int = 4
    band: int = 16
    buffers: int = 1

    @property
    def shared_memory(self) -> int:
        """Bytes that a program takes, without the barriers."""
        stage = (128 + 256) * self.block_k * 2
        return stage * self.num_stages + 2 * self.buffers * 64 * 128 * 2


@gluon.jit
def place(tile, tiles_m, tiles_n, BAND: gl.constexpr):
    """Row and column of a tile."""
    per_band = BAND * tiles_n
    first = tile // per_band * BAND
    height = gl.minimum(tiles_m - first, BAND)
    inside = tile % per_band
    return first + inside % height, inside // height


@gluon.jit
def load_tiles(
    x_desc, w_desc, rings, work,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr, GATED: gl.constexpr,
):  # fmt: skip
    """The loading warp. GATED: W's rows come as 8 of the gate, their 8 of the up part, and so on."""
    x_smem, w_smem, full, empty = rings
    tiles_m, tiles_n, k_tiles = work
    index = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = place(tile, tiles_m, tiles_n, BAND)
        for step in range(k_tiles):
            stage = index % STAGES
            bar = full.index(stage)
            # A barrier that nobody has used counts as waited for with 1
            mbarrier.wait(empty.index(stage), ((index // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, (GROUPS * ROWS + COUNT) * BLOCK_K * 2)
            for group in gl.static_range(GROUPS):
                at = [(m * GROUPS + group) * ROWS, step * BLOCK_K]
                copy_in(x_desc, at, bar, x_smem.index(stage * GROUPS + group))
            target = w_smem.index(stage)
            if GATED:
                copy_in(w_desc, [n * (COUNT // 16), 0, 0, step * BLOCK_K], bar, target.reshape(w_desc.block_shape))
            else:
                copy_in(w_desc, [n * COUNT, step * BLOCK_K], bar, target)
            index += 1


@gluon.jit
def times_sigmoid(x, SCALE: gl.constexpr):
    """x * sigmoid(SCALE * x), to about 2^-21. The units for 1 / x and 2^x are what an activation waits for: their
    instructions are taken as they are, without the steps around them that keep denormal numbers."""
    y = x * (-1.4426950408889634 * SCALE)
    y = 1.0 + gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [y], gl.float32, True, 1)
    return x * gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [y], gl.float32, True, 1)


@gluon.jit
def activate(x, ACT: gl.constexpr):
    """The activation of float32 values."""
    if ACT == "gelu":
        y = 0.5 * x * (1.0 + gl.erf(x * 0.7071067811865476))
    elif ACT == "quick_gelu":
        y = times_sigmoid(x, 1.702)
    else:
        y = times_sigmoid(x, 1.0)
    return y


@gluon.jit
def write(value, out_desc, staging, row, col, slot, BUFFERS: gl.constexpr):
    """[64, 128] of the output through shared memory, which the copy from the BUFFERS-th call before has left."""
    part = staging.index(slot)
    tma.store_wait(BUFFERS - 1)
    barrier()
    part.store(value.to(out_desc.dtype))
    fence_async_shared()
    barrier()
    copy_out(out_desc, [row, col], part)


@gluon.jit
def multiply_tiles(
    out_desc, bias_ptr, staging, rings, work, N,
    STAGES: gl.constexpr, BAND: gl.constexpr, BUFFERS: gl.constexpr, ACT: gl.constexpr, MINE: gl.constexpr,
):  # fmt: skip
    """Four warps: rows MINE * 64 … of every tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COUNT, 16])
    x_smem, w_smem, full, empty = rings
    tiles_m, tiles_n, k_tiles = work
    index = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, gl.num_programs(0)):
        m, n = place(tile, tiles_m, tiles_n, BAND)
        acc = gl.zeros([ROWS, COUNT], gl.float32, layout=layout)
        if bias_ptr is not None:  # on its way while the products are made
            cols = n * COUNT + gl.arange(0, COUNT, layout=gl.SliceLayout(0, layout))
            bias = gl.load(bias_ptr + cols, mask=cols < N, other=0.0)
        for step in range(k_tiles):
            stage = index % STAGES
            mbarrier.wait(full.index(stage), (index // STAGES) & 1)
            w = w_smem.index(stage).permute((1, 0))
            acc = warpgroup_mma(x_smem.index(stage * GROUPS + MINE), w, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            if step > 0:
                mbarrier.arrive(empty.index((index - 1) % STAGES))
            index += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((index - 1) % STAGES))
        row = (m * GROUPS + MINE) * ROWS
        if ACT == "silu":
            # What a thread holds of a gate and of its up part are neighbours
            gate, up = gl.split(acc.reshape([ROWS, COUNT // 16, 2, 8]).permute(0, 1, 3, 2))
            y = (activate(gate, ACT) * up).reshape([ROWS, PART])
            write(y, out_desc, staging, row, n * PART, MINE * BUFFERS, 1)
        else:
            if bias_ptr is not None:
                acc += bias.to(gl.float32)[None, :]
            low, high = gl.split(acc.reshape([ROWS, 2, PART]).permute(0, 2, 1))
            slot = MINE * BUFFERS
            write(activate(low, ACT), out_desc, staging, row, n * COUNT, slot, BUFFERS)
            write(activate(high, ACT), out_desc, staging, row, n * COUNT + PART, slot + BUFFERS - 1, BUFFERS)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M"])
def linear_tiles_kernel(
    out_desc, x_desc, w_desc, bias_ptr, M, N, K,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, BAND: gl.constexpr,
    BUFFERS: gl.constexpr, ACT: gl.constexpr,
):  # fmt: skip
    """One program a multiprocessor. N: columns of the output."""
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES * GROUPS, ROWS, BLOCK_K], flat)
    w_smem = gl.allocate_shared_memory(x_desc.dtype, [STAGES, COUNT, BLOCK_K], flat)
    staging = gl.allocate_shared_memory(x_desc.dtype, [GROUPS * BUFFERS, ROWS, PART], flat)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    fence_async_shared()
    gated: gl.constexpr = ACT == "silu"
    width: gl.constexpr = PART if gated else COUNT
    work = (gl.cdiv(M, GROUPS * ROWS), gl.cdiv(N, width), gl.cdiv(K, BLOCK_K))
    rings = (x_smem, w_smem, full, empty)
    gl.warp_specialize(
        [
            (multiply_tiles, (out_desc, bias_ptr, staging, rings, work, N, STAGES, BAND, BUFFERS, ACT, 0)),
            (multiply_tiles, (out_desc, bias_ptr, staging, rings, work, N, STAGES, BAND, BUFFERS, ACT, 1)),
            (load_tiles, (x_desc, w_desc, rings, work, BLOCK_K, STAGES, BAND, gated)),
        ],
        [4, 1],
        [232, 24],
    )


def linear_tiles(x: Tensor, weight: Tensor, bias: Tensor | None, config: TilesConfig, act: Activation) -> Tensor:
    """x [M, K], weight [N, K] → act(x Wᵀ + b) [M, N], N a multiple of 8; silu: silu(x Wgᵀ) · (x Wuᵀ), weight
    [2 F, K] with Wg its first half and F a multiple of 8, no bias → [M, F].

    16-bit types; rows contiguous, 16-byte aligned. Sums, bias and activation in float32, rounded once.
    """
    gated = act == "silu"
    rows, width = x.shape
    count = weight.shape[0] // 2 if gated else weight.shape[0]
    tiles = triton.cdiv(rows, 128) * triton.cdiv(weight.shape[0], 256)
    out = torch.empty((rows, count), dtype=x.dtype, device=x.device)
    linear_tiles_kernel[(min(tiles, linear_hopper.processors(x.device)),)](
        descriptor(out, [64, 128]),
        descriptor(x, [64, config.block_k]),
        weight_descriptor(weight, 256, config.block_k, gated),
        bias,
        rows,
        count,
        width,
        BLOCK_K=config.block_k,
        STAGES=config.num_stages,
        BAND=config.band,
        BUFFERS=config.buffers,
        ACT=act,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out
