# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""The best token of each row of scores, with or without noise, in one launch."""

import triton
import triton.language as tl
from torch import Tensor

from mm_core.kernels.sample import Filters, Launch

_BLOCK = 2048  # scores a program looks at at once
_NOISY_BLOCK = 1024  # fewer, as noise takes registers
_MAX_PIECES = 64

_GAMMA = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)
_NONE = tl.constexpr(-(2**63))  # below every key


@triton.jit
def monotone_bits(x):
    """int32 that orders as the floats do; the two zeros are equal."""
    x = tl.where(x == 0.0, 0.0, x)
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def random_bits(key, at):
    """The 52 bits behind the noise of tokens `at` in the stream `key`, as in `mm_core.kernels.random`."""
    bits = key.to(tl.uint64, bitcast=True) + (at + 1).to(tl.uint64) * _GAMMA
    bits = (bits ^ (bits >> 30)) * _MIX_1
    bits = (bits ^ (bits >> 27)) * _MIX_2
    return (bits ^ (bits >> 31)) >> 12


@triton.jit
def gumbel(bits):
    """Noise as `mm_core.kernels.random.gumbel_noise`, of uniform numbers (bits + 1/2) / 2^52."""
    uniform = (bits.to(tl.float64) + 0.5) * 2.220446049250313e-16  # 2^-52
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@triton.jit
def rough_gumbel(bits):
    """The same within 1e-4, without float64. Near 1, -log(u) is a series of 1 - u, which has all its digits."""
    rest = ((4503599627370496 - bits).to(tl.float32) - 0.5) * 2.220446049250313e-16  # 1 - u
    near_one = rest * (1.0 + rest * (0.5 + rest * (0.3333333333 + rest * 0.25)))
    minus_log = -tl.log((bits.to(tl.float32) + 0.5) * 2.220446049250313e-16)
    return -tl.log(tl.where(rest < 0.0625, near_one, minus_log))


@triton.jit
def divided(scores_ptr, at, used, temperature):
    """Scores in float32 over the temperature; -inf where not used."""
    x = tl.load(scores_ptr + at, mask=used, other=float("-inf")).to(tl.float32)
    return tl.div_rn(x, temperature + tl.zeros_like(x))


@triton.jit(do_not_specialize=["total", "pieces", "steps"])
def choose_kernel(
    scores_ptr, rows_ptr, temperatures_ptr, keys_ptr, floors_ptr, lasts_ptr,
    slots_ptr, out_ptr, last_ids_ptr, state_ptr, stride, width, total, pieces, steps,
    EDITED: tl.constexpr, RANDOM: tl.constexpr, FILTERED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the best of some steps of BLOCK scores of one row; the row's last one writes the token.

    The best is one int64 that orders by value, then by lowest index: the value's bits, or the largest
    int32 where the row is broken, above 2^32 - 1 - index.
    """
    draw = tl.program_id(0)
    row = tl.load(rows_ptr + draw)
    scores_ptr += (draw.to(tl.int64) if EDITED else row) * stride
    if RANDOM:
        temperature = tl.load(temperatures_ptr + row)
        key = tl.load(keys_ptr + row)
    if FILTERED:
        floor, last = tl.load(floors_ptr + draw), tl.load(lasts_ptr + draw)
    start = tl.program_id(1) * steps * BLOCK
    index = start + tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    broken = tl.zeros((BLOCK,), tl.int32)
    top = tl.full((), float("-inf"), tl.float32)
    for step in range(steps):
        at = start + step * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(scores_ptr + at, mask=at < width, other=float("-inf")).to(tl.float32)
        broken |= (x != x).to(tl.int32) | (x == float("inf")).to(tl.int32)
        if RANDOM:  # noqa: SIM102 (one is known when the kernel is compiled)
            if temperature > 0.0:
                x = tl.div_rn(x, temperature + tl.zeros_like(x))
                if FILTERED:
                    x = tl.where((x > floor) | ((x == floor) & (at <= last)), x, float("-inf"))
                bits = random_bits(key, at)
                rough = tl.max(x + rough_gumbel(bits), 0)
                # Exact noise only where the best so far may be beaten; the sums are rounded to 2^-24 of them.
                noisy = tl.full((BLOCK,), float("-inf"), tl.float32)
                if (rough > float("-inf")) & (rough + 0.001 + tl.abs(rough) * 1e-6 >= top):
                    noisy = x + gumbel(bits)
                    top = tl.maximum(top, tl.max(noisy, 0))
                x = noisy
        better = x > best  # never for a NaN; the first of equals stays
        best = tl.where(better, x, best)
        index = tl.where(better, at, index)
    high = tl.where(broken != 0, 0x7FFFFFFF, monotone_bits(best))
    found = tl.max(high.to(tl.int64) * 4294967296 + (4294967295 - index.to(tl.int64)), 0)

    state_ptr += draw * 2
    tl.atomic_max(state_ptr, found, sem="relaxed")
    if tl.atomic_add(state_ptr + 1, 1, sem="acq_rel") == pieces - 1:
        found = tl.atomic_xchg(state_ptr, _NONE, sem="relaxed")
        tl.atomic_xchg(state_ptr + 1, 0, sem="relaxed")
        token = tl.minimum(4294967295 - (found & 4294967295), width - 1)
        tl.store(out_ptr + row, token)
        tl.store(last_ids_ptr + tl.load(slots_ptr + row), token)
        if not EDITED:
            value = found >> 32
            usable = (value != 0x7FFFFFFF) & (value > -2139095041)  # the bits of -inf
            tl.store(out_ptr + total + row, usable.to(tl.int64))


def piece_steps(rows: int, width: int, block: int) -> int:
    """Steps of each piece of a row, so that all programs together fill the device several times over."""
    programs = 1024 if rows < 128 else 2048  # with many rows the last programs would otherwise run alone
    return triton.cdiv(triton.cdiv(width, block), min(max(programs // rows, 1), _MAX_PIECES))


def choose_tokens(
    scores: Tensor,
    rows: Tensor,
    temperatures: Tensor,
    launch: Launch,
    filters: Filters | None = None,
    *,
    edited: bool = False,
    random: bool = True,
) -> None:
    """See `mm_core.kernels.sample.choose_tokens`. random: False where all temperatures are known to be 0."""
    floors = lasts = None
    if filters is not None and len(rows):
        from mm_core.kernels._triton import filters as impl

        choose_tokens(scores, rows, temperatures, launch, edited=edited, random=False)
        floors, lasts = impl.floors_of(scores, rows, temperatures, launch, filters, edited)
    count, width = len(rows), scores.shape[1]
    if not count:
        return
    block = _NOISY_BLOCK if random else _BLOCK
    steps = piece_steps(count, width, block)
    pieces = triton.cdiv(width, steps * block)
    choose_kernel[(count, pieces)](
        scores, rows, temperatures, launch.keys, floors, lasts, launch.slots, launch.out, launch.last_ids,
        launch.state, scores.stride(0), width, launch.out.shape[1], pieces, steps,
        EDITED=edited, RANDOM=random, FILTERED=floors is not None, BLOCK=block, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
