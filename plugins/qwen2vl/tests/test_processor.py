"""The processor: pixel values bit for bit, settings of both layouts, and prompts, against transformers."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny import make_tiny_qwen2vl
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mm_core.checkpoint.config import open_checkpoint
from mm_core.config import EngineConfig, SamplingParams
from mm_core.errors import CheckpointError, InvalidParamsError, InvalidPromptError, MediaError, PluginError
from mm_core.hookspecs import MediaRequest, Processor
from mm_core.inputs import InputPipeline, eos_token_ids
from mm_core.layers import Patchify
from mm_core.media import Normalisation, PatchLayout, normalise, patchify
from mm_core.types import MediaFeature, MediaItem, TextPrompt
from mm_plugin_qwen2vl import mm_fusion
from mm_plugin_qwen2vl.processor import Qwen2VLProcessor

RNG = np.random.default_rng(0)
NONE = MediaRequest({})


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {layout: make_tiny_qwen2vl(root, layout=layout) for layout in ("hub", "tf5")}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def processor(paths: dict[str, Path]) -> Qwen2VLProcessor:
    return Qwen2VLProcessor(open_checkpoint(str(paths["hub"])))


@pytest.fixture(scope="module")
def reference(paths: dict[str, Path]) -> Qwen2VLImageProcessorPil:
    return Qwen2VLImageProcessorPil.from_pretrained(str(paths["hub"]))


@pytest.fixture(scope="module")
def pipeline(paths: dict[str, Path], processor: Qwen2VLProcessor) -> Iterator[InputPipeline]:
    checkpoint = open_checkpoint(str(paths["hub"]))
    made = InputPipeline(
        processor, mm_fusion("qwen2vl", checkpoint), "qwen2vl", checkpoint.identity, EngineConfig(preprocess_threads=2),
        len(processor.tokenizer), 2048, eos_token_ids(checkpoint.generation_config, processor.tokenizer),
    )  # fmt: skip
    yield made
    made.close()


def noise(height: int, width: int, mode: str = "RGB") -> Image.Image:
    image = Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return image.convert(mode)


def item(image: Image.Image) -> MediaItem:
    return MediaItem("image", b"", image.convert("RGB"), {"width": image.width, "height": image.height})


def clip(frames: np.ndarray, **info: Any) -> MediaItem:
    return MediaItem("video", b"", frames, info)


def patches(processor: Qwen2VLProcessor, feature: MediaFeature) -> np.ndarray:
    """What the encoder makes of a feature's pixels."""
    settings = processor._settings[feature.modality]
    (pixels,) = feature.tensors.values()
    assert pixels.dtype == torch.uint8
    made = Patchify(settings.layout, settings.norm, torch.device("cpu"), torch.float32)([pixels])
    assert len(made) == math.prod(feature.info["grid_thw"])
    return made.numpy()


def same(processor: Qwen2VLProcessor, feature: MediaFeature, wanted: Any) -> bool:
    return feature.info["grid_thw"] == tuple(wanted["image_grid_thw"][0].tolist()) and np.array_equal(
        patches(processor, feature), wanted["pixel_values"]
    )


def test_it_is_a_processor(processor: Qwen2VLProcessor) -> None:
    assert isinstance(processor, Processor)
    assert processor.placeholder("video") == "<|video_pad|>"
    assert not processor.accepts_verbatim("x", {"image": 1})
    assert processor.finish("x", [1]) == "x"


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "RGBA"])
def test_pixels_equal_transformers_in_every_mode(
    processor: Qwen2VLProcessor, reference: Qwen2VLImageProcessorPil, mode: str
) -> None:
    for _ in range(4):
        image = noise(*(int(n) for n in RNG.integers(8, 300, 2)), mode=mode)
        assert same(
            processor,
            processor.prepare(item(image), b""),
            reference(images=[image.convert("RGB")], return_tensors="np"),
        )


def test_pixels_equal_transformers_at_every_size(
    processor: Qwen2VLProcessor, reference: Qwen2VLImageProcessorPil
) -> None:
    sizes = [
        (1, 1),
        (1, 8),
        (8, 1),
        (1, 200),
        (200, 1),
        (28, 28),
        (56, 56),
        (55, 57),
        (224, 224),
        (561, 278),
        (1080, 1920),
    ]
    sizes += [tuple(int(n) for n in RNG.integers(4, 500, 2)) for _ in range(25)]
    for height, width in sizes:
        image = noise(height, width)
        feature = processor.prepare(item(image), b"")
        assert same(processor, feature, reference(images=[image], return_tensors="np")), (height, width)
        assert feature.num_tokens * 4 == len(patches(processor, feature))


def test_request_sizes_equal_transformers(processor: Qwen2VLProcessor, reference: Qwen2VLImageProcessorPil) -> None:
    image = noise(300, 200)
    for low, high in ((784, 3136), (3136, 12_845_056), (200_000, 300_000)):
        variant = processor.variant(item(image), MediaRequest({}, {"min_pixels": low, "max_pixels": high}))
        wanted = reference(images=[image], size={"shortest_edge": low, "longest_edge": high}, return_tensors="np")
        assert same(processor, processor.prepare(item(image), variant), wanted)


def test_too_elongated(processor: Qwen2VLProcessor) -> None:
    for size in ((1, 201), (8192, 1)):
        with pytest.raises(MediaError) as caught:
            processor.prepare(item(noise(*size)), b"")
        assert caught.value.code == "image_aspect"


def test_division_equals_the_product_in_float64() -> None:
    """The shortcut in `Normalisation.apply`."""
    values = np.arange(256, dtype=np.uint8)
    assert np.array_equal(values / np.float32(255), (values.astype(np.float64) * (1 / 255)).astype(np.float32))
    pixels = np.tile(values[:, None], 3)
    exact = Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    other = Normalisation((0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 1 / 256)
    for norm in (exact, other):
        scaled = (pixels.astype(np.float64) * norm.rescale).astype(np.float32)
        assert np.array_equal(normalise(pixels, norm), (scaled - np.float32(norm.mean)) / np.float32(norm.std))


def plain_video(frames: np.ndarray, size: tuple[int, int], mean: list[float], std: list[float]) -> np.ndarray:
    """Patches of a video, written out: one loop an axis, no tricks."""
    resized = [np.asarray(Image.fromarray(f).resize(size[::-1], Image.Resampling.BICUBIC)) for f in frames]
    while len(resized) % 2:
        resized.append(resized[-1])
    scaled = (np.stack(resized).astype(np.float64) * (1 / 255)).astype(np.float32)
    pixels = (scaled - np.float32(mean)) / np.float32(std)
    rows = []
    for t in range(0, len(pixels), 2):
        for y in range(0, size[0], 28):
            for x in range(0, size[1], 28):
                for dy in (0, 14):
                    for dx in (0, 14):
                        patch = pixels[t : t + 2, y + dy : y + dy + 14, x + dx : x + dx + 14]
                        rows.append(patch.transpose(3, 0, 1, 2).reshape(-1))
    return np.stack(rows)


@pytest.mark.parametrize("count", [1, 2, 5, 6])
def test_videos_equal_the_plain_reference(processor: Qwen2VLProcessor, reference: Any, count: int) -> None:
    frames = RNG.integers(0, 256, (count, 90, 130, 3), dtype=np.uint8)
    feature = processor.prepare(clip(frames, sample_fps=4.0), b"")
    t, h, w = feature.info["grid_thw"]
    assert t == -(-count // 2)
    wanted = plain_video(frames, (h * 14, w * 14), reference.image_mean, reference.image_std)
    assert np.array_equal(patches(processor, feature), wanted)
    assert feature.num_tokens == t * h * w // 4
    assert feature.info["second_per_grid"] == 0.5
    assert processor.prepare(clip(frames), b"").info["second_per_grid"] is None


def test_features_share_no_memory_with_what_was_given(processor: Qwen2VLProcessor) -> None:
    frames = RNG.integers(0, 256, (2, 112, 112, 3), dtype=np.uint8)
    kept = frames.copy()
    feature = processor.prepare(clip(frames), processor.variant(clip(frames), MediaRequest({}, {"min_pixels": 784})))
    assert feature.tensors["pixels"].shape == frames.shape
    frames[:] = 0
    assert np.array_equal(feature.tensors["pixels"].numpy(), kept)


def test_patches_of_other_layouts() -> None:
    frames = RNG.integers(0, 256, (3, 24, 36, 3), dtype=np.uint8)
    norm = Normalisation((0.0,) * 3, (1 / 255,) * 3)
    made, grid = patchify(frames, PatchLayout(patch=4, temporal=1, merge=3), norm)
    assert grid == (3, 6, 9)
    block = made.reshape(3, 2, 3, 3, 3, 3, 4, 4)[2, 1, 2, 0, 1]
    assert np.array_equal(np.rint(block), frames[2, 12:16, 28:32].transpose(2, 0, 1))


def test_both_layouts_give_the_same_settings(paths: dict[str, Path], processor: Qwen2VLProcessor) -> None:
    other = Qwen2VLProcessor(open_checkpoint(str(paths["tf5"])))
    assert other.settings_key == processor.settings_key
    assert other.video_sampling(NONE) == processor.video_sampling(NONE)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "hi"}]}]
    assert other.apply_chat_template(messages) == processor.apply_chat_template(messages)


def with_settings(paths: dict[str, Path], tmp_path: Path, **changes: Any) -> Qwen2VLProcessor:
    path = tmp_path / "changed"
    shutil.copytree(paths["hub"], path, dirs_exist_ok=True)
    file = path / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return Qwen2VLProcessor(open_checkpoint(str(path)))


def test_settings_enter_the_key(paths: dict[str, Path], tmp_path: Path, processor: Qwen2VLProcessor) -> None:
    changed = with_settings(paths, tmp_path, image_mean=[0.5, 0.5, 0.5], rescale_factor=1 / 256)
    assert changed.settings_key != processor.settings_key
    size = with_settings(paths, tmp_path, min_pixels=None, size={"shortest_edge": 784, "longest_edge": 9})
    feature = size.prepare(item(noise(10, 10)), b"")
    assert feature.info["grid_thw"] == (1, 2, 2)
    for bad in ({"do_resize": False}, {"patch_size": 0}, {"min_pixels": "3"}, {"image_std": [1.0]}):
        with pytest.raises(CheckpointError):
            with_settings(paths, tmp_path, **bad)


def test_capped_video_frames(paths: dict[str, Path], tmp_path: Path) -> None:
    frames = RNG.integers(0, 256, (8, 112, 112, 3), dtype=np.uint8)
    capped = with_settings(paths, tmp_path, cap_pixels_per_frame=True, max_video_tokens=40)
    assert capped.prepare(clip(frames), b"").info["grid_thw"] == (4, 6, 6)  # 40·784·0.9·2 / 8 = 84² pixels


def test_variants_differ_only_where_the_features_do(processor: Qwen2VLProcessor) -> None:
    image, video = item(noise(10, 10)), clip(np.zeros((2, 8, 8, 3), np.uint8))
    for media in (image, video):
        found = [
            processor.variant(media, MediaRequest({}, kwargs))
            for kwargs in ({}, {"fps": 3.0}, {"min_pixels": 56 * 56}, {"max_pixels": 20_000}, {"max_pixels": 30_000})
        ]
        assert found[:3] == [b""] * 3
        assert len(set(found)) == 3


BAD_KWARGS: list[dict[str, Any]] = [
    {"min_pixels": 0}, {"min_pixels": -1}, {"max_pixels": 0}, {"max_pixels": -1}, {"max_pixels": 10**12},
    {"max_pixels": 1e6}, {"max_pixels": True}, {"min_pixels": "3136"}, {"min_pixels": 5000, "max_pixels": 4000},
    {"fps": 0}, {"fps": -1.0}, {"fps": float("nan")}, {"fps": float("inf")}, {"fps": 1e9}, {"fps": "2"}, {"fps": True},
    {"num_frames": 0}, {"num_frames": 10**9}, {"num_frames": 2.0}, {"num_frames": 4, "fps": 2.0},
    {"max_frames": 10**9}, {"max_frames": 0}, {"min_frames": 10, "max_frames": 4}, {"max_pixels": 10**6000},
    {"do_resize": False}, {"size": {}}, {"images_kwargs": {}},
]  # fmt: skip


@pytest.mark.parametrize("kwargs", BAD_KWARGS, ids=lambda k: "-".join(k))
def test_bad_kwargs(processor: Qwen2VLProcessor, kwargs: dict[str, Any]) -> None:
    with pytest.raises(InvalidParamsError, match="mm_processor_kwargs") as caught:
        processor.check_kwargs(kwargs)
    assert caught.value.param == "mm_processor_kwargs"


def test_sampling_overrides(processor: Qwen2VLProcessor) -> None:
    default = processor.video_sampling(NONE)
    assert (default.fps, default.max_frames, default.given_frames) == (2.0, 768, False)
    asked = processor.video_sampling(MediaRequest({}, {"num_frames": 8}))
    assert (asked.fps, asked.num_frames, asked.given_frames) == (None, 8, True)
    processor.check_kwargs({"fps": 1, "max_frames": 16, "min_pixels": 784, "max_pixels": 784})


def test_template_errors_are_the_users(processor: Qwen2VLProcessor) -> None:
    broken = Qwen2VLProcessor.__new__(Qwen2VLProcessor)
    broken.tokenizer, broken._template = processor.tokenizer, "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(InvalidPromptError, match="template"):
        broken.apply_chat_template([{"role": "user", "content": "x"}])


def test_the_familys_own_template_is_the_fallback(processor: Qwen2VLProcessor) -> None:
    from mm_plugin_qwen2vl.processor import _TEMPLATE

    fallback = Qwen2VLProcessor.__new__(Qwen2VLProcessor)
    fallback.tokenizer, fallback._template = processor.tokenizer, _TEMPLATE
    parts = [{"type": "image"}, {"type": "video"}, {"type": "text", "text": "hi"}]
    for messages in (
        [{"role": "user", "content": parts}],
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ],
    ):
        assert fallback.apply_chat_template(messages) == processor.apply_chat_template(messages)


def test_tokenizers_without_placeholders_are_refused(paths: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(str(paths["hub"]))
    checkpoint.tokenizer.convert_tokens_to_ids = lambda text: None
    with pytest.raises(PluginError, match="image_pad"):
        Qwen2VLProcessor(checkpoint)


def test_prompt_ids_equal_the_expansion_of_transformers(
    pipeline: InputPipeline, processor: Qwen2VLProcessor, reference: Qwen2VLImageProcessorPil
) -> None:
    images = [noise(60, 100), noise(120, 90)]
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "First <this>,\n"},
                                     {"type": "image", "image": images[1]}, {"type": "text", "text": " then that."}]},
        {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And?"},
    ]  # fmt: skip
    request = pipeline.submit("r", messages, SamplingParams()).result(20)
    text = processor.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    grids = reference(images=images, return_tensors="np")["image_grid_thw"]
    pieces = text.split("<|image_pad|>")
    for index, grid in enumerate(grids):
        pieces[index] += "<|image_pad|>" * int(grid.prod() // 4)
    assert list(request.token_ids) == processor.tokenizer("".join(pieces))["input_ids"]
    assert [r.feature.info["grid_thw"] for r in request.ranges] == [tuple(g.tolist()) for g in grids]
    assert all(set(request.token_ids[r.offset : r.end]) == {processor.placeholder_id("image")} for r in request.ranges)
    assert request.positions is not None
    assert request.positions.shape == (3, len(request.token_ids))
    assert processor.tokenizer.eos_token_id in request.stop_token_ids


def test_images_and_videos_in_one_request(pipeline: InputPipeline, processor: Qwen2VLProcessor) -> None:
    frames = RNG.integers(0, 256, (3, 60, 60, 3), dtype=np.uint8)
    media = {"video": [(frames, 2.0)], "image": [noise(56, 56), noise(1, 1)]}
    request = pipeline.submit("r", TextPrompt(prompt="What?", multi_modal_data=media), SamplingParams()).result(20)
    assert [r.feature.modality for r in request.ranges] == ["video", "image", "image"]
    for found in request.ranges:
        assert request.token_ids[found.offset] == processor.placeholder_id(found.feature.modality)
        assert found.length == found.feature.num_tokens
    assert request.ranges[0].feature.info["second_per_grid"] == 1.0


def test_request_settings_separate_keys(pipeline: InputPipeline) -> None:
    image = noise(100, 100)
    keys = set()
    for kwargs in (None, {"max_pixels": 4000}, {"max_pixels": 8000}):
        prompt = TextPrompt(prompt="x", multi_modal_data={"image": image}, mm_processor_kwargs=kwargs)
        keys.add(pipeline.submit("r", prompt, SamplingParams()).result(20).ranges[0].feature.key)
    assert len(keys) == 3
