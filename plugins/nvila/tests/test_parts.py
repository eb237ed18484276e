"""Tiling, projectors, templates and settings by themselves."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support.tiny_vila import LITE, PLAIN, S2, STATIC, Tiny
from support.vila_reference import best_ratio, crops, projector

from mm_core import Engine, MMError, SamplingParams, TextPrompt
from mm_core.checkpoint import open_checkpoint
from mm_core.errors import CheckpointError, ConfigError, InvalidParamsError, InvalidPromptError, MediaDecodeError
from mm_core.hookspecs import BuildContext, MediaRequest
from mm_core.testing import clip, picture
from mm_core.types import MediaItem
from mm_plugin_nvila import tiling
from mm_plugin_nvila.processor import VilaProcessor
from mm_plugin_nvila.projector import make_projector
from mm_plugin_nvila.prompts import HERMES_2, LLAMA_3, QWEN2, VICUNA_V1, choose
from mm_plugin_nvila.settings import read_settings

CONTEXT = BuildContext(torch.device("cpu"), torch.float32, 64)
MEDIA = {"image": "<image>", "video": "<vila/video>"}


class Given:
    """A checkpoint that is only settings."""

    name = "somebody/model"

    def __init__(self, **config: Any) -> None:
        vision = {"model_type": "siglip_vision_model", "image_size": 448, "patch_size": 14}
        plain = {"vision_tower_cfg": vision, "mm_projector_cfg": {"mm_projector_type": "mlp_downsample"}}
        self.config = {"architectures": ["LlavaLlamaModel"], **plain, **config}
        self.processor_config: dict[str, Any] = {"image_processor": {}}


def sizes(count: int) -> list[tuple[int, int]]:
    draw = random.Random(5)
    drawn = [(draw.randint(1, 2000), draw.randint(1, 2000)) for _ in range(count)]
    return [(1, 1), (1, 8192), (8192, 1), (448, 448), (1344, 896), (900, 300), (3000, 1500), *drawn]


@pytest.mark.parametrize(("low", "high"), [(9, 12), (1, 12), (4, 9), (2, 30)])
def test_grids(low: int, high: int) -> None:
    """Of every size; ties are settled as the set's order says."""
    for width, height in sizes(60):
        image = Image.new("RGB", (1, 1)).resize((width, height))
        assert tiling.closest(image.size, tiling.candidates(low, high), 448) == best_ratio(image, low, high, 448)


def test_order_of_equal_products_is_that_of_the_set() -> None:
    numbers = range(1, 7)
    wanted = sorted({(i, j) for n in numbers for i in range(1, n + 1) for j in range(1, n + 1) if i * j <= 6},
                    key=lambda r: r[0] * r[1])  # fmt: skip
    assert list(tiling.candidates(1, 6)) == wanted
    assert set(wanted[-4:]) == {(1, 6), (6, 1), (2, 3), (3, 2)}


@pytest.mark.parametrize("size", [(31, 200), (400, 57), (1, 300), (28, 28)])
def test_tiles_are_the_crops(size: tuple[int, int]) -> None:
    image = picture(3, *size)
    tiles, (rows, columns) = tiling.dynamic_s2(image, (1, 2, 3), 12, 28)
    wanted = [*crops(image, 1, 1, 28), *crops(image, 2, 2, 28), *crops(image, columns, rows, 28)]
    assert np.array_equal(tiles, np.stack([np.asarray(c) for c in wanted]))
    tiles = tiling.dynamic(image, 1, 12, 28)
    columns, rows = best_ratio(image, 1, 12, 28)
    wanted = crops(image, columns, rows, 28)
    wanted += [image.resize((28, 28))] if len(wanted) > 1 else []
    assert np.array_equal(tiles, np.stack([np.asarray(c) for c in wanted]))


def test_thin_pictures_have_a_ceiling() -> None:
    def thin(height: int) -> Image.Image:
        return Image.new("RGB", (1, height))

    assert tiling.padded(thin(8192), (0.5, 0.5, 0.5)).size == (8192, 8192)
    assert tiling.resized(thin(2**18), 2**8, 4).shape == (4, 256, 3)
    for make in (
        lambda: tiling.padded(thin(8193), (0.5, 0.5, 0.5)),
        lambda: tiling.dynamic_s2(thin(2**18), (1, 2, 3), 12, 448),
        lambda: tiling.resized(thin(2**18 + 1), 2**8, 4),
    ):
        with pytest.raises(MediaDecodeError, match="Crop") as caught:
            make()
        assert caught.value.code == "image_aspect"


@pytest.mark.parametrize("side", [4, 5, 6])
@pytest.mark.parametrize(
    "kind",
    [
        "identity", "linear", "mlp1x_gelu", "mlp2x_gelu", "mlp4x_gelu", "mlp_downsample", "mlp_downsample_2x2_fix",
        "mlp_downsample_3x3_fix", "mlp_downsample_3x3_s2", "mlp_downsample_3x3_s2_new",
    ],
)  # fmt: skip
def test_projectors(kind: str, side: int) -> None:
    width, out = 12, 12 if kind == "identity" else 20
    reference, made = projector(kind, width, out), make_projector(kind, width, out, CONTEXT)
    made.load_state_dict(reference.state_dict())
    x = torch.randn(3, side * side, width)
    assert torch.allclose(made(x), reference(x), atol=1e-6)


def test_projector_that_nobody_knows() -> None:
    with pytest.raises(ConfigError, match="mlp_upsample"):
        make_projector("mlp_upsample", 8, 8, CONTEXT)
    with pytest.raises(ConfigError, match="identity"):
        make_projector("identity", 8, 9, CONTEXT)


TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": "A cat."},
    {"role": "user", "content": "Why?"},
]
ASK = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions."  # noqa: E501
HELP = "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, and assist the user with a variety of tasks using natural language."  # noqa: E501


def test_templates() -> None:
    assert QWEN2.render(TURNS, MEDIA) == (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n<image>What?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert VICUNA_V1.render(TURNS, MEDIA) == f"{ASK} USER: <image>What? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:"
    assert HERMES_2.render(TURNS, MEDIA) == (
        "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>What?<|im_end|>"
        "<|im_start|>assistant\nA cat.<|im_end|><|im_start|>user\nWhy?<|im_end|><|im_start|>assistant\n"
    )

    def part(role: str, text: str) -> str:
        return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}"

    assert LLAMA_3.render(TURNS, MEDIA) == (
        "<|begin_of_text|>" + part("system", HELP) + "<|eot_id|>" + part("user", "<image>What?") + "<|eot_id|>"
        + part("assistant", "A cat.") + "<|eot_id|>" + part("user", "Why?") + "<|eot_id|>" + part("assistant", "")
    )  # fmt: skip


def test_system_messages() -> None:
    system = {"role": "system", "content": "Be brief."}
    assert QWEN2.render([system, TURNS[2]], MEDIA).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>u")
    assert VICUNA_V1.render([system, TURNS[2]], MEDIA) == "Be brief. USER: Why? ASSISTANT:"
    for messages in ([TURNS[2], system], [{"role": "tool", "content": "x"}]):
        with pytest.raises(InvalidPromptError, match="role"):
            QWEN2.render(messages, MEDIA)


def test_which_template() -> None:
    llama, qwen = {"model_type": "llama"}, {"model_type": "qwen2"}
    assert choose("a", {}, qwen, {}) is QWEN2
    assert choose("a", {}, llama, {"</s>": 2}) is VICUNA_V1
    assert choose("a", {}, llama, {"<|start_header_id|>": 2, "</s>": 3}) is LLAMA_3
    assert choose("a", {}, llama, {"<|im_start|>": 2, "</s>": 3}) is HERMES_2
    assert choose("org/Llama-3-VILA1.5-8b", {}, llama, {"</s>": 2}) is LLAMA_3
    assert choose("org/VILA1.5-40b", {}, llama, {"</s>": 2}) is HERMES_2
    assert choose("org/VILA1.5-40b", {"conv_template": "vicuna_v1"}, llama, {}) is VICUNA_V1
    assert choose("a", {"version": "hermes-2"}, qwen, {}) is HERMES_2
    assert choose("a", {"version": "auto"}, {**qwen, "chat_template": "qwen2"}, {}) is QWEN2
    for name, config, text in (
        ("a", {"conv_template": "mpt"}, qwen),
        ("a", {}, {"model_type": "mistral"}),
        ("a", {}, llama),
    ):
        with pytest.raises(ConfigError, match="conv_template"):
            choose(name, config, text, {})


def test_settings_of_a_class() -> None:
    """What NVILAForConditionalGeneration means without saying it; what config.json says counts more."""
    vision = {"model_type": "siglip_vision_model", "image_size": 448, "patch_size": 14}
    bare = Given(
        architectures=["NVILAForConditionalGeneration"],
        vision_tower_cfg=None,
        mm_projector_cfg=None,
        vision_config=vision,
    )
    found = read_settings(bare)
    assert (found.aspect, found.scales, found.output, found.max_tiles) == ("dynamic_s2", (448, 896, 1344), 2, 12)
    assert (found.projector, found.num_video_frames, found.select_layer) == ("mlp_downsample", 8, -2)
    bare.config |= {"s2_scales": "448,896", "s2_resize_output_to_scale_idx": 0, "max_tiles": 6}
    found = read_settings(bare)
    assert (found.scales, found.output, found.max_tiles) == ((448, 896), 0, 6)
    bare.config["architectures"] = ["NVILALiteForConditionalGeneration"]
    found = read_settings(bare)
    assert (found.aspect, found.scales, found.projector) == ("dynamic", (), "mlp_downsample_3x3_fix")


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio='anyres'"),
        ({"vision_tower_cfg": {"model_type": "clip_vision_model"}}, "image_aspect_ratio=None"),
        ({**S2, "s2_scales": "448,1000"}, "multiples"),
        ({**S2, "s2_scales": "big"}, "s2_scales='big'"),
        ({**S2, "s2_scales": ""}, "s2_scales"),
        ({**S2, "s2_scales": "896,1344"}, "smallest"),
        ({**S2, "s2_scales": "448,896", "s2_resize_output_to_scale_idx": 2}, "s2_resize_output_to_scale_idx=2"),
        ({**STATIC, "s2_scales": "448,896", "s2_max_split_size": 896}, "s2_max_split_size=896"),
        ({"mm_projector_cfg": None}, "mm_projector"),
        ({"vision_tower_cfg": "/home/somebody/vision_tower"}, "vision_tower/config.json"),
        ({"max_tiles": 65}, "max_tiles=65"),
        ({"min_tiles": 13}, "min_tiles=13"),
        ({"ps3": True}, "ps3=True"),
        ({"video_max_tiles": 4}, "video_max_tiles=4"),
        ({"video_encoder": {"_target_": "a.OtherEncoder"}}, "OtherEncoder"),
        ({"video_encoder": {"_target_": "a.TSPVideoEncoder", "pool_sizes": [[8, 1]]}}, "pool_sizes"),
    ],
)
def test_settings_that_make_no_sense(config: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        read_settings(Given(**{"s2_scales": None, **config}))


def test_settings_as_json_text() -> None:
    encoder = {"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[8, 1, 1]], "end_tokens": None}
    found = read_settings(Given(video_encoder=json.dumps(encoder), image_encoder={"_target_": "a.BasicImageEncoder"}))
    assert found.pools == ((8, 1, 1),)
    assert (found.video_marks.end, found.image_marks.end) == ("", "\n")


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> VilaProcessor:
    return VilaProcessor(open_checkpoint(str(Tiny(S2).write(tmp_path_factory.mktemp("tiny")))))


def test_tiles_of_the_feature(processor: VilaProcessor) -> None:
    item = MediaItem("image", b"", picture(1, 300, 100), {})
    cut = processor.prepare(item, processor.variant(item, MediaRequest({"image": 1})))
    columns, rows = best_ratio(item.data, 9, 12, 28)
    assert cut.info["block"] == (rows, columns) == (2, 6)
    assert cut.tensors["pixels"].dtype == torch.uint8
    assert (len(cut.tensors["pixels"]), cut.num_tokens) == (1 + 4 + 12, 12 * 4)
    whole = processor.prepare(item, processor.variant(item, MediaRequest({"image": 2})))
    assert (len(whole.tensors["pixels"]), whole.num_tokens) == (1, 4)
    ids, mask = processor.expand(cut)
    assert (sum(mask), len(ids)) == (48, 48 + len(processor.tokenizer("\n")["input_ids"]))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"max_tiles": 8}, {"max_tiles": 65}, {"max_tiles": True}, {"num_frames": 0}, {"num_frames": 769},
        {"num_frames": 2.0}, {"fps": 0}, {"fps": float("nan")}, {"fps": 1.0, "num_frames": 4}, {"min_pixels": 4},
    ],
)  # fmt: skip
def test_bad_options(kwargs: dict[str, Any], processor: VilaProcessor) -> None:
    with pytest.raises(InvalidParamsError):
        processor.check_kwargs(kwargs)


def test_frames_that_cannot_be_averaged(tmp_path: Path) -> None:
    encoder = {"_target_": "TSPVideoEncoder", "pool_sizes": [[4, 1, 1]]}
    path = Tiny({**PLAIN, "num_video_frames": None, "video_encoder": encoder}).write(tmp_path)
    with Engine.from_pretrained(path) as engine:
        prompt = TextPrompt(prompt="What?", multi_modal_data={"video": clip(1, 9)})
        with pytest.raises(InvalidParamsError, match="num_frames"):  # config.json says nothing
            engine.generate(prompt)
        for count, wanted in ((6, InvalidParamsError), (8, None)):
            asked = TextPrompt(
                prompt="What?", multi_modal_data={"video": clip(1, 9)}, mm_processor_kwargs={"num_frames": count}
            )
            if wanted is None:
                (output,) = engine.generate(asked, SamplingParams(max_tokens=2, temperature=0))
                assert output.usage.media_tokens == 2 * 4
            else:
                with pytest.raises(wanted, match="multiple of 4"):
                    engine.generate(asked)


def test_a_model_without_media_tokens_never_answers_them(tmp_path: Path) -> None:
    """The tokenizer knows two tokens more than the model has embeddings."""
    path = Tiny(LITE, "mlp_downsample_3x3_fix", media_tokens=False).write(tmp_path)
    with Engine.from_pretrained(path) as engine:
        known = engine._frontend.model.decoder.config.vocab_size
        assert len(engine._frontend.model.processor.tokenizer) == known + 2
        params = SamplingParams(max_tokens=40, temperature=5.0, seed=3, ignore_eos=True, logprobs=2)
        (output,) = engine.generate(TextPrompt(prompt="What?", multi_modal_data={"image": picture(1)}), params)
        assert len(output.token_ids) == 40
        assert max(output.token_ids) < known
        assert max(output.prompt_token_ids) == known


def test_parts_that_are_missing(tmp_path: Path) -> None:
    path = Tiny(PLAIN, layout="paths").write(tmp_path)
    for name, text in (("mm_projector/model.safetensors", "missing"), ("vision_tower/config.json", "vision_tower")):
        (path / name).unlink()
        with pytest.raises((CheckpointError, ConfigError), match=text) as caught:
            Engine.from_pretrained(path)
        assert isinstance(caught.value, MMError)
