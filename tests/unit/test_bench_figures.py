"""Timelines, the floor, and the other figures of a run, from values made by hand."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.real_size import make_dummy_qwen2vl

from mm_core.bench import timeline
from mm_core.bench.analysis import (
    Asked,
    Facts,
    Measured,
    check_counts,
    difference,
    floors,
    ideal_reuse,
    latencies,
    percentiles,
    phases,
    summarise,
)
from mm_core.bench.device import measure_ceilings
from mm_core.bench.models import built_in_models, family_of
from mm_core.bench.report import result_text
from mm_core.bench.work import (
    Ceilings,
    DecoderSize,
    RequestSize,
    Work,
    decode_passes,
    decode_work,
    prefill_work,
    span_work,
)
from mm_core.bench.workloads import BenchRequest
from mm_core.checkpoint import open_checkpoint
from mm_core.checkpoint.config import flat_text_config
from mm_core.config import SamplingParams
from mm_core.decoders.default import mm_decoder
from mm_core.errors import ConfigError, EngineError
from mm_core.hookspecs import BuildContext
from mm_core.plugins import PluginRegistry
from mm_core.tracing import Span, SpanRecorder
from mm_core.types import (
    CompletionOutput,
    MediaFeature,
    PlaceholderRange,
    PreparedRequest,
    RequestMetrics,
    RequestOutput,
    TextPrompt,
    Usage,
)

H100 = Ceilings(flops=783e12, bandwidth=2.97e12)
IMAGE, LARGE = {"grid_thw": (1, 32, 32)}, {"grid_thw": (1, 96, 96)}


def ms(track: str, name: str, start: float, end: float, **args: int) -> Span:
    return Span(track, name, int(start * 1e6), int(end * 1e6), args)


# --- timelines

SPANS = [
    ms("decoder", "decode", 40, 60, sequences=3), ms("encoder", "encode", 0, 10), ms("encoder", "encode", 20, 50),
    ms("preprocess 10", "preprocess", 0, 5), ms("preprocess 2", "preprocess", 0, 100), ms("decoder", "prefill", 5, 15),
    ms("engine", "schedule", 0, 1),
]  # fmt: skip


def test_busy_time_and_overlap() -> None:
    assert timeline.union(SPANS[:3]) == [(0, 10_000_000), (20_000_000, 60_000_000)]
    assert timeline.overlap_seconds(SPANS) == pytest.approx(0.015)  # 5…10 and 40…50 ms
    found = timeline.summary(SPANS, -int(5e6), int(95e6))
    assert found["device_busy_fraction"] == pytest.approx(0.55)  # 0…15 and 20…60 ms
    assert found["device_idle_s"] == pytest.approx({"before": 0.005, "between": 0.005, "after": 0.035})
    assert found["device_tracks_s"] == pytest.approx({"encoder": 0.04, "decoder": 0.03})
    assert found["by_name"]["encode"] == {"spans": 2, "seconds": pytest.approx(0.04)}
    nothing = timeline.summary(SPANS[3:5], 0, int(1e8))
    assert nothing["device_busy_fraction"] is nothing["device_idle_s"] is None


def test_overlap_equals_counting_by_milliseconds() -> None:
    generator = np.random.default_rng(0)
    spans, busy = [], np.zeros((2, 1000), dtype=bool)
    for _ in range(60):
        lane, start = int(generator.integers(2)), int(generator.integers(950))
        end = start + int(generator.integers(1, 40))
        spans.append(ms(timeline.DEVICE_TRACKS[lane], "x", start, end))
        busy[lane, start:end] = True
    assert timeline.overlap_seconds(spans) == pytest.approx(busy.all(axis=0).sum() / 1e3)
    assert timeline.length(timeline.union(spans)) == pytest.approx(busy.any(axis=0).sum() / 1e3)


def test_clipping_keeps_what_lies_inside() -> None:
    inside = timeline.clipped(SPANS, int(8e6), int(30e6))
    assert [(s.name, s.start_ns / 1e6, s.end_ns / 1e6) for s in inside] == [
        ("encode", 8, 10), ("preprocess", 8, 30), ("prefill", 8, 15), ("encode", 20, 30)
    ]  # fmt: skip


def test_chrome_trace(tmp_path: Path) -> None:
    timeline.write_trace(SPANS, int(5e6), tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert list(names.values()) == ["preprocess 2", "preprocess 10", "encoder", "decoder", "engine"]
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == len(SPANS)
    decode = next(e for e in spans if e["name"] == "decode")
    assert (names[decode["tid"]], decode["ts"], decode["dur"]) == ("decoder", 35_000.0, 20_000.0)
    assert decode["args"] == {"sequences": 3}
    assert all(e["pid"] == 1 for e in events)
    again = timeline.read_trace(tmp_path / "t.json")
    assert sorted(again, key=repr) == sorted(
        (dataclasses.replace(s, start_ns=s.start_ns - 5_000_000, end_ns=s.end_ns - 5_000_000) for s in SPANS), key=repr
    )


# --- arithmetic and floors


@pytest.fixture(scope="module")
def facts() -> Facts:
    registry = PluginRegistry()
    config = built_in_models(registry)["qwen2-vl-7b"].files["config.json"]
    size = DecoderSize.from_text_config(flat_text_config(config), 2)
    return Facts(size, config, family_of(registry, config["architectures"]), H100, max_num_seqs=256)


def test_formulas_count_the_modules_weights(tmp_path: Path, facts: Facts) -> None:
    checkpoint = open_checkpoint(str(make_dummy_qwen2vl(tmp_path)))
    context = BuildContext(torch.device("meta"), torch.bfloat16, 1024)
    matrices = {n: p.numel() for n, p in mm_decoder("", checkpoint).build(context).named_parameters() if p.dim() > 1}
    head = sum(count for name, count in matrices.items() if "lm_head" in name)
    embedding = sum(count for name, count in matrices.items() if "embed" in name)
    assert facts.decoder.head_params == head == embedding
    assert facts.decoder.layer_params == sum(matrices.values()) - head - embedding
    registry = PluginRegistry()
    owner = registry.resolve(checkpoint.architectures)
    encoder = registry.call_owner("mm_encoder", owner, family="qwen2vl", checkpoint=checkpoint, context=context)
    found = sum(p.numel() for p in encoder.parameters() if p.dim() > 1)
    assert facts.family.encoder_params(facts.config) == found
    assert facts.decoder.kv_bytes == 57344
    wide = DecoderSize.from_text_config(flat_text_config(facts.config), 2, 4)
    assert (wide.kv_bytes, wide.weight_bytes) == (2 * 57344, facts.decoder.weight_bytes)


def request(prompt: int, cached: int, output: int, *items: dict) -> Asked:
    return Asked(RequestSize(prompt, cached, output), list(items))


@pytest.mark.parametrize(
    ("asked", "rate"),
    [
        ([request(294, 0, 128, IMAGE)] * 256, 98),
        ([request(294, 0, 128, IMAGE)] * 16 + [request(294, 272, 128)] * 240, 244),
        ([request(294, 272, 128)] * 256, 280),
        ([request(2342, 0, 64, LARGE)] * 32, 11.9),
        ([request(36, 0, 256)] * 256, 162),
    ],
)
def test_floors_agree_with_those_computed_by_hand(facts: Facts, asked: list[Asked], rate: float) -> None:
    assert len(asked) / sum(floors(facts, asked).values()) == pytest.approx(rate, rel=0.03)


def test_floor_of_one_request(facts: Facts) -> None:
    alone = dataclasses.replace(facts, together=False)
    single = floors(alone, [request(294, 0, 1, IMAGE)] * 3)
    assert single["decode"] == 0
    assert sum(single.values()) / 3 == pytest.approx(0.007, rel=0.05)
    full = floors(alone, [request(294, 0, 129, IMAGE)] * 2)
    assert full["decode"] / 256 == pytest.approx(0.0048, rel=0.02)


def test_decoding_takes_the_fewest_passes(facts: Facts) -> None:
    size = facts.decoder
    requests = [RequestSize(10, 0, n) for n in (3, 5, 2)]
    assert decode_passes(requests, 2) == 4  # the longest answer's; the others' 2 + 1 tokens run beside it
    assert decode_passes(requests, 1) == 7
    assert decode_passes([RequestSize(10, 0, n) for n in (9, 2, 2, 2)], 2) == 8  # not 8 + 1, wave after wave
    assert decode_passes([RequestSize(10, 0, 4)] * 3, 2) == 5  # 9 tokens, 2 a pass
    work, kv = decode_work(size, requests, 2), (11 + 12) + (11 + 12 + 13 + 14) + 11
    assert work.bytes == 4 * size.weight_bytes + kv * size.kv_bytes
    assert work.flops == pytest.approx(size.tokens(7, 7, kv / 7, kv).flops)
    assert decode_work(size, [RequestSize(10, 0, 1)], 2) == decode_work(size, [], 2) == Work()
    one = prefill_work(size, [RequestSize(8, 0, 1)])
    two = prefill_work(size, [RequestSize(8, 0, 1)] * 2)
    assert two.flops == pytest.approx(2 * one.flops)
    assert two.bytes == one.bytes == size.weight_bytes


def test_work_of_spans(facts: Facts) -> None:
    size = facts.decoder
    decode = span_work(size, ms("decoder", "decode", 0, 1, tokens=4, sequences=4, kv_tokens=400))
    assert decode == size.tokens(4, 4, 100, 400)
    prefill = span_work(size, ms("decoder", "prefill", 0, 1, tokens=200, sequences=2, kv_tokens=200))
    assert prefill.flops == pytest.approx(prefill_work(size, [RequestSize(100, 0, 1)] * 2).flops)
    assert prefill.bytes == size.weight_bytes
    assert span_work(size, ms("decoder", "decode", 0, 1)) == Work()
    cross = span_work(size, ms("decoder", "decode", 0, 1, tokens=4, sequences=4, kv_tokens=400, source_tokens=6000))
    assert cross == size.tokens(4, 4, 100 + 1500, 6400)
    assert span_work(replace(size, source_params=7), ms("decoder", "source", 0, 1, projected=1500)) == Work(21000.0)


def test_phases_against_the_ceilings(facts: Facts) -> None:
    spans = [
        ms("encoder", "encode", 0, 10, items=2), ms("decoder", "decode", 10, 15, tokens=1, sequences=1, kv_tokens=294),
        ms("decoder", "decode", 15, 20, tokens=1, sequences=1, kv_tokens=295),
    ]  # fmt: skip
    found = phases(facts, spans, [IMAGE], 2)
    assert set(found) == {"encode", "decode"}
    flops = 2 * facts.family.encoder_flops(facts.config, IMAGE)
    assert found["encode"]["tflops"] == pytest.approx(flops / 0.010 / 1e12)
    assert found["decode"]["tbs"] == pytest.approx(2 * 14.14e9 / 0.010 / 1e12, rel=0.01)
    assert found["decode"]["tbs_share"] == pytest.approx(found["decode"]["tbs"] / 2.97)


@pytest.mark.slow
def test_ceilings_are_measured_in_a_process_of_their_own() -> None:
    found = measure_ceilings("cpu", "float32")
    assert found.matmul == "1024³ fp32"
    assert found.ceilings == Ceilings(found.matmul_flops, max(found.copy_bandwidth, found.read_bandwidth))
    assert found.matmul_flops > 1e9
    assert found.copy_bandwidth > 1e8
    with pytest.raises(EngineError, match=r"ceilings of device 'fly' failed \(.+\)"):
        measure_ceilings("fly", "auto")


# --- reuse, latencies, checks


def prepared(ids: list[int], key: bytes) -> PreparedRequest:
    feature = MediaFeature("image", 4, {}, {"grid_thw": (1, 4, 4)}, key)
    return PreparedRequest("r", tuple(ids), SamplingParams(), (PlaceholderRange(1, 4, (True,) * 4, feature),))


def test_ideal_reuse_follows_blocks_and_media() -> None:
    common = [1, 9, 9, 9, 9, *range(10, 21)]  # one block of 16
    first, second = prepared([*common, 50], b"a"), prepared([*common, 51], b"a")
    other, again = prepared([*common, 52], b"b"), prepared([*common[:8], *range(60, 69)], b"a")
    found = ideal_reuse([first, second, other, again], [], [7, 7, 7, 7], 16)
    assert [a.size.cached for a in found] == [0, 16, 0, 0]
    assert [len(a.encode) for a in found] == [1, 0, 1, 0]  # the last needs the rows, which exist
    primed = ideal_reuse([second], [first], [3], 16)
    assert primed == [Asked(RequestSize(17, 16, 3), [], [{"grid_thw": (1, 4, 4)}])]
    whole = ideal_reuse([prepared(common, b"a")], [prepared(common, b"a")], [1], 16)
    assert whole[0].size.cached == 15  # the last token's logits are needed


def output(tokens: int, metrics: RequestMetrics | None, **usage: int) -> RequestOutput:
    answer = CompletionOutput(0, "", tuple(range(tokens)))
    return RequestOutput("r", (1,), (answer,), Usage(completion_tokens=tokens, **usage), True, metrics)


def test_latencies() -> None:
    times = (10.1, 10.2, 10.5)
    outputs = [output(3, RequestMetrics(10.05, 10.06, 10.1, 10.5, times)), output(1, None)]
    found = latencies(outputs, int(10e9))
    assert found["ttft_ms"]["p50"] == pytest.approx(100)
    assert found["inter_token_ms"]["max"] == pytest.approx(300)
    assert found["per_token_ms"]["mean"] == pytest.approx(200)
    assert found["request_ms"]["max"] > found["ttft_ms"]["max"]
    assert latencies(outputs, None)["ttft_ms"]["p50"] == pytest.approx(50)
    assert latencies([output(1, None)], None) == dict.fromkeys(
        ("ttft_ms", "inter_token_ms", "per_token_ms", "request_ms")
    )


def test_percentiles() -> None:
    found = percentiles([float(n) for n in range(101)])
    assert found == {"p50": 50, "p90": 90, "p99": 99, "mean": 50, "max": 100}
    assert percentiles([]) is None


def test_counters_grow() -> None:
    before = {"steps": 3, "cache": {"hits": 1}, "name": "x", "flag": True}
    after = {"steps": 5, "cache": {"hits": 4, "misses": 2}, "name": "x", "flag": True, "new": 1.5}
    assert difference(before, after) == {"steps": 2, "cache": {"hits": 3, "misses": 2}, "new": 1.5}


def test_wrong_counts_fail_loudly() -> None:
    wanted = BenchRequest(TextPrompt(prompt="x"), 2, 294, 256)
    good = output(2, None, prompt_tokens=294, media_tokens=256)
    check_counts("w", [wanted], [good])
    check_counts("w", [BenchRequest(TextPrompt(prompt="x"), 2)], [output(2, None, prompt_tokens=7)])
    for tokens, prompt, media in ((2, 295, 256), (2, 294, 255), (1, 294, 256)):
        with pytest.raises(ConfigError, match=r"294, 256 and 2 are its definition"):
            check_counts("w", [wanted], [output(tokens, None, prompt_tokens=prompt, media_tokens=media)])


def test_no_formula_no_encoder_floor(facts: Facts) -> None:
    without = dataclasses.replace(facts, family=None)
    assert floors(without, [request(294, 0, 2, IMAGE)])["encode"] == 0
    assert SimpleNamespace(**phases(without, [ms("encoder", "encode", 0, 1)], [IMAGE], 1)["encode"]).tflops == 0


def test_what_a_summary_says_of_lengths_dropped_spans_and_needless_encoding(facts: Facts) -> None:
    lengths = range(300, 320)
    outputs = [output(2, None, prompt_tokens=n, media_tokens=256) for n in lengths]
    asked = [Asked(RequestSize(n, 272, 2), [], [IMAGE]) for n in lengths]
    spans = [ms("encoder", "encode", 0, 10)]
    figures = summarise(facts, Measured(0, int(1e9), outputs, spans, {"encoded_items": 2}, dropped=7), asked)
    assert figures["tokens"]["prompt_each"] == list(lengths)[:16]
    flops = 2 * facts.family.encoder_flops(facts.config, IMAGE)
    assert figures["phases"]["encode"]["tflops"] == pytest.approx(flops / 0.010 / 1e12)
    assert figures["timeline"]["dropped_spans"] == 7
    text = result_text({"workload": "w", "kind": "throughput", **figures})
    assert "(300 to 319 each)" in text
    assert "7 spans came after the first 1,000,000 and were dropped" in text
    without = summarise(
        dataclasses.replace(facts, family=None), Measured(0, int(1e9), outputs, spans, {"encoded_items": 2}), asked
    )
    text = result_text({"workload": "w", "kind": "throughput", **without})
    assert "in 1 launches" in text
    assert "TFLOP/s" not in text
    assert "dropped" not in text


def test_a_recorder_keeps_the_first_spans_and_counts_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_core.tracing.MAX_SPANS", 2)
    recorder = SpanRecorder()
    for span in SPANS[:3]:
        recorder.add(span)
    assert recorder.dropped == 1
    assert recorder.take() == SPANS[:2]
    assert recorder.dropped == 0
