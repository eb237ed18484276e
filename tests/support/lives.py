"""Lives of a world without tensors: what may happen to an engine, in any order, and what must hold at the end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st

from mm_core.config import SamplingParams
from mm_core.engine.messages import Abort, ClearCache, PinItem, UnpinItem
from mm_core.errors import CacheFullError
from mm_core.scheduler import Sequence
from support.fake_model import World, random_faults
from support.fake_requests import expected_tokens, feature, make_request, make_source

MEDIA = [
    replace(item, uuid=item.key.decode())
    for item in (feature("a", 3), feature("b", 6), feature("c", 9), feature("d", 2, cost=100))
]
PARTS = st.lists(st.one_of(st.sampled_from(MEDIA), st.integers(8, 11)), min_size=1, max_size=14)
TEXT = st.lists(st.integers(8, 9), min_size=1, max_size=9)
SOURCES = [make_source(p) for p in ([MEDIA[0]], [MEDIA[1], MEDIA[0]], [MEDIA[2]], [8, MEDIA[1], 9], [8, 9, 8, 9, 10])]
STOPS = st.sampled_from([frozenset(), frozenset(range(8, 14)), frozenset({20})])
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), PARTS, st.integers(1, 12), st.integers(1, 2), STOPS, st.none()),
        st.tuples(st.just("add"), TEXT, st.integers(1, 12), st.integers(1, 2), STOPS, st.sampled_from(SOURCES)),
        st.tuples(st.just("step"), st.integers(1, 4)),
        st.tuples(st.just("abort"), st.integers(0, 30)),
        st.tuples(st.just("clear")),
        st.tuples(st.sampled_from(["pin", "unpin"]), st.sampled_from(MEDIA)),
    ),
    min_size=3,
    max_size=30,
)


WORLDS = {
    "actions": ACTIONS,
    "overlap": st.booleans(),
    "num_blocks": st.integers(8, 40),
    "max_num_seqs": st.integers(1, 6),
    "max_tokens": st.integers(1, 40),
    "encoder_rows": st.integers(9, 30),
    "encoder_budget": st.integers(1, 80),
    "source_budget": st.sampled_from([0, 1, 12]),
    "reuse": st.booleans(),
    "policy": st.sampled_from(["reuse", "fcfs"]),
    "copy_tokens": st.sampled_from([0, 1, 3]),
    "faults": st.one_of(st.none(), st.integers(0, 1000)),
}


def lone_answer(seq: Sequence) -> list[int]:
    """Up to a stop token or the length asked for."""
    tokens = expected_tokens(seq.request, seq.params.max_tokens or 0)
    ends = [i + 1 for i, token in enumerate(tokens) if token in seq.request.stop_token_ids]
    return tokens[: min(ends, default=len(tokens))]


def live(actions: list[tuple], faults: int | None, **settings: Any) -> World:
    """The world at its end."""
    world = World(**settings)
    if faults is not None:
        world.runner.faults = random_faults(faults, 0.1)
    aborted = set()
    for name, *values in actions:
        if name == "add":
            parts, length, n, stops, source = values
            params = SamplingParams(max_tokens=length, temperature=0, n=n)
            extra = {} if source is None else {"source": source, "kv_context": source.key}
            request = make_request(str(len(world.sequences)), parts, params, stop_token_ids=stops, **extra)
            if len(request.token_ids) + length <= world.scheduler.sources.max_length(request):
                world.add(request)
        elif name == "step":
            for _ in range(values[0]):
                world.step()
        elif name in ("pin", "unpin"):
            kind = PinItem if name == "pin" else UnpinItem
            error = world.core.keeper.answer(kind(0, values[0].uuid, None)).error
            assert error is None or isinstance(error, CacheFullError)
            world.check()
        elif name == "clear":
            world.core.handle(ClearCache())
            world.scheduler.check_integrity()
        elif name == "forget" and world.scheduler.tiers is not None:
            world.scheduler.tiers.forget(lambda content, part=values[0]: content.key[0] % 3 == part % 3)
            world.scheduler.check_integrity()
        elif world.sequences:
            seq = world.sequences[-1 - values[0] % len(world.sequences)]  # small: one of the latest
            world.core.handle(Abort(seq.request.request_id))
            world.scheduler.check_integrity()
            aborted.add(seq.request.request_id)
    world.run()
    for item in MEDIA:
        world.core.keeper.answer(UnpinItem(0, item.uuid, None))
    for seq in world.sequences:
        wanted, request_id = lone_answer(seq), seq.request.request_id
        if request_id in world.errors or request_id in aborted:
            assert seq.output_token_ids == wanted[: seq.num_output_tokens]
        else:
            assert seq.output_token_ids == wanted
    assert faults is not None or not world.errors
    assert world.core.request_ids == []
    check_empty(world)
    return world


def check_empty(world: World) -> None:
    """Nothing is held by anybody."""
    scheduler = world.scheduler
    counts = scheduler.pool.counts()
    assert counts["in_use"] == counts["pending"] == 0
    assert counts["free"] + counts["cached"] == scheduler.pool.num_blocks
    scheduler.encoder_cache.check_integrity(set())
    assert scheduler.encoder_cache.room == scheduler.encoder_cache.capacity
