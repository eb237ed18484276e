# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,no-any-return"
# ruff: noqa: N803 (Triton constants are upper case)
"""Scores of tokens that a grammar does not allow: only these are written, none are read."""

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


@triton.jit(do_not_specialize=["words"])
def mask_kernel(scores_ptr, rows_ptr, masks_ptr, places_ptr, stride, width, words, BLOCK: tl.constexpr):
    """One program: BLOCK scores of one row. A word is loaded by the 32 lanes whose bits it has, from one place."""
    which = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    used = at < width
    masks_ptr += tl.load(places_ptr + which) * words
    bits = tl.load(masks_ptr + (at >> 5), mask=used, other=0) >> (at & 31)
    scores_ptr += tl.load(rows_ptr + which) * stride
    tl.store(scores_ptr + at, tl.full((BLOCK,), float("-inf"), tl.float32), mask=used & ((bits & 1) == 0))


def mask_(scores: Tensor, rows: Tensor, masks: Tensor, places: Tensor) -> None:
    """See `mm_core.kernels.grammar_mask.mask_`."""
    assert scores.stride(1) == 1
    assert masks.is_contiguous()
    width = scores.shape[1]
    if len(rows):
        mask_kernel[(len(rows), triton.cdiv(width, _BLOCK))](
            scores, rows, masks, places, scores.stride(0), width, masks.shape[1],
            BLOCK=_BLOCK, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
