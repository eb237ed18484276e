"""Every family on a real GPU: what a CPU answers, cold, again, alone, and with graphs and overlap off."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import FAMILIES
from support.tiny_whisper import sound

from mm_core import Engine, KvCacheConfig, SamplingParams, TextPrompt
from mm_core.types import MediaFeature

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
SEED, OTHER = 11, 61
PLAIN = ("llava-onevision", "whisper")  # also without overlap and graphs

Answers = list[tuple[int, ...]]


@pytest.fixture(scope="module", autouse=True)
def exact() -> Iterator[None]:
    """Products of float32 in float32."""
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for flag in flags:
        flag.allow_tf32 = False
    yield
    for flag, was in zip(flags, before, strict=True):
        flag.allow_tf32 = was


def start(name: str, path: Path, device: str, **settings: Any) -> Engine:
    # On the GPU a full step is measured first.
    kv = KvCacheConfig(free_gpu_memory_fraction=0.05) if device == "cuda" else KvCacheConfig(num_blocks=512)
    sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 1024, **settings}
    plugins = FAMILIES[name].modules()
    return Engine.from_pretrained(path, device=device, dtype="float32", kv_cache_config=kv, plugins=plugins, **sizes)


def answers(engine: Engine, prompts: Sequence[TextPrompt]) -> Answers:
    return [output.token_ids for output in engine.generate(prompts, GREEDY)]


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The checkpoint of a family, and what a CPU answers to its prompts of both seeds."""

    @cache
    def make(name: str) -> tuple[Path, Answers, Answers]:
        family = FAMILIES[name]
        path = family.make(tmp_path_factory.mktemp(name))
        with start(name, path, "cpu") as engine:
            found = answers(engine, family.prompts(SEED)), answers(engine, family.prompts(OTHER))
        assert len({*found[0], *found[1]}) > 3, "the media do not matter: equal answers prove nothing"
        return path, *found

    return make


@pytest.mark.parametrize("name", FAMILIES)
def test_a_gpu_answers_as_a_cpu_does(name: str, wanted: Any) -> None:
    path, first, second = wanted(name)
    prompts, others = FAMILIES[name].prompts(SEED), FAMILIES[name].prompts(OTHER)
    with start(name, path, "cuda") as engine:
        assert answers(engine, prompts) == first
        calls = engine.stats()["encoder_calls"]
        assert answers(engine, prompts) == first, "again, from what is kept"
        assert engine.stats()["encoder_calls"] == calls
        assert [answers(engine, [prompt])[0] for prompt in prompts] == first, "alone"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says that it may miss some
            torch.cuda.set_sync_debug_mode("error")
        try:
            found = answers(engine, others)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert found == second, "other media, without waiting for the device"
        blocks = engine.stats()["blocks"]
        assert blocks["in_use"] == blocks["pending"] == 0


@pytest.mark.parametrize("name", PLAIN)
def test_without_graphs_and_overlap(name: str, wanted: Any) -> None:
    path, first, _ = wanted(name)
    with start(name, path, "cuda", cuda_graphs=False, overlap=False) as engine:
        assert answers(engine, FAMILIES[name].prompts(SEED)) == first


@pytest.mark.parametrize("mels", [80, 128])
def test_log_mel_frames_are_those_of_a_cpu(mels: int) -> None:
    from mm_plugin_whisper.encoder import LogMel
    from mm_plugin_whisper.processor import framed
    from mm_plugin_whisper.settings import Sound

    settings, features = Sound(mels=mels), []
    for seed, seconds in enumerate((0.4, 12.5, 30.0)):
        count = min(int(seconds * settings.frames_per_second) + 2, settings.frames)
        samples = torch.from_numpy(framed(sound(seconds, seed), settings.chunk, 0, count, settings))
        info = {"frames": count}
        features.append(MediaFeature("audio", settings.frames // 2, {"samples": samples}, info))
        features.append(MediaFeature("audio", settings.frames // 2, {"samples": samples}, {**info, "peak": 1.5}))
    found = LogMel(settings, torch.device("cuda"))(features).cpu()
    expected = LogMel(settings, torch.device("cpu"))(features)
    assert float((found - expected).abs().max()) < 1e-4
    assert float(expected.max() - expected.min()) > 0.5
