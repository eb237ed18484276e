"""Attention over an fp8 cache: against the plain twin, which reads the same numbers in float32. Magnitudes of keys
and values differ by seven decimal orders from token to token and head to head; NaN wherever nothing may be read."""

from dataclasses import replace

import pytest
import torch
from kernels.cases import COMPILING, CUDA, HALF_TYPES, TRITON_DTYPES, PagedCase, PagedInputs, build, device_of
from kernels.test_family_shapes import PAGED
from kernels.test_paged_attention import CASES, FRESH, FRESH_LONG, LONG, MIXED, fresh_of, random_case
from kernels.test_shared_prefixes import CASES as SHARED
from kernels.test_shared_prefixes import WIDE as SHARED_WIDE
from kernels.test_shared_prefixes import plan_of
from torch import Tensor

from mm_core.kernels import fp8, reference
from mm_core.kernels.paged_attention import paged_attention_triton
from mm_core.kernels.shared_prefixes import SharedPrefixes

# Of each row's norm. Half types round the result and the probabilities.
TOLERANCE = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 8e-3}
EXPONENT_OF_NOTHING = 255


def dtypes(turn: int | None = None) -> list[torch.dtype]:
    """bfloat16 arithmetic is wrong in the interpreter, which is slow too: there, of many cases, each takes one of the
    others by turns."""
    if CUDA or COMPILING:
        return TRITON_DTYPES
    found = [torch.float32, torch.float16]
    return found if turn is None else [found[turn % 2]]


def assert_rows_close(out: Tensor, expected: Tensor) -> None:
    """Every row of every head by itself."""
    wide = expected.double()
    errors = (out.double() - wide).norm(dim=-1) / wide.norm(dim=-1).clamp(min=1e-20)
    assert COMPILING or bool((errors <= TOLERANCE[out.dtype]).all()), f"{errors.max():.2e}"


def magnitudes(*shape: int, low: float, high: float, seed: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 10 ** (low + (high - low) * torch.rand(shape, generator=generator)).to(device)


class Coded:
    """A case with its caches in fp8; `plain` has the same numbers in the model's dtype."""

    def __init__(
        self, case: PagedCase, dtype: torch.dtype, seed: int = 0, transposed: bool = True, low: int = -4
    ) -> None:
        self.plain: PagedInputs = build(case, dtype, device_of("triton"), seed)
        q, *caches = self.plain.args[:3]
        # Scores stay as large as those of plain random numbers: else the softmax would choose one key.
        q.mul_((1e-3 * magnitudes(len(q), 1, 1, low=-1, high=1, seed=seed, device=q.device)).to(dtype))
        codes, self.scales = [], []
        for which, cache in enumerate(caches):
            spread = magnitudes(*cache.shape[:3], low=low, high=3, seed=seed + 1 + which, device=q.device)
            cache.mul_(spread[..., None])
            found, exponents = fp8.quantise(cache)
            nothing = found.view(torch.uint8).eq(0x7F).all(-1)
            cache.copy_(reference.dequantise_kv(found, exponents))
            exponents[nothing] = EXPONENT_OF_NOTHING
            codes.append(found)
            # As an engine may keep them: a block's exponents of one head side by side.
            self.scales.append(exponents.transpose(1, 2).contiguous().transpose(1, 2) if transposed else exponents)
        self.args = (q, *codes, *self.plain.args[3:])
        self.kwargs = {**self.plain.kwargs, "scales": tuple(self.scales)}

    def check(self, **options: object) -> None:
        q, count = self.args[0], self.plain.num_tokens
        out = torch.full(q.shape, float("nan"), dtype=q.dtype, device=q.device)
        returned = paged_attention_triton(*self.args, **self.kwargs, **options, out=out)
        self.compare(returned)
        assert returned is out
        assert COMPILING or bool(out[count:].isnan().all())

    def compare(self, out: Tensor) -> None:
        if COMPILING:
            return
        count = self.plain.num_tokens
        expected = reference.paged_attention(self.args[0].float(), *self.args[1:], **self.kwargs)
        assert_rows_close(out[:count], expected[:count])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference_triton(case):
    place = CASES.index(case)
    for turn, dtype in enumerate(dtypes(place)):
        Coded(case, dtype, transposed=(place // 2 + turn) % 2 == 0).check()


@pytest.mark.parametrize(("num_decodes", "case"), MIXED, ids=str)
def test_mixed_batches_triton(num_decodes, case):
    for dtype in dtypes(MIXED.index((num_decodes, case))):
        Coded(case, dtype, seed=5).check(num_decodes=num_decodes)


@pytest.mark.parametrize("name", PAGED)
def test_shapes_of_the_families_triton(name):
    for dtype in dtypes(list(PAGED).index(name)):
        Coded(PAGED[name][int(CUDA)], dtype, seed=2).check()


@pytest.mark.parametrize(("num_decodes", "case"), [*FRESH, *(FRESH_LONG if CUDA else [])], ids=str)
def test_chunks_from_fresh_keys_triton(monkeypatch, num_decodes, case):
    """A chunk's own keys come as they were rounded, those before from the cache. Plain probabilities in float16 have
    no room for values whose magnitudes differ much."""
    device_of("triton")
    from mm_core.kernels._triton import attention_packed

    taken = []
    packed = attention_packed.packed
    monkeypatch.setattr(attention_packed, "packed", lambda *args, **options: taken.append(packed(*args, **options)))
    monkeypatch.setattr(attention_packed, "packed_pays", lambda *_: True)
    for dtype in HALF_TYPES if CUDA else dtypes(FRESH.index((num_decodes, case))):
        inputs = Coded(case, dtype, low=1)
        inputs.check(num_decodes=num_decodes, fresh=fresh_of(inputs.plain, case))
    assert taken


def test_long_chunks_are_read_from_fresh_keys_triton(monkeypatch):
    """Also where the cache is fp8, for whose sake `fresh` was rounded; not where it is of yet another type."""
    device_of("triton")
    from mm_core.kernels._triton import attention_packed

    monkeypatch.setattr(attention_packed, "packable", lambda *_: True)
    q = torch.zeros(128, 2, 64, dtype=torch.bfloat16)
    for dtype, most in ((torch.bfloat16, 512), (fp8.DTYPE, 192), (torch.float16, 0)):
        cache = torch.zeros(8, 16, 2, 64).to(dtype)
        assert attention_packed.packed_pays(q, (q, q), cache, 1.0, 128, 128) is (most > 0)
        assert attention_packed.packed_pays(q, (q, q), cache, 1.0, 128, most) is (most > 0)
        assert not attention_packed.packed_pays(q, (q, q), cache, 1.0, 128, most + 1) or not most


@pytest.mark.parametrize(
    "case", [*SHARED, *(SHARED_WIDE if CUDA else [])], ids=lambda case: f"{case[1][:2]}-{case[2:6]}"
)
def test_shared_prefixes_triton(case):
    q_lens, kv_lens, heads, kv_heads, head_size, block_size, groups = case
    singles = q_lens.count(1)
    for dtype in dtypes(SHARED.index(case) if case in SHARED else None):
        inputs = Coded(PagedCase(q_lens, kv_lens, heads, kv_heads, head_size, block_size), dtype, seed=4)
        tables = inputs.args[3]
        for blocks, seqs in groups:
            tables[list(seqs), :blocks] = tables[seqs[0], :blocks].clone()
        plan = plan_of(groups, block_size, singles)
        parts = (torch.from_numpy(x).to(tables.device) for x in (plan.members, plan.bounds, plan.lens))
        inputs.check(num_decodes=singles, shared=SharedPrefixes(*parts))


@pytest.mark.parametrize("seed", range(20 if CUDA else 3))
def test_random_shapes_triton(seed):
    case = random_case(seed)
    if seed % 2:
        case = replace(case, q_lens=[1] * len(case.kv_lens), kv_lens=[max(n, 1) for n in case.kv_lens])
    for dtype in dtypes(seed // 2):
        Coded(case, dtype, seed, transposed=seed % 3 > 0).check()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_triton(case, dtype):
    Coded(case, dtype, seed=3).check()


EXTREMES = [
    PagedCase([1, 1, 9], [40, 130, 100], 4, 2, 64, 16),
    PagedCase([1, 1], [300, 20], 3, 3, 16, 16),
]


@pytest.mark.parametrize("case", EXTREMES, ids=str)
def test_queries_and_values_of_any_size_triton(case):
    """Beyond float16's range, where a model computes in bfloat16 or float32; zeros; values that cancel a
    probability's smallness."""
    for dtype in [x for x in dtypes() if x != torch.float16]:
        inputs = Coded(case, dtype, seed=6)
        q, (k_scales, v_scales) = inputs.args[0], inputs.scales
        q[::2] *= 2.0**40
        used = k_scales != EXPONENT_OF_NOTHING
        k_scales[used] = 112
        v_scales[used] = torch.where(torch.arange(int(used.sum()), device=q.device) % 3 == 0, 220, 112).to(torch.uint8)
        inputs.kwargs["scale"] *= 2.0**-30
        inputs.check()
        inputs.args[2].view(torch.uint8)[used] = 0
        q[1::2] = 0
        inputs.check()
        k_scales[used] = 140  # beyond float16, with queries as small
        inputs.kwargs["scale"] *= 2.0**-28
        inputs.check()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("q_len", [1, 20])
@pytest.mark.parametrize("which", [1, 2])
def test_what_is_not_a_number_shows_triton(q_len, which):
    """In the sequence and the heads that read it, and nowhere else."""
    case = PagedCase([q_len, q_len], [100, 70], 4, 2, 64, 16)
    for dtype in dtypes():
        inputs = Coded(case, dtype, seed=8)
        block = int(inputs.args[3][1, 2])
        inputs.args[which].view(torch.uint8)[block, 3, 1, 7] = 0x7F
        out = paged_attention_triton(*inputs.args, **inputs.kwargs)[: 2 * q_len]
        bad = torch.zeros(2 * q_len, 4, dtype=torch.bool, device=out.device)
        bad[q_len:, 2:] = True
        assert COMPILING or torch.equal(out.isnan().any(-1), bad)


@pytest.mark.skipif(CUDA, reason="a GPU takes this path by itself")
@pytest.mark.parametrize(("num_decodes", "case"), [(3, MIXED[0][1]), (2, EXTREMES[1])], ids=str)
def test_even_and_odd_dims_apart_triton(monkeypatch, num_decodes, case):
    """What only a GPU takes, with its one instruction for a pair of codes replaced."""
    device_of("triton")
    if COMPILING:
        return
    import triton.language as tl

    from mm_core.kernels._triton import attention_decode, attention_fp8

    def number(codes):
        return codes.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)

    taken = []
    monkeypatch.setattr(attention_fp8, "split_pairs", lambda x: taken.append(x) or (number(x & 255), number(x >> 8)))
    monkeypatch.setattr(attention_decode, "takes_pairs", lambda *_: True)
    Coded(case, torch.float16, seed=1).check(num_decodes=num_decodes)
    assert taken
