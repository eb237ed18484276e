"""Pixels bit for bit as transformers' PIL image processors make them, and the settings behind them."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.tiny_llava import GRIDS, PICTURES, TILE, Tiny, pictures_of, prepared_video
from transformers.image_processing_utils import select_best_resolution
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor

from mm_core.checkpoint import open_checkpoint
from mm_core.errors import CheckpointError, ConfigError, MediaDecodeError
from mm_core.hookspecs import MediaRequest
from mm_core.media import normalise
from mm_core.testing import frames, picture
from mm_core.types import MediaItem
from mm_plugin_llava.config import LlavaConfig
from mm_plugin_llava.layout import frames_layout, grid_layout
from mm_plugin_llava.pictures import PictureSettings, best_resolution
from mm_plugin_llava.processor import LlavaProcessor

DICE = random.Random(7)
SIZES = [(1, 1), (1, 300), (300, 1), (TILE, TILE), (37, 39), (40, 30)]
SIZES += [(DICE.randint(1, 500), DICE.randint(1, 500)) for _ in range(14)]
KINDS = {
    "CLIP": Tiny(),
    "Siglip": Tiny(tower="siglip", pictures="Siglip", config={"vision_feature_select_strategy": "full"}),
    "Llava": Tiny(pictures="Llava", layout="tf5"),
    "LlavaNext": Tiny("llava_next", pictures="LlavaNext"),
    "LlavaOnevision": Tiny("llava_onevision", "siglip", "qwen2", "LlavaOnevision", "tf5"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, LlavaProcessor]]:
    paths = {kind: tiny.write(tmp_path_factory.mktemp(kind)) for kind, tiny in KINDS.items()}
    return {kind: (path, LlavaProcessor(open_checkpoint(str(path)))) for kind, path in paths.items()}


def prepared(processor: LlavaProcessor, modality: Any, data: Any, several: int = 1) -> Any:
    item = MediaItem(modality, b"", data)
    return processor.prepare(item, processor.variant(item, MediaRequest({modality: several})))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("several", [1, 2])
def test_pixels_of_many_sizes(kind: str, several: int, made: dict[str, Any]) -> None:
    path, processor = made[kind]
    reference, settings = pictures_of(path), processor._settings["image"]
    for seed, size in enumerate(SIZES):
        image = picture(seed, *size)
        nested = [[image] * several] if kind == "LlavaOnevision" else [image]
        wanted = np.asarray(reference(images=nested, return_tensors="np")["pixel_values"])[0]
        wanted = wanted if wanted.ndim == 4 else wanted[None]
        pixels = prepared(processor, "image", image, several).tensors["pixels"].numpy()
        assert pixels.shape == (len(wanted), 35, 35, 3), size
        ours = normalise(pixels, settings.norm).transpose(0, 3, 1, 2)
        np.testing.assert_array_equal(ours, wanted[:, :, :35, :35], err_msg=str(size))


def test_a_clip_is_resized_frame_by_frame(made: dict[str, Any]) -> None:
    _, processor = made["LlavaOnevision"]
    shot = frames(3, 4, 70, 90)
    feature = prepared(processor, "video", shot)
    ours = normalise(feature.tensors["pixels"].numpy(), processor._settings["video"].norm).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(ours, prepared_video(shot)[:, :, :35, :35])
    assert feature.num_tokens == 4 * 3 * 3 + 1


@pytest.mark.parametrize(
    "changes",
    [
        {"do_rescale": False, "do_normalize": False},
        {"do_normalize": False},
        {"rescale_factor": 0.01},
        {"resample": 2},
        {"size": {"shortest_edge": 50}},
        {"size": {"shortest_edge": 30}},
        {"size": {"height": 44, "width": 61}},
        {"do_resize": False},
        {"size": TILE, "crop_size": TILE},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["CLIP", "LlavaNext"])
def test_settings_are_honoured(kind: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Also tiles that are resized and cropped once more, and pictures smaller than the crop."""
    import json

    path = KINDS[kind].write(tmp_path)
    file = path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    processor = LlavaProcessor(open_checkpoint(str(path)))
    for seed, size in enumerate([(60, 45), (20, 90), (33, 31)]):
        image = picture(seed, *size)
        wanted = pictures_of(path)(images=[image], return_tensors="np")["pixel_values"][0]
        ours = normalise(
            prepared(processor, "image", image).tensors["pixels"].numpy(), processor._settings["image"].norm
        )
        np.testing.assert_array_equal(
            ours.transpose(0, 3, 1, 2), np.asarray(wanted).reshape(-1, 3, TILE, TILE)[:, :, :35, :35]
        )


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision"])
def test_missing_settings_take_transformers_defaults(kind: str) -> None:
    from importlib import import_module

    name = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}[kind]
    theirs = getattr(
        import_module(f"transformers.models.{kind}.image_processing_pil_{kind}"), f"{name}ImageProcessorPil"
    )()
    ours = PictureSettings.from_config({}, kind)
    size = (ours.size, None) if isinstance(ours.size, int) else (None, ours.size)
    assert size == (theirs.size.shortest_edge, (theirs.size.height, theirs.size.width) if theirs.size.height else None)
    assert ours.crop == ((theirs.crop_size.height, theirs.crop_size.width) if theirs.do_center_crop else None)
    assert (list(ours.norm.mean), list(ours.norm.std)) == (list(theirs.image_mean), list(theirs.image_std))
    assert (ours.norm.rescale, ours.resample) == (theirs.rescale_factor, int(theirs.resample))
    assert [list(p) for p in ours.pinpoints] == list(getattr(theirs, "image_grid_pinpoints", []))


def test_best_resolution_is_transformers_own() -> None:
    dice = random.Random(1)
    for _ in range(300):
        size = (dice.randint(1, 3000), dice.randint(1, 3000))
        points = [(dice.randint(1, 9) * 100, dice.randint(1, 9) * 100) for _ in range(9)]
        assert best_resolution(size, points) == select_best_resolution(size, points)
    grids = [(h, w) for h, w in GRIDS]
    assert best_resolution((8192, 1), grids) == select_best_resolution((8192, 1), grids)


def test_rows_as_transformers_processors_count_them() -> None:
    """Their arithmetic, which is not the model's, on 24 × 24 rows a tile of 336 pixels."""
    dice = random.Random(2)
    points = [[336 * a, 336 * b] for a in range(1, 7) for b in range(1, 7)]
    shared: dict[str, Any] = {"image_processor": SimpleNamespace(image_grid_pinpoints=points)}
    following = SimpleNamespace(**shared, patch_size=14, num_additional_image_tokens=0)
    onevision = SimpleNamespace(**shared, num_image_tokens=576, vision_aspect_ratio="anyres_max_9")
    following._get_unpadded_features = LlavaNextProcessor._get_unpadded_features.__get__(following)
    onevision._get_unpadded_features = LlavaOnevisionProcessor._get_unpadded_features.__get__(onevision)
    for _ in range(300):
        size = (dice.randint(1, 4000), dice.randint(1, 4000))
        best = best_resolution(size, [(h, w) for h, w in points])
        grid = (best[0] // 336, best[1] // 336)
        for fake, kind, most in ((following, LlavaNextProcessor, 0), (onevision, LlavaOnevisionProcessor, 9)):
            wanted = kind._get_number_of_features(fake, *size, 336, 336)
            assert grid_layout(size, grid, 24, most).num_rows(576) == wanted, (size, kind)
    assert frames_layout(5, 27).num_rows(729) == 5 * 14 * 14 + 1


def test_elongated_pictures_end_in_a_named_error(made: dict[str, Any]) -> None:
    """transformers would make a picture of gigabytes before it crops it."""
    settings = PictureSettings.from_config({"size": {"shortest_edge": 336}}, "llava")
    for size in ((1, 8192), (8192, 1)):
        with pytest.raises(MediaDecodeError, match="so elongated") as caught:
            settings.plain(picture(0, *size))
        assert caught.value.code == "image_aspect"
    square = PictureSettings.from_config({}, "llava_onevision")
    with pytest.raises(MediaDecodeError, match="9000×9000"):
        square.squared(picture(0, 9000, 1))
    assert square.squared(picture(0, 8192, 1)).size == (8192, 8192)
    assert prepared(made["LlavaOnevision"][1], "image", picture(0, 8192, 1)).num_tokens == 25 + 6


@pytest.mark.parametrize(
    ("part", "kind", "text"),
    [
        ({"image_processor_type": "PixtralImageProcessor"}, "llava", "PixtralImageProcessor"),
        ({"size": {"longest_edge": 3}}, "llava", "shortest_edge"),
        ({"size": {"height": 336, "width": 0}}, "llava", "height and width"),
    ],
)
def test_settings_nobody_reads(part: dict[str, Any], kind: str, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        PictureSettings.from_config(part, kind)


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ({**PICTURES["CLIP"], "do_center_crop": False}, "llava"),
        (PICTURES["CLIP"] | {"crop_size": 40}, "llava"),
        ({**PICTURES["LlavaNext"], "image_grid_pinpoints": [[TILE, TILE + 1]]}, "llava_next"),
        (PICTURES["CLIP"] | {"image_processor_type": "CLIPImageProcessor"}, "llava_next"),
    ],
)
def test_tiles_that_the_tower_cannot_read(part: dict[str, Any], kind: str) -> None:
    with pytest.raises(CheckpointError, match="tiles of 38 pixels"):
        PictureSettings.from_config(part, kind).check(TILE, tiled=kind == "llava_next")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"model_type": "llava", "vision_feature_select_strategy": "cls"}, "cls"),
        ({"model_type": "llava_next", "vision_feature_select_strategy": "full"}, "577 rows"),
        ({"model_type": "llava_onevision", "vision_aspect_ratio": "pad"}, "anyres_max_N"),
        ({"model_type": "llava", "text_config": {"model_type": "gemma"}}, "gemma"),
        ({"model_type": "llava", "vision_config": {"model_type": "pixtral"}}, "pixtral"),
        ({"model_type": "pali"}, "pali"),
    ],
)
def test_configs_nobody_reads(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        LlavaConfig.from_checkpoint(fake(config))


def fake(config: dict[str, Any]) -> Any:
    return SimpleNamespace(config=config, text_config=config.get("text_config") or config)


@pytest.mark.parametrize("kind", ["llava", "llava_next", "llava_onevision"])
def test_an_empty_config_is_transformers_own(kind: str) -> None:
    import transformers

    name = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}[kind]
    theirs = getattr(transformers, f"{name}Config")()
    ours = LlavaConfig.from_checkpoint(fake({"model_type": kind}))
    assert {n: getattr(theirs.vision_config, n) for n in ours.tower.defaults} == {
        n: getattr(ours.tower, n) for n in ours.tower.defaults
    }
    assert ours.text_width == theirs.text_config.hidden_size
    assert ours.text_type == theirs.text_config.model_type
    assert (ours.layers, ours.act, ours.bias) == (
        theirs.vision_feature_layer,
        theirs.projector_hidden_act,
        theirs.multimodal_projector_bias,
    )
    assert ours.skip == (theirs.vision_feature_select_strategy == "default")
