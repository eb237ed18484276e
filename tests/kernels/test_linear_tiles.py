"""Products with an activation at their end, against the separate ops."""

import pytest
import torch
from kernels.cases import CUDA, assert_close, device_of, dtypes_of, randn

from mm_core.kernels import reference


@pytest.mark.parametrize(("rows", "count", "width"), [(150, 136, 128), (257, 264, 72)])
def test_tiles(rows, count, width):
    """Tiles that reach over the ends, and programs with several of them."""
    device = device_of("triton")
    from mm_core.kernels._triton.linear_tiles import gated_tiles, gelu_tiles

    for dtype in dtypes_of("triton"):
        if CUDA and dtype == torch.float32:
            continue  # these tiles are for 16 bits: twice as wide ones do not fit
        x = randn(rows, width, seed=1, device=device, dtype=dtype)
        bias = randn(count, seed=2, device=device, dtype=dtype)
        weight = randn(2 * count, width, seed=3, device=device, dtype=dtype) / width**0.5
        assert_close(gated_tiles(x, weight), reference.silu_and_mul(x.float() @ weight.float().T))
        plain = weight[:count].contiguous()
        expected = reference.quick_gelu_(x.float() @ plain.float().T + bias.float())
        assert_close(gelu_tiles(x, plain, bias), expected)
