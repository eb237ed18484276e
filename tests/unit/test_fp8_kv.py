"""An fp8 KV cache in the whole engine, of every family: reuse changes speed, never tokens (compute in fp32, greedy)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import FAMILIES
from support.pictures import frames, picture
from support.tiny import make_tiny_qwen2vl

from mm_core import Engine, KvCacheConfig, RequestOutput, SamplingParams, TextPrompt
from mm_core.errors import ConfigError, EngineError
from mm_core.runner.memory import check_fp8
from mm_core.scheduler.policy import POLICIES

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, logprobs=0)
EVERY = [pytest.param(name, marks=() if name in ("whisper", "blip2-t5") else pytest.mark.slow) for name in FAMILIES]


def start(path: Path, num_blocks: int = 512, *, reuse: bool = True, dtype: str = "fp8", **options: Any) -> Engine:
    kv: Any = KvCacheConfig(num_blocks=num_blocks, enable_block_reuse=reuse, dtype=dtype)  # type: ignore[arg-type]
    return Engine.from_pretrained(path, kv_cache_config=kv, show_progress=False, **options)


def prompts() -> list[TextPrompt]:
    cat, dog, clip = picture(1, 150, 100), picture(2, 90, 120), {"frames": frames(3, 4), "fps": 2.0}
    return [
        TextPrompt(prompt=f"<|im_start|>user\n{IMAGE}Describe this image.", multi_modal_data={"image": cat}),
        TextPrompt(prompt=f"<|im_start|>user\n{IMAGE}What is in the picture?", multi_modal_data={"image": cat}),
        TextPrompt(prompt=f"<|im_start|>user\n{IMAGE}{IMAGE}Both?", multi_modal_data={"image": [cat, dog]}),
        TextPrompt(prompt=f"{VIDEO}What is there to see", multi_modal_data={"video": clip}),
        TextPrompt(prompt="The quick brown fox jumps over the lazy dog while the cat sleeps"),
        TextPrompt(prompt="The quick brown fox jumps over the lazy dog while the system asks"),
    ]


def tokens(outputs: Sequence[RequestOutput]) -> list[tuple[int, ...]]:
    return [output.token_ids for output in outputs]


def chosen(outputs: Sequence[RequestOutput]) -> torch.Tensor:
    """[tokens] log-probabilities of the answers' tokens."""
    return torch.tensor(
        [step[t].logprob for o in outputs for t, step in zip(o.token_ids, o.logprobs or (), strict=True)]
    )


def checked(engine: Engine) -> Engine:
    """With the books checked after every step."""
    core: Any = engine._frontend._core
    step = core.step

    def checking(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        core.scheduler.check_integrity()
        return result

    core.step = checking
    return engine


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen2vl(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def alone(path: Path) -> list[RequestOutput]:
    """Each prompt alone, without reuse, in one piece: what all others must equal."""
    with start(path, reuse=False) as engine:
        outputs = [engine.generate(p, GREEDY)[0] for p in prompts()]
        assert engine.stats()["cached_tokens"] == engine.stats()["partial_prefills"] == 0
    assert len(set(tokens(outputs))) == len(outputs)
    return outputs


def test_served_from_the_cache_the_answer_is_the_same_bit_by_bit(path: Path, alone: list[RequestOutput]) -> None:
    """The same chunks of the same prompts: what was rounded for the first is what the second reads."""
    (question,) = prompts()[:1]
    with checked(start(path)) as engine:
        first, again = (engine.generate(question, GREEDY)[0] for _ in range(2))
        assert again.usage.cached_tokens >= 16
    assert first.token_ids == again.token_ids == alone[0].token_ids
    assert torch.equal(chosen([first]), chosen(alone[:1]))
    assert (chosen([again]) - chosen([first])).abs().max() < 1e-4


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"reuse": False}, "steps"),
        ({}, "cached_tokens"),
        ({"max_num_batched_tokens": 17}, "partial_prefills"),
        ({"num_blocks": 8, "max_num_batched_tokens": 64}, "preemptions"),
    ],
    ids=["batched", "reused", "chunked", "preempted"],
)
def test_same_tokens(
    path: Path, alone: list[RequestOutput], options: dict[str, Any], taken: str, overlap: bool
) -> None:
    with checked(start(path, **options, overlap=overlap)) as engine:
        if taken == "preemptions":
            engine._frontend._core.scheduler.outlook.wants = lambda _: (1, 1)  # type: ignore[method-assign]
        for _ in range(2):
            assert tokens(engine.generate(prompts(), GREEDY)) == tokens(alone)
        assert engine.stats()[taken] > 0


def test_restored_from_the_host(path: Path, alone: list[RequestOutput], monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes and scales travel together, and are checked; always, though so small a model computes faster."""
    always = replace(POLICIES["reuse"], restores=lambda *_: True)
    monkeypatch.setitem(POLICIES, "reuse", always)  # type: ignore[arg-type]
    options: Any = {"num_blocks": 12, "host_cache_size": 16 * 2**20, "host_cache_checksums": True}
    kv = KvCacheConfig(dtype="fp8", **options)
    with checked(Engine.from_pretrained(path, kv_cache_config=kv, show_progress=False)) as engine:
        for _ in range(3):
            assert tokens([engine.generate(p, GREEDY)[0] for p in prompts()]) == tokens(alone)
        assert engine.stats()["host_cache"]["restored"] > 0


@pytest.mark.parametrize("name", EVERY)
def test_every_family(name: str, tmp_path: Path) -> None:
    """Also sources of cross-attention, and T5's bias."""
    family = FAMILIES[name]
    path, asked, plugins = family.make(tmp_path), family.prompts(0), family.modules()
    with start(path, plugins=plugins, dtype="auto") as engine:
        exact = engine.generate(asked, GREEDY)
    with start(path, plugins=plugins, reuse=False) as engine:
        outputs = [engine.generate(p, GREEDY)[0] for p in asked]
    with checked(start(path, plugins=plugins, max_num_batched_tokens=40)) as engine:
        for _ in range(2):
            assert tokens(engine.generate(asked, GREEDY)) == tokens(outputs)
        assert all(layer.scales is not None for layer in engine._frontend._core.runner.kv.caches["self"])
    # The first token, before answers part: near the exact one's, and not it.
    error = (chosen(outputs)[:: GREEDY.max_tokens] - chosen(exact)[:: GREEDY.max_tokens]).abs()
    same = torch.tensor([a.token_ids[0] == b.token_ids[0] for a, b in zip(outputs, exact, strict=True)])
    assert (error[same] < 0.3).all()
    assert not torch.equal(chosen(outputs), chosen(exact))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_types(path: Path, dtype: str, alone: list[RequestOutput]) -> None:
    kv = KvCacheConfig(num_blocks=64, dtype="fp8")
    with Engine.from_pretrained(path, dtype=dtype, kv_cache_config=kv, show_progress=False) as engine:  # type: ignore[arg-type]
        first, again = (engine.generate(prompts(), GREEDY) for _ in range(2))
        assert engine.stats()["cached_tokens"] > 0
    for outputs in (first, again):
        same = sum(
            a == b
            for o, w in zip(outputs, alone, strict=True)
            for a, b in zip(o.token_ids[:4], w.token_ids[:4], strict=True)
        )
        assert same >= len(outputs) * 3, "of four tokens each, three are those of fp32"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_end_the_request(path: Path, bad: float) -> None:
    with start(path) as engine:
        bias = engine._frontend.model.decoder.layers[0].self_attn.qkv_proj.bias  # type: ignore[attr-defined]
        with torch.inference_mode():
            bias[-1] = bad  # of a value
        with pytest.raises(EngineError, match="NaN logits"):
            engine.generate(prompts()[-1], GREEDY)


@pytest.fixture
def old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")


@pytest.mark.usefixtures("old_gpu")
def test_a_gpu_without_e4m3_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"compute capability 8\.9 or later; NVIDIA A100 has 8\.0.*dtype='auto'"):
        check_fp8(torch.float8_e4m3fn, torch.device("cuda"))
    check_fp8(torch.bfloat16, torch.device("cuda"))
    check_fp8(torch.float8_e4m3fn, torch.device("cpu"))
