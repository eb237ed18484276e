# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""y = x Wᵀ + b for few rows on Hopper: W is read once, in equal shares (stream-K, Osama et al. 2023).

The steps along K of all output tiles form one line, cut into equal parts, one a multiprocessor, so none
waits for another however few tiles there are. Whoever finishes a cut tile last adds up the float32 parts,
always in the same order: results are deterministic, and nobody waits. In each multiprocessor one warp
only loads, as far ahead as there is room, while one or two groups of four warps multiply: each has 64 rows
of W (the left operand of the tensor cores) and all rows of x.
"""

from __future__ import annotations

from functools import cache
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from mm_core.kernels._triton.launch import launch_options

# Named anew after Triton 3.6
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

GROUP = gl.constexpr(64)  # rows of W that four warps multiply: what the tensor cores take


class HopperConfig(NamedTuple):
    """Tiles of `hopper`: block_m rows of x, 64 * groups (1 or 2) rows of W, block_k columns; num_stages on their way.

    early: start while the kernel before still runs, and load W before waiting for it (see launch.py).
    """

    block_m: int
    groups: int
    block_k: int
    num_stages: int
    early: bool = True


@gluon.jit
def place(index, first, last, k_tiles):
    """(tile, step) of the index-th step of a program: tiles downwards, steps within a tile upwards."""
    mirrored = last - 1 - index
    tile = mirrored // k_tiles
    low = gl.maximum(first, tile * k_tiles)
    high = gl.minimum(last, (tile + 1) * k_tiles)
    return tile, low - tile * k_tiles + high - 1 - mirrored


@gluon.jit
def load_weights(w_desc, w_smem, bar, slot, tile, col, GROUPS: gl.constexpr, GATED: gl.constexpr):
    """W for one step. GATED: 8 gate rows, then their 8 up rows, and so on."""
    for group in gl.static_range(GROUPS):
        target = w_smem.index(slot * GROUPS + group)
        if GATED:
            target = target.reshape(w_desc.block_shape)
            at = [(tile * GROUPS + group) * (GROUP // 16), 0, 0, col]
            copy_in(w_desc, at, bar, target)
        else:
            copy_in(w_desc, [(tile * GROUPS + group) * GROUP, col], bar, target)


@gluon.jit
def load_all(
    w_desc, x_desc, rings, line,
    BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    GATED: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """The loading warp: as far ahead of the products as there is room."""
    size: gl.constexpr = (GROUPS * GROUP + BLOCK_M) * BLOCK_K * 2
    w_smem, x_smem, full, empty = rings
    first, last, k_tiles, m_tiles, _ = line
    count = last - first
    ready = gl.minimum(count, STAGES)
    for index in range(ready):
        tile, step = place(index, first, last, k_tiles)
        bar = full.index(index)
        mbarrier.expect(bar, size)
        load_weights(w_desc, w_smem, bar, index, tile // m_tiles, step * BLOCK_K, GROUPS, GATED)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    for index in range(ready):
        tile, step = place(index, first, last, k_tiles)
        at = [tile % m_tiles * BLOCK_M, step * BLOCK_K]
        copy_in(x_desc, at, full.index(index), x_smem.index(index))
    for index in range(ready, count):
        stage = index % STAGES
        tile, step = place(index, first, last, k_tiles)
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), (index // STAGES - 1) & 1)
        mbarrier.expect(bar, size)
        load_weights(w_desc, w_smem, bar, stage, tile // m_tiles, step * BLOCK_K, GROUPS, GATED)
        at = [tile % m_tiles * BLOCK_M, step * BLOCK_K]
        copy_in(x_desc, at, bar, x_smem.index(stage))


@gluon.jit
def gated_pairs(value, BLOCK_M: gl.constexpr):
    """[64, M] whose rows are 8 gate rows, 8 up rows, 8 gate rows … as two of [4, 8, M]: no thread gives any away."""
    return gl.split(value.reshape([GROUP // 16, 2, 8, BLOCK_M]).permute(0, 2, 3, 1))


@gluon.jit
def complete(
    acc, parts, begin, low, line, squares,
    BLOCK_M: gl.constexpr, GROUPS: gl.constexpr, MINE: gl.constexpr,
):  # fmt: skip
    """Leave a part of a cut tile; true, and the whole sum, where it was the last one to come."""
    partial_ptr, count_ptr = parts
    _, _, k_tiles, _, steps = line
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    size: gl.constexpr = GROUP * BLOCK_M
    stride: gl.constexpr = GROUPS * size
    start = (((begin + 1).to(gl.int64) * programs - 1) // steps).to(gl.int32)
    end = (((begin + k_tiles).to(gl.int64) * programs - 1) // steps).to(gl.int32)
    mine = partial_ptr + MINE * size + squares
    # A program has two places: one for the beginning of a tile, one for anything else
    gl.store(mine + (2 * pid + (low > 0).to(gl.int32)) * stride, acc)
    barrier()
    count = count_ptr + start * GROUPS + MINE
    last_one = gl.atomic_add(count, 1, sem="acq_rel", scope="gpu") == end - start
    if last_one:
        gl.atomic_xchg(count, 0, sem="relaxed", scope="gpu")
        acc = gl.load(mine + 2 * start * stride, cache_modifier=".cg")
        if BLOCK_M * GROUPS > 128:
            for other in range(start + 1, end + 1):
                acc += gl.load(mine + (2 * other + 1) * stride, cache_modifier=".cg")
        else:
            # Few registers' worth: several on their way at once
            for base in range(start + 1, end + 1, 4):
                for other in gl.static_range(4):
                    limit = (base + other > end).to(gl.int32) * size
                    part = mine + (2 * (base + other) + 1) * stride
                    acc += gl.load(part, mask=squares >= limit, other=0.0, cache_modifier=".cg")
    return last_one, acc


@gluon.jit
def write(acc, out, bias_ptr, group, row, in_n, in_m, BLOCK_M: gl.constexpr, GATED: gl.constexpr):
    """64 rows of W's products, with bias or gate: columns `group` of the output."""
    out_ptr, M, N, stride_o = out
    n = group * (GROUP // 2) + (in_n // 16) * 8 + in_n % 8 if GATED else group * GROUP + in_n
    m = row + in_m
    if bias_ptr is not None:
        acc += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    offsets = n[:, None] + (m * stride_o)[None, :]
    used = ((n < N)[:, None] & (m < M)[None, :]).to(gl.int32)
    if GATED:
        gate, up = gated_pairs(acc, BLOCK_M)
        acc = gate / (1.0 + gl.exp(-gate)) * up
        offsets, _ = gated_pairs(offsets, BLOCK_M)
        used, _ = gated_pairs(used, BLOCK_M)
    gl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=used != 0)


@gluon.jit
def multiply(
    out, bias_ptr, parts, rings, line,
    BLOCK_M: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    GATED: gl.constexpr, MINE: gl.constexpr,
):  # fmt: skip
    """Four warps: rows MINE * 64 … of every tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    w_smem, x_smem, full, empty = rings
    first, last, k_tiles, m_tiles, _ = line
    in_n = gl.arange(0, GROUP, layout=gl.SliceLayout(1, layout))
    in_m = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(0, layout))
    # Squares of 8 x 8 one after another: what a warp holds is then contiguous
    squares = ((in_n // 8) * (BLOCK_M * 8) + (in_n % 8) * 8)[:, None] + ((in_m // 8) * 64 + in_m % 8)[None, :]
    top = (last - 1) // k_tiles
    index = 0
    for back in range(top - first // k_tiles + 1):
        tile = top - back
        begin = tile * k_tiles
        low = gl.maximum(first, begin) - begin
        high = gl.minimum(last - begin, k_tiles)
        acc = gl.zeros([GROUP, BLOCK_M], gl.float32, layout=layout)
        for step in range(low, high):
            stage = index % STAGES
            mbarrier.wait(full.index(stage), (index // STAGES) & 1)
            x = x_smem.index(stage).permute((1, 0))
            acc = warpgroup_mma(w_smem.index(stage * GROUPS + MINE), x, acc, is_async=True)
            acc = warpgroup_mma_wait(1, deps=[acc])
            if step > low:
                mbarrier.arrive(empty.index((index - 1) % STAGES))
            index += 1
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index((index - 1) % STAGES))
        whole = True
        if (low > 0) | (high < k_tiles):
            whole, acc = complete(acc, parts, begin, low, line, squares, BLOCK_M, GROUPS, MINE)
        if whole:
            group = tile // m_tiles * GROUPS + MINE
            write(acc, out, bias_ptr, group, tile % m_tiles * BLOCK_M, in_n, in_m, BLOCK_M, GATED)


@gluon.jit(do_not_specialize=["M"])
def hopper_kernel(
    out_ptr, x_desc, w_desc, bias_ptr, partial_ptr, count_ptr, M, N, K, stride_o,
    BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    GATED: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """One program a multiprocessor: steps [first, last) of the line."""
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    w_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES * GROUPS, GROUP, BLOCK_K], flat)
    x_smem = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=GROUPS)
    fence_async_shared()
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    k_tiles = gl.cdiv(K, BLOCK_K)
    m_tiles = gl.cdiv(M, BLOCK_M)
    out_rows: gl.constexpr = GROUP // 2 if GATED else GROUP
    steps = gl.cdiv(N, GROUPS * out_rows) * m_tiles * k_tiles
    first = (pid.to(gl.int64) * steps // programs).to(gl.int32)
    last = ((pid + 1).to(gl.int64) * steps // programs).to(gl.int32)
    line = (first, last, k_tiles, m_tiles, steps)
    rings = (w_smem, x_smem, full, empty)
    out = (out_ptr, M, N, stride_o)
    parts = (partial_ptr, count_ptr)
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (multiply, (out, bias_ptr, parts, rings, line, BLOCK_M, GROUPS, STAGES, GATED, 0)),
                (load_all, (w_desc, x_desc, rings, line, BLOCK_M, BLOCK_K, GROUPS, STAGES, GATED, EARLY)),
            ],
            [1],
            [24],
        )
    else:
        gl.warp_specialize(
            [
                (multiply, (out, bias_ptr, parts, rings, line, BLOCK_M, GROUPS, STAGES, GATED, 0)),
                (multiply, (out, bias_ptr, parts, rings, line, BLOCK_M, GROUPS, STAGES, GATED, 1)),
                (load_all, (w_desc, x_desc, rings, line, BLOCK_M, BLOCK_K, GROUPS, STAGES, GATED, EARLY)),
            ],
            [4, 1],
            [232, 24],
        )


def shared_layout(block: list[int]) -> gl.NVMMASharedLayout:
    """What the tensor cores read of a tile of 16-bit numbers."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(block))


def descriptor(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    """Tiles of a matrix of 16-bit numbers, rows contiguous, as the tensor cores read them."""
    return TensorDescriptor(matrix, list(matrix.shape), [matrix.stride(0), 1], block, shared_layout(block))


def weight_descriptor(weight: Tensor, rows: int, block_k: int, gated: bool) -> TensorDescriptor:
    """That many rows of W. gated: W seen as [F / 8, 2, 8, K], so that a feature's gate and up rows come together."""
    if not gated:
        return descriptor(weight, [rows, block_k])
    count, stride = weight.shape[0] // 2, weight.stride(0)
    block = [rows // 16, 2, 8, block_k]
    shape, strides = [count // 8, 2, 8, weight.shape[1]], [8 * stride, count * stride, stride, 1]
    return TensorDescriptor(weight, shape, strides, block, shared_layout(block))


def hopper(x: Tensor, weight: Tensor, bias: Tensor | None, config: HopperConfig, *, gated: bool = False) -> Tensor:
    """x [M, K], weight [N, K] → [M, N]; gated: weight [2 F, K], F a multiple of 8 → [M, F].

    Rows contiguous, 16-byte aligned. Sums in float32 and rounds once. gated: silu(x Wgᵀ) · (x Wuᵀ),
    Wg being the first F rows. Products by one weight must not run on two streams at once.
    """
    rows, width = x.shape
    count = weight.shape[0] // 2 if gated else weight.shape[0]
    tiles = triton.cdiv(weight.shape[0], 64 * config.groups) * triton.cdiv(rows, config.block_m)
    programs = min(tiles * triton.cdiv(width, config.block_k), processors(x.device))
    out = torch.empty((rows, count), dtype=x.dtype, device=x.device)
    partial = torch.empty(2 * programs * config.groups * 64 * config.block_m, dtype=torch.float32, device=x.device)
    hopper_kernel[(programs,)](
        out,
        descriptor(x, [config.block_m, config.block_k]),
        weight_descriptor(weight, 64, config.block_k, gated),
        bias,
        partial,
        counters(weight),
        rows,
        count,
        width,
        count,
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        GROUPS=config.groups,
        STAGES=config.num_stages,
        GATED=gated,
        EARLY=config.early,
        num_warps=4,
        enable_fp_fusion=True,
        **launch_options(config.early),
    )
    return out


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


_COUNTERS: dict[tuple[int, torch.device], Tensor] = {}


def counters(weight: Tensor) -> Tensor:
    """Counters of finished parts, zero; every launch leaves them so. Each weight has its own, because
    kernels on two streams run at once, and those do not share a weight."""
    key = (weight.data_ptr(), weight.device)
    found = _COUNTERS.get(key)
    if found is None:
        found = torch.zeros(2 * processors(weight.device), dtype=torch.int32, device=weight.device)
        if not torch.cuda.is_current_stream_capturing():  # zeroed by that graph alone, else
            _COUNTERS[key] = found
    return found
