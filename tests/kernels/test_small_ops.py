import pytest
import torch
from kernels.cases import BACKENDS, CUDA, assert_close, device_of, dtypes_of, randn

from mm_core import kernels
from mm_core.kernels import reference
from mm_core.kernels.activation import silu_and_mul_triton
from mm_core.kernels.kv_write import kv_write_triton
from mm_core.kernels.norm import add_rms_norm_triton, rms_norm_triton
from mm_core.kernels.rope import build_rope_table, mrope_axis_of_freq, rope_pair_triton, rope_triton

TRITON = {
    "kv_write": kv_write_triton,
    "rope_": rope_triton,
    "rope_pair_": rope_pair_triton,
    "rms_norm": rms_norm_triton,
    "add_rms_norm_": add_rms_norm_triton,
    "silu_and_mul": silu_and_mul_triton,
}
NAN = float("nan")
HEADS = [(4, 2, 64), (3, 1, 80)] + ([(28, 4, 128), (16, 16, 96), (12, 12, 72)] if CUDA else [])
TOKENS = [1, 11] + ([4097] if CUDA else [])


def op(name: str, backend: str):
    return TRITON[name] if backend == "triton" else getattr(kernels, name)


def fused_heads(tokens, heads, head_size, seed, device, dtype):
    """[tokens, heads, head_size] inside rows that hold other things before and after."""
    rows = torch.full((tokens, heads + 3, head_size), NAN, device=device, dtype=dtype)
    view = rows[:, 2 : 2 + heads]
    view.copy_(randn(tokens, heads, head_size, seed=seed, device=device, dtype=dtype))
    return rows, view


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("interleaved", [False, True])
def test_kv_write(backend, block_size, interleaved):
    device = device_of(backend)
    for dtype in dtypes_of(backend):
        for _, kv_heads, head_size in HEADS:
            blocks, tokens = 6, 19
            shape = (blocks, 2, block_size, kv_heads, head_size)
            whole = torch.full(shape if interleaved else (2, *shape[:1], *shape[2:]), NAN, dtype=dtype, device=device)
            cache = whole.transpose(0, 1) if interleaved else whole
            expected = cache.clone()
            order = torch.randperm(blocks * block_size, generator=torch.Generator().manual_seed(1))
            slots = order[:tokens].to(device)
            slots[::5] = -1
            _, k = fused_heads(tokens, kv_heads, head_size, 0, device, torch.float32)
            _, v = fused_heads(tokens, kv_heads, head_size, 1, device, dtype)
            op("kv_write", backend)(k, v, cache[0], cache[1], slots)
            reference.kv_write(k, v, expected[0], expected[1], slots)
            assert torch.equal(cache.isnan(), expected.isnan())
            assert torch.equal(cache.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axes", [1, 3])
@pytest.mark.parametrize("tokens", TOKENS)
def test_rope(backend, axes, tokens):
    device = device_of(backend)
    for dtype in dtypes_of(backend):
        for heads, kv_heads, head_size in HEADS:
            rotary = head_size if tokens != 11 else head_size - 16
            inv_freq = 1.0 / 10000.0 ** (torch.arange(0, rotary, 2) / rotary)
            table = build_rope_table(inv_freq, 500, attention_scaling=1.1).to(device)
            first = rotary // 8
            axis = mrope_axis_of_freq([first, first, rotary // 2 - 2 * first]).to(device) if axes == 3 else None
            shape = (axes, tokens) if axes == 3 else (tokens,)
            positions = torch.randint(500, shape, generator=torch.Generator().manual_seed(2)).to(device)
            positions = positions.to(torch.int32 if tokens == 11 else torch.int64)
            q_rows, q = fused_heads(tokens, heads, head_size, 0, device, dtype)
            k_rows, k = fused_heads(tokens, kv_heads, head_size, 1, device, dtype)
            wide = q.float().clone(), k.float().clone()
            op("rope_", backend)(q, k, positions, table, axis)
            reference.rope_(*wide, positions, table, axis)
            for out, expected, rows in ((q, wide[0], q_rows), (k, wide[1], k_rows)):
                assert_close(out, expected)
                assert rows[:, :2].isnan().all()
                assert rows[:, 2 + out.shape[1] :].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_rope_pair(backend, tokens):
    device = device_of(backend)
    for dtype in dtypes_of(backend):
        for heads, kv_heads, head_size in HEADS:
            _, q = fused_heads(tokens, heads, head_size, 0, device, dtype)
            _, k = fused_heads(tokens, kv_heads, head_size, 1, device, dtype)
            angles = randn(tokens, head_size // 2, seed=5, device=device, dtype=torch.float32) * 9
            wide = q.float().clone(), k.float().clone()
            op("rope_pair_", backend)(q, k, angles.cos(), angles.sin())
            reference.rope_pair_(*wide, angles.cos(), angles.sin())
            assert_close(q, wide[0])
            assert_close(k, wide[1])


def test_mrope_as_in_transformers():
    """Against Qwen2VLRotaryEmbedding, for positions that differ on every axis."""
    qwen = pytest.importorskip("transformers.models.qwen2_vl.modeling_qwen2_vl")
    config_module = pytest.importorskip("transformers.models.qwen2_vl.configuration_qwen2_vl")
    config = config_module.Qwen2VLTextConfig(
        hidden_size=256, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )  # fmt: skip
    rotary = qwen.Qwen2VLRotaryEmbedding(config)
    positions = torch.randint(500, (3, 1, 13), generator=torch.Generator().manual_seed(0))
    q, k = (randn(13, heads, 128, seed=heads, device=torch.device("cpu"), dtype=torch.float32) for heads in (2, 1))
    cos, sin = rotary(q, positions)
    expected = qwen.apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    table = build_rope_table(rotary.inv_freq, 512)
    kernels.rope_(q, k, positions[:, 0], table, mrope_axis_of_freq([16, 24, 24]))
    assert_close(q, expected[0][0].transpose(0, 1))
    assert_close(k, expected[1][0].transpose(0, 1))


WIDTHS = [64, 1000] + ([896, 3584, 8192, 18944] if CUDA else [])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", [0, *TOKENS])
def test_norms(backend, width, tokens):
    device = device_of(backend)
    for dtype in dtypes_of(backend):
        rows = randn(tokens, width + 8, seed=1, device=device, dtype=dtype)
        x, weight = rows[:, :width], randn(width, seed=2, device=device, dtype=dtype)
        residual = randn(tokens, width, seed=3, device=device, dtype=dtype)
        other = residual.clone()
        before = x.clone()
        assert_close(
            op("rms_norm", backend)(x, weight, 1e-6),
            reference.rms_norm(x, weight, 1e-6),
            4e-3 if dtype != torch.float32 else None,
        )
        out = op("add_rms_norm_", backend)(x, residual, weight, 1e-6)
        expected = reference.add_rms_norm_(x, other, weight, 1e-6)
        assert_close(residual, other, 1e-6)
        assert_close(out, expected, 4e-3 if dtype != torch.float32 else None)
        assert torch.equal(x, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", [0, *TOKENS])
def test_silu_and_mul(backend, width, tokens):
    device = device_of(backend)
    for dtype in dtypes_of(backend):
        x = randn(tokens, 2 * width, seed=1, device=device, dtype=dtype)
        out = op("silu_and_mul", backend)(x)
        assert out.shape == (tokens, width)
        assert_close(out, reference.silu_and_mul(x.float()))


def test_import_needs_no_triton():
    import subprocess
    import sys

    code = "import sys; sys.modules['triton'] = None; import mm_core.kernels as k; print(k.paged_attention)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
