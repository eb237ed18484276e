"""The CPU's ways with long sequences of one query: each read where it lies, alone."""

from __future__ import annotations

import pytest
import torch

from mm_core.kernels import paged_attention, reference
from mm_core.kernels.paged_attention import plan_cpu

BLOCK = 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (6, 2), (4, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_long_and_short_sequences_in_one_batch(dtype: torch.dtype, heads: int, kv_heads: int, causal: bool) -> None:
    """Cross-attention of a decode step: sources of 1,500 rows, in a row or scattered, beside short ones."""
    generator = torch.Generator().manual_seed(heads)
    lengths = [1500, 40, 700, 1500, 33]
    counts = [-(-n // BLOCK) for n in lengths]
    order = torch.randperm(sum(counts), generator=generator).int()
    order[: counts[0]] = order[: counts[0]].sort().values  # not in a row, but nearly
    tables = torch.zeros((len(lengths), max(counts)), dtype=torch.int32)
    start = 0
    for row, count in enumerate(counts):
        tables[row, :count] = order[start : start + count]
        start += count
    tables[3, : counts[3]] = torch.arange(sum(counts), sum(counts) + counts[3])  # one after another
    shape = (sum(counts) + counts[3], BLOCK, kv_heads, 64)
    k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    q = torch.randn((len(lengths), heads, 64), generator=generator).to(dtype)
    bounds = torch.arange(len(lengths) + 1, dtype=torch.int32)
    lens = torch.tensor(lengths, dtype=torch.int32)
    options = {"max_q_len": 1, "max_kv_len": 1500, "scale": 0.125, "causal": causal}
    got = paged_attention(q, k, v, tables, bounds, lens, **options)
    want = reference.paged_attention(q.float(), k.float(), v.float(), tables, bounds, lens, **options)
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(got.float(), want, atol=tolerance, rtol=2e-2 if dtype == torch.bfloat16 else 0)


def test_long_sequences_are_planned_alone() -> None:
    tables = torch.arange(4 * 100, dtype=torch.int32).view(4, 100)
    plan = plan_cpu(tables, torch.arange(5, dtype=torch.int32), torch.tensor([1500, 40, 600, 50]).int(), BLOCK)
    assert sorted(group.seqs for group in plan.singles) == [[0], [1, 3], [2]]
