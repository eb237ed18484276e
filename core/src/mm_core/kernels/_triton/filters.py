# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""Which tokens can be drawn, as the lowest score and the last id among those with that score, without sorting.

Where top-p ends: the mass of tokens by their distance from the best one first, then
exactly, among the few tokens of that range of distances in which the mass is reached.

Masses are the integers of `mm_core.kernels.weights`: their sums are exact, so that this finds the very
token that a sort would.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_core.kernels._triton.sample import divided, monotone_bits, piece_steps
from mm_core.kernels.sample import Filters, Launch

_BLOCK = 1024
_BINS = 2048
_PER_UNIT = 64  # bins in a unit of distance: they reach as far as 32, where no token has mass any more


@triton.jit
def mass_of(x, peak, counted):
    """As `mm_core.kernels.weights`, 0 where not counted; 2^52 added and taken away rounds to even."""
    mass = tl.exp(tl.where(counted, x - peak, 0.0).to(tl.float64)) * 1099511627776.0  # 2^40
    return tl.where(counted, ((mass + 4503599627370496.0) - 4503599627370496.0).to(tl.int64), 0)


@triton.jit
def bin_of(x, peak, PER_UNIT: tl.constexpr, BINS: tl.constexpr):
    """-1 for what has no mass, NaN included."""
    distance = (peak - x) * PER_UNIT
    near = (distance >= 0) & (distance < BINS)
    return tl.where(near, tl.where(near, distance, 0.0).to(tl.int32), -1)


@triton.jit(do_not_specialize=["steps"])
def bin_masses_kernel(
    bins_ptr, scores_ptr, rows_ptr, temperatures_ptr, peaks_ptr, floors_ptr, stride, width, steps,
    PER_UNIT: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: adds the masses of some steps of BLOCK tokens of one row to the row's bins."""
    draw = tl.program_id(0)
    row = tl.load(rows_ptr + draw)
    temperature, peak, floor = tl.load(temperatures_ptr + draw), tl.load(peaks_ptr + draw), tl.load(floors_ptr + draw)
    for step in range(steps):
        at = (tl.program_id(1) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        x = divided(scores_ptr + row * stride, at, at < width, temperature)
        place = bin_of(x, peak, PER_UNIT, BINS)
        counted = (place >= 0) & (x >= floor)
        masses = mass_of(x, peak, counted)
        tl.atomic_add(bins_ptr + draw.to(tl.int64) * BINS + place, masses, mask=counted, sem="relaxed")


@triton.jit
def last_bin_kernel(bins_ptr, last_ptr, before_ptr, limits_ptr, top_p_ptr, BINS: tl.constexpr):
    """One program: of one row, the mass to be reached, the bin in which it is, and the mass of better bins.

    The bin is -1 where everything is kept.
    """
    draw = tl.program_id(0)
    lanes = tl.arange(0, BINS)
    masses = tl.load(bins_ptr + draw.to(tl.int64) * BINS + lanes)
    top_p = tl.load(top_p_ptr + draw)
    total = tl.sum(masses, 0)
    limit = total.to(tl.float64) * top_p
    before = tl.cumsum(masses, 0) - masses
    reached = (before.to(tl.float64) < limit) & (masses > 0)
    last = tl.max(tl.where(reached, lanes, -1), 0)
    whole = (top_p >= 1.0) | (total.to(tl.float64) < limit)
    tl.store(last_ptr + draw, tl.where(whole, -1, last))
    tl.store(before_ptr + draw, tl.sum(tl.where(lanes == last, before, 0), 0))
    tl.store(limits_ptr + draw, limit)


@triton.jit(do_not_specialize=["steps"])
def gather_bin_kernel(
    found_ptr, counts_ptr, last_ptr,
    scores_ptr, rows_ptr, temperatures_ptr, peaks_ptr, floors_ptr, stride, width, steps,
    PER_UNIT: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: appends the ids of one row's tokens in its last bin, of some steps, in any order."""
    draw = tl.program_id(0)
    last = tl.load(last_ptr + draw)
    if last < 0:
        return
    row = tl.load(rows_ptr + draw)
    temperature, peak, floor = tl.load(temperatures_ptr + draw), tl.load(peaks_ptr + draw), tl.load(floors_ptr + draw)
    for step in range(steps):
        at = (tl.program_id(1) * steps + step) * BLOCK + tl.arange(0, BLOCK)
        x = divided(scores_ptr + row * stride, at, at < width, temperature)
        mine = ((bin_of(x, peak, PER_UNIT, BINS) == last) & (x >= floor)).to(tl.int32)
        count = tl.sum(mine, 0)
        if count > 0:
            first = tl.atomic_add(counts_ptr + draw, count, sem="relaxed")
            place = first + tl.cumsum(mine, 0) - 1
            tl.store(found_ptr + draw.to(tl.int64) * width + place, at, mask=mine != 0)


@triton.jit
def found_block(scores_ptr, found_ptr, start, count, temperature, BLOCK: tl.constexpr):
    """BLOCK of one row's gathered tokens: whether there is one, its id, its score, the score's bits as int64."""
    place = start + tl.arange(0, BLOCK)
    used = place < count
    at = tl.load(found_ptr + place, mask=used, other=0)
    x = divided(scores_ptr, at, used, temperature)
    return used, at, x, monotone_bits(x).to(tl.int64)


@triton.jit
def last_token_kernel(
    floors_ptr, lasts_ptr, found_ptr, counts_ptr, last_ptr, before_ptr, limits_ptr,
    scores_ptr, rows_ptr, temperatures_ptr, peaks_ptr, stride, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: the score and id of one row's last kept token, by halving what lies between.

    Token i is kept where the mass of all better ones is below the limit; equal ones come by their ids.
    """
    draw = tl.program_id(0)
    if tl.load(last_ptr + draw) < 0:
        return
    scores_ptr += tl.load(rows_ptr + draw) * stride
    found_ptr += draw.to(tl.int64) * width
    temperature, peak = tl.load(temperatures_ptr + draw), tl.load(peaks_ptr + draw)
    before, limit, count = tl.load(before_ptr + draw), tl.load(limits_ptr + draw), tl.load(counts_ptr + draw)

    low, high = tl.full((), 2147483647, tl.int64), tl.full((), -2147483648, tl.int64)
    for start in range(0, count, BLOCK):
        used, at, x, bits = found_block(scores_ptr, found_ptr, start, count, temperature, BLOCK)
        low = tl.minimum(low, tl.min(tl.where(used, bits, 2147483647), 0))
        high = tl.maximum(high, tl.max(tl.where(used, bits, -2147483648), 0))
    # The smallest value, as monotone bits, above which lies less than the limit: in [low, high].
    while low < high:
        middle = (low + high) >> 1
        above = before
        for start in range(0, count, BLOCK):
            used, at, x, bits = found_block(scores_ptr, found_ptr, start, count, temperature, BLOCK)
            above += tl.sum(mass_of(x, peak, used & (bits > middle)), 0)
        enough = above.to(tl.float64) >= limit
        low = tl.where(enough, middle + 1, low)
        high = tl.where(enough, high, middle)

    above = before
    mass = tl.full((), 0, tl.int64)
    equal = 0
    for start in range(0, count, BLOCK):
        used, at, x, bits = found_block(scores_ptr, found_ptr, start, count, temperature, BLOCK)
        above += tl.sum(mass_of(x, peak, used & (bits > low)), 0)
        same = used & (bits == low)
        equal += tl.sum(same.to(tl.int32), 0)
        mass = tl.maximum(mass, tl.max(mass_of(x, peak, same), 0))
    kept = 0
    for start in range(0, equal, BLOCK):
        place = start + tl.arange(0, BLOCK)
        better = (above + place.to(tl.int64) * mass).to(tl.float64)
        kept += tl.sum(((place < equal) & (better < limit)).to(tl.int32), 0)
    first, last = 0, width - 1  # the smallest id up to which lie as many equal tokens as are kept
    if kept == equal:
        first = last
    while first < last:
        middle = (first + last) >> 1
        below = 0
        for start in range(0, count, BLOCK):
            used, at, x, bits = found_block(scores_ptr, found_ptr, start, count, temperature, BLOCK)
            below += tl.sum((used & (bits == low) & (at <= middle)).to(tl.int32), 0)
        first = tl.where(below < kept, middle + 1, first)
        last = tl.where(below < kept, last, middle)
    floor = low.to(tl.int32)
    tl.store(floors_ptr + draw, tl.where(floor < 0, floor ^ 0x7FFFFFFF, floor).to(tl.float32, bitcast=True))
    tl.store(lasts_ptr + draw, last)


def top_p_ends(
    scores: Tensor, rows: Tensor, temperatures: Tensor, peaks: Tensor, top_p: Tensor, floors: Tensor, lasts: Tensor
) -> None:
    """Raise `floors`, and lower `lasts`, to the last tokens that top-p keeps of those at or above the floors.

    scores: [R, V]. rows: int64 [n]; temperatures, peaks (the best divided scores), floors: float32 [n];
    top_p: float64 [n]; lasts: int32 [n].
    """
    count, width = len(rows), scores.shape[1]
    device = scores.device
    bins = torch.zeros((count, _BINS), dtype=torch.int64, device=device)
    counts = torch.zeros(count, dtype=torch.int32, device=device)
    last = torch.empty_like(counts)
    before = torch.empty(count, dtype=torch.int64, device=device)
    limits = torch.empty(count, dtype=torch.float64, device=device)
    found = torch.empty((count, width), dtype=torch.int32, device=device)
    steps = piece_steps(count, width, _BLOCK)
    grid = (count, triton.cdiv(width, steps * _BLOCK))
    sizes = {"PER_UNIT": _PER_UNIT, "BINS": _BINS, "BLOCK": _BLOCK, "num_warps": 4, "enable_fp_fusion": True}
    given = (scores, rows, temperatures, peaks, floors, scores.stride(0), width, steps)
    bin_masses_kernel[grid](bins, *given, **sizes)
    last_bin_kernel[(count,)](bins, last, before, limits, top_p, BINS=_BINS, num_warps=8, enable_fp_fusion=True)
    gather_bin_kernel[grid](found, counts, last, *given, **sizes)
    last_token_kernel[(count,)](
        floors, lasts, found, counts, last, before, limits,
        scores, rows, temperatures, peaks, scores.stride(0), width, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def floors_of(
    scores: Tensor, rows: Tensor, temperatures: Tensor, launch: Launch, filters: Filters, edited: bool
) -> tuple[Tensor, Tensor]:
    """float32 and int32 [n]: of divided scores, tokens above the floor can be drawn, and those equal to it up to
    an id. The best tokens of the rows are in `launch.last_ids`."""
    own = temperatures[rows]
    own = torch.where(own > 0, own, 1.0)  # of greedy rows no filter is asked for
    at = torch.arange(len(rows), device=rows.device) if edited else rows
    peaks = scores[at, launch.last_ids[launch.slots[rows]]].to(torch.float32) / own
    floors = torch.full_like(own, float("-inf"))
    lasts = torch.full_like(rows, scores.shape[1], dtype=torch.int32)
    if filters.largest_k:
        best = (scores if edited else scores[rows]).topk(filters.largest_k, dim=-1).values
        kth = best.gather(1, filters.top_k.clamp(max=filters.largest_k)[:, None] - 1)[:, 0].to(torch.float32) / own
        floors = torch.where(filters.top_k < scores.shape[1], kth, floors)
    if filters.top_p is not None:
        top_p_ends(scores, at, own, peaks, filters.top_p, floors, lasts)
    if filters.log_min_p is not None:
        floor = peaks + filters.log_min_p
        lasts.masked_fill_(floor > floors, scores.shape[1])
        floors = torch.maximum(floors, floor)
    return floors, lasts
