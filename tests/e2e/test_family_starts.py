"""How an engine starts on a GPU, for every family, without one: warm-up, measuring, the largest steps, graphs.

CUDA's parts are made up: kernels to compile there are none, and a graph's replay runs the pass again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.families import FAMILIES

from mm_core import Engine, EngineConfig, KvCacheConfig, SamplingParams
from mm_core.engine import loading
from mm_core.engine.startup import StartupTimes
from mm_core.engine.warming import EngineWarmUp
from mm_core.hookspecs import BuildContext
from mm_core.runner import chunk_graphs, fusing, graphs, runner, warmup
from mm_core.runner.rehearsal import noise_features

GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
SIZES = {"max_num_seqs": 3, "max_num_batched_tokens": 512, "encoder_cache_tokens": 4096, "encoder_budget": 2000}
FREE = 2**30  # bytes of the GPU's memory, weights taken off


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Nothing is reused, so that the same prompts take the same steps again."""
    family = FAMILIES[request.param]
    path = family.make(tmp_path_factory.mktemp(request.param))
    kv = KvCacheConfig(num_blocks=512, enable_block_reuse=False)
    with Engine.from_pretrained(path, device="cpu", kv_cache_config=kv, plugins=family.modules(), **SIZES) as made:
        made.family = family  # type: ignore[attr-defined]
        yield made


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What of torch.cuda a start calls."""
    for name in ("set_device", "synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (FREE, FREE))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(runner, "reserve_pinned", lambda: None)
    monkeypatch.setattr(warmup, "_triton_runtime", lambda: SimpleNamespace(jit_cache_hook=None))
    condition = fusing.Conditioner.run

    def strict(self: Any, items: Any) -> Any:
        rows, failed = condition(self, items)
        assert not failed, "on a GPU a wrong index ends the process"
        return rows, failed

    monkeypatch.setattr(fusing.Conditioner, "run", strict)


def model_of(engine: Engine) -> loading.LoadedModel:
    return engine._frontend.model


def test_every_step_of_the_warm_up_runs(
    engine: Engine, cuda: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also with fewer layers than the model has, which is how most of it runs."""
    model, config = model_of(engine), EngineConfig(**SIZES)
    execute, seen = runner.ModelRunner.execute, []

    def checked(self: Any, batch: Any) -> Any:
        result = execute(self, batch)
        assert not result.failed
        assert not result.failed_media
        seen.append((len(batch.encode), len(batch.sources)))
        return result

    def strict(self: Any, step: Any) -> bool:
        step()
        return True

    monkeypatch.setattr(runner.ModelRunner, "execute", checked)
    monkeypatch.setattr(warmup.WarmUp, "_try", strict)
    examples = noise_features(model.processor, loading._EXAMPLE_SIDES)
    assert examples, "this family is not warmed up with media"
    context = BuildContext(model.device, model.dtype, model.max_model_len)
    warm = EngineWarmUp(config, model.modules, context)
    with caplog.at_level(logging.WARNING):
        warm.begin_text(StartupTimes())
        warm.begin_media(StartupTimes(), examples)
        warm.finish(StartupTimes())
    assert not caplog.records
    assert any(items for items, _ in seen)
    assert model.modules.has_cross == any(sources for _, sources in seen)


def test_a_full_step_is_measured(engine: Engine, cuda: None) -> None:
    model = model_of(engine)
    sizes = {**SIZES, "max_num_batched_tokens": 2048}
    config = EngineConfig(**sizes)
    kept = config.encoder_cache_tokens * model.encoder.hidden_size * 4
    needed = kept + loading.GRAPH_BYTES
    assert loading._measure(model, config) == needed
    behind = EngineConfig(**sizes, kv_cache_config=KvCacheConfig(host_cache_size=2**20))
    assert loading._measure(model, behind) == needed + (FREE - needed) // 8, "staging for host memory, a 16th each way"


def test_the_largest_steps_run_and_graphs_answer_as_steps_do(
    engine: Engine, cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = model_of(engine), engine.family.prompts(5)  # type: ignore[attr-defined]
    wanted = [output.token_ids for output in engine.generate(prompts, GREEDY)]
    assert len(set(wanted)) > 1
    replayed: list[str] = []

    def recorded(name: str) -> Any:
        def capture(run: Any, pool: Any) -> Any:
            return SimpleNamespace(replay=lambda: (replayed.append(name), run()))

        return capture

    monkeypatch.setattr(graphs, "capture", recorded("decode"))
    monkeypatch.setattr(chunk_graphs, "capture", recorded("chunks"))
    own = engine._frontend._core.runner
    examples = noise_features(model.processor, loading._EXAMPLE_SIDES)
    monkeypatch.setattr(own, "_on_stream", nullcontext)
    monkeypatch.setattr(own, "_stream", object())
    with torch.inference_mode():
        own.reserve(examples[-1:], loading._encoder_budget(EngineConfig(**SIZES)))
        own.capture_graphs([])
    monkeypatch.setattr(own, "_stream", None)
    assert [engine.generate(prompt, GREEDY)[0].token_ids for prompt in prompts] == wanted
    assert "decode" in replayed
    if not model.modules.has_cross:  # whose prompts may be a single token
        # What `condition` places is in no graph.
        assert ("chunks" in replayed) != model.modules.conditions
