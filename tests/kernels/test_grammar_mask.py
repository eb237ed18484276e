"""Masks of grammars, against `reference.py`."""

import numpy as np
import pytest
import torch
from kernels.cases import BACKENDS, CUDA, device_of

from mm_core.kernels import reference
from mm_core.kernels.grammar_mask import mask_, mask_triton

INF = float("inf")
WIDTHS = [944, 152064] if CUDA else [1, 31, 32, 101, 4100]


def random_masks(count, width, spare):
    """int32 [count, W] with about half of the bits set; the bits behind the vocabulary are set or not."""
    words = -(-width // 32) + spare
    dice = np.random.default_rng(width)
    return torch.from_numpy(dice.integers(-(2**31), 2**31, (count, words), dtype=np.int32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1, 3], []], ids=len)
def test_mask(backend, width, rows):
    """To the last bit; scores that are allowed, and other rows, stay as they were, whatever they are."""
    device = device_of(backend)
    scores = torch.randn(4, width, generator=torch.Generator().manual_seed(1))
    scores[1, ::4], scores[2, ::5], scores[3, ::3] = INF, -INF, float("nan")
    masks = random_masks(6, width, spare=width % 2)
    masks[5] = -1  # a row that everything is allowed
    places = torch.tensor([5, 0, 3, 2])[: len(rows)]
    args = [torch.tensor(rows, dtype=torch.int64), masks, places]
    expected, there = scores.clone(), scores.clone().to(device)
    reference.mask_(expected, *args)
    (mask_triton if backend == "triton" else mask_)(there, *(x.to(device) for x in args))
    assert torch.equal(there.cpu().view(torch.int32), expected.view(torch.int32))
    untouched = [row for row in range(4) if row not in rows[1:]]  # the first has the mask of ones
    assert torch.equal(there.cpu()[untouched].view(torch.int32), scores[untouched].view(torch.int32))
    if len(rows) == 4 and width > 100:
        assert bool((expected[2] != scores[2]).any())  # something was masked


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_of_rows_that_lie_apart(backend):
    device = device_of(backend)
    whole = torch.zeros(3, 200, device=device)
    masks = torch.zeros(1, 4, dtype=torch.int32, device=device)
    masks[0, 3] = -(2**31)  # token 127 alone
    run = mask_triton if backend == "triton" else mask_
    run(whole[:, 10:138], torch.tensor([2], device=device), masks, torch.tensor([0], device=device))
    assert whole[:2].count_nonzero() == 0
    assert (whole[2] == 0).nonzero()[:, 0].tolist() == [*range(10), 137, *range(138, 200)]
