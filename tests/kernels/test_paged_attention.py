import pytest
import torch
from kernels.cases import (
    BACKENDS,
    CUDA,
    HALF_TYPES,
    TRITON_DTYPES,
    PagedCase,
    PagedInputs,
    assert_close,
    build,
    device_of,
    dtypes_of,
)

from mm_core.kernels import paged_attention, reference
from mm_core.kernels.paged_attention import paged_attention_triton

PREFILL = [
    PagedCase([5, 0, 33, 1], [5, 0, 70, 20]),
    PagedCase([40, 3], [70, 100], 4, 1, 80, 64, causal=False),
    PagedCase([9, 37], [4, 37], 5, 1, 64, 16, bias="head"),  # queries before the first key
    PagedCase([34, 2], [50, 3], 2, 2, 128, 32, causal=False, bias="shared"),
    PagedCase([20, 1], [36, 9], 6, 2, 96, 48, bias="flat", scale=-0.3),
]
DECODE = [
    PagedCase([1, 1, 0, 1], [1, 33, 0, 64]),
    PagedCase([1, 1], [600, 90], 5, 1, 80, 16),  # several splits, some of them empty
    PagedCase([1, 1], [300, 20], 4, 2, 64, 64, bias="head"),
    PagedCase([1, 1, 1], [40, 7, 0], 2, 2, 96, 32, causal=False, bias="shared"),
    PagedCase([1, 1], [300, 20], 3, 3, 16, 16),  # each head's last split merges
    PagedCase([0, 1, 1], [0, 131, 200], 2, 2, 64, 16, causal=False),
]


def wide_cases() -> list[PagedCase]:
    """Every head size and block size, with groups, masks and biases taking turns."""
    cases = []
    groups = [(4, 4), (8, 4), (12, 4), (8, 2), (10, 2), (6, 1), (14, 2), (8, 1)]
    biases = ["none", "head", "none", "shared", "flat"]
    turn = 0
    for head_size in (64, 80, 96, 128):
        for block_size in (16, 64):
            for q_lens, kv_lens in (
                ([1] * 9, [1, 2, 63, 64, 65, 400, 1000, 4097, 7]),
                ([1, 300, 0, 64, 1, 129], [900, 300, 0, 700, 65, 1000]),
            ):
                heads, kv_heads = groups[turn % len(groups)]
                bias = biases[turn % len(biases)]
                cases.append(PagedCase(q_lens, kv_lens, heads, kv_heads, head_size, block_size, turn % 3 != 1, bias))
                turn += 1
    return cases


LONG = [
    PagedCase([1], [32768], 32, 8, 128, 16),
    PagedCase([1] * 5, [32768, 1, 16385, 300, 32767], 28, 4, 128, 64),
    PagedCase([1], [32768], 71, 1, 64, 64),
    PagedCase([512, 1], [32768, 32768], 8, 2, 128, 16),
    PagedCase([8192], [8192], 4, 1, 128, 64),
    PagedCase([77, 4000], [9000, 4000], 16, 16, 64, 64, causal=False),
]
CASES = [*PREFILL, *DECODE, *(wide_cases() if CUDA else [])]


def check(case: PagedCase, backend: str, dtype: torch.dtype, seed: int = 0, num_decodes: int = 0) -> None:
    inputs = build(case, dtype, device_of(backend), seed)
    inputs.kwargs["num_decodes"] = num_decodes
    out = torch.full(inputs.args[0].shape, float("nan"), dtype=dtype, device=inputs.args[0].device)
    run = paged_attention_triton if backend == "triton" else paged_attention
    returned = run(*inputs.args, **inputs.kwargs, out=out)
    expected = reference.paged_attention(*inputs.wide(), **inputs.kwargs)
    assert returned is out
    assert_close(out[: inputs.num_tokens], expected[: inputs.num_tokens])
    assert out[inputs.num_tokens :].isnan().all()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_reference(case, backend):
    for dtype in dtypes_of(backend):
        check(case, backend, dtype)


MIXED = [
    (3, PagedCase([1, 1, 1, 5, 0, 33, 1], [70, 1, 300, 5, 0, 70, 20])),
    (1, PagedCase([1, 40, 3], [600, 70, 100], 5, 1, 80, 16, bias="head")),
    (2, PagedCase([1, 1, 130], [40, 20, 130], 6, 2, 96, 48, causal=False)),
]


@pytest.mark.parametrize(("num_decodes", "case"), MIXED, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_batches(backend, num_decodes, case):
    for dtype in dtypes_of(backend):
        check(case, backend, dtype, num_decodes=num_decodes)


FRESH = [
    (0, PagedCase([130, 20, 0, 64], [130, 90, 0, 64], 4, 2, 128, 16)),
    (2, PagedCase([1, 1, 70, 5], [300, 1, 200, 5], 5, 1, 64, 48)),
]
FRESH_LONG = [
    (0, PagedCase([294] * 9, [294] * 9, 28, 4, 128, 16)),
    (0, PagedCase([2330, 150, 700], [2330, 1500, 1000], 28, 4, 128, 16)),
    (3, PagedCase([1, 1, 1, 200, 3000], [900, 1, 65, 4096, 3000], 8, 8, 64, 64)),
]


def fresh_of(inputs: PagedInputs, case: PagedCase) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunks' own keys and values, as they stand in the caches, inside wider rows; NaN elsewhere."""
    _, k_cache, v_cache, tables = inputs.args[:4]
    found = []
    for cache in (k_cache, v_cache):
        wide = torch.full((inputs.args[0].shape[0], case.kv_heads + 1, case.head_size), float("nan")).to(cache)
        row = 0
        for seq, (count, length) in enumerate(zip(case.q_lens, case.kv_lens, strict=True)):
            at = torch.arange(length - count, length, device=cache.device)
            blocks = tables[seq, at // case.block_size].long()
            wide[row : row + count, : case.kv_heads] = cache[blocks, at % case.block_size]
            row += count
        found.append(wide[:, : case.kv_heads])
    return found[0], found[1]


@pytest.mark.parametrize(("num_decodes", "case"), [*FRESH, *(FRESH_LONG if CUDA else [])], ids=str)
def test_chunks_from_fresh_keys_triton(monkeypatch, num_decodes, case):
    device = device_of("triton")
    from mm_core.kernels._triton import attention_packed

    taken = []
    packed = attention_packed.packed
    monkeypatch.setattr(attention_packed, "packed_pays", lambda *_: True)
    monkeypatch.setattr(attention_packed, "packed", lambda *args, **options: taken.append(packed(*args, **options)))
    for dtype in HALF_TYPES if CUDA else TRITON_DTYPES:
        inputs = build(case, dtype, device)
        out = torch.full(inputs.args[0].shape, float("nan"), dtype=dtype, device=device)
        options = {"num_decodes": num_decodes, "fresh": fresh_of(inputs, case)}
        paged_attention_triton(*inputs.args, **inputs.kwargs, **options, out=out)
        expected = reference.paged_attention(*inputs.wide(), **inputs.kwargs)
        assert_close(out[: inputs.num_tokens], expected[: inputs.num_tokens])
        assert out[inputs.num_tokens :].isnan().all()
    assert taken


PACKED = [
    (2, 1, PagedCase([1, 1, 0, 1], [33, 100, 5, 1], 4, 4, 64, 16, causal=False)),
    (4, 1, PagedCase([1, 1, 1], [70, 0, 31], 8, 4, 32, 16)),
    (2, 3, PagedCase([1, 1], [300, 20], 6, 2, 64, 64, bias="head")),
]


@pytest.mark.parametrize(("pack", "splits", "case"), PACKED, ids=str)
def test_key_heads_side_by_side_triton(pack, splits, case):
    device = device_of("triton")
    from mm_core.kernels._triton.attention_decode import DecodeTiles, decode

    for dtype in TRITON_DTYPES:
        inputs = build(case, dtype, device)
        out = torch.full(inputs.args[0].shape, float("nan"), dtype=dtype, device=device)
        given = {name: inputs.kwargs[name] for name in ("max_kv_len", "scale", "causal", "bias")}
        decode(*inputs.args, out, **given, tiles=DecodeTiles(32, 4, 2, pack), num_splits=splits)
        expected = reference.paged_attention(*inputs.wide(), **inputs.kwargs)
        assert_close(out[: inputs.num_tokens], expected[: inputs.num_tokens])
        assert out[inputs.num_tokens :].isnan().all()


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("case", LONG, ids=str)
def test_long_triton(case, dtype):
    check(case, "triton", dtype, seed=3)


def random_case(seed: int) -> PagedCase:
    generator = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    q_lens = [pick(0, 1, 1, 2, 17, 60) for _ in range(pick(1, 3, 6))] + [1]
    causal = pick(True, True, False)
    kv_lens = [length + pick(0, 0, 5, 100) if causal else pick(1, 30, 200) for length in q_lens]
    kv_heads = pick(1, 2, 3)
    return PagedCase(
        q_lens, kv_lens, kv_heads * pick(1, 2, 5), kv_heads, pick(32, 64, 80), pick(16, 64), causal,
        pick("none", "none", "head", "flat"),
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(25))
def test_random_shapes_cpu(seed):
    check(random_case(seed), "cpu", torch.float32, seed)


@pytest.mark.parametrize("lens", [[350] * 8, [16] * 4, [3, 900, 4, 1000, 500], [77]])
def test_decode_batches_cpu(lens):
    check(PagedCase([1] * len(lens), lens, 10, 2, 64, 16), "cpu", torch.float32)
    check(PagedCase([1] * len(lens), lens, 10, 2, 64, 16), "cpu", torch.bfloat16)


def test_long_chunks_cpu():
    check(PagedCase([700], [1500], 2, 1, 32, 64), "cpu", torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q_lens", [[1, 1], [4, 3]])
def test_a_new_output_is_contiguous(q_lens, backend):
    inputs = build(PagedCase(q_lens, [20, 5]), torch.float32, device_of(backend))
    args = (inputs.args[0][: inputs.num_tokens], *inputs.args[1:])
    run = paged_attention_triton if backend == "triton" else paged_attention
    out = run(*args, **inputs.kwargs)
    assert out.is_contiguous()
    assert_close(out, reference.paged_attention(*args, **inputs.kwargs))
