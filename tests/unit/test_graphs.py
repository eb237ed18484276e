"""What graphs compute on padded batches is what eager steps compute. Without a GPU a replay runs the pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import fake_cross
from support.tiny import randomize_

from mm_core.config import SamplingParams
from mm_core.decoders.llama import LlamaConfig, LlamaDecoder
from mm_core.hookspecs import BuildContext
from mm_core.kernels import kv_write
from mm_core.layers import RopeConfig
from mm_core.runner import chunk_graphs, graphs
from mm_core.runner.fusing import Modules
from mm_core.runner.memory import KVCache
from mm_core.runner.runner import ModelRunner, RunnerLimits
from mm_core.scheduler.sequence import ScheduledBatch, ScheduledSequence
from mm_core.scheduler.sequence import Sequence as SequenceState
from mm_core.types import MediaFeature, PlaceholderRange, PreparedRequest

CPU = torch.device("cpu")
BLOCK = 16
CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-6,
    rope=RopeConfig(10000.0),
    max_position_embeddings=256,
)


class _Encoder(torch.nn.Module):
    hidden_size = 32

    def cost(self, feature: MediaFeature) -> int:
        return feature.num_tokens


def make_runner(kv_dtype: torch.dtype = torch.float32) -> ModelRunner:
    decoder = LlamaDecoder(CONFIG, BuildContext(CPU, torch.float32, 256))
    randomize_(decoder)
    kv = KVCache(decoder.kv_specs, 64, BLOCK, kv_dtype, CPU)
    torch.manual_seed(0)
    noise = torch.randn(2, 2, 64 * BLOCK, 2, 8)
    for (k, v, scales), (some_k, some_v) in zip(kv.caches["self"], noise, strict=True):
        kv_write(some_k, some_v, k, v, torch.arange(64 * BLOCK), scales)
    modules = Modules("fake", decoder, _Encoder())  # type: ignore[arg-type]
    runner = ModelRunner(modules, kv, CPU, RunnerLimits(8, 256, 40, 256))
    runner.rows.slab.normal_()
    runner.rows.places.by_key[b"a"] = np.array([30, 5, 17], np.int32)
    runner._sampler.last_ids.copy_(torch.arange(40, 48))
    return runner


def scheduled(slot: int, start: int, length: int, known: int, **extra: Any) -> ScheduledSequence:
    """A sequence of `known` ids of which tokens [start, start + length) run; what is not known was just sampled."""
    ids = tuple((7 * slot + 3 * i) % 90 for i in range(known))
    seq = SequenceState(slot, PreparedRequest("r", ids, SamplingParams(max_tokens=9), **extra))
    seq.slot = slot
    blocks = -(-(start + length) // BLOCK)
    samples = start + length >= known and not extra.get("ranges")
    return ScheduledSequence(seq, start, length, samples, {"self": list(range(7 * slot, 7 * slot + blocks))})


IMAGE = (PlaceholderRange(4, 4, (True, False, True, True), MediaFeature("image", 3, {}, key=b"a")),)
BATCHES = {
    "a prompt": [scheduled(0, 0, 21, 21)],
    "two chunks, one with a picture": [scheduled(0, 2, 5, 60, ranges=IMAGE), scheduled(3, 40, 33, 73)],
    "decodes beside chunks": [
        scheduled(5, 50, 1, 50),
        scheduled(1, 17, 1, 18),
        scheduled(0, 0, 30, 30),
        scheduled(2, 16, 3, 19),
    ],
    "a chunk of one token of a picture": [scheduled(5, 50, 1, 50), scheduled(0, 6, 1, 60, ranges=IMAGE)],
    "nothing is sampled": [scheduled(0, 0, 9, 60)],
}
DECODES = {
    "one": [scheduled(0, 20, 1, 21)],
    "three": [scheduled(4, 33, 1, 33), scheduled(0, 20, 1, 21), scheduled(7, 90, 1, 90)],
    "as many as there can be": [scheduled(i, 10 + 9 * i, 1, 10 + 9 * i) for i in range(8)],
}


def eager(runner: ModelRunner, host: Any) -> torch.Tensor:
    hidden = runner._forward(host)
    return hidden if host.sample_rows is None or len(host.sample_rows) else hidden[:0]


def compare(
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    make: Any,
    batch: list[ScheduledSequence],
    runner: ModelRunner | None = None,
) -> None:
    monkeypatch.setattr(module, "capture", lambda run, _: SimpleNamespace(replay=run))
    runner = runner or make_runner()
    host = runner._builder.build(ScheduledBatch(1, tuple(batch)), runner.rows.places)
    stores = runner.kv.stores
    before = [store.clone() for store in stores]
    wanted = eager(runner, host)
    after = [store.clone() for store in stores]
    assert any(not torch.equal(one.float(), two.float()) for one, two in zip(before, after, strict=True))
    with torch.inference_mode():
        made = make(runner)
        for store, old in zip(stores, before, strict=True):
            store.copy_(old)
        made.capture(None)  # must leave the caches alone
        found = made.run(host)
    assert found is not None
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for store, new in zip(stores, after, strict=True):
        torch.testing.assert_close(store.float(), new.float())


def chunks(runner: ModelRunner) -> chunk_graphs.ChunkGraphs:
    return chunk_graphs.ChunkGraphs(runner._graph_inputs(0), runner._slab_for_prompts(), 256)


@pytest.mark.parametrize("name", BATCHES)
def test_a_padded_step_computes_what_an_eager_one_does(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    compare(monkeypatch, chunk_graphs, chunks, BATCHES[name])


@pytest.mark.parametrize("name", ["decodes beside chunks", "nothing is sampled"])
def test_a_padded_step_with_an_fp8_cache(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    compare(monkeypatch, chunk_graphs, chunks, BATCHES[name], make_runner(torch.float8_e4m3fn))


@pytest.mark.parametrize("name", DECODES)
def test_a_padded_decode_step_with_an_fp8_cache(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def make(runner: ModelRunner) -> graphs.DecodeGraphs:
        return graphs.DecodeGraphs(runner._graph_inputs(0))

    compare(monkeypatch, graphs, make, DECODES[name], make_runner(torch.float8_e4m3fn))


@pytest.mark.parametrize("name", DECODES)
def test_a_padded_decode_step_computes_what_an_eager_one_does(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    compare(monkeypatch, graphs, lambda runner: graphs.DecodeGraphs(runner._graph_inputs(0)), DECODES[name])


def test_steps_that_no_graph_fits_are_left_to_eager_ones() -> None:
    runner = make_runner()
    made = chunks(runner)
    build = runner._builder.build
    long = build(ScheduledBatch(1, (scheduled(0, 0, 250, 250),)), runner.rows.places)
    assert made._fit(long) is not None
    made._tokens = {count: [n for n in sizes if n < 250] for count, sizes in made._tokens.items()}
    assert made._fit(long) is None
    assert made.run(long) is None


# -- cross-attention -----------------------------------------------------------------------------------

LONG, SHORT = (fake_cross.media_source(fake_cross.feature(name, rows)) for name, rows in (("a", 77), ("b", 5)))
with_source = fake_cross.scheduled
CROSS_CHUNKS = {
    "a prompt": [with_source(0, 0, 21, 21, LONG)],
    "decodes beside chunks": [
        with_source(5, 50, 1, 50, LONG),
        with_source(1, 17, 1, 18, SHORT, 1),
        with_source(0, 0, 30, 30, LONG),
        with_source(2, 16, 3, 19, SHORT, 1),
    ],
}
CROSS_DECODES = {
    "one": [with_source(0, 20, 1, 21, SHORT)],
    "three, two of them with one source": [
        with_source(4, 33, 1, 33, LONG),
        with_source(0, 20, 1, 21, SHORT, 1),
        with_source(7, 60, 1, 60, LONG),
    ],
}


def make_cross_runner(source_len: int = 0) -> ModelRunner:
    """Noise in all blocks stands for the sources' keys and values."""
    runner = fake_cross.make_runner(fake_cross.Plain("cross_attention"))
    if source_len:
        runner._decoder.max_source_len = source_len  # type: ignore[attr-defined]
    runner._sampler.last_ids.copy_(torch.arange(40, 48))
    return runner


@pytest.mark.parametrize("name", CROSS_CHUNKS)
def test_a_padded_step_with_sources(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    compare(monkeypatch, chunk_graphs, chunks, CROSS_CHUNKS[name], make_cross_runner())


@pytest.mark.parametrize("name", CROSS_DECODES)
def test_a_padded_decode_step_with_sources(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def make(runner: ModelRunner) -> graphs.DecodeGraphs:
        return graphs.DecodeGraphs(runner._graph_inputs(0))

    compare(monkeypatch, graphs, make, CROSS_DECODES[name], make_cross_runner())


def test_a_graph_forgets_the_sources_of_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (graphs, chunk_graphs):
        monkeypatch.setattr(module, "capture", lambda run, _: SimpleNamespace(replay=run))
    runner = make_cross_runner()
    for make, batches in (
        (lambda: graphs.DecodeGraphs(runner._graph_inputs(0)), CROSS_DECODES.values()),
        (lambda: chunks(runner), CROSS_CHUNKS.values()),
    ):
        with torch.inference_mode():
            made: Any = make()
            made.capture(None)
            for batch in [*batches, *reversed(batches)]:
                host = runner._builder.build(ScheduledBatch(1, tuple(batch)), runner.rows.places)
                found = made.run(host).clone()
                torch.testing.assert_close(found, eager(runner, host), atol=1e-5, rtol=1e-5)


def test_longer_sources_than_were_captured_are_left_to_eager_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (graphs, chunk_graphs):
        monkeypatch.setattr(module, "capture", lambda run, _: SimpleNamespace(replay=run))
    runner = make_cross_runner(source_len=76)
    inputs = runner._graph_inputs(0)
    assert inputs.source_len == 76
    decodes, steps = graphs.DecodeGraphs(inputs), chunks(runner)
    with torch.inference_mode():
        decodes.capture(None)
        steps.capture(None)
        for source, fits in ((SHORT, True), (LONG, False)):
            for made, s in ((decodes, with_source(0, 20, 1, 21, source)), (steps, with_source(0, 0, 9, 9, source))):
                host = runner._builder.build(ScheduledBatch(1, (s,)), runner.rows.places)
                assert (made.run(host) is not None) is fits  # type: ignore[attr-defined]


def test_conditioned_rows_fit_no_graph() -> None:
    runner = fake_cross.make_runner(
        fake_cross.Condition(), decoder=LlamaDecoder(CONFIG, BuildContext(CPU, torch.float32, 256))
    )
    runner.rows.places.by_key[b"a"] = np.arange(21, dtype=np.int32)
    made = chunks(runner)
    place = PlaceholderRange(4, 2, (True, True), fake_cross.feature("a", 21, num_fused=2))
    for ranges, fits in (((place,), False), ((), True)):
        batch = ScheduledBatch(1, (scheduled(0, 2, 5, 60, ranges=ranges),))
        assert (made._fit(runner._builder.build(batch, runner.rows.places)) is not None) is fits
