# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""Penalties for tokens that a sequence has had, in one pass over the scores."""

import triton
import triton.language as tl
from torch import Tensor

from mm_core.kernels.penalties import IN_PROMPT as _IN_PROMPT

_BLOCK = 2048


@triton.jit
def penalise_kernel(
    scores_ptr, rows_ptr, counts_ptr, places_ptr, repetition_ptr, frequency_ptr, presence_ptr, width,
    IN_PROMPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK scores of one row."""
    which = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    used = at < width
    counts = tl.load(counts_ptr + tl.load(places_ptr + which) * width + at, mask=used, other=0)
    scores_ptr += tl.load(rows_ptr + which) * width
    x = tl.load(scores_ptr + at, mask=used, other=0.0)
    repetition = tl.load(repetition_ptr + which).to(tl.float32)
    frequency, presence = tl.load(frequency_ptr + which).to(tl.float32), tl.load(presence_ptr + which).to(tl.float32)
    output = (counts & (IN_PROMPT - 1)).to(tl.float32)
    repeated = tl.where(x < 0, x * repetition, tl.div_rn(x, repetition + tl.zeros_like(x)))
    x = tl.where(counts != 0, repeated, x)
    x = x - frequency * output
    x = x - presence * (output > 0).to(tl.float32)
    tl.store(scores_ptr + at, x, mask=used)


def penalise_(
    scores: Tensor,
    rows: Tensor,
    counts: Tensor,
    places: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> None:
    """See `mm_core.kernels.penalties.penalise_`."""
    assert scores.is_contiguous()
    assert counts.is_contiguous()
    width = scores.shape[1]
    if len(rows):
        # No fused multiply-add: each product is rounded as torch rounds it.
        penalise_kernel[(len(rows), triton.cdiv(width, _BLOCK))](
            scores, rows, counts, places, repetition, frequency, presence, width,
            IN_PROMPT=_IN_PROMPT, BLOCK=_BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
