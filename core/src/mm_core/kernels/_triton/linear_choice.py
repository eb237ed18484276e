"""Which kernel multiplies few rows by a weight, or many with an activation behind: rules read off measurements
on an H100.

Measured with the projections of Qwen2-VL-2B and -7B, Llama-7B and Whisper-large-v3, weights not in the L2
cache; a kernel of ours is taken where it beats the library by about 2 % or more. Beyond 128 rows it never
does: the library's kernels share tiles of x between multiprocessors, which Triton cannot. But where an
activation follows, doing it in the same kernel saves a pass over what is widest.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor

from mm_core.kernels._triton.linear import GemvConfig, gemv
from mm_core.kernels._triton.linear_hopper import HopperConfig, hopper
from mm_core.kernels._triton.linear_row import RowConfig, choose_row, row_linear
from mm_core.kernels._triton.linear_tiles import TilesConfig, linear_tiles
from mm_core.kernels.linear import Activation, AddNorm

LEAST_ELEMENTS = 2**20  # of a weight; below, launching is what takes time
LONG = 100_000  # rows of a weight that is a vocabulary's

# With an activation behind: from how many rows on one kernel is taken, and how (not below linear.MANY_ROWS). Alone,
# SwiGLU takes 0.89 to 0.90 of the time of two kernels, quick GELU 0.79 to 0.85; the exact GELU takes longer. In long
# runs, at the device's power limit, no difference shows but the memory that is not needed.
TILES: dict[Activation, tuple[int, TilesConfig]] = {"silu": (1024, TilesConfig()), "quick_gelu": (4096, TilesConfig())}


def run(x: Tensor, weight: Tensor, bias: Tensor | None, *, gated: bool) -> Tensor | None:
    """x [M, K], weight [N, K] → [M, N] or, gated, [M, N / 2]; None where the library is to do it."""
    config = choose(x.shape[0], weight.shape[0], weight.shape[1], gated)
    if config is None or not (aligned(x) and aligned(weight)):
        return None
    return multiply(x, weight, bias, config, gated=gated)


def multiply(
    x: Tensor, weight: Tensor, bias: Tensor | None, config: RowConfig | GemvConfig | HopperConfig, *, gated: bool
) -> Tensor:
    """By the kernel whose settings these are; gated: not by that of `RowConfig`."""
    if isinstance(config, RowConfig):
        return row_linear(x, weight, bias, config)[0]
    if isinstance(config, GemvConfig):
        return gemv(x, weight, bias, config, gated=gated)
    return hopper(x, weight, bias, config, gated=gated)


def run_row(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: AddNorm | None, *, gelu: bool
) -> tuple[Tensor, Tensor] | None:
    """One row with what is fused to it; None where the kernel for that does not fit."""
    config = choose_row(weight.shape[0], weight.shape[1])
    if config is None or not (aligned(x) and aligned(weight)):
        return None
    return row_linear(x, weight, bias, config, norm=norm, gelu=gelu)


def run_many(x: Tensor, weight: Tensor, bias: Tensor | None, act: Activation) -> Tensor | None:
    """Many rows with the activation behind (see `linear_tiles`); None where that is left to two kernels."""
    config = many_rows(x.shape[0], weight.shape[0], weight.shape[1], act)
    if config is None or not (aligned(x) and aligned(weight)):
        return None
    return linear_tiles(x, weight, bias, config, act)


def many_rows(rows: int, count: int, width: int, act: Activation) -> TilesConfig | None:
    """The tiles for M rows and a weight of [N, K]; one choice for all M, so that a warm-up meets it."""
    least, config = TILES.get(act, (None, None))
    if least is None or rows < least or count * width < LEAST_ELEMENTS:
        return None
    return None if width % 8 or count % (16 if act == "silu" else 8) else config


def aligned(matrix: Tensor) -> bool:
    """Rows contiguous, and each begins at a multiple of 16 bytes."""
    return matrix.stride(1) == 1 and matrix.stride(0) % 8 == 0 and matrix.data_ptr() % 16 == 0


@cache
def choose(rows: int, count: int, width: int, gated: bool) -> RowConfig | GemvConfig | HopperConfig | None:
    """The kernel for M rows and a weight of [N, K]; None: the library's."""
    if count * width < LEAST_ELEMENTS or width % 8 or (gated and count % 16):
        return None
    return one_row(count, width, gated) if rows == 1 else few_rows(rows, count, width, gated)


def one_row(count: int, width: int, gated: bool) -> RowConfig | GemvConfig:
    """Tiles that leave little of their width unused, and enough programs where there are few rows."""
    if not gated and (config := choose_row(count, width)) is not None:
        return config
    if gated:
        return GemvConfig(2, 2048, 4) if width % 2048 == 0 else GemvConfig(4, 512, 2)
    if width < 4096 and 3584 < count <= 8192:
        return GemvConfig(8, 512, 4)
    return GemvConfig(4, 512, 2) if width < 2048 and count > 8192 else GemvConfig(2, 2048, 4)


def few_rows(rows: int, count: int, width: int, gated: bool) -> HopperConfig | None:
    """The more rows, the larger the weight must be for its even sharing to matter."""
    elements = count * width
    if rows <= 16:
        return HopperConfig(16, 2, 256, 3) if count > LONG else HopperConfig(16, 1, 256, 5)
    if rows <= 32 and elements >= 16_000_000:
        return HopperConfig(32, 2, 128, 5) if count > LONG else HopperConfig(32, 1, 256, 4)
    if 32 < rows <= 64 and (gated or elements >= 2**26):
        return HopperConfig(64, 2, 128, 4) if count > LONG else HopperConfig(64, 1, 128, 6)
    return HopperConfig(128, 2, 128, 3) if 64 < rows <= 128 and elements >= 2**29 else None
