"""The complete example of the multimodal reuse guide, with its import and constructor lines changed only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.e2e import settle
from support.pictures import picture

from mm_core import Engine, KvCacheConfig, RequestOutput, SamplingParams, TextPrompt
from mm_core.errors import ConfigError

SAMPLING = SamplingParams(max_tokens=24, temperature=0)


def example_prompts(image_a: Image.Image, image_b: Image.Image) -> list[TextPrompt]:
    return [
        TextPrompt(
            prompt="Describe this image.",
            multi_modal_data={"image": [image_a]},
            multi_modal_uuids={"image": ["image-001"]},
        ),
        TextPrompt(
            prompt="What is in the picture?",
            multi_modal_data={"image": [image_b]},
            multi_modal_uuids={"image": ["image-002"]},
        ),
        TextPrompt(
            prompt="Describe these images in one sentence.",
            multi_modal_data={"image": [image_a, image_b]},
            multi_modal_uuids={"image": ["image-001", "image-002"]},
        ),
    ]


def make(path: Path) -> Engine:
    return Engine.from_pretrained(
        path,
        kv_cache_config=KvCacheConfig(
            enable_block_reuse=True, free_gpu_memory_fraction=0.9, dtype="auto", host_cache_size=0
        ),
        show_progress=False,
    )


@pytest.fixture(scope="module")
def alone(tiny_path: Path) -> list[RequestOutput]:
    """Each request on an engine of its own, that reuses nothing and is told no uuid."""
    outputs = []
    for prompt in example_prompts(picture(1), picture(2, 90, 120)):
        kv = KvCacheConfig(num_blocks=64, enable_block_reuse=False)
        with Engine.from_pretrained(tiny_path, kv_cache_config=kv, show_progress=False) as engine:
            plain = TextPrompt(prompt=prompt.prompt, multi_modal_data=prompt.multi_modal_data)
            outputs += engine.generate(plain, SAMPLING)
    assert len({o.token_ids for o in outputs}) == 3
    return outputs


@pytest.mark.parametrize("together", [False, True], ids=["one after another", "as one list"])
def test_guide_example(tiny_path: Path, alone: list[RequestOutput], together: bool) -> None:
    prompts = example_prompts(picture(1), picture(2, 90, 120))
    with make(tiny_path) as engine:
        outputs = engine.generate(prompts, SAMPLING) if together else [engine.generate(p, SAMPLING)[0] for p in prompts]
        stats = engine.stats()
        settle(engine)
    assert stats["encoded_items"] == 2, "each picture is encoded once in all"
    a, b, both = (o.usage for o in outputs)
    assert both.media_tokens == a.media_tokens + b.media_tokens > 0
    assert a.encoded_media_tokens + b.encoded_media_tokens + both.encoded_media_tokens == both.media_tokens
    if not together:  # in a list, whoever is ready first encodes for the others
        assert stats["encoder_calls"] == 2
        assert both.encoded_media_tokens == 0, "the third request reuses what the first two encoded"
    assert [o.prompt_token_ids for o in outputs] == [o.prompt_token_ids for o in alone]
    assert [o.token_ids for o in outputs] == [o.token_ids for o in alone]
    assert [o.text for o in outputs] == [o.text for o in alone]


def test_the_names_stand_for_the_pictures_afterwards(tiny_path: Path, alone: list[RequestOutput]) -> None:
    prompts = example_prompts(picture(1), picture(2, 90, 120))
    with make(tiny_path) as engine:
        engine.generate(prompts[:2], SAMPLING)
        named = TextPrompt(
            prompt=prompts[2].prompt,
            multi_modal_data={"image": [None, None]},
            multi_modal_uuids={"image": ["image-001", "image-002"]},
        )
        (output,) = engine.generate(named, SAMPLING)
        assert engine.stats()["encoded_items"] == 2
    assert output.usage.encoded_media_tokens == 0
    assert output.token_ids == alone[2].token_ids


@pytest.mark.parametrize("options", [{"dtype": "fp8"}, {"host_cache_size": 64 * 2**20}], ids=lambda o: next(iter(o)))
def test_what_the_guide_sets_is_what_runs(tiny_path: Path, options: dict[str, Any]) -> None:
    """With the guide's own options, other than the example's: the same requests, and again from the cache."""
    prompts = example_prompts(picture(1), picture(2, 90, 120))
    kv = KvCacheConfig(enable_block_reuse=True, free_gpu_memory_fraction=0.9, **options)
    with Engine.from_pretrained(tiny_path, kv_cache_config=kv, show_progress=False) as engine:
        first, again = (engine.generate(prompts, SAMPLING) for _ in range(2))
        settle(engine)
    assert [o.token_ids for o in again] == [o.token_ids for o in first]
    assert all(o.usage.cached_tokens for o in again)


@pytest.mark.parametrize(
    "options", [{"free_gpu_memory_fraction": 0.0}, {"free_gpu_memory_fraction": 1.1}, {"dtype": "int4"},
                {"host_cache_size": -1}, {"enable_block_reuse": "yes"}, {"enable_partial_reuse": True},
                {"free_gpu_memory_fraction": float("nan")}, {"num_blocks": 1}, {"block_size": 17}],
)  # fmt: skip
def test_wrong_cache_options_are_named(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigError, match=name):
        KvCacheConfig(**options)
