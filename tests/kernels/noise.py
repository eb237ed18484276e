"""The two kinds of noise of the sampling kernels, side by side."""

import triton
import triton.language as tl

from mm_core.kernels._triton.sample import gumbel, rough_gumbel


@triton.jit
def noise_kernel(exact_ptr, rough_ptr, bits_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bits = tl.load(bits_ptr + at).to(tl.uint64, bitcast=True)
    tl.store(exact_ptr + at, gumbel(bits))
    tl.store(rough_ptr + at, rough_gumbel(bits))
