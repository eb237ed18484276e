"""Counter-based random numbers: the noise of a draw is a pure function of (seed, step, token id).

SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") in integer
torch operations, which wrap around alike on every device; the transcendental part is computed in
float64 and rounded to float32, so that the last bit of a device's `log` does not show.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_BITS = 64
_WORD = 2**_BITS - 1


def stream_key(seed: int, step: int) -> int:
    """Start, as a signed 64-bit integer, of the stream that draws output token `step` under `seed`."""
    return _signed(_mix(_mix(seed + _GAMMA) + (step + 1) * _GAMMA))


def random_bits(keys: Tensor, count: int) -> Tensor:
    """The first `count` numbers of each stream: keys int64 [R] to int64 [R, count], all 64 bits random."""
    counter = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64)
    bits = keys[:, None] + counter * _signed(_GAMMA)
    for shift, factor in ((30, _MIX_1), (27, _MIX_2)):
        bits.bitwise_xor_(_shift_right(bits, shift)).mul_(_signed(factor))
    return bits.bitwise_xor_(_shift_right(bits, 31))


def gumbel_noise(keys: Tensor, count: int) -> Tensor:
    """Standard Gumbel noise, float32 [R, count]; always finite.

    The uniform behind it is (k + 1/2) / 2^52 with k of 52 bits: exact in float64 and never 0 or 1.
    """
    bits = _shift_right(random_bits(keys, count), 12)
    uniform = bits.to(torch.float64).add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_().to(torch.float32)


def _shift_right(bits: Tensor, by: int) -> Tensor:
    """A logical shift; torch's own copies the sign bit."""
    return (bits >> by).bitwise_and_((1 << (_BITS - by)) - 1)


def _mix(value: int) -> int:
    value &= _WORD
    value = ((value ^ (value >> 30)) * _MIX_1) & _WORD
    value = ((value ^ (value >> 27)) * _MIX_2) & _WORD
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits, which is what torch takes as a scalar."""
    value &= _WORD
    return value - (1 << _BITS) if value >> (_BITS - 1) else value
