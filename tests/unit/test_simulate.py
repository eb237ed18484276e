"""The simulator: its clock, its device, its books, and that it finds in the caches what the engine finds."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
from support.pictures import picture
from support.tiny import make_tiny_qwen2vl

from mm_core.bench.sim_costs import DEFAULT_COSTS, PRESETS, SimCosts, costs_of
from mm_core.bench.sim_device import VirtualDevice
from mm_core.bench.sim_report import LEVELS, document, figures, table
from mm_core.bench.sim_requests import text_ids
from mm_core.bench.simulate import SimSetup, replay
from mm_core.bench.trace_kinds import KINDS, TraceOptions, make_trace
from mm_core.bench.traces import Media, Text, Trace, TraceRequest
from mm_core.errors import ConfigError, ContextLengthError, MediaTooLargeError
from mm_core.scheduler import policy as policies
from mm_core.scheduler.costs import CostModel
from mm_core.scheduler.sequence import ScheduledBatch
from mm_core.scheduler.transfers import BlockRestore, BlockStore, Spill, Transfers

# Whole seconds, so that times can be told by heart; a copy takes no time.
PLAIN = SimCosts(
    step_seconds=1.0, token_seconds=0.0, attention_seconds=0.0, decode_seconds=0.0, kv_seconds=0.0,
    encoder_seconds=0.0, encoder_square_seconds=0.0, kv_bytes=64, row_bytes=64, store_bandwidth=1e300,
    restore_bandwidth=1e300, copy_latency=0.0, disk_read_bandwidth=1e300, disk_write_bandwidth=1e300,
    disk_latency=0.0, staging_bytes=2**40,
)  # fmt: skip
SMALL = TraceOptions(
    requests=60, rate=0.5, media=8, rows=16, shared_tokens=12, text_tokens=22, output_tokens=6, turns=4, think=3.0,
    systems=4, system_tokens=80,
)  # fmt: skip
TIGHT = SimSetup(kv_tokens=384, costs=PLAIN, max_num_seqs=8, max_num_batched_tokens=128, encoder_budget=256,
                 encoder_cache_tokens=48, check=True)  # fmt: skip


def test_loads_no_torch():
    code = (
        "import sys, mm_core.cli.cache_sim, mm_core.bench.simulate, mm_core.bench.sim_report\n"
        "from mm_core.bench.simulate import SimSetup, replay\n"
        "from mm_core.bench.trace_kinds import TraceOptions, make_trace\n"
        "replay(make_trace('zipf', TraceOptions(requests=3, rows=32)), SimSetup(2000, host_tokens=500))\n"
        "assert not {'torch', 'transformers', 'triton'} & {m.split('.')[0] for m in sys.modules}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# -- time ------------------------------------------------------------------------------------


def one(at: float = 0.0, answer: int = 3, **more) -> TraceRequest:
    return TraceRequest(at, (Text(1, 20),), Text(2, answer), **more)


def test_a_request_alone():
    (fate,) = replay(Trace((one(at=5.0),)), replace(TIGHT, overlap=False)).requests
    assert (fate.arrival, fate.first, fate.end) == (5.0, 6.0, 8.0)
    assert fate.token_ids == text_ids(Text(2, 3))


def test_turns_come_after_the_answer_and_the_thinking():
    talk = [one(conversation="c", turn=n, think=2.5 * n) for n in range(2)] + [one(20.0, conversation="c", turn=2)]
    found = replay(Trace(tuple(talk)), replace(TIGHT, overlap=False)).requests
    assert [(f.arrival, f.end) for f in found] == [(0.0, 3.0), (5.5, 8.5), (20.0, 23.0)]
    assert [f.cached_tokens for f in found] == [0, 16, 16]


def test_steps_wait_for_each_other_and_for_the_encoder():
    costs = replace(PLAIN, encoder_seconds=0.25)
    request = TraceRequest(0.0, (Media("m", 16, 8), Text(1, 4)), Text(2, 2))
    (fate,) = replay(Trace((request,)), replace(TIGHT, costs=costs)).requests
    assert (fate.first, fate.end, fate.encoded_rows) == (3.0, 4.0, 16)


def test_costs_of_a_step():
    costs = replace(
        PLAIN, step_seconds=3.0, token_seconds=4 / 20, attention_seconds=1.0, decode_seconds=100.0, kv_seconds=1000.0
    )
    (fate,) = replay(Trace((one(answer=2),)), replace(TIGHT, costs=costs, overlap=False)).requests
    assert fate.first == math.hypot(3, 4) + 20 * 10.5
    assert fate.end - fate.first == 3.0 + 100 + 1000 * 21


def batch(**transfers) -> ScheduledBatch:
    return ScheduledBatch(1, (), transfers=Transfers(**transfers))


def test_copies_take_their_time_and_share_a_lane():
    costs = replace(
        PLAIN, store_bandwidth=64.0, restore_bandwidth=32.0, copy_latency=0.5, disk_read_bandwidth=16.0,
        disk_write_bandwidth=8.0, disk_latency=1.0,
    )  # fmt: skip
    device = VirtualDevice(costs, 1, staging_slots=2)
    stores = tuple(BlockStore(bytes([n]), n, n) for n in range(3))
    restores = (BlockRestore(b"a", 5, 5), BlockRestore(b"b", 6, 6), BlockRestore(b"c", 7, 7, place=0))
    assert device.launch(batch(stores=stores, restores=restores, spills=(Spill(b"d", (1,), (1,)),)), 10.0) == 10.0
    assert device.pending == 7
    ends = {}
    while device.pending:
        now = device.next_end
        ends |= {(told.key, told.ok): now - 10 for told in device.poll(now)}
    assert ends == {
        (b"\x00", True): 1.5, (b"\x01", True): 2.5, (b"\x02", False): 0.0,  # no room in staging
        (b"a", True): 2.5, (b"b", True): 4.5, (b"c", True): 7.5,  # read from disk until 5, then 0.5 + 2
        (b"d", True): 9.0,
    }  # fmt: skip
    assert device.copied == {"store": 128, "restore": 192, "disk_read": 64, "disk_write": 64}


# -- what is found ---------------------------------------------------------------------------


@pytest.mark.parametrize("policy", policies.POLICIES)
@pytest.mark.parametrize("kind", KINDS)
def test_books_balance_and_answers_are_the_traces(kind, policy):
    trace = make_trace(kind, replace(SMALL, salts=2, rate=0.2))
    costs = replace(
        PLAIN, step_seconds=0.01, token_seconds=0.01, store_bandwidth=1e5, restore_bandwidth=1e5,
        disk_read_bandwidth=5e4, disk_write_bandwidth=5e4,
    )  # fmt: skip
    setup = replace(TIGHT, policy=policy, costs=costs, host_tokens=800, disk_tokens=8000)
    found = replay(trace, setup)
    assert len(found.requests) == 60
    assert all(f.token_ids == text_ids(f.request.answer) for f in found.requests)
    assert all(f.arrival >= f.request.at and f.first > f.arrival and f.end >= f.first for f in found.requests)
    shown = figures(found)
    tokens = shown["tokens"]
    assert sum(tokens[level] for level in LEVELS) == tokens["prompt"] == sum(r.prompt_tokens for r in trace.requests)
    assert tokens["device"] > 0
    assert tokens["host"] + tokens["disk"] > 0


def test_more_room_finds_more():
    trace = make_trace("zipf", replace(SMALL, requests=150, media=30))
    hits = [1 - figures(replay(trace, replace(TIGHT, kv_tokens=kv)))["hit_rate"]["computed"] for kv in (320, 640, 4000)]
    assert hits == sorted(hits)
    assert hits[2] > hits[0] + 0.1
    costs = replace(PLAIN, step_seconds=0.01, token_seconds=0.01)
    with_host = figures(replay(trace, replace(TIGHT, kv_tokens=320, host_tokens=4000, costs=costs)))["hit_rate"]
    assert 1 - with_host["computed"] > hits[0] + 0.05
    without = figures(replay(trace, replace(TIGHT, enable_block_reuse=False)))
    assert without["hit_rate"]["computed"] == 1.0


def test_what_does_not_fit_is_refused_alone():
    large = TraceRequest(0.0, (Media("large", 100, 1), Text(1, 4)), Text(2, 2))
    long = TraceRequest(0.0, (Text(1, 500),), Text(2, 2))
    found = replay(Trace((large, long, one())), TIGHT)
    assert [type(f.error) for f in found.requests] == [MediaTooLargeError, ContextLengthError, type(None)]
    shown = figures(found)
    assert (shown["failed"], shown["requests"]) == (2, 1)


@pytest.mark.parametrize(
    ("change", "match"), [({"policy": "best"}, "reuse, fcfs"), ({"kv_tokens": 31}, "two blocks"),
                          ({"disk_tokens": 800}, "host tier")],
)  # fmt: skip
def test_setups_are_checked(change, match):
    with pytest.raises(ConfigError, match=match):
        replay(Trace((one(),)), replace(TIGHT, **change))


def test_report():
    trace = make_trace("system-prompts", SMALL)
    shown = [figures(replay(trace, replace(TIGHT, policy=name, kv_tokens=2000))) for name in policies.POLICIES]
    lines = table(shown).splitlines()
    assert [line.split()[:3] for line in lines[2:]] == [[name, "2k", "-"] for name in policies.POLICIES]
    assert len({len(line) for line in lines}) == 1
    kept = json.loads(json.dumps(document(trace, PLAIN, shown), allow_nan=False))
    assert kept["trace"]["requests"] == 60
    assert kept["results"] == shown
    assert SimCosts(**kept["costs"]) == PLAIN


# -- the same as the engine ------------------------------------------------------------------


def run_engine(model, trace: Trace, setup: SimSetup):
    """Cached tokens and encoded rows of each request in a real engine, all submitted before its first step; and its
    scheduler's counters."""
    from mm_core.config import KvCacheConfig, SamplingParams
    from mm_core.engine.loading import build_core, build_pipeline
    from mm_core.engine.messages import Submit
    from mm_core.types import TextPrompt

    slot_bytes = 2 * 2 * 2 * 16 * 4 * setup.block_size  # layers, K and V, heads, head size, float32
    host = setup.host_tokens // setup.block_size * slot_bytes
    config = engine_config(
        kv_cache_config=KvCacheConfig(num_blocks=setup.kv_tokens // setup.block_size, host_cache_size=host),
        max_num_seqs=setup.max_num_seqs, max_num_batched_tokens=setup.max_num_batched_tokens,
        encoder_budget=setup.encoder_budget, encoder_cache_tokens=setup.encoder_cache_tokens,
        scheduling_policy=setup.policy, overlap=setup.overlap,
    )  # fmt: skip
    core, length = build_core(model, config)
    core.scheduler.policy = replace(core.scheduler.policy, restores=always)
    pipeline = build_pipeline(model, config, length)
    pictures = {name: picture(number, 112, 112) for number, name in enumerate(trace.media)}
    image = model.processor.placeholder_id("image")
    for number, request in enumerate(trace.requests):
        ids: list[int] = []
        for part in request.segments:
            ids += [i % 200 + 20 for i in text_ids(part)] if isinstance(part, Text) else [image]
        shown = [pictures[part.name] for part in request.segments if isinstance(part, Media)]
        prompt = TextPrompt(
            prompt_token_ids=ids, multi_modal_data={"image": shown} if shown else None, cache_salt=request.salt
        )
        params = SamplingParams(max_tokens=request.answer.tokens, temperature=0.0, ignore_eos=True)
        prepared = replace(pipeline.submit(str(number), prompt).result(), params=params)
        assert len(prepared.token_ids) == request.prompt_tokens
        assert core.handle(Submit(prepared)) == []
    found = {}
    while core.has_work:
        for told in core.step():
            assert told.error is None
            if told.finish_reason is not None:
                found[int(told.request_id)] = (told.cached_tokens, told.encoded_rows)
    assert core.drain() == []
    core.scheduler.check_integrity()
    counters = asdict(core.scheduler.stats)
    if core.scheduler.tiers is not None:
        counters |= asdict(core.scheduler.tiers.stats)
    pipeline.close()
    core.runner.transfers.close()
    return [found[n] for n in range(len(trace.requests))], counters


def engine_config(**settings):
    from mm_core.config import EngineConfig

    return EngineConfig(device="cpu", show_progress=False, **settings)


def always(*_args: object) -> bool:
    return True


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from mm_core.engine.loading import load_model

    return load_model(str(make_tiny_qwen2vl(tmp_path_factory.mktemp("sim"))), engine_config(), None)


COUNTED = (
    "steps", "cached_tokens", "computed_tokens", "encoded_items", "preemptions", "deferred", "restored_tokens",
    "restored_items", "offloaded", "host_hits",
)  # fmt: skip


@pytest.mark.parametrize("policy", ["reuse", "fcfs"])
@pytest.mark.parametrize(("kind", "host"), [("zipf", 0), ("zipf", 800), ("system-prompts", 480)])
def test_finds_what_the_engine_finds(kind, host, policy, tiny, monkeypatch):
    """The same requests, keys, sizes and policy: the same tokens from the same caches, in the same steps."""
    for name in ("observe_step", "observe_restore"):  # the engine's clock is not the simulator's
        monkeypatch.setattr(CostModel, name, lambda self, *_args: self)
    trace = make_trace(kind, replace(SMALL, requests=30, rate=0.0, media=6, salts=2 if kind == "zipf" else 0))
    setup = replace(TIGHT, policy=policy, host_tokens=host, overlap=False, staging_slots=10**6, check=False)
    wanted, counters = run_engine(tiny, trace, setup)
    known = policies.POLICIES[policy]
    monkeypatch.setitem(policies.POLICIES, policy, replace(known, restores=always))  # type: ignore[index]
    found = replay(trace, setup)
    assert [(f.cached_tokens, f.encoded_rows) for f in sorted(found.requests, key=order(trace))] == wanted
    counted = [name for name in COUNTED if name in counters]
    assert {name: found.counters[name] for name in counted} == {name: counters[name] for name in counted}
    assert counters["cached_tokens"] > 0
    assert counters.get("offloaded", 1) > 0
    if host and policy == "fcfs":  # by their order alone requests on one item find it on the device
        assert counters["restored_tokens"] > 0


def order(trace: Trace):
    places = {id(request): number for number, request in enumerate(trace.requests)}
    return lambda fate: places[id(fate.request)]


# -- costs -----------------------------------------------------------------------------------


def test_presets_stand_for_what_was_measured():
    costs = PRESETS[DEFAULT_COSTS]
    options = TraceOptions(requests=1, rate=0.0, text_tokens=22, shared_tokens=12)
    distinct, large = (replace(options, rows=rows, output_tokens=2) for rows in (256, 2304))
    for given, first in ((distinct, 0.015), (large, 0.115)):  # seconds
        (fate,) = replay(make_trace("zipf", given), SimSetup(154_000, costs=costs)).requests
        assert fate.first == pytest.approx(first, rel=0.25)
        assert fate.end - fate.first == pytest.approx(0.0052, rel=0.05)
    at_once = make_trace("zipf", TraceOptions(requests=256, media=10**6, exponent=0.0, rate=0.0, rows=256,
                                              output_tokens=128))  # fmt: skip
    done = replay(at_once, SimSetup(1_000_000, costs=costs))
    assert 256 / done.seconds == pytest.approx(70, rel=0.1)  # image-distinct in docs/benchmarks


@pytest.mark.slow
@pytest.mark.parametrize("policy", policies.POLICIES)
def test_tells_what_an_h100_measured(policy):
    """Written by tests/bench/reuse_zipf.py: the same sizes, pictures drawn otherwise by the same law."""
    page = Path(__file__).resolve().parents[2] / "docs/benchmarks/reuse-zipf-h100.json"
    kept = json.loads(page.read_text(encoding="utf-8"))
    setting, measured = kept["setting"], kept["runs"][policy]
    host = {"fcfs": 0, "reuse": setting["host_bytes"] // PRESETS[DEFAULT_COSTS].kv_bytes}[policy]
    trace = make_trace("zipf", TraceOptions(requests=setting["requests"], media=setting["pictures"], rate=0.0))
    found = replay(trace, SimSetup(setting["kv_tokens"], host_tokens=host, policy=policy))
    shown = figures(found)
    assert shown["requests_per_s"] == pytest.approx(measured["requests_per_s"], rel=0.15)
    assert 1 - shown["hit_rate"]["computed"] == pytest.approx(
        measured["cached_tokens"] / measured["prompt_tokens"], abs=0.03
    )
    assert found.counters["encoded_items"] == pytest.approx(measured["counters"]["encoded_items"], rel=0.1)


def test_costs_by_name_and_file(tmp_path):
    assert costs_of(DEFAULT_COSTS) is PRESETS[DEFAULT_COSTS]
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"preset": "h100-llava-1.5-7b", "kv_bytes": 262144}))
    assert costs_of(str(file)) == replace(PRESETS["h100-llava-1.5-7b"], kv_bytes=262144)
    file.write_text(json.dumps(asdict(PLAIN)))
    assert costs_of(str(file)) == PLAIN


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", '{"preset": "a100"}', '{"preset": []}', '{"speed": 1}', '{"kv_bytes": 1.5}', '{"kv_bytes": true}',
     '{"kv_bytes": 0}', '{"step_seconds": "1"}', '{"step_seconds": NaN}', '{"step_seconds": -1}',
     '{"restore_bandwidth": 0}', '{"step_seconds": 1e999}', "[" * 100_000],
)  # fmt: skip
def test_bad_costs_are_refused(text, tmp_path):
    file = tmp_path / "costs.json"
    file.write_text(text)
    with pytest.raises(ConfigError):
        costs_of(str(file))


def test_absent_costs():
    with pytest.raises(ConfigError, match="h100-qwen2-vl-7b"):
        costs_of("absent.json")
    assert {f.type for f in fields(SimCosts)} == {"float", "int"}
