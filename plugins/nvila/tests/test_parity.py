"""Every kind of checkpoint against the written reference: prompt ids, greedy tokens, logits."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from support.tiny_vila import LITE, PLAIN, S2, STATIC, Tiny
from support.vila_reference import VilaReference

from mm_core import Engine, KvCacheConfig, RequestOutput, SamplingParams, TextPrompt
from mm_core.testing import Answer, frames, picture

GREEDY = SamplingParams(max_tokens=10, temperature=0, logprobs=5)
NVILA, NVILA_LITE = "NVILAForConditionalGeneration", "NVILALiteForConditionalGeneration"
TSP = {"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[2, 1, 1], [4, 2, 2]]}
VIDEO_S2 = {**S2, "video_encoder": TSP, "num_video_frames": 8}

KINDS = {
    "nvila-parts": Tiny(S2),
    "nvila-paths": Tiny(S2, layout="paths"),
    "nvila-flat": Tiny(S2, layout="flat"),
    "nvila-hf": Tiny({}, layout="hf", architecture=NVILA),
    "nvila-tied": Tiny(S2, layout="hf", architecture=NVILA, tied=True),
    "nvila-first-scale": Tiny({**S2, "s2_resize_output_to_scale_idx": 0}, "mlp_downsample_2x2_fix"),
    "nvila-middle-scale": Tiny({**S2, "s2_resize_output_to_scale_idx": 1, "max_tiles": 10}),
    "nvila-two-scales": Tiny({**S2, "s2_scales": [28, 56], "max_tiles": 9}, "mlp_downsample_3x3_s2"),
    "nvila-uncut": Tiny({**S2, "image_aspect_ratio": "resize"}, "mlp_downsample_3x3_s2_new"),
    "nvila-video": Tiny(VIDEO_S2),
    "lite-parts": Tiny(LITE, "mlp_downsample_3x3_fix"),
    "lite-hf": Tiny({}, layout="hf", architecture=NVILA_LITE, projector="mlp_downsample_3x3_fix"),
    "lite-min-tiles": Tiny({**LITE, "min_tiles": 2}, "mlp_downsample"),
    "vila-static": Tiny(STATIC, "mlp_downsample", layout="paths", size=56),
    "vila-static-last": Tiny({**STATIC, "s2_resize_output_to_scale_idx": 1}, "mlp_downsample_2x2_fix"),
    "vila-plain": Tiny(PLAIN, "mlp_downsample", "hf", "VILAForConditionalGeneration"),
    "vila-pad": Tiny({**PLAIN, "image_aspect_ratio": "pad"}, "linear"),
    "vila-clip": Tiny({**PLAIN, "mm_vision_select_feature": "patch"}, "mlp2x_gelu", tower="clip"),
    "vila-last-layer": Tiny({**PLAIN, "mm_vision_select_layer": -1}, "mlp3x_gelu"),
    "vila-llama": Tiny({**PLAIN, "num_video_frames": 2}, "mlp_downsample", text="llama"),
    # Patches of 7 cover 28 of 31 pixels.
    "nvila-uncovered": Tiny({**S2, "s2_scales": "31,62,93", "s2_max_split_size": 31}, size=31, tile=31),
    "vila-uncovered": Tiny({**STATIC, "s2_scales": "31,62", "s2_max_split_size": 31}, size=40, tile=31),
    "no-media-tokens": Tiny(S2, media_tokens=False),
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], tuple[Engine, VilaReference]]]:
    made: dict[str, tuple[Engine, VilaReference]] = {}

    def make(kind: str) -> tuple[Engine, VilaReference]:
        if kind not in made:
            path = KINDS[kind].write(tmp_path_factory.mktemp(kind))
            engine = Engine.from_pretrained(path, kv_cache_config=KvCacheConfig(num_blocks=256))
            made[kind] = engine, VilaReference(path)
        return made[kind]

    yield make
    for engine, _ in made.values():
        engine.close()


def turn(text: str, kind: str = "") -> str:
    if KINDS.get(kind) is not None and KINDS[kind].text == "llama":
        return (
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
            f"detailed, and polite answers to the user's questions. USER: {text} ASSISTANT:"
        )
    return (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
        f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    )


def ask(text: str, images: Sequence[Image.Image] = (), videos: Sequence[Any] = (), **kwargs: Any) -> TextPrompt:
    data = {"image": list(images), "video": [{"frames": v, "fps": 2.0} for v in videos]}
    media = {m: v for m, v in data.items() if v}
    return TextPrompt(prompt=text, multi_modal_data=media, mm_processor_kwargs=kwargs or None)


def check(output: RequestOutput, wanted: Answer, least: int = 3) -> None:
    assert list(output.prompt_token_ids) == wanted.prompt_ids
    assert list(output.token_ids) == wanted.token_ids
    assert len(set(wanted.token_ids)) >= min(least, len(wanted.token_ids))
    assert output.logprobs is not None
    assert wanted.logits is not None
    for given, logits in zip(output.logprobs, torch.log_softmax(wanted.logits, -1), strict=True):
        for token, entry in given.items():
            assert abs(entry.logprob - float(logits[token])) < 5e-4


@pytest.mark.parametrize("kind", KINDS)
def test_one_image(kind: str, model: Callable[[str], tuple[Engine, VilaReference]]) -> None:
    """Asked in plain words: the template is the plugin's."""
    engine, reference = model(kind)
    wanted = reference.answer(turn("<image>describe the picture", kind), [picture(1, 90, 60)], max_tokens=10)
    (output,) = engine.generate(ask("describe the picture", [picture(1, 90, 60)]), GREEDY)
    check(output, wanted)
    other = reference.answer(turn("<image>describe the picture", kind), [picture(2, 90, 60)], max_tokens=10)
    assert not torch.allclose(wanted.logits[0], other.logits[0], atol=1e-2), "the reference ignores the picture"


@pytest.mark.parametrize("kind", ["nvila-parts", "nvila-first-scale", "lite-hf", "vila-static", "vila-plain"])
def test_several_images_and_videos(kind: str, model: Callable[[str], tuple[Engine, VilaReference]]) -> None:
    """Several images are not cut; one beside a video is. In one batch, and one by one."""
    engine, reference = model(kind)
    frame_sets = [frames(5, 7), frames(6, 3, 40, 90)]
    count = reference.config.get("num_video_frames") or (8 if KINDS[kind].layout == "hf" else None)
    kwargs = {} if count else {"num_frames": 3}
    jobs: list[tuple[str, list[Image.Image], list[Any]]] = [
        ("<image>What is<image> in it?", [picture(3, 40, 90), picture(4, 100, 30)], []),
        ("<vila/video>What is in it?", [], frame_sets[:1]),
        ("What<vila/video> is<image> in<vila/video> it?", [picture(5, 70, 30)], frame_sets),
        ("The quick brown fox", [], []),
    ]
    prompts = [ask(turn(t), i, v, **(kwargs if v else {})) for t, i, v in jobs]
    outputs = engine.generate(prompts, GREEDY)
    for (text, images, videos), prompt, output in zip(jobs, prompts, outputs, strict=True):
        wanted = reference.answer(turn(text), images, videos, max_tokens=10, num_frames=kwargs.get("num_frames"))
        check(output, wanted)
        (alone,) = engine.generate(prompt, GREEDY)
        assert alone.token_ids == output.token_ids


@pytest.mark.parametrize("kind", ["nvila-parts", "nvila-middle-scale", "lite-parts", "vila-static", "vila-pad"])
def test_sizes(kind: str, model: Callable[[str], tuple[Engine, VilaReference]]) -> None:
    engine, reference = model(kind)
    draw = random.Random(kind)
    sizes = [
        (1, 1),
        (1, 8192),
        (8192, 1),
        (84, 84),
        (28, 56),
        *((draw.randint(2, 300), draw.randint(2, 300)) for _ in range(6)),
    ]
    pictures = [picture(i, *size) for i, size in enumerate(sizes)]
    outputs = engine.generate([ask(turn("<image>What is in it?"), [p]) for p in pictures], GREEDY)
    for image, output in zip(pictures, outputs, strict=True):
        check(output, reference.answer(turn("<image>What is in it?"), [image], max_tokens=10))


@pytest.mark.parametrize("count", [4, 9])
def test_video_pyramid(count: int, model: Callable[[str], tuple[Engine, VilaReference]]) -> None:
    """Averages over frames and neighbouring rows, two levels; fewer frames than are wanted come again."""
    engine, reference = model("nvila-video")
    clip = frames(8, count)
    wanted = reference.answer(turn("<vila/video>What is in it?"), videos=[clip], max_tokens=10)
    (output,) = engine.generate(ask(turn("<vila/video>What is in it?"), videos=[clip]), GREEDY)
    check(output, wanted)
    assert output.usage.media_tokens == 4 * 4 + 2 * 1


def test_options(model: Callable[[str], tuple[Engine, VilaReference]]) -> None:
    """max_tiles and num_frames of a request."""
    engine, reference = model("lite-parts")
    text, image, clip = turn("<image>What is in it?"), picture(9, 150, 100), frames(9, 9)
    wanted = reference.answer(text, [image], max_tokens=10, max_tiles=2)
    (output,) = engine.generate(ask(text, [image], max_tiles=2), GREEDY)
    check(output, wanted)
    text = turn("<vila/video>What is in it?")
    wanted = reference.answer(text, videos=[clip], max_tokens=10, num_frames=3)
    (output,) = engine.generate(ask(text, videos=[clip], num_frames=3), GREEDY)
    check(output, wanted)
