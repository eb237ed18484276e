"""Qwen2VLEncoder equals transformers' vision towers, alone and packed."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.loading import load_renamed
from support.tiny import make_tiny_qwen2vl
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

from mm_core.errors import ConfigError
from mm_core.hookspecs import BuildContext
from mm_core.media import Normalisation, PatchLayout, patchify
from mm_core.types import MediaFeature
from mm_plugin_qwen2vl.encoder import Qwen2VLEncoder, VisionConfig
from mm_plugin_qwen2vl.layout import packed_layout
from mm_plugin_qwen2vl.processor import Settings, Sizes

# Whole and cut windows, one row of groups, several frames
GRIDS = [(1, 8, 8), (1, 2, 6), (1, 10, 14), (3, 6, 4), (1, 2, 2), (2, 12, 10)]
TOLERANCE = 2e-5  # of rows of about unit size, in float32
CPU = BuildContext(torch.device("cpu"), torch.float32, 64)


LAYOUT = PatchLayout()
SETTINGS = {
    "image": Settings(Sizes(1, 10**6), LAYOUT, Normalisation((0.48, 0.46, 0.41), (0.27, 0.26, 0.28)), 3),
    "video": Settings(Sizes(1, 10**5), LAYOUT, Normalisation((0.5, 0.5, 0.5), (0.5, 0.4, 0.3)), 3),
}


def feature(grid: tuple[int, int, int], modality: str = "image") -> MediaFeature:
    """The last frame of several is left out: the encoder repeats the one before."""
    t, h, w = grid
    generator = torch.Generator().manual_seed(1000 * h + w)
    shape = (2 * t - (t > 1), 14 * h, 14 * w, 3)
    pixels = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return MediaFeature(modality, t * h * w // 4, {"pixels": pixels}, {"grid_thw": grid})


def build(tmp_path: Path, version: str, layout: str = "hub", **overrides: object):
    path = make_tiny_qwen2vl(tmp_path, version, layout, **overrides)
    model = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    config = json.loads((path / "config.json").read_text())
    encoder = Qwen2VLEncoder(VisionConfig.from_config(config), SETTINGS, CPU)
    unused = load_renamed(encoder, load_file(path / "model.safetensors"), encoder.weight_map)
    assert not any("visual" in name for name in unused)
    return model.model.visual, encoder


def reference(visual: torch.nn.Module, features: Sequence[MediaFeature]) -> list[torch.Tensor]:
    found = [patchify(f.tensors["pixels"].numpy(), LAYOUT, SETTINGS[f.modality].norm) for f in features]
    assert [grid for _, grid in found] == [f.info["grid_thw"] for f in features]
    pixels = torch.cat([torch.from_numpy(patches) for patches, _ in found])
    grids = torch.tensor([f.info["grid_thw"] for f in features])
    rows = visual(pixels, grid_thw=grids).pooler_output
    return list(rows.split([f.num_tokens for f in features]))


@pytest.mark.parametrize("layout", ["hub", "tf5"])
@pytest.mark.parametrize("version", ["2", "2.5"])
@torch.inference_mode()
def test_rows_equal_the_reference(tmp_path: Path, version: str, layout: str) -> None:
    visual, encoder = build(tmp_path, version, layout)
    features = [feature(g, "video" if g[0] > 1 else "image") for g in GRIDS]
    got, want = encoder(features), reference(visual, features)
    assert [tuple(r.shape) for r in got] == [(f.num_tokens, encoder.hidden_size) for f in features]
    assert torch.cat(want).std() > 0.3
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("version", ["2", "2.5"])
@torch.inference_mode()
def test_packed_rows_equal_those_of_items_alone(tmp_path: Path, version: str) -> None:
    _, encoder = build(tmp_path, version)
    features = [feature(g) for g in GRIDS]
    alone = [encoder([f])[0] for f in features]
    torch.testing.assert_close(encoder(features), alone, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(encoder(features[::-1]), alone[::-1], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(encoder(features), alone, atol=TOLERANCE, rtol=0)  # from a layout that was kept
    assert encoder([]) == []


@torch.inference_mode()
def test_only_the_last_layouts_are_kept(tmp_path: Path) -> None:
    _, encoder = build(tmp_path, "2.5")
    features = [feature((1, 2, 2 * n)) for n in range(1, 40)]
    alone = [encoder([f])[0] for f in features]
    assert len(encoder._layouts) == 32
    torch.testing.assert_close(encoder(features), alone, atol=TOLERANCE, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("version", ["2", "2.5"])
@torch.inference_mode()
def test_a_gpu_computes_the_same_without_waiting(tmp_path: Path, version: str) -> None:
    """Items that come once, and packs of equal ones that are captured and replayed."""
    _, encoder = build(tmp_path, version)
    device = torch.device("cuda")
    other = Qwen2VLEncoder(encoder.config, SETTINGS, BuildContext(device, torch.float32, 64))
    for param, value in zip(other.parameters(), encoder.parameters(), strict=True):
        param.copy_(value)
    features = [feature(g, m) for g in GRIDS for m in ("image", "video") if g[0] > 1 or m == "image"]
    features += [feature((1, 8, 8 + 2 * (n % 3 == 0))) for n in range(9)]
    want = torch.cat(encoder(features))
    there = [replace(f, tensors={k: t.to(device) for k, t in f.tensors.items()}) for f in features]
    with torch.cuda.stream(torch.cuda.Stream()):
        other(there)  # compiles kernels, which may wait
        other.use_graphs()
        for _ in range(3):
            try:
                torch.cuda.set_sync_debug_mode("error")
                rows = torch.cat(other(there))
            finally:
                torch.cuda.set_sync_debug_mode("default")
            torch.testing.assert_close(rows.cpu(), want, atol=1e-4, rtol=0)
    assert len(other._captured._graphs) >= 6


@torch.inference_mode()
def test_windows_matter(tmp_path: Path) -> None:
    """So that the comparison above would notice a tower that ignores them."""
    _, encoder = build(tmp_path, "2.5")
    _, other = build(tmp_path, "2.5", vision_fullatt_block_indexes=[0, 1, 2])
    item = [feature((1, 10, 14))]
    assert (encoder(item)[0] - other(item)[0]).abs().max() > 0.01


@torch.inference_mode()
def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    _, encoder = build(tmp_path, "2.5")
    low = Qwen2VLEncoder(encoder.config, SETTINGS, BuildContext(torch.device("cpu"), torch.bfloat16, 64))
    for param, value in zip(low.parameters(), encoder.parameters(), strict=True):
        param.copy_(value)
    (got,), (want,) = low([feature((1, 8, 6))]), encoder([feature((1, 8, 6))])
    assert got.dtype == torch.bfloat16
    assert (got.float() - want).norm() / want.norm() < 0.03


@pytest.mark.parametrize("window", [0, 1, 2, 4])
def test_layout_equals_the_reference_on_random_grids(window: int) -> None:
    rng = random.Random(window)
    for _ in range(20):
        grids = [(rng.randint(1, 3), 2 * rng.randint(1, 12), 2 * rng.randint(1, 12)) for _ in range(rng.randint(1, 4))]
        layout, tensor = packed_layout(grids, 2, window), torch.tensor(grids)
        assert layout.frames.tolist() == get_vision_cu_seqlens(tensor).tolist()
        positions = get_vision_position_ids(tensor, 2)
        if window:
            order, bounds = get_vision_window_index(tensor, 2, window * 28, 14)
            assert layout.order.tolist() == order.tolist()
            assert layout.inverse.tolist() == torch.argsort(order).tolist()
            assert layout.windows.tolist() == bounds.tolist()
            assert layout.max_window == bounds.diff().max()
            positions = positions.view(-1, 4, 2)[order].view(-1, 2)
        assert layout.positions.tolist() == positions.tolist()
        assert layout.max_frame == max(h * w for _, h, w in grids)


def test_cost_is_patches(tmp_path: Path) -> None:
    _, encoder = build(tmp_path, "2")
    assert encoder.cost(feature((2, 12, 10))) == 240


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ConfigError, match="'relu'"):
        VisionConfig.from_config({"model_type": "qwen2_vl", "vision_config": {"hidden_act": "relu"}})
