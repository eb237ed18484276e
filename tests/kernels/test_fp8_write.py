"""Keys and values written as e4m3 with a scale for each token and head: against their plain twins, bit by bit."""

import pytest
import torch
from kernels.cases import BACKENDS, CUDA, assert_close, device_of, dtypes_of, randn
from kernels.test_small_ops import HEADS, fused_heads
from torch import Tensor

from mm_core import kernels
from mm_core.kernels import fp8, reference
from mm_core.kernels.kv_write import kv_write_triton
from mm_core.kernels.rope import rope_kv_write_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAN = float("nan")
INF = float("inf")


def codes_of(numbers: Tensor) -> Tensor:
    """The bytes, all NaN alike."""
    codes = numbers.view(torch.uint8).clone()
    codes[codes == 0xFF] = 0x7F
    return codes


def same(out: Tensor, expected: Tensor) -> None:
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(nan=7.0), expected.nan_to_num(nan=7.0))


def make_cache(blocks: int, block_size: int, heads: int, size: int, device: torch.device, interleaved: bool = True):
    """Codes [2, blocks, block_size, heads, size] and exponents, of a value that is written nowhere."""
    shape = (blocks, 2, block_size, heads) if interleaved else (2, blocks, block_size, heads)
    codes = torch.full((*shape, size), 0x55, dtype=torch.uint8, device=device)
    exponents = torch.full(shape, 77, dtype=torch.uint8, device=device)
    if interleaved:
        codes, exponents = codes.transpose(0, 1), exponents.transpose(0, 1)
    return codes.view(torch.float8_e4m3fn), exponents


def extremes(dtype: torch.dtype) -> Tensor:
    """[heads, 64]: heads at the ends of the scales' ranges, with noise of every size between."""
    x = torch.randn(37, 64, generator=torch.Generator().manual_seed(0)) * torch.arange(-24.0, 13.0).exp2()[:, None]
    x[:8] = 0
    ends = [448.0, 449.0, 448 * 2.0**-15, 449 * 2.0**-15, 65504.0, -65504.0, 1e-7]
    x[1:8, 5] = torch.tensor(ends)
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantised_as_the_formula_says(dtype):
    x = extremes(dtype)
    numbers, exponents = fp8.quantise(x)
    wanted, powers = reference.quantise_kv(x)
    assert torch.equal(exponents, powers)
    assert torch.equal(codes_of(numbers), codes_of(wanted))
    back = fp8.dequantise(numbers, exponents, dtype)
    assert torch.equal(back.float(), reference.dequantise_kv(wanted, powers))  # nothing is rounded, in no dtype
    amax = x.float().abs().amax(-1)
    step = torch.maximum(amax / 14, torch.tensor(2.0**-24))  # half of the coarsest: of [256, 448], 32 apart
    assert ((back.float() - x.float()).abs().amax(-1) <= step).all()
    again, twice = fp8.quantise(back)
    assert torch.equal(fp8.dequantise(again, twice, dtype), back)


def test_every_code_has_its_value():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
    for exponent in (112, 127, 134):
        exponents = torch.full((256,), exponent, dtype=torch.uint8)
        for dtype in DTYPES:
            same(fp8.dequantise(codes, exponents, dtype).float(), codes.float() * 2.0 ** (exponent - 127))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_stays_so(dtype, bad):
    x = torch.ones(3, 2, 8, dtype=dtype)
    x[1, 0, 3] = bad
    back = fp8.dequantise(*fp8.quantise(x), dtype)
    assert back[1, 0, 3].isnan()
    assert torch.equal(back.isnan().any(-1), x.isfinite().logical_not().any(-1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_kv_write(backend, block_size, interleaved):
    device = device_of(backend)
    op = kv_write_triton if backend == "triton" else kernels.kv_write
    for dtype in dtypes_of(backend):
        for _, heads, size in HEADS:
            blocks, tokens = 6, 19
            cache, exponents = make_cache(blocks, block_size, heads, size, device, interleaved)
            expected, powers = make_cache(blocks, block_size, heads, size, device, interleaved)
            order = torch.randperm(blocks * block_size, generator=torch.Generator().manual_seed(1))
            slots = order[:tokens].to(device)
            slots[::5] = -1
            k_rows, k = fused_heads(tokens, heads, size, 0, device, dtype)
            v_rows, v = fused_heads(tokens, heads, size, 1, device, dtype)
            k[1] *= extremes(torch.float32).to(device)[20:21, :1].to(dtype)
            k[2], k[3, 0, 1], k[4, 0, :3] = 0, 1000.0, 449.0
            before = [rows.clone() for rows in (k_rows, v_rows)]
            wanted = [rows.clone() for rows in (k, v)]
            op(k, v, cache[0], cache[1], slots, (exponents[0], exponents[1]))
            reference.kv_write(*wanted, expected[0], expected[1], slots, (powers[0], powers[1]))
            assert torch.equal(exponents, powers)
            assert torch.equal(codes_of(cache), codes_of(expected))
            same(k, wanted[0])
            same(v, wanted[1])
            assert not torch.equal(v, before[1][:, 2 : 2 + heads])
            for rows, old in zip((k_rows, v_rows), before, strict=True):
                same(rows[slots < 0], old[slots < 0])
                same(rows[:, :2], old[:, :2])
                same(rows[:, 2 + heads :], old[:, 2 + heads :])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", [1, 11, *([150] if CUDA else [])])
@pytest.mark.parametrize("spare", [0, 16])
def test_rope_kv_write(backend, tokens, spare):
    """Rotated keys may differ in their last bit, so k is compared with what was written of it."""
    device = device_of(backend)
    op = rope_kv_write_triton if backend == "triton" else kernels.rope_kv_write_
    for dtype in dtypes_of(backend):
        for heads, kv_heads, size in HEADS[:4]:
            (_, q), (k_rows, k), (_, v) = (
                fused_heads(tokens, count, size, seed, device, dtype)
                for seed, count in enumerate((heads, kv_heads, kv_heads))
            )
            angles = randn(tokens, (size - spare) // 2, seed=5, device=device, dtype=torch.float32) * 9
            blocks = tokens // 16 + 2
            cache, exponents = make_cache(blocks, 16, kv_heads, size, device)
            _, powers = make_cache(blocks, 16, kv_heads, size, device)
            slots = torch.randperm(blocks * 16, generator=torch.Generator().manual_seed(1))[:tokens].to(device)
            slots[3::5] = -1
            wide = q.float().clone(), k.float().clone()
            exact, rounded = k.float().clone(), v.clone()
            reference.rope_pair_(q.float().clone(), exact, angles.cos(), angles.sin())
            reference.rope_kv_write_(
                *wide, rounded, angles.cos(), angles.sin(), *torch.zeros_like(cache), slots, (powers[0], powers[1])
            )
            op(q, k, v, angles.cos(), angles.sin(), cache[0], cache[1], slots, (exponents[0], exponents[1]))
            assert_close(q, wide[0])
            kept = slots >= 0
            at = slots[kept] // 16, slots[kept] % 16
            for rows, which in ((k, 0), (v, 1)):
                codes, scale = cache.view(torch.uint8)[which][at].view(torch.float8_e4m3fn), exponents[which][at]
                assert torch.equal(reference.dequantise_kv(codes, scale), rows[kept].float())
            same(v, rounded)
            assert torch.equal(exponents[1], powers[1])
            # Half a step of e4m3's at most, and of the rotation's own rounding.
            scale = exact[kept].abs().amax(-1, keepdim=True)
            assert ((k[kept].float() - exact[kept]).abs() <= scale / 14 + 0.01 * scale).all()
            assert (exponents[0].int() - powers[0].int()).abs().max() <= 1
            assert k_rows[:, :2].isnan().all()
            untouched = torch.ones(blocks * 16, dtype=torch.bool, device=device)
            untouched[slots[kept]] = False
            assert (exponents[:, untouched.view(blocks, 16)] == 77).all()
            assert (cache.view(torch.uint8)[:, untouched.view(blocks, 16)] == 0x55).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_is_written_as_nan(backend, bad):
    """And shows in attention, where the engine looks for it; other tokens and heads have their values."""
    device = device_of(backend)
    write, rope = (
        (kv_write_triton, rope_kv_write_triton) if backend == "triton" else (kernels.kv_write, kernels.rope_kv_write_)
    )
    turns = torch.zeros(5, 32, device=device)
    for dtype in dtypes_of(backend):
        for rotate in (False, True):
            k, v, q = (randn(5, 2, 64, seed=n, device=device, dtype=dtype) for n in range(3))
            k[3, 1, 60] = bad
            v[1, 0, 0] = bad
            cache, exponents = make_cache(1, 16, 2, 64, device)
            slots = torch.arange(5, device=device)
            if rotate:
                rope(q, k, v, turns + 1, turns, cache[0], cache[1], slots, (exponents[0], exponents[1]))
            else:
                write(k, v, cache[0], cache[1], slots, (exponents[0], exponents[1]))
            for rows, which, place in ((k, 0, (3, 1)), (v, 1, (1, 0))):
                found = cache.view(torch.uint8)[which, 0, :5].view(torch.float8_e4m3fn).float()
                poisoned = torch.zeros(5, 2, dtype=torch.bool, device=device)
                poisoned[place] = True
                assert torch.equal(found.isnan().any(-1), poisoned)
                assert torch.equal(rows.isnan().any(-1), poisoned)


@pytest.mark.skipif(CUDA, reason="a matter of the CPU's path")
def test_attention_of_a_cpu_reads_what_the_numbers_stand_for():
    """Chunks, single tokens in groups and alone, blocks in any order, another dtype, a bias: exactly as from a cache
    that holds the rounded values."""
    generator = torch.Generator().manual_seed(0)
    q_lens, kv_lens = [1, 5, 1, 40, 1], [30, 21, 700, 40, 17]
    blocks, heads, size = 64, 2, 64
    for dtype in (torch.float32, torch.bfloat16):
        cache, exponents = make_cache(blocks, 16, heads, size, torch.device("cpu"))
        k, v = (torch.randn(blocks * 16, heads, size, generator=generator).to(dtype) for _ in range(2))
        kernels.kv_write(k, v, cache[0], cache[1], torch.arange(blocks * 16), (exponents[0], exponents[1]))
        plain = (k.view(blocks, 16, heads, size), v.view(blocks, 16, heads, size))
        tables = torch.stack([torch.randperm(blocks, generator=generator)[:44] for _ in q_lens]).int()
        bounds = torch.tensor([0, *q_lens]).cumsum(0).int()
        q = torch.randn(sum(q_lens), 4, size, generator=generator).to(dtype)
        bias = torch.randn(4, 800, 800, generator=generator)
        rest = (tables, bounds, torch.tensor(kv_lens, dtype=torch.int32))
        for causal, added in ((True, None), (False, None), (True, bias)):
            options = {"max_q_len": 40, "max_kv_len": 700, "scale": 0.125, "causal": causal, "bias": added}
            found = kernels.paged_attention(q, cache[0], cache[1], *rest, scales=tuple(exponents), **options)
            assert torch.equal(found, kernels.paged_attention(q, *plain, *rest, **options))
            twin = reference.paged_attention(q, cache[0], cache[1], *rest, scales=tuple(exponents), **options)
            assert_close(found, twin)
