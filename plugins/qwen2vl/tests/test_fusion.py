"""Qwen2VLFusion's positions equal get_rope_index of transformers."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

from mm_core.errors import MediaError
from mm_core.types import MediaFeature, PlaceholderRange
from mm_plugin_qwen2vl.fusion import Qwen2VLFusion

TEXT, IMAGE, VIDEO = 7, 1, 2
VISION = {"spatial_merge_size": 2, "tokens_per_second": 2}


def item(modality: str, grid: tuple[int, int, int], offset: int, seconds: float | None = None) -> PlaceholderRange:
    n = grid[0] * grid[1] * grid[2] // 4
    info = {"grid_thw": grid, "second_per_grid": seconds}
    return PlaceholderRange(offset, n, (True,) * n, MediaFeature(modality, n, {}, info))


def prompt(rng: random.Random, kinds: str) -> tuple[list[int], list[PlaceholderRange]]:
    """Text and items in turn, `i` an image and `v` a video; text may be absent at either end."""
    ids: list[int] = [TEXT] * rng.randint(0, 9)
    ranges = []
    for kind in kinds:
        grid = (rng.randint(1, 9) if kind == "v" else 1, 2 * rng.randint(1, 9), 2 * rng.randint(1, 9))
        seconds = rng.choice([0.1, 1 / 3, 0.5, 1.0, 1.7, 4.0, None]) if kind == "v" else None
        ranges.append(item("video" if kind == "v" else "image", grid, len(ids), seconds))
        ids += [VIDEO if kind == "v" else IMAGE] * ranges[-1].length + [TEXT] * rng.randint(1, 6)
    return (ids if rng.random() < 0.7 else ids[: ranges[-1].end]), ranges


def reference(version: str, ids: list[int], ranges: list[PlaceholderRange]) -> tuple[np.ndarray, int]:
    model = Qwen2VLModel if version == "2" else Qwen2_5_VLModel
    stub = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(**VISION)))
    stub.get_vision_position_ids = lambda *a, **k: model.get_vision_position_ids(stub, *a, **k)
    tokens = torch.tensor([ids])
    grids = {
        m: torch.tensor([r.feature.info["grid_thw"] for r in ranges if r.feature.modality == m])
        for m in ("image", "video")
    }
    seconds = [r.feature.info["second_per_grid"] for r in ranges if r.feature.modality == "video"]
    extra = {"second_per_grid_ts": torch.tensor([1.0 if s is None else s for s in seconds])}
    positions, delta = model.get_rope_index(
        stub,
        tokens,
        torch.where(tokens == TEXT, 0, tokens),
        image_grid_thw=grids["image"],
        video_grid_thw=grids["video"],
        **(extra if version == "2.5" else {}),
    )
    return positions[:, 0].numpy(), int(delta)


@pytest.mark.parametrize("version", ["2", "2.5"])
@pytest.mark.parametrize("kinds", ["i", "v", "ii", "vv", "iv", "vi", "iivvi"])
def test_positions_equal_the_reference(version: str, kinds: str) -> None:
    fusion = Qwen2VLFusion(2, 2 if version == "2.5" else None)
    rng = random.Random(kinds)
    for _ in range(25):
        ids, ranges = prompt(rng, kinds)
        found = fusion.positions(ids, ranges)
        assert found is not None
        want, delta = reference(version, ids, ranges)
        assert found[0].dtype == np.int32
        np.testing.assert_array_equal(found[0], want)
        assert found[1] == delta


def test_text_alone_has_plain_positions() -> None:
    assert Qwen2VLFusion(2, None).positions([TEXT] * 5, []) is None


def test_tokens_around_the_rows_of_a_range_count_as_text() -> None:
    fusion = Qwen2VLFusion(2, None)
    bare = item("image", (1, 4, 6), 3)
    ids = [TEXT] * 3 + [IMAGE] * 6 + [TEXT] * 4
    wrapped = PlaceholderRange(2, 8, (False, *bare.is_media, False), bare.feature)
    np.testing.assert_array_equal(fusion.positions(ids, [bare])[0], fusion.positions(ids, [wrapped])[0])


def test_video_too_sparse_for_the_table_of_angles_is_rejected() -> None:
    clip = item("video", (10, 2, 2), 1, seconds=1000.0)
    with pytest.raises(MediaError, match="more frames a second"):
        Qwen2VLFusion(2, 2.0).positions([TEXT] + [VIDEO] * 10, [clip])


def test_settings_come_from_either_config_layout() -> None:
    vision = {"vision_config": {"spatial_merge_size": 2, "tokens_per_second": 2}}
    timed = Qwen2VLFusion.from_config({"model_type": "qwen2_5_vl", **vision})
    assert (timed.merge_size, timed.tokens_per_second) == (2, 2)
    assert Qwen2VLFusion.from_config({"model_type": "qwen2_vl", **vision}).tokens_per_second is None
