"""The sizes that families bring: heads of 8 to 128, cross-attention to 1,500 keys, T5's bias, patches of 4, 14 and 16,
vocabularies and projections whose sizes are no multiples of a tile."""

import pytest
import torch
from kernels import cases
from kernels.cases import BACKENDS, CUDA, PagedCase, assert_close, build, device_of, dtypes_of, randn
from kernels.test_fused_ops import NORM, pictures
from kernels.test_sample import launch_of

from mm_core import kernels
from mm_core.kernels import reference
from mm_core.kernels.kv_write import kv_write_triton
from mm_core.kernels.norm import add_layer_norm_triton, add_rms_norm_triton
from mm_core.kernels.paged_attention import paged_attention_triton
from mm_core.kernels.patchify import patchify_triton
from mm_core.kernels.rope import rope_kv_write_triton
from mm_core.kernels.sample import choose_tokens_triton
from mm_core.layers import Patchify
from mm_core.media import PatchLayout
from mm_core.media import patchify as patchify_array

NAN = float("nan")
# Each of its kind as small as takes the same kernels, and on a GPU as large as models have it.
PAGED = {
    "opt, decode": [PagedCase([1, 1, 1], [70, 1, 31], 2, 2, 80), PagedCase([1] * 9, [2000] * 9, 32, 32, 80)],
    "opt, prompts": [PagedCase([70, 2], [70, 20], 1, 1, 80), PagedCase([600, 40, 1], [600, 90, 1], 32, 32, 80)],
    "llama, prompts": [PagedCase([70, 2], [90, 20], 1, 1, 128), PagedCase([600, 300], [600, 900], 32, 32, 128)],
    "whisper, decode": [
        PagedCase([1, 1, 0, 1], [33, 0, 5, 100], 2, 2, 64, causal=False),
        PagedCase([1] * 33, [1500] * 32 + [0], 20, 20, 64, causal=False),
    ],
    "whisper, short prompts": [
        PagedCase([4, 1, 9], [60, 0, 31], 2, 2, 64, causal=False),
        PagedCase([4] * 16, [1500] * 16, 20, 20, 64, causal=False),
    ],
    "whisper, long prompts": [
        PagedCase([70, 3], [90, 40], 2, 2, 64, causal=False),
        PagedCase([220, 4, 100], [1500, 1500, 0], 20, 20, 64, causal=False),
    ],
    "t5, decode": [
        PagedCase([1, 1], [70, 5], 4, 4, 64, bias="head", scale=1.0),
        PagedCase([1] * 20, [100] * 19 + [512], 32, 32, 64, bias="head", scale=1.0),
    ],
    "t5, prompts": [
        PagedCase([70, 3], [70, 20], 2, 2, 64, bias="head", scale=1.0),
        PagedCase([1, 300, 80], [1, 300, 512], 32, 32, 64, bias="head", scale=1.0),
    ],
    "small heads": [
        PagedCase([1, 1], [20, 7], 4, 4, 8),
        PagedCase([5, 1, 40], [20, 7, 40], 4, 2, 12),
    ],
}  # fmt: skip
SIZE = int(CUDA)


@pytest.mark.parametrize("name", PAGED)
@pytest.mark.parametrize("backend", BACKENDS)
def test_paged_attention(backend, name):
    """A bias in the model's dtype, as T5's is."""
    device, case = device_of(backend), PAGED[name][SIZE]
    run = paged_attention_triton if backend == "triton" else kernels.paged_attention
    for dtype in dtypes_of(backend):
        inputs = build(case, dtype, device)
        if inputs.kwargs["bias"] is not None:
            inputs.kwargs["bias"] = inputs.kwargs["bias"].to(dtype)
        out = run(*inputs.args, **inputs.kwargs)
        expected = reference.paged_attention(*inputs.wide(), **inputs.kwargs)
        assert_close(out[: inputs.num_tokens], expected[: inputs.num_tokens])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "head_size"), [(32, 80), (20, 64), (3, 12)])
def test_cache_writes(backend, heads, head_size):
    device = device_of(backend)
    run = kv_write_triton if backend == "triton" else kernels.kv_write
    for dtype in dtypes_of(backend):
        k, v = randn(7, 2 * heads, head_size, seed=1, device=device, dtype=dtype).split(heads, dim=1)
        slots = torch.tensor([40, -1, 3, 0, 17, -1, 16], device=device)
        cache = torch.full((2, 3, 16, heads, head_size), NAN, dtype=dtype, device=device)
        expected = cache.clone()
        run(k, v, cache[0], cache[1], slots)
        reference.kv_write(k, v, expected[0], expected[1], slots)
        assert torch.equal(cache.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("heads", "head_size"), [(32, 128), (4, 12)])
def test_rotated_cache_writes(backend, heads, head_size):
    device = device_of(backend)
    run = rope_kv_write_triton if backend == "triton" else kernels.rope_kv_write_
    for dtype in dtypes_of(backend):
        fused = randn(5, 3 * heads, head_size, seed=1, device=device, dtype=dtype)
        q, k, v = fused.split(heads, dim=1)
        angles = randn(5, head_size // 2, seed=5, device=device, dtype=torch.float32)
        slots = torch.tensor([4, 3, 0, 17, 20], device=device)
        cache = torch.zeros((2, 2, 16, heads, head_size), dtype=dtype, device=device)
        wide, expected = (q.float().clone(), k.float().clone()), cache.clone()
        reference.rope_kv_write_(*wide, v, angles.cos(), angles.sin(), expected[0], expected[1], slots)
        run(q, k, v, angles.cos(), angles.sin(), cache[0], cache[1], slots)
        assert_close(q, wide[0])
        assert_close(cache[0], expected[0])
        assert torch.equal(cache[1], expected[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [768, 1152, 1408, 2560])
def test_norms(backend, width):
    device = device_of(backend)
    layer, rms = kernels.add_layer_norm_, kernels.add_rms_norm_
    if backend == "triton":
        layer, rms = add_layer_norm_triton, add_rms_norm_triton
    for dtype in dtypes_of(backend):
        x, residual = (randn(3, width, seed=n, device=device, dtype=dtype) for n in (1, 2))
        weight, bias = (randn(width, seed=n, device=device, dtype=dtype) for n in (3, 4))
        limit = 4e-3 if dtype != torch.float32 else None
        expected = reference.add_layer_norm_(x, residual.clone(), weight, bias, 1e-12)
        assert_close(layer(x, residual.clone(), weight, bias, 1e-12), expected, limit)
        expected = reference.add_rms_norm_(x, residual.clone(), weight, 1e-6)
        assert_close(rms(x, residual.clone(), weight, 1e-6), expected, limit)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("patch", [4, 7, 14, 16])
def test_patches(backend, patch):
    """Tiles of one picture, and pictures of one frame: bit for bit."""
    device, layout = device_of(backend), PatchLayout(patch, 1, 1)
    pack = pictures(device, (3, 2 * patch, 2 * patch), (1, 2 * patch, 3 * patch))
    run = patchify_triton if backend == "triton" else kernels.patchify
    for dtype in (torch.float32, torch.bfloat16):
        values = Patchify(layout, NORM, device, dtype)._values
        out = run(pack, values, patch=patch, temporal=1, merge=1)
        parts = [torch.from_numpy(patchify_array(p.cpu().numpy(), layout, NORM)[0]) for p in pack]
        assert torch.equal(out.cpu(), torch.cat(parts).to(dtype))


@pytest.mark.parametrize("width", [51866, 32064])
def test_vocabularies_triton(width):
    device = device_of("triton")
    logits = randn(2, width, seed=3, device=device, dtype=torch.float32)
    logits[1, -1] = 50.0
    rows, cold = torch.arange(2, device=device), torch.zeros(2, device=device)
    launch = launch_of(2, device)
    choose_tokens_triton(logits, rows, cold, launch, random=False)
    assert launch.out.tolist() == [logits.argmax(-1).tolist(), [1, 1]]


# (rows of the weight, columns): heads, and projections of OPT, T5, Whisper, mBART and Q-Former
PROJECTIONS = [(51866, 1280), (50304, 2560), (32128, 2048), (10240, 2560), (1280, 5120), (4096, 1024), (3072, 768)]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 30, 60, 128])
def test_projections_triton(rows):
    """What `linear` takes on a Hopper GPU, with a bias and without."""
    device = device_of("triton")
    if not (cases.COMPILING or (CUDA and torch.cuda.get_device_capability() == (9, 0))):
        pytest.skip("Gluon has no interpreter, and its kernel is written for sm_90")
    from mm_core.kernels._triton import linear_choice

    taken = 0
    for count, width in PROJECTIONS:
        config = linear_choice.choose(rows, count, width, False)
        if config is None:
            continue
        taken += 1
        size = count if CUDA else 1024 + count % 16  # the same variant
        x = randn(rows, width, seed=1, device=device, dtype=torch.bfloat16)
        weight = randn(size, width, seed=2, device=device, dtype=torch.float32).mul_(width**-0.5).bfloat16()
        bias = randn(size, seed=3, device=device, dtype=torch.bfloat16)
        if CUDA:
            torch.cuda.synchronize()  # a kernel may read W before the one that wrote it is done
        for added in (None, bias):
            out = linear_choice.multiply(x, weight, added, config, gated=False)
            assert_close(out, reference.linear(x, weight, added))
    assert taken or rows == 128


@pytest.mark.gpu
@pytest.mark.parametrize("gelu", [False, True])
def test_whole_rows_triton(gelu):
    """Whisper's and mBART's projections of one row, behind a norm and without, with the tiles that are chosen."""
    device = device_of("triton")
    from mm_core.kernels._triton.linear_row import choose_row, row_linear

    dtype = dtypes_of("triton")[-1]
    for count, width in [(3840, 1280), (1280, 1280), (5120, 1280), (1280, 5120), (3072, 1024), (1024, 4096)]:
        config = choose_row(count, width)
        assert config is not None
        size = count if CUDA else 64 + count % 16
        x, residual = (randn(1, width, seed=i, device=device, dtype=dtype) for i in (1, 2))
        weight = randn(size, width, seed=3, device=device, dtype=torch.float32).mul_(width**-0.5).to(dtype)
        bias, scale, shift = (randn(n, seed=n, device=device, dtype=dtype) for n in (size, width, width))
        norm = kernels.AddNorm(residual, scale, shift, 1e-5)
        out, total = row_linear(x, weight, bias, config, norm=norm, gelu=gelu)
        wanted = reference.norm_linear(x, norm._replace(residual=residual.clone()), weight, bias, gelu=gelu)
        assert_close(out, wanted[0])
        assert_close(total, wanted[1])
        plain = reference.gelu_linear if gelu else reference.linear
        assert_close(row_linear(x, weight, bias, config, gelu=gelu)[0], plain(x, weight, bias))
