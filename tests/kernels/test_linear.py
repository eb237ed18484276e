"""Projections: the stream of W for one row, Hopper's stream-K kernel for few, its tiles with an activation for many,
and the choice between them."""

import itertools

import pytest
import torch
from kernels import cases
from kernels.cases import BACKENDS, CUDA, HALF_TYPES, assert_close, device_of, dtypes_of, randn

from mm_core import kernels
from mm_core.kernels import reference
from mm_core.kernels.linear import MANY_ROWS, MOST_ROWS
from mm_core.layers import GatedMLP, Linear

HOPPER = CUDA and torch.cuda.get_device_capability() == (9, 0)
hopper_only = pytest.mark.skipif(not HOPPER, reason="the kernel is written for the tensor cores of sm_90")
# (weight rows, columns): whole tiles, and neither a multiple of any tile
SIZES = [(256, 1024), (200, 1000)]
# Weights as large as those of models, so that the choice is not the library: (rows, columns, gated)
MODELS = [(4608, 3584, False), (3584, 18944, False), (37888, 3584, True), (152064, 3584, False), (1808, 5000, True)]


def operands(rows, count, width, *, seed, device, dtype, bias=True):
    """x [rows, width] as part of a wider tensor, a weight whose products are of order 1, a bias."""
    x = randn(rows, width + 8, seed=seed, device=device, dtype=dtype)[:, :width]
    weight = randn(count, width, seed=seed + 1, device=device, dtype=torch.float32).mul_(width**-0.5).to(dtype)
    return x, weight, randn(count, seed=seed + 2, device=device, dtype=dtype) if bias else None


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_on_this_machine(rows, size):
    device = device_of("cpu")
    for dtype in dtypes_of("cpu"):
        x, weight, bias = operands(rows, *size, seed=1, device=device, dtype=dtype)
        assert_close(kernels.linear(x, weight, bias), reference.linear(x, weight, bias))
        assert_close(kernels.linear(x[None], weight)[0], reference.linear(x, weight))
        assert_close(kernels.gated_linear(x, weight), reference.gated_linear(x, weight))
        assert kernels.gated_linear(x[None], weight).shape == (1, rows, size[0] // 2)
        assert_close(kernels.gelu_linear(x, weight, bias), reference.gelu_linear(x, weight, bias))
        assert_close(kernels.quick_gelu_linear(x, weight, bias), reference.quick_gelu_linear(x, weight, bias))
        assert torch.equal(kernels.quick_gelu_linear(x[None], weight)[0], kernels.quick_gelu_linear(x, weight))
        scale, shift = (randn(size[1], seed=i, device=device, dtype=dtype) for i in (4, 5))
        norm = kernels.AddNorm(randn(rows, size[1], seed=6, device=device, dtype=dtype), scale, shift, 1e-5)
        for gelu in (False, True):
            found = kernels.norm_linear(x, norm._replace(residual=norm.residual.clone()), weight, bias, gelu=gelu)
            wanted = reference.norm_linear(x, norm._replace(residual=norm.residual.clone()), weight, bias, gelu=gelu)
            assert_close(found[0], wanted[0])
            assert_close(found[1], wanted[1])


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("blocks", [(16, 512, 4), (64, 1024, 8)], ids=str)
def test_one_row_triton(backend, size, gated, blocks):
    device = device_of(backend)
    from mm_core.kernels._triton.linear import GemvConfig, gemv

    for dtype in dtypes_of(backend):
        x, weight, bias = operands(1, *size, seed=2, device=device, dtype=dtype)
        if gated:
            assert_close(gemv(x, weight, None, GemvConfig(*blocks), gated=True), reference.gated_linear(x, weight))
            continue
        for added in (None, bias):
            out = gemv(x, weight, added, GemvConfig(*blocks))
            assert_close(out, reference.linear(x, weight, added))


@hopper_only
@pytest.mark.gpu
@pytest.mark.parametrize("tile", [(1, 16), (30, 32), (50, 64), (130, 64), (100, 128)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
def test_stream_k(tile, groups, gated):
    """Tiles cut in two or many, tiles beyond the last row, column and feature; twice, since it counts parts."""
    from mm_core.kernels._triton.linear_hopper import HopperConfig, counters, hopper

    rows, block_m = tile
    config, dtype = HopperConfig(block_m, groups, 64, 3), HALF_TYPES[groups - 1]
    for count, width in ((224, 9968), (1632, 2608), (40000, 272)):
        x, weight, bias = operands(rows, count, width, seed=3, device=torch.device("cuda"), dtype=dtype)
        torch.cuda.synchronize()  # the kernel may read W before the one that wrote it is done
        added = None if gated else bias
        first, again = (hopper(x, weight, added, config, gated=gated) for _ in range(2))
        assert_close(first, reference.gated_linear(x, weight) if gated else reference.linear(x, weight, bias))
        assert torch.equal(first, again)
        assert not counters(weight).any()


@pytest.fixture(scope="module", params=MODELS, ids=str)
def projection(request):
    """A model's weight and bias on the GPU, and whether it is a gated pair."""
    count, width, gated = request.param
    generator = torch.Generator(device="cuda").manual_seed(4)
    weight = torch.randn(count, width, device="cuda", dtype=torch.bfloat16, generator=generator).mul_(width**-0.5)
    bias = torch.randn(count, device="cuda", dtype=torch.bfloat16, generator=generator)
    torch.cuda.synchronize()  # the kernels may read a weight before the one that wrote it is done
    return weight, bias, gated


@hopper_only
@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 16, 32, 33, 64, 65, 128, 129])
def test_chosen_kernels(projection, rows):
    """What `linear` takes, also inside a CUDA graph, and with its rows in other company."""
    weight, bias, gated = projection
    x = randn(rows, weight.shape[1], seed=5, device=weight.device, dtype=weight.dtype)

    def run(x):
        return kernels.gated_linear(x, weight) if gated else kernels.linear(x, weight, bias)

    expected = reference.gated_linear(x, weight) if gated else reference.linear(x, weight, bias)
    found = run(x)
    assert_close(found, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(x)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, found)
    if rows > 1:
        others = x.clone()
        others[1:] = float("inf")
        assert torch.equal(run(others)[0], found[0])


ACTIVATED = {"silu": "gated_linear", "quick_gelu": "quick_gelu_linear", "gelu": "gelu_linear"}


@pytest.mark.gpu
@pytest.mark.parametrize("act", ACTIVATED)
@pytest.mark.parametrize("tiles", [(64, 4, 16, 1), (64, 3, 2, 2), (128, 2, 8, 1)], ids=str)
def test_many_rows(act, tiles):
    """More tiles than programs; tiles beyond the last row, column and feature; a row alone and in other company."""
    if not (cases.COMPILING or HOPPER):
        pytest.skip("Gluon has no interpreter, and its kernel is written for sm_90")
    from mm_core.kernels._triton.linear_tiles import TilesConfig, linear_tiles

    config, device = TilesConfig(*tiles), torch.device("cuda" if CUDA else "cpu")
    sizes = [(1, 144, 64), (777, 4080, 328), (3000, 2560, 1280)]
    for dtype, (rows, count, width) in zip((*HALF_TYPES, torch.bfloat16), sizes, strict=True):
        x, weight, bias = operands(rows, count, width, seed=11, device=device, dtype=dtype)
        bias = None if act == "silu" else bias
        out = linear_tiles(x, weight, bias, config, act)
        given = (x, weight) if act == "silu" else (x, weight, bias)
        assert_close(out, getattr(reference, ACTIVATED[act])(*given))
        assert torch.equal(out, linear_tiles(x, weight, bias, config, act))
        few = min(rows, 70)
        assert torch.equal(out[:few], linear_tiles(x[:few], weight, bias, config, act))
        others = x.clone()
        others[1:] = float("inf")
        assert torch.equal(out[0], linear_tiles(others, weight, bias, config, act)[0])


@hopper_only
@pytest.mark.gpu
@pytest.mark.parametrize("act", ACTIVATED)
def test_many_rows_are_taken(act, monkeypatch):
    """By the ops, once there is a rule; also inside a CUDA graph, and for x with more dimensions."""
    from mm_core.kernels._triton import linear_choice
    from mm_core.kernels._triton.linear_tiles import TilesConfig

    config, device = TilesConfig(), torch.device("cuda")
    monkeypatch.setattr(linear_choice, "TILES", {act: (2048, config)})
    x, weight, bias = operands(2050, 2560, 1280, seed=12, device=device, dtype=torch.bfloat16)
    given = (weight,) if act == "silu" else (weight, bias)
    op = getattr(kernels, ACTIVATED[act])
    found = op(x, *given)
    assert torch.equal(found, linear_choice.linear_tiles(x, weight, None if act == "silu" else bias, config, act))
    assert_close(op(x[:2047], *given), getattr(reference, ACTIVATED[act])(x[:2047], *given))
    assert torch.equal(op(x.unflatten(0, (2, 1025)), *given).flatten(0, 1), found)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op(x, *given)
    captured.fill_(float("nan"))
    graph.replay()
    assert torch.equal(captured, found)


def test_many_rows_choice(monkeypatch):
    """Only with a rule, from its rows on, and where the sizes fit; what rules there are can be launched."""
    pytest.importorskip("triton.experimental.gluon")
    from mm_core.kernels._triton import linear_choice
    from mm_core.kernels._triton.linear_tiles import TilesConfig

    for least, config in (*linear_choice.TILES.values(), (MANY_ROWS, TilesConfig())):
        assert least >= MANY_ROWS
        assert config.shared_memory + 2048 <= 227 * 1024
        assert config.buffers in (1, 2)
        assert config.block_k % 64 == 0
    config = TilesConfig(band=8)
    monkeypatch.setattr(linear_choice, "TILES", {"silu": (4096, config), "quick_gelu": (2048, config)})
    choose = linear_choice.many_rows
    assert choose(4096, 37888, 3584, "silu") is config
    assert choose(4095, 37888, 3584, "silu") is None
    assert choose(4095, 5120, 1280, "quick_gelu") is config
    assert choose(4095, 5120, 1280, "gelu") is None, "no rule"
    assert choose(8192, 6840, 1280, "silu") is None, "features do not come in eights"
    assert choose(8192, 6840, 1280, "quick_gelu") is config
    assert choose(8192, 6840, 1284, "quick_gelu") is None
    assert choose(8192, 512, 1280, "quick_gelu") is None


def test_choice_fits():
    """Every choice is launchable: shared memory, registers' worth of sums, aligned features."""
    pytest.importorskip("triton.experimental.gluon")
    from mm_core.kernels._triton.linear import GemvConfig
    from mm_core.kernels._triton.linear_choice import choose
    from mm_core.kernels._triton.linear_hopper import HopperConfig

    seen = set()
    sizes = [(c, w, g) for c, w, g in MODELS] + [(3584, 3584, False), (22016, 4096, True), (51866, 1280, False)]
    for (count, width, gated), rows in itertools.product(sizes, range(1, MOST_ROWS + 1)):
        config = choose(rows, count, width, gated)
        seen.add(config)
        if isinstance(config, GemvConfig):
            assert rows == 1
        elif isinstance(config, HopperConfig):
            stage = (config.block_m + 64 * config.groups) * config.block_k * 2
            assert stage * config.num_stages + 2048 <= 227 * 1024
            assert rows <= config.block_m
            assert config.groups in (1, 2)
    assert len(seen) > 5
    assert choose(8, 64, 64, False) is None
    assert choose(8, 37880, 3584, True) is None, "features do not come in eights"


def test_whole_rows_fit():
    """Powers of two, or no choice at all."""
    pytest.importorskip("triton.experimental.gluon")
    from mm_core.kernels._triton.linear_row import choose_row, parts

    for count, width in itertools.product((1280, 3840, 5120, 1536, 2048, 999, 64), (1280, 5120, 1024, 768, 1536, 1000)):
        config = choose_row(count, width)
        if config is not None:
            assert sum(parts(width)) == width
            assert all(n & (n - 1) == 0 and n > 0 for n in (*parts(width), *config))
    assert choose_row(3840, 1280) is not None
    assert choose_row(1280, 5120) is not None
    assert choose_row(1280, 1000) is None


@pytest.mark.parametrize("bias", [False, True])
def test_layers(bias):
    """Linear and GatedMLP are the ops, with and without a bias."""
    layer, mlp = Linear(24, 40, bias=bias), GatedMLP(24, 48, bias=bias)
    for seed, param in enumerate((*layer.parameters(), *mlp.parameters())):
        param.copy_(randn(*param.shape, seed=seed, device=param.device, dtype=param.dtype))
    x = randn(5, 24, seed=9, device=torch.device("cpu"), dtype=torch.float32)
    assert_close(layer(x), reference.linear(x, layer.weight, layer.bias))
    hidden = reference.linear(x, mlp.gate_up_proj.weight, mlp.gate_up_proj.bias)
    down = reference.linear(reference.silu_and_mul(hidden), mlp.down_proj.weight, mlp.down_proj.bias)
    assert_close(mlp(x), down)


@pytest.mark.parametrize("backend", BACKENDS[1:])
@pytest.mark.parametrize("size", [(200, 192), (64, 640)], ids=str)
@pytest.mark.parametrize("gelu", [False, True])
def test_whole_rows_triton(backend, size, gelu):
    """With and without the norm and the bias."""
    device = device_of(backend)
    from mm_core.kernels._triton.linear_row import RowConfig, row_linear

    for dtype in dtypes_of(backend):
        x, weight, bias = operands(1, *size, seed=6, device=device, dtype=dtype)
        residual, scale, shift = (randn(size[1], seed=i, device=device, dtype=dtype) for i in (7, 8, 9))
        norm, kept = kernels.AddNorm(residual[None], scale, shift, 1e-5), residual.clone()
        for added in (None, bias):
            for before in (None, norm):
                out, total = row_linear(x, weight, added, RowConfig(4, 4), norm=before, gelu=gelu)
                if before is None:
                    assert_close(out, (reference.gelu_linear if gelu else reference.linear)(x, weight, added))
                    continue
                before = norm._replace(residual=residual.clone()[None])
                wanted = reference.norm_linear(x, before, weight, added, gelu=gelu)
                assert_close(out, wanted[0])
                assert torch.equal(total, wanted[1])
                assert torch.equal(residual, kept)
