"""Inputs for the kernels' tests: seeded, strided as in the engine, NaN wherever nothing may be read."""

import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
COMPILING = False  # set by compile_only.py, where launches only compile
HALF_TYPES = [torch.float16, torch.bfloat16]
# bfloat16 arithmetic is wrong in the interpreter, and float16 tells no more than float32 there.
TRITON_DTYPES = [torch.float32, *HALF_TYPES] if CUDA else [torch.float32]
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
BACKENDS = ["cpu", "triton"]


def can_interpret() -> bool:
    """Whether Triton, in this process, runs kernels without a GPU."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton.language as tl

    return type(tl.max).__name__ == "InterpretedFunction"


def device_of(backend: str) -> torch.device:
    """Where to put the inputs; skips the test where the backend cannot run."""
    if backend == "cpu":
        return torch.device("cpu")
    if CUDA:
        return torch.device("cuda")
    if not can_interpret():
        pytest.skip("Triton was imported without its interpreter: test_interpreter.py runs this")
    return torch.device("cpu")


def dtypes_of(backend: str) -> list[torch.dtype]:
    return TRITON_DTYPES if backend == "triton" else [torch.float32, torch.bfloat16]


def relative_error(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected||; NaN anywhere in out gives NaN."""
    out, expected = out.double().cpu(), expected.double().cpu()
    return float((out - expected).norm() / expected.norm().clamp(min=1e-30))


def assert_close(out: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    limit = TOLERANCE[out.dtype] if tolerance is None else tolerance
    error = relative_error(out, expected)
    assert error <= limit, f"relative error {error:.2e} > {limit:.0e}"


def randn(*shape: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


@dataclass(frozen=True)
class PagedCase:
    """One batch: q_lens[s] queries and kv_lens[s] keys for each sequence."""

    q_lens: Sequence[int]
    kv_lens: Sequence[int]
    heads: int = 4
    kv_heads: int = 2
    head_size: int = 64
    block_size: int = 16
    causal: bool = True
    bias: str = "none"  # none, head: one a head, shared: one for all, flat: the same for every query
    scale: float | None = None

    def __str__(self) -> str:
        lens = f"q{max(self.q_lens)}kv{max(self.kv_lens)}s{len(self.q_lens)}"
        shape = f"h{self.heads}-{self.kv_heads}d{self.head_size}b{self.block_size}"
        return f"{lens}-{shape}-{'causal' if self.causal else 'full'}-{self.bias}"


@dataclass(frozen=True)
class PagedInputs:
    args: tuple[Tensor, ...]
    kwargs: dict[str, Any]
    num_tokens: int

    def wide(self) -> tuple[Tensor, ...]:
        """The arguments with q and the caches in float32, for a reference that rounds nothing."""
        return (*(x.float() for x in self.args[:3]), *self.args[3:])


def build(case: PagedCase, dtype: torch.dtype, device: torch.device, seed: int = 0) -> PagedInputs:
    """Random inputs; q is part of a fused projection, the caches are a layer of a larger tensor."""
    num_tokens, size, width = sum(case.q_lens), case.block_size, case.heads + 2 * case.kv_heads
    fused = randn(num_tokens + 3, width, case.head_size, seed=seed, device=device, dtype=dtype)
    fused[num_tokens:] = float("nan")
    counts = [-(-length // size) for length in case.kv_lens]
    total = sum(counts) + 2
    shape = (3, total, size, case.kv_heads, case.head_size)
    caches = torch.full(shape, float("nan"), dtype=dtype, device=device)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed)).tolist()
    # Unused entries name a block that holds only NaN.
    tables = torch.full((len(counts), max(counts) + 1), order.pop(), dtype=torch.int32)
    for seq, (count, length) in enumerate(zip(counts, case.kv_lens, strict=True)):
        blocks = [order.pop() for _ in range(count)]
        tables[seq, :count] = torch.tensor(blocks, dtype=torch.int32)
        tokens = torch.arange(length)
        at = tables[seq, tokens // size].long().to(device), (tokens % size).to(device)
        for which in (0, 1):
            rows = (length, case.kv_heads, case.head_size)
            caches[1 + which][at] = randn(*rows, seed=seed + 7 * seq + which, device=device, dtype=dtype)
    bounds = [0, *itertools.accumulate(case.q_lens)]
    ints = {"dtype": torch.int32, "device": device}
    kwargs: dict[str, Any] = {
        "max_q_len": max(case.q_lens),
        "max_kv_len": max(case.kv_lens),
        "scale": case.head_size**-0.5 if case.scale is None else case.scale,
        "causal": case.causal,
        "bias": make_bias(case, device, seed),
    }
    args = (fused[:, : case.heads], caches[1], caches[2], tables.to(device))
    lengths = (torch.tensor(bounds, **ints), torch.tensor(list(case.kv_lens), **ints))
    return PagedInputs((*args, *lengths), kwargs, num_tokens)


def make_bias(case: PagedCase, device: torch.device, seed: int) -> Tensor | None:
    if case.bias == "none":
        return None
    rows = max(max(case.kv_lens), max(case.q_lens))
    heads = case.heads if case.bias == "head" else 1
    shape = (heads, 1 if case.bias == "flat" else rows, max(case.kv_lens) + 5)
    bias = randn(*shape, seed=seed + 100, device=device, dtype=torch.float32)
    if case.bias == "shared":
        # Hidden by the bias alone; some rows of non-causal cases lose every key of a tile.
        bias[:, :, 1:40] = float("-inf")
    return bias.expand(heads, rows, shape[2])
