"""Counter-based random numbers: the noise of a draw is a pure function of (seed, step, token id).

SplitMix64 (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators") in integer
torch operations, which wrap around alike on every device; the transcendental part is computed in
float64 and rounded to float32, so that the last bit of a device's `log` does not show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Words = np.ndarray[Any, np.dtype[np.uint64]]

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_BITS = 64
_WORD = 2**_BITS - 1


def stream_keys(seeds: Sequence[int], steps: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Start of the stream that draws output token `step` under `seed`, for each pair: int64 [R].

    Seeds and steps lie in [0, 2^64).
    """
    seeded = _mix(np.asarray(seeds, np.uint64) + np.uint64(_GAMMA))
    return _mix(seeded + (np.asarray(steps, np.uint64) + np.uint64(1)) * np.uint64(_GAMMA)).view(np.int64)


def stream_key(seed: int, step: int) -> int:
    """One of `stream_keys`."""
    return int(stream_keys([seed], [step])[0])


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


def _mix(words: Words) -> Words:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(_MIX_1)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(_MIX_2)
    return words ^ (words >> np.uint64(31))


def _signed(value: int) -> int:
    """The int64 with the same 64 bits, which is what torch takes as a scalar."""
    value &= _WORD
    return value - (1 << _BITS) if value >> (_BITS - 1) else value
