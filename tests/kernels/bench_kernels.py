"""Times the kernels on the current GPU against its measured ceilings.

    PYTHONPATH=core/src:tests python tests/kernels/bench_kernels.py --json kernels.json

TB/s counts the fewest bytes that the op must move, TFLOP/s the fewest operations (half of them when causal).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import triton

from mm_core import kernels
from mm_core.kernels import fp8
from mm_core.kernels.shared_prefixes import SharedPrefixes, plan_shared_prefixes
from mm_core.layers import Patchify
from mm_core.media import Normalisation, PatchLayout

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16


def milliseconds(fn: Callable[[], Any], *, captured: bool = True) -> float:
    """Median time of one call inside a CUDA graph, so that launching costs nothing; or beside the
    launches of the next ones, for what allocates on the host and cannot be captured."""
    bench = triton.testing.do_bench_cudagraph if captured else triton.testing.do_bench
    return float(bench(fn, rep=40, return_mode="median"))


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.float32).to(DTYPE)


def row(name: str, unit: str, amount: float, fn: Callable[[], Any], *, captured: bool = True) -> dict[str, Any]:
    """amount: bytes for TB/s, operations for TFLOP/s."""
    time = milliseconds(fn, captured=captured)
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


def decode_row(name: str, lens: list[int], heads: int, kv_heads: int, size: int, block: int, longest: int, part=None):
    """One step of a batch; longest: the bound a CUDA graph is captured with. Small batches take turns on several
    caches, as the layers of a model do, so that the last one's is not what they find in the GPU's cache."""
    copies = 1 if sum(lens) > 50_000 else 8
    batches = [paged([1] * len(lens), max(lens), heads, kv_heads, size, block) for _ in range(copies)]
    batches = [(*batch[:5], torch.tensor(lens, device=DEVICE, dtype=torch.int32)) for batch in batches]
    if part is not None:
        for seqs, tokens in part:
            for batch in batches:
                batch[3][seqs, : tokens // block] = batch[3][seqs[0], : tokens // block].clone()
    options = {"max_q_len": 1, "max_kv_len": longest, "scale": size**-0.5}
    amount = 4 * sum(lens) * kv_heads * size

    def run(shared):
        for batch in batches:
            kernels.paged_attention(*batch, **options, shared=shared)

    def timed(label: str, size: int, shared: SharedPrefixes | None) -> dict[str, Any]:
        found = row(label, "TB/s", copies * size, lambda: run(shared))
        return {**found, "ms": round(found["ms"] / copies, 4)}

    plain = timed(name, amount, None)
    if part is None:
        return [plain]
    plan = plan_shared_prefixes(batches[0][3].cpu().numpy(), np.array(lens, np.int32), block, min_saved=1)
    assert plan is not None
    shared = SharedPrefixes(*(torch.from_numpy(x).to(DEVICE) for x in (plan.members, plan.bounds, plan.lens)))
    least = amount - 4 * plan.saved * kv_heads * size
    return [plain, timed(f"{name}: each prefix read once", least, shared)]


def coded(cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache in fp8, and its exponents; piece by piece, for the room that it takes."""
    pieces = [fp8.quantise(piece) for piece in cache.split(4096)]
    codes = torch.cat([codes.view(torch.uint8) for codes, _ in pieces])
    return codes.view(fp8.DTYPE), torch.cat([exponents for _, exponents in pieces])


def fp8_row(name: str, unit: str, amount: float, args: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
    """`amount`: of an fp8 cache, where it is bytes."""
    (k, k_scales), (v, v_scales) = (coded(cache) for cache in args[1:3])
    args = (args[0], k, v, *args[3:])
    return row(name, unit, amount, lambda: kernels.paged_attention(*args, **options, scales=(k_scales, v_scales)))


def fp8_rows() -> list[dict[str, Any]]:
    """The same batches over a bfloat16 and an fp8 cache."""
    rows = []
    decodes = ((400, 28, 4, 128, True), (700, 28, 4, 128, True), (550, 32, 32, 128, True), (1500, 20, 20, 64, False))
    for kv_len, heads, kv_heads, size, causal in decodes:
        args = paged([1] * 256, kv_len, heads, kv_heads, size, 16)
        options = {"max_q_len": 1, "max_kv_len": kv_len, "scale": size**-0.5, "causal": causal}
        name, count = f"decode 256 x {kv_len}, {heads}/{kv_heads} heads of {size}", 2 * 256 * kv_len * kv_heads
        rows.append(row(name, "TB/s", 2 * count * size, lambda a=args, o=options: kernels.paged_attention(*a, **o)))
        rows.append(fp8_row(f"{name}, fp8", "TB/s", count * (size + 1), args, options))
        del args
        torch.cuda.empty_cache()
    for count, length, kv_len in ((1, 8192, 8192), (4, 512, 2560)):
        args = paged([length] * count, kv_len, 28, 4, 128, 16)
        options = {"max_q_len": length, "max_kv_len": kv_len, "scale": 128**-0.5}
        name, amount = f"prefill {count} x {length} of {kv_len} causal, 28/4 heads of 128", 2 * count * 28 * 128
        amount *= 2 * length * kv_len - length**2
        rows.append(row(name, "TFLOP/s", amount, lambda a=args, o=options: kernels.paged_attention(*a, **o)))
        rows.append(fp8_row(f"{name}, fp8", "TFLOP/s", amount, args, options))
    return rows


def decode_rows() -> list[dict[str, Any]]:
    rows = []
    for count, kv_len in ((256, 400), (1, 32768), (8, 350)):
        for heads, kv_heads, size, block in ((32, 8, 128, 16), (28, 4, 128, 16), (32, 8, 128, 64), (10, 2, 64, 16)):
            name = f"decode {count} x {kv_len}, {heads}/{kv_heads} heads of {size}, blocks of {block}"
            rows += decode_row(name, [kv_len] * count, heads, kv_heads, size, block, kv_len)
    for count, kv_len in ((256, 400), (32, 300), (1, 300)):
        name = f"decode {count} x {kv_len} in a graph for 32768, 28/4 heads of 128"
        rows += decode_row(name, [kv_len] * count, 28, 4, 128, 16, 32768)
    return rows


def shared_rows() -> list[dict[str, Any]]:
    """Batches whose sequences begin alike, plain and with each prefix read once; of the least bytes."""
    own = torch.randint(22, 151, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    pictures = [([seq for seq in range(256) if seq % 16 == i], 272) for i in range(16)]
    name = "decode 16 pictures x 16, 272 + 22..150 tokens, 28/4 heads of 128"
    rows = decode_row(name, [272 + n for n in own], 28, 4, 128, 16, 8192, pictures)
    name = "decode 256 of one prompt, 2048 + 22..150 tokens, 28/4 heads of 128"
    return rows + decode_row(name, [2048 + n for n in own], 28, 4, 128, 16, 8192, [(list(range(256)), 2048)])


def prefill_row(count: int, length: int, heads: int, kv_heads: int, size: int, block: int, fresh: bool):
    args = paged([length] * count, length, heads, kv_heads, size, block)
    options = {"max_q_len": length, "max_kv_len": length, "scale": size**-0.5}
    if fresh:
        options["fresh"] = randn(count * length, 2 * kv_heads, size).split(kv_heads, dim=1)
    source = "new keys" if fresh else f"blocks of {block}"
    name = f"prefill {count} x {length} causal, {heads}/{kv_heads} heads of {size}, {source}"
    amount = 2 * count * heads * size * length**2
    return row(name, "TFLOP/s", amount, lambda: kernels.paged_attention(*args, **options))


def prefill_rows() -> list[dict[str, Any]]:
    shapes = ((32, 8, 128, 16), (28, 4, 128, 16), (28, 4, 128, 64), (32, 32, 64, 64))
    rows = [prefill_row(1, 8192, *shape, fresh) for shape in shapes for fresh in (True, False)]
    rows += [prefill_row(*batch, 28, 4, 128, 16, fresh) for batch in ((3, 2330), (27, 294)) for fresh in (True, False)]
    q, k, v = (randn(1, 32, 8192, 128) for _ in range(3))
    sdpa = row("torch sdpa 8k causal, 32/32 heads of 128", "TFLOP/s", 2 * 32 * 128 * 8192**2,
               lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))  # fmt: skip
    return [*rows, sdpa]


def varlen_rows() -> list[dict[str, Any]]:
    rows = []
    shapes = ((64, 1024, 16, 80), (16, 1024, 16, 80), (1, 1024, 16, 80), (1, 9216, 16, 80), (300, 64, 16, 80))
    for count, length, heads, size in (*shapes, (16, 729, 16, 72), (16, 577, 16, 64)):
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
    cos, sin = (torch.rand(tokens, 64, device=DEVICE) for _ in range(2))
    return [
        row("rms_norm 16k x 4096", "TB/s", 2 * x.nbytes, lambda: kernels.rms_norm(x, weight, 1e-6)),
        row("add_rms_norm_ 16k x 4096", "TB/s", 4 * x.nbytes,
            lambda: kernels.add_rms_norm_(x, residual, weight, 1e-6)),
        row("silu_and_mul 16k x 14336", "TB/s", gated.nbytes * 1.5, lambda: kernels.silu_and_mul(gated)),
        row("rope_ 16k, 32/8 heads of 128", "TB/s", heads, lambda: kernels.rope_(q, k, positions, table)),
        row("rope_ with 3 axes", "TB/s", heads, lambda: kernels.rope_(q, k, three, table, axis)),
        row("kv_write 16k, 8 heads of 128", "TB/s", 8 * k.numel(),
            lambda: kernels.kv_write(k, v, caches[0], caches[1], slots)),
        row("rope_kv_write_ 16k, 32/8 heads of 128", "TB/s", heads + 4 * k.numel() + 8 * cos.numel(),
            lambda: kernels.rope_kv_write_(q, k, v, cos, sin, caches[0], caches[1], slots)),
    ]  # fmt: skip


def vision_rows() -> list[dict[str, Any]]:
    """The passes of a Qwen2-VL encoder between its matrix products, 64 pictures of 448 × 448 at once."""
    tokens, width, count, side = 65536, 1280, 64, 448
    x, residual, weight, bias = randn(tokens, width), randn(tokens, width), randn(width), randn(width)
    inner = randn(tokens, 4 * width)
    q, k = randn(tokens, 48, 80).split([16, 32], dim=1)[0], randn(tokens, 16, 80)
    angles = torch.rand(tokens, 40, device=DEVICE)
    pixels = [torch.randint(256, (1, side, side, 3), dtype=torch.uint8, device=DEVICE) for _ in range(count)]
    make = Patchify(PatchLayout(), Normalisation((0.5,) * 3, (0.5,) * 3), DEVICE, DTYPE)
    patches = make(pixels)
    return [
        row("add_layer_norm_ 64k x 1280", "TB/s", 4 * x.nbytes,
            lambda: kernels.add_layer_norm_(x, residual, weight, bias, 1e-6)),
        row("quick_gelu_ 64k x 5120", "TB/s", 2 * inner.nbytes, lambda: kernels.quick_gelu_(inner)),
        row("rope_pair_ 64k, 16/16 heads of 80", "TB/s", 4 * 2 * q.numel() + 2 * angles.nbytes,
            lambda: kernels.rope_pair_(q, k, angles, angles)),
        row("patchify 64 pictures of 448", "TB/s", patches.nbytes + sum(p.nbytes for p in pixels),
            lambda: kernels.patchify(pixels, make._values, patch=14, temporal=2, merge=2), captured=False),
    ]  # fmt: skip


def linear_rows() -> list[dict[str, Any]]:
    """The projections of one decode step of Qwen2-VL-7B, one after another, beside the library's."""
    rows, layers, hidden, inner, vocabulary = [], 28, 3584, 18944, 152064
    # Seven layers' weights, used four times: none is left in the GPU's cache when its turn comes again
    sizes = ((4608, hidden), (hidden, hidden), (2 * inner, hidden), (hidden, inner))
    weights = [tuple(randn(*size).mul_(0.02) for size in sizes) for _ in range(7)]
    bias, head = randn(4608), randn(vocabulary, hidden)
    amount = head.nbytes + 4 * sum(weight.nbytes for layer in weights for weight in layer)
    for batch in (1, 8, 32, 64, 128, 256):
        x, mixed = randn(batch, hidden), randn(batch, hidden)

        def ours(x=x, mixed=mixed):
            for index in range(layers):
                qkv, out, gate_up, down = weights[index % 7]
                kernels.linear(x, qkv, bias)
                kernels.linear(kernels.gated_linear(kernels.linear(mixed, out), gate_up), down)
            return kernels.linear(x, head)

        def library(x=x, mixed=mixed):
            for index in range(layers):
                qkv, out, gate_up, down = weights[index % 7]
                F.linear(x, qkv, bias)
                F.linear(kernels.silu_and_mul(F.linear(F.linear(mixed, out), gate_up)), down)
            return F.linear(x, head)

        rows.append(row(f"projections and gates of a decode step, batch {batch}", "TB/s", amount, ours))
        rows.append(row(f"the same, torch's products, batch {batch}", "TB/s", amount, library))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    groups = (ceilings, decode_rows, shared_rows, prefill_rows, fp8_rows, varlen_rows, small_rows, vision_rows)
    for group in (*groups, linear_rows):
        rows += group()
        torch.cuda.empty_cache()
    for entry in rows:
        print(f"{entry['name']:58} {entry['ms']:9.4f} ms {entry['value']:9.3f} {entry['unit']}")
    if options.json:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        options.json.write_text(json.dumps({**about, "dtype": "bfloat16", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
