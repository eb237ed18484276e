"""Decoding with prefixes that several sequences share: the host's plan, and the kernels that follow it."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from kernels.cases import BACKENDS, CUDA, PagedCase, assert_close, build, device_of, dtypes_of

from mm_core.kernels import paged_attention, reference
from mm_core.kernels.paged_attention import paged_attention_triton
from mm_core.kernels.shared_prefixes import SharedPlan, SharedPrefixes, plan_shared_prefixes

Group = tuple[int, Sequence[int]]  # blocks shared, by whom
BLOCK = 16


def plan_of(groups: Sequence[Group], block_size: int, count: int) -> SharedPlan:
    """The plan that says these groups, everybody else alone."""
    taken = [seq for _, seqs in groups for seq in seqs]
    alone = [seq for seq in range(count) if seq not in taken]
    sizes = [*(len(seqs) for _, seqs in groups), *(1 for _ in alone)]
    bounds = np.full(count + 1, count, np.int32)
    bounds[: len(sizes) + 1] = [0, *itertools.accumulate(sizes)]
    lens = np.zeros(count, np.int32)
    lens[: len(groups)] = [blocks * block_size for blocks, _ in groups]
    return SharedPlan(np.array([*taken, *alone], np.int32), bounds, lens, 0)


CASES = [
    # one group in two tiles of members and two splits, another, two sequences alone; own keys split too
    ([1] * 9, [161, 600, 170, 200, 165, 190, 33, 80, 50], 14, 2, 64, 16,
     [(10, [0, 2, 5, 1, 3, 4]), (2, [6, 8])]),
    ([1] * 5, [70, 300, 65, 49, 100], 4, 2, 80, 16, [(4, [0, 4, 2])]),
    ([1, 1, 1, 1, 20, 3], [130, 300, 190, 64, 64, 3], 5, 1, 96, 48, [(2, [2, 0, 1])]),  # a mixed batch
]  # fmt: skip
WIDE = [
    ([1] * 64, [272 + 3 * i for i in range(64)], 28, 4, 128, 16, [(17, range(i, 64, 4)) for i in range(4)]),
    ([1] * 100, [2048 + 7 * i for i in range(100)], 32, 8, 128, 64, [(32, range(100))]),
    ([1] * 70, [520 + i for i in range(70)], 8, 8, 64, 16, [(8, range(10)), (32, range(10, 69))]),
    ([1] * 3, [4000, 4100, 9000], 28, 4, 128, 16, [(249, [2, 0])]),
    ([1, 1, 1, 1, 200, 30], [700, 900, 800, 650, 300, 30], 28, 4, 128, 16, [(40, [2, 0, 1, 3])]),
]


@pytest.mark.parametrize("case", [*CASES, *(WIDE if CUDA else [])], ids=lambda case: f"{case[1][:2]}-{case[2:6]}")
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_reference(backend, case):
    q_lens, kv_lens, heads, kv_heads, head_size, block_size, groups = case
    device, singles = device_of(backend), q_lens.count(1)
    for dtype in dtypes_of(backend):
        inputs = build(PagedCase(q_lens, kv_lens, heads, kv_heads, head_size, block_size), dtype, device)
        tables = inputs.args[3]
        for blocks, seqs in groups:
            tables[list(seqs), :blocks] = tables[seqs[0], :blocks].clone()
        plan = plan_of(groups, block_size, singles)
        shared = SharedPrefixes(*(torch.from_numpy(x).to(device) for x in (plan.members, plan.bounds, plan.lens)))
        out = torch.full(inputs.args[0].shape, float("nan"), dtype=dtype, device=device)
        run = paged_attention_triton if backend == "triton" else paged_attention
        run(*inputs.args, **inputs.kwargs, out=out, num_decodes=singles, shared=shared)
        expected = reference.paged_attention(*inputs.wide(), **inputs.kwargs)
        assert_close(out[: inputs.num_tokens], expected[: inputs.num_tokens])
        assert out[inputs.num_tokens :].isnan().all()


def test_spare_rows_behind_the_batch_triton():
    """As in a graph captured for more sequences than there are: zeros, and nobody is attended to twice."""
    device = device_of("triton")
    inputs = build(PagedCase([1] * 5, [70, 80, 90, 0, 0]), torch.float32, device)
    inputs.args[3][1, :4] = inputs.args[3][0, :4].clone()
    parts = ([1, 0, 2, 0, 0], [0, 2, 3, 3, 3, 3], [64, 0, 0, 0, 0])
    shared = SharedPrefixes(*(torch.tensor(x, dtype=torch.int32, device=device) for x in parts))
    out = paged_attention_triton(*inputs.args, **inputs.kwargs, shared=shared)[:5]
    assert_close(out, reference.paged_attention(*inputs.args, **inputs.kwargs)[:5])
    assert (out[3:] == 0).all()


def tables_of(count: int, width: int, groups: Sequence[Group]) -> np.ndarray:
    tables = np.random.default_rng(0).permutation(count * width).reshape(count, width).astype(np.int32) + 10_000
    for number, (blocks, seqs) in enumerate(groups):
        tables[np.asarray(seqs), :blocks] = np.arange(blocks) + number * width
    return tables


def check_plan(plan: SharedPlan, tables: np.ndarray, kv_lens: np.ndarray) -> None:
    """What `SharedPrefixes` promises."""
    count = len(kv_lens)
    assert sorted(plan.members.tolist()) == list(range(count))
    assert plan.bounds[0] == 0
    assert plan.bounds[-1] == count
    assert {x.dtype for x in (plan.members, plan.bounds, plan.lens)} == {np.dtype(np.int32)}
    assert (plan.members.shape, plan.bounds.shape, plan.lens.shape) == ((count,), (count + 1,), (count,))
    saved, real = 0, int((plan.lens > 0).sum())
    assert real <= count // 2
    assert (plan.lens[:real] > 0).all()
    for group, length in enumerate(plan.lens.tolist()):
        seqs = plan.members[plan.bounds[group] : plan.bounds[group + 1]]
        if length:
            assert len(seqs) > 1
            assert length % BLOCK == 0
            assert (length < kv_lens[seqs]).all()
            assert (tables[seqs, : length // BLOCK] == tables[seqs[0], : length // BLOCK]).all()
            saved += (len(seqs) - 1) * length
    assert saved == plan.saved


def shared_of(plan: SharedPlan) -> dict[frozenset[int], int]:
    spans = zip(plan.lens.tolist(), itertools.pairwise(plan.bounds.tolist()), strict=True)
    return {frozenset(plan.members[a:b].tolist()): length for length, (a, b) in spans if length}


def test_a_picture_for_each_group():
    groups = [(17, [i for i in range(256) if i % 16 == g]) for g in range(16)]
    tables, kv_lens = tables_of(256, 32, groups), np.arange(300, 300 + 256, dtype=np.int32) % 100 + 300
    plan = plan_shared_prefixes(tables, kv_lens, BLOCK, min_saved=240 * 272)
    assert plan is not None
    check_plan(plan, tables, kv_lens)
    assert shared_of(plan) == {frozenset(seqs): 272 for _, seqs in groups}


def test_the_last_block_is_never_shared():
    tables = tables_of(8, 8, [(6, range(8))])
    for length, expected in ((96, 80), (97, 96)):  # a multiple of the block size fills its last block
        plan = plan_shared_prefixes(tables, np.full(8, length, np.int32), BLOCK, min_saved=1)
        assert plan is not None
        assert shared_of(plan) == {frozenset(range(8)): expected}


def test_nested_prefixes_save_the_most():
    """All begin alike; the first eight share a picture too, the next two so little more that they stay."""
    tables = tables_of(40, 40, [(6, range(40)), (30, range(8)), (8, range(8, 10))])
    tables[:10, :6] = tables[20, :6]
    kv_lens = np.full(40, 600, np.int32)
    plan = plan_shared_prefixes(tables, kv_lens, BLOCK, min_saved=1)
    assert plan is not None
    check_plan(plan, tables, kv_lens)
    assert shared_of(plan) == {frozenset(range(8)): 480, frozenset(range(8, 40)): 96}


def test_nothing_worth_sharing():
    kv_lens = np.full(16, 500, np.int32)
    assert plan_shared_prefixes(tables_of(16, 32, []), kv_lens, BLOCK, min_saved=1) is None
    few = tables_of(16, 32, [(10, [3, 4])])
    assert plan_shared_prefixes(few, kv_lens, BLOCK, min_saved=161) is None
    assert plan_shared_prefixes(few, kv_lens, BLOCK, min_saved=160) is not None
    assert plan_shared_prefixes(tables_of(16, 32, [(1, range(16))]), kv_lens, BLOCK, min_saved=1) is None
    assert plan_shared_prefixes(few[:0], kv_lens[:0], BLOCK, min_saved=1) is None
    assert plan_shared_prefixes(few, np.full(16, 1, np.int32), BLOCK, min_saved=1) is None


def most_saved(tables: np.ndarray, full: Sequence[int], seqs: list[int], depth: int) -> int:
    """The most blocks saved by groups among seqs, which share their first `depth` blocks: by trying, at each
    block, every way of leaving some of the branches in one group."""
    branches: dict[int, list[int]] = {}
    for seq in seqs:
        key = int(tables[seq, depth]) if depth < full[seq] else -1 - seq
        branches.setdefault(key, []).append(seq)
    inner = [most_saved(tables, full, part, depth + 1) if len(part) > 1 else 0 for part in branches.values()]
    sizes = [len(part) for part in branches.values()]
    best = 0
    for stay in itertools.product((False, True), repeat=len(sizes)):
        count = sum(size for size, stays in zip(sizes, stay, strict=True) if stays)
        usable = depth if depth * BLOCK >= 64 else 0
        here = max(count - 1, 0) * usable
        best = max(best, here + sum(kept for kept, stays in zip(inner, stay, strict=True) if not stays))
    return best


@pytest.mark.parametrize("seed", range(30))
def test_random_trees(seed):
    """Never more than the best there is, and all but one group's first member of it at each branching."""
    random = np.random.default_rng(seed)
    count, width = int(random.integers(2, 9)), 12
    tables = tables_of(count, width, [])
    for _ in range(random.integers(1, 6)):
        parent, child = random.integers(0, count, 2)
        blocks = int(random.integers(1, width))
        tables[child, :blocks] = tables[parent, :blocks]
    kv_lens = random.integers(1, width * BLOCK + 1, count).astype(np.int32)
    full = ((kv_lens - 1) // BLOCK).tolist()
    best = most_saved(tables, full, list(range(count)), 0) * BLOCK
    plan = plan_shared_prefixes(tables, kv_lens, BLOCK, min_saved=1)
    if plan is None:
        assert best == 0
        return
    check_plan(plan, tables, kv_lens)
    assert 0.75 * best <= plan.saved <= best
