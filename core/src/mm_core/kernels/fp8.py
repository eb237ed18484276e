"""Keys and values in eight bits: e4m3 with one power of two for each token and KV head.

A head's elements are stored as float8_e4m3fn (Micikevicius et al. 2022, "FP8 formats for deep learning") of
x / scale. The scale is stored as its exponent in a byte, biased by 127: e8m0 of the OCP Microscaling
Formats specification 1.0, section 5.4. Here for a CPU; the Triton kernels do the same.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

DTYPE = torch.float8_e4m3fn
MIN_EXPONENT = 112
"""Scales are at least 2^-15, by which the least e4m3 number, 2^-9, is float16's least: what a cache holds is exact in
every dtype that models compute in."""
MAX_HALF = 61440.0
"""The largest e4m3 significand below float16's infinity, to which greater numbers would else be rounded."""

_INFINITY = 0x7F800000  # bits of a float32
_LAST_EXPONENT = 246  # of float32's finite numbers
_ROUND_UP = 0x1FFFFF  # carries into the exponent where the significand is above 1.75, that of 448


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """[..., D] float -> e4m3 [..., D] and exponents [...] uint8: scale 2^(e - 127), the least with
    amax / scale <= 448. NaN and infinities become NaN."""
    wide = x.float()
    bits = wide.abs().amax(-1).view(torch.int32).clamp_(max=_INFINITY)
    exponents = bits.add_(_ROUND_UP).bitwise_right_shift_(23).sub_(8).clamp_(min=MIN_EXPONENT)
    if bool((exponents > _LAST_EXPONENT).any()):  # torch would cast infinities to 448
        wide = wide.masked_fill(wide.isinf(), float("nan"))
    if x.dtype == torch.float16:
        wide = wide.clamp(-MAX_HALF, MAX_HALF)
    inverse = (254 - exponents).bitwise_left_shift_(23).view(torch.float32)
    return (wide * inverse[..., None]).to(DTYPE), exponents.to(torch.uint8)


def dequantise(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantise` gave, back as dtype, exactly: e4m3 [..., D], or its bytes, and uint8 [...] -> [..., D]. D is
    even."""
    # Through a table of pairs: torch's own conversion takes eight times as long.
    pairs = codes.reshape(-1).view(torch.uint16).int()
    values = _pairs(dtype).index_select(0, pairs).view(dtype).view(codes.shape)
    scales = exponents.int().bitwise_left_shift_(23).view(torch.float32).to(dtype)
    return values.mul_(scales[..., None])


@functools.cache
def _pairs(dtype: torch.dtype) -> Tensor:
    """[65536]: the two numbers of two bytes that lie one after another, as one integer."""
    values = torch.arange(256, dtype=torch.uint8).view(DTYPE).to(dtype)
    first, second = values.repeat(256), values.repeat_interleave(256)
    return torch.stack((first, second), 1).view(torch.int64 if dtype.itemsize == 4 else torch.int32).flatten()
