"""Ops that do several passes' work in one: against their plain twins."""

import pytest
import torch
from kernels.cases import BACKENDS, CUDA, assert_close, device_of, dtypes_of, randn
from kernels.test_small_ops import HEADS, TOKENS, fused_heads

from mm_core import kernels
from mm_core.kernels import reference
from mm_core.kernels.gelu import quick_gelu_triton_
from mm_core.kernels.norm import add_layer_norm_triton
from mm_core.kernels.patchify import patchify_triton
from mm_core.kernels.rope import rope_kv_write_triton
from mm_core.layers import Patchify
from mm_core.media import Normalisation, PatchLayout
from mm_core.media import patchify as patchify_array

TRITON = {
    "add_layer_norm_": add_layer_norm_triton,
    "quick_gelu_": quick_gelu_triton_,
    "rope_kv_write_": rope_kv_write_triton,
    "patchify": patchify_triton,
}
NAN = float("nan")
WIDTHS = [64, 1000] + ([1280, 1152, 3420] if CUDA else [])
NORM = Normalisation((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def op(name: str, backend: str):
    return TRITON[name] if backend == "triton" else getattr(kernels, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", [0, *TOKENS])
def test_add_layer_norm(backend, width, tokens):
    device = device_of(backend)
    for dtype in dtypes_of(backend):
        x = randn(tokens, width + 8, seed=1, device=device, dtype=dtype)[:, :width]
        weight, bias = (randn(width, seed=n, device=device, dtype=dtype) for n in (2, 3))
        residual = randn(tokens, width, seed=4, device=device, dtype=dtype) + 3
        other, before = residual.clone(), x.clone()
        out = op("add_layer_norm_", backend)(x, residual, weight, bias, 1e-6)
        expected = reference.add_layer_norm_(x, other, weight, bias, 1e-6)
        assert_close(residual, other, 1e-6)
        assert_close(out, expected, 4e-3 if dtype != torch.float32 else None)
        assert torch.equal(x, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 8), (3, 5), (7, 4097)])
def test_quick_gelu(backend, shape):
    device = device_of(backend)
    for dtype in dtypes_of(backend):
        x = randn(*shape, seed=1, device=device, dtype=dtype) * 4
        expected = reference.quick_gelu_(x.float())
        assert op("quick_gelu_", backend)(x).data_ptr() == x.data_ptr()
        assert_close(x, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("spare", [0, 16])
def test_rope_kv_write(backend, tokens, spare):
    """Heads inside fused rows, with dims that do not turn, and tokens that are written nowhere."""
    device = device_of(backend)
    for dtype in dtypes_of(backend):
        for heads, kv_heads, head_size in HEADS[:4]:
            q_rows, q = fused_heads(tokens, heads, head_size, 0, device, dtype)
            k_rows, k = fused_heads(tokens, kv_heads, head_size, 1, device, dtype)
            _, v = fused_heads(tokens, kv_heads, head_size, 2, device, dtype)
            angles = randn(tokens, (head_size - spare) // 2, seed=5, device=device, dtype=torch.float32) * 9
            block_size, blocks = 16, tokens // 16 + 2
            cache = torch.full((2, blocks, block_size, kv_heads, head_size), NAN, dtype=dtype, device=device)
            expected, wide = cache.clone(), (q.float().clone(), k.float().clone())
            slots = torch.randperm(blocks * block_size, generator=torch.Generator().manual_seed(1))[:tokens].to(device)
            slots[3::5] = -1
            reference.rope_kv_write_(*wide, v, angles.cos(), angles.sin(), *expected, slots)
            op("rope_kv_write_", backend)(q, k, v, angles.cos(), angles.sin(), *cache, slots)
            assert_close(q, wide[0])
            assert_close(k, wide[1])
            assert torch.equal(cache.isnan(), expected.isnan())
            assert_close(cache[0].nan_to_num(), expected[0].nan_to_num())
            assert torch.equal(cache[1].nan_to_num(), expected[1].nan_to_num())
            for rows, view in ((q_rows, q), (k_rows, k)):
                assert rows[:, :2].isnan().all()
                assert rows[:, 2 + view.shape[1] :].isnan().all()


def pictures(device: torch.device, *shapes: tuple[int, int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (*s, 3), generator=generator, dtype=torch.uint8).to(device) for s in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_patchify_is_exact(backend, dtype):
    """Bit for bit what NumPy makes of the same pictures, of several sizes and lengths in one pack."""
    device = device_of(backend)
    for layout, rescale in ((PatchLayout(), 1 / 255), (PatchLayout(4, 1, 3), 1 / 255), (PatchLayout(8, 3, 1), 1 / 128)):
        norm = Normalisation(NORM.mean, NORM.std, rescale)
        side = layout.factor
        pack = pictures(device, (1, side, side), (2, 2 * side, 3 * side), (5, 3 * side, side), (1, 2 * side, 2 * side))
        values = Patchify(layout, norm, device, dtype)._values
        sizes = {"patch": layout.patch, "temporal": layout.temporal, "merge": layout.merge}
        out = op("patchify", backend)(pack, values, **sizes)
        parts = [torch.from_numpy(patchify_array(p.cpu().numpy(), layout, norm)[0]) for p in pack]
        assert torch.equal(out.cpu(), torch.cat(parts).to(dtype))
        assert op("patchify", backend)([], values, **sizes).shape == (0, out.shape[1])


def test_patchify_of_layers_is_exact():
    device = torch.device("cuda" if CUDA else "cpu")
    pack = pictures(device, (1, 56, 84), (3, 28, 28))
    for dtype in (torch.float32, torch.bfloat16):
        out = Patchify(PatchLayout(), NORM, device, dtype)(pack)
        parts = [torch.from_numpy(patchify_array(p.cpu().numpy(), PatchLayout(), NORM)[0]) for p in pack]
        assert torch.equal(out.cpu(), torch.cat(parts).to(dtype))
