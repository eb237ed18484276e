"""Times the kernels on the current GPU against its measured ceilings.

    PYTHONPATH=core/src:tests python tests/kernels/bench_kernels.py --json kernels.json

TB/s counts the fewest bytes that the op must move, TFLOP/s the fewest operations (half of them when causal).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton

from mm_core import kernels

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16


def milliseconds(fn: Callable[[], Any]) -> float:
    """Median time of one call inside a CUDA graph, so that launching costs nothing."""
    return float(triton.testing.do_bench_cudagraph(fn, rep=40, return_mode="median"))


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float32).to(DTYPE)


def row(name: str, unit: str, amount: float, fn: Callable[[], Any]) -> dict[str, Any]:
    """amount: bytes for TB/s, operations for TFLOP/s."""
    time = milliseconds(fn)
    return {"name": name, "ms": round(time, 4), "unit": unit, "value": round(amount / time / 1e9, 3)}


def ceilings() -> list[dict[str, Any]]:
    source, target = randn(1 << 29), randn(1 << 29)
    a, b = randn(8192, 8192), randn(8192, 8192)
    return [
        row("copy 1 GiB", "TB/s", 2 * source.nbytes, lambda: target.copy_(source)),
        row("read 1 GiB (sum)", "TB/s", source.nbytes, lambda: torch.sum(source, dtype=torch.float32)),
        row("matmul 8192", "TFLOP/s", 2 * 8192**3, lambda: a @ b),
    ]


def paged(q_lens: list[int], kv_len: int, heads: int, kv_heads: int, size: int, block: int):
    """q and the keyword-free arguments of paged_attention, with shuffled blocks."""
    count, per_seq = len(q_lens), -(-kv_len // block)
    tables = torch.randperm(count * per_seq, device=DEVICE, dtype=torch.int32).view(count, per_seq)
    bounds = torch.tensor([0, *q_lens], device=DEVICE).cumsum(0).to(torch.int32)
    lens = torch.full((count,), kv_len, device=DEVICE, dtype=torch.int32)
    caches = (randn(count * per_seq, block, kv_heads, size) for _ in range(2))
    return randn(sum(q_lens), heads, size), *caches, tables, bounds, lens


def decode_rows() -> list[dict[str, Any]]:
    rows = []
    for count, kv_len in ((256, 400), (1, 32768), (8, 350)):
        for heads, kv_heads, size, block in ((32, 8, 128, 16), (32, 8, 128, 64), (10, 2, 64, 16)):
            args = paged([1] * count, kv_len, heads, kv_heads, size, block)
            options = {"max_q_len": 1, "max_kv_len": kv_len, "scale": size**-0.5}
            name = f"decode {count} x {kv_len}, {heads}/{kv_heads} heads of {size}, blocks of {block}"
            amount = 4 * count * kv_len * kv_heads * size

            def run(args=args, options=options):
                return kernels.paged_attention(*args, **options)

            rows.append(row(name, "TB/s", amount, run))
    return rows


def prefill_rows() -> list[dict[str, Any]]:
    rows, length = [], 8192
    for heads, kv_heads, size, block in ((32, 8, 128, 16), (32, 8, 128, 64), (28, 4, 128, 16), (32, 32, 64, 64)):
        args = paged([length], length, heads, kv_heads, size, block)
        options = {"max_q_len": length, "max_kv_len": length, "scale": size**-0.5}
        name = f"prefill 8k causal, {heads}/{kv_heads} heads of {size}, blocks of {block}"
        amount = 2 * heads * size * length**2

        def run(args=args, options=options):
            return kernels.paged_attention(*args, **options)

        rows.append(row(name, "TFLOP/s", amount, run))
    q, k, v = (randn(1, 32, length, 128) for _ in range(3))
    sdpa = row("torch sdpa 8k causal, 32/32 heads of 128", "TFLOP/s", 2 * 32 * 128 * length**2,
               lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))  # fmt: skip
    return [*rows, sdpa]


def varlen_rows() -> list[dict[str, Any]]:
    rows = []
    for count, length, heads, size in ((16, 1024, 16, 80), (1, 9216, 16, 80), (300, 64, 16, 80), (16, 729, 16, 72)):
        q, k, v = randn(count * length, 3 * heads, size).split(heads, dim=1)
        bounds = torch.arange(0, (count + 1) * length, length, device=DEVICE, dtype=torch.int32)
        name = f"varlen {count} x {length}, {heads} heads of {size}"

        def run(q=q, k=k, v=v, bounds=bounds, length=length, size=size):
            return kernels.varlen_attention(q, k, v, bounds, max_seqlen=length, scale=size**-0.5)

        rows.append(row(name, "TFLOP/s", 4 * count * heads * size * length**2, run))
    return rows


def small_rows() -> list[dict[str, Any]]:
    tokens, width, inner = 16384, 4096, 14336
    x, residual, weight = randn(tokens, width), randn(tokens, width), randn(width)
    gated = randn(tokens, 2 * inner)
    q, k, v = randn(tokens, 48, 128).split([32, 8, 8], dim=1)
    positions = torch.arange(tokens, device=DEVICE)
    table = kernels.build_rope_table(torch.rand(64, device=DEVICE), tokens)
    axis = kernels.mrope_axis_of_freq([16, 24, 24]).to(DEVICE)
    three = positions.expand(3, -1).contiguous()
    caches = randn(2, 2048, 16, 8, 128)
    slots = torch.randperm(2048 * 16, device=DEVICE)[:tokens]
    heads = 2 * (q.numel() + k.numel()) * 2
    return [
        row("rms_norm 16k x 4096", "TB/s", 2 * x.nbytes, lambda: kernels.rms_norm(x, weight, 1e-6)),
        row("add_rms_norm_ 16k x 4096", "TB/s", 4 * x.nbytes,
            lambda: kernels.add_rms_norm_(x, residual, weight, 1e-6)),
        row("silu_and_mul 16k x 14336", "TB/s", gated.nbytes * 1.5, lambda: kernels.silu_and_mul(gated)),
        row("rope_ 16k, 32/8 heads of 128", "TB/s", heads, lambda: kernels.rope_(q, k, positions, table)),
        row("rope_ with 3 axes", "TB/s", heads, lambda: kernels.rope_(q, k, three, table, axis)),
        row("kv_write 16k, 8 heads of 128", "TB/s", 8 * k.numel(),
            lambda: kernels.kv_write(k, v, caches[0], caches[1], slots)),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    for group in (ceilings, decode_rows, prefill_rows, varlen_rows, small_rows):
        rows += group()
        torch.cuda.empty_cache()
    for entry in rows:
        print(f"{entry['name']:58} {entry['ms']:9.4f} ms {entry['value']:9.3f} {entry['unit']}")
    if options.json:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        options.json.write_text(json.dumps({**about, "dtype": "bfloat16", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
