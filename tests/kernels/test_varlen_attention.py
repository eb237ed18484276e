import itertools

import pytest
import torch
from kernels.cases import BACKENDS, CUDA, HALF_TYPES, TRITON_DTYPES, assert_close, device_of, dtypes_of, randn

from mm_core.kernels import reference, varlen_attention
from mm_core.kernels.varlen_attention import varlen_attention_triton

SMALL = [
    ([5, 0, 70, 30], 2, 2, 80, False),
    ([33, 33, 33], 4, 2, 64, True),
]
WIDE = [
    ([1024] * 3 + [9216, 1], 4, 4, 80, False),
    ([64] * 300 + [16, 48], 4, 4, 80, False),
    ([577, 577, 0, 10], 16, 16, 64, False),
    ([300, 5, 4096], 8, 2, 128, True),
    ([729, 729], 16, 16, 72, False),
    ([257] * 5, 16, 16, 88, False),
    ([1500] * 2, 20, 20, 64, False),
    ([100, 1000, 31], 6, 3, 96, True),
]


@pytest.mark.parametrize(
    ("lens", "heads", "kv_heads", "head_size", "causal"), [*SMALL, *(WIDE if CUDA else [])], ids=str
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_reference(backend, lens, heads, kv_heads, head_size, causal):
    device = device_of(backend)
    if backend == "cpu" and max(lens) > 1100:
        pytest.skip("too large for the CPU")
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32, device=device)
    run = varlen_attention_triton if backend == "triton" else varlen_attention
    for dtype in dtypes_of(backend):
        # Rows past the last segment are NaN: nobody may read them.
        shape = (sum(lens) + 2, heads + 2 * kv_heads, head_size)
        fused = randn(*shape, seed=len(lens), device=device, dtype=dtype)
        fused[sum(lens) :] = float("nan")
        q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
        options = {"max_seqlen": max(lens), "scale": head_size**-0.5, "causal": causal}
        out = run(q, k, v, cu_seqlens, **options)
        expected = reference.varlen_attention(q.float(), k.float(), v.float(), cu_seqlens, **options)
        assert_close(out[: sum(lens)], expected[: sum(lens)])


PACKED = [
    ([70, 0, 150], 2, 2, 80, False),
    ([64, 130], 4, 2, 64, True),
    ([5, 100], 2, 1, 96, True),
    ([200], 1, 1, 128, False),
    ([90], 2, 2, 72, False),
    ([70], 2, 2, 88, False),
]


@pytest.mark.parametrize(
    ("lens", "heads", "kv_heads", "head_size", "causal"), [*PACKED, *(WIDE if CUDA else [])], ids=str
)
def test_packed_triton_equals_the_reference(lens, heads, kv_heads, head_size, causal):
    """The kernel for keys that lie together, which `varlen_attention` takes for half types on Hopper alone."""
    device = device_of("triton")
    from mm_core.kernels._triton.attention_packed import PackedTiles, packed

    cu_seqlens = torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32, device=device)
    for dtype in HALF_TYPES if CUDA else TRITON_DTYPES:
        total = sum(lens)
        fused = randn(total + 2, heads + 2 * kv_heads, head_size, seed=len(lens), device=device, dtype=dtype)
        fused[total:] = float("nan")
        q, k, v = fused.split([heads, kv_heads, kv_heads], dim=1)
        out = torch.full((total + 2, heads, head_size), float("nan"), device=device, dtype=dtype)
        options = {"max_seqlen": max(lens), "scale": head_size**-0.5, "causal": causal}
        packed(q, k, v, cu_seqlens, out, **options, tiles=None if CUDA else PackedTiles(64, 64, 4, 2))
        expected = reference.varlen_attention(q.float(), k.float(), v.float(), cu_seqlens, **options)
        assert_close(out[:total], expected[:total])
        assert out[total:].isnan().all()


@pytest.mark.parametrize("lens", [[64] * 40, [64, 64, 16, 16, 0, 64], [200, 1, 3], [10] * 3 + [50]])
def test_windows_cpu(lens):
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lens)], dtype=torch.int32)
    q, k, v = (randn(sum(lens), 3, 16, seed=i, device=torch.device("cpu"), dtype=torch.float32) for i in range(3))
    options = {"max_seqlen": max(lens), "scale": 0.25}
    expected = reference.varlen_attention(q, k, v, cu_seqlens, **options)
    assert_close(varlen_attention(q, k, v, cu_seqlens, **options), expected)
