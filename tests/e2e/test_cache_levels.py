"""`engine.cache` with host memory and a disk behind the device, and with every family."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.cached import BLOCK, ROWS, answer, check, shot, turn, work
from support.e2e import GREEDY, settle
from support.families import FAMILIES

from mm_core import Engine, KvCacheConfig
from mm_core.cache.disk import DiskTier
from mm_core.engine.cache import CacheControl
from mm_core.errors import CacheFullError, MediaNotCachedError
from mm_core.inputs import ChatPrompt
from mm_core.types import CacheEvent

PICTURES = range(8)
SALTS = (None, "alice", "bob")
KINDS = ("warm", "pin", "unpin", "evict", "salt", "lookup", "stats", "clear", "events")


def start(path: Path, disk: Path | None, slots: int = 64, **options: Any) -> Engine:
    """The device holds four of the pictures, the host's memory more of them, the disk all."""
    behind = {} if disk is None else {"disk_cache_path": str(disk), "disk_cache_size": 2**21}
    kv = KvCacheConfig(num_blocks=24, host_cache_size=slots * 8192, **behind)
    return Engine.from_pretrained(
        path, kv_cache_config=kv, encoder_cache_tokens=2 * ROWS, show_progress=False, **options
    )


def ask_all(engine: Engine) -> list[tuple[int, ...]]:
    return [answer(engine, turn(shot(seed), f"u{seed}")).token_ids for seed in PICTURES]


@pytest.fixture(scope="module")
def wanted(tiny_path: Path) -> list[tuple[int, ...]]:
    """The tokens of an engine that reuses nothing."""
    kv = KvCacheConfig(num_blocks=64, enable_block_reuse=False)
    with Engine.from_pretrained(tiny_path, kv_cache_config=kv, show_progress=False) as engine:
        return ask_all(engine)


def test_lookups_tell_the_levels_apart(tiny_path: Path, wanted: list[tuple[int, ...]], tmp_path: Path) -> None:
    with start(tiny_path, tmp_path, slots=20) as engine:
        assert ask_all(engine) == wanted
        before = engine.cache.stats()
        found = [engine.cache.lookup(turn(shot(seed), f"u{seed}")) for seed in PICTURES]
        assert engine.cache.stats() == before
        assert sum(f.device_tokens for f in found) > 0
        assert sum(f.host_tokens for f in found) > 0
        assert all(f.cached_tokens <= f.prompt_tokens for f in found)
        assert {f.encoded_media + f.restorable_media for f in found} <= {0, 1}
        for seed in PICTURES:
            found_now = engine.cache.lookup(turn(shot(seed), f"u{seed}"))
            assert answer(engine, turn(shot(seed), f"u{seed}")).usage.cached_tokens <= found_now.cached_tokens + BLOCK
        stats = engine.cache.stats()
        assert stats.host.capacity > 0
        assert stats.disk.capacity > 0
        assert stats.host.offloaded_tokens > 0
        assert stats.host.evicted > 0
        hits = stats.device.hits + stats.host.hits + stats.disk.hits
        assert hits == engine.stats()["cached_tokens"]
        assert stats.host.queries == stats.device.queries - stats.device.hits
        assert stats.disk.queries == stats.host.queries - stats.host.hits
        check(engine)


def test_what_is_evicted_is_gone_from_every_level_and_after_a_restart(
    tiny_path: Path, wanted: list[tuple[int, ...]], tmp_path: Path
) -> None:
    shared = BLOCK  # what all these chats begin with is nobody's
    with start(tiny_path, tmp_path) as engine:
        assert ask_all(engine) == wanted
        assert engine.cache.lookup(turn(shot(0), "u0")).host_tokens > 0
        assert engine.cache.evict("u0").stored > 0
        for level in ("host", "disk"):
            assert getattr(engine.cache.stats(), level).entries > 0, "the others stay"
        assert engine.cache.lookup(turn(shot(0), "u0")).cached_tokens <= shared
        assert engine.cache.lookup(turn(shot(1), "u1")).cached_tokens > shared
        settle(engine)
    with start(tiny_path, tmp_path) as engine:
        found = [engine.cache.lookup(turn(shot(seed), f"u{seed}")) for seed in PICTURES]
        assert found[0].cached_tokens <= shared
        assert found[1].disk_tokens > shared, "the disk outlives the process"
        assert ask_all(engine) == wanted
        engine.cache.evict("u1")
        engine.cache.evict("u2")
    with start(tiny_path, tmp_path) as engine:
        found = [engine.cache.lookup(turn(shot(seed), f"u{seed}")) for seed in PICTURES]
        assert [f.cached_tokens <= shared for f in found[:4]] == [False, True, True, False]
        engine.cache.clear()
        assert engine.cache.lookup(turn(shot(3), "u3")).cached_tokens == 0
    with start(tiny_path, tmp_path) as engine:
        assert engine.cache.lookup(turn(shot(3), "u3")).cached_tokens == 0, "clear() reaches the disk"


def test_a_salts_copies_go_with_it(tiny_path: Path) -> None:
    with start(tiny_path, None) as engine:
        for seed in PICTURES:
            engine.chat([ChatPrompt(turn(shot(seed)), cache_salt="alice" if seed < 4 else "bob")], GREEDY)
        assert engine.cache.evict(salt="alice").stored > 0
        tiers = engine._frontend._core.scheduler.tiers
        assert tiers is not None
        assert {entry.content.salt for entry in tiers.host.entries() if not entry.num_rows} <= {"bob"}
        for seed in range(4):
            assert engine.cache.lookup(ChatPrompt(turn(shot(seed)), cache_salt="alice")).cached_tokens == 0
        check(engine)


def replay(events: list[CacheEvent]) -> dict[tuple[str, str], set[bytes]]:
    """What can be found, by cache and level, if these events are all there is."""
    found: dict[tuple[str, str], set[bytes]] = {}
    for event in events:
        there = found.setdefault((event.cache, event.level), set())
        if event.kind == "evicted":
            there.remove(event.key)
        else:
            assert event.key not in there, event
            there.add(event.key)
    return {place: keys for place, keys in found.items() if keys}


def truth_of(engine: Engine) -> dict[tuple[str, str], set[bytes]]:
    scheduler = engine._frontend._core.scheduler
    tiers = scheduler.tiers
    assert tiers is not None
    assert isinstance(tiers.disk, DiskTier)
    host = [entry for entry in tiers.host.entries() if entry.ready]
    found = {
        ("kv", "device"): {content.key for _, content in scheduler.prefix.contents()},
        ("encoder", "device"): {*scheduler.encoder_cache.keys()},
        ("kv", "host"): {entry.key for entry in host if not entry.num_rows},
        ("encoder", "host"): {entry.key for entry in host if entry.num_rows},
        ("kv", "disk"): {entry.key for entry in tiers.disk.entries() if not entry.num_rows},
        ("encoder", "disk"): {entry.key for entry in tiers.disk.entries() if entry.num_rows},
    }
    return {place: keys for place, keys in found.items() if keys}


def test_replayed_events_are_what_every_level_holds(
    tiny_path: Path, wanted: list[tuple[int, ...]], tmp_path: Path
) -> None:
    """Also from the middle, also of a disk that was filled by an earlier process, also where things are evicted."""
    for life in range(2):
        with start(tiny_path, tmp_path, slots=20 + 30 * life) as engine:
            early = engine.cache.events()
            events: list[CacheEvent] = []
            for round_ in range(3):
                assert ask_all(engine) == wanted
                engine.cache.evict(f"u{round_ + 3 * life}")
                late = engine.cache.events()
                for _ in range(2):
                    assert answer(engine, turn(shot(7), "u7")).token_ids == wanted[7]
                settle(engine)
                engine.cache.stats()
                events += taken(early)
                assert replay(events) == truth_of(engine)
                assert replay(taken(late)) == truth_of(engine)
                late.close()
            kinds = {(e.kind, e.level) for e in events}
            assert {("stored", "device"), ("evicted", "device"), ("offloaded", "host"), ("restored", "device")} <= kinds
            assert ("offloaded", "disk") in kinds
            early.close()


def taken(stream: Any) -> list[CacheEvent]:
    events = []
    while (event := stream._feed.poll()[0]) is not None:
        events.append(event)
    return events


def test_what_went_to_the_hosts_memory_is_pinned_there(tiny_path: Path, wanted: list[tuple[int, ...]]) -> None:
    with start(tiny_path, None, slots=20) as engine:
        answer(engine, turn(shot(0), "u0"))
        answer(engine, turn(shot(1), "u1"))
        for seed in range(2, 12):
            answer(engine, turn(shot(seed), f"u{seed}"))
            before = engine.cache.lookup(turn(shot(0), "u0"))
            if before.host_tokens > BLOCK:
                break
        assert before.host_tokens > BLOCK
        pinned = engine.cache.pin("u0")
        assert pinned.stored * BLOCK >= before.host_tokens
        assert 0 < engine.cache.stats().host.pinned <= engine.cache.stats().host.capacity // 2
        for _ in range(2):
            for seed in range(12, 24):
                answer(engine, turn(shot(seed), f"u{seed}"))
        after = engine.cache.lookup(turn(shot(0), "u0"))
        assert after.cached_tokens >= before.cached_tokens - BLOCK, "what lies behind the picture may go"
        assert engine.cache.lookup(turn(shot(1), "u1")).cached_tokens <= BLOCK
        assert answer(engine, turn(uuid="u0")).token_ids == wanted[0]
        check(engine)
        engine.cache.unpin("u0")
        assert engine.cache.stats().host.pinned == 0
        check(engine)


# -- all at once -----------------------------------------------------------------------------------


def meddle(cache: CacheControl, dice: random.Random, asked: Callable[[int, str | None], Any]) -> str:
    """One call of any kind; what came of it."""
    seed, salt = dice.choice(PICTURES), dice.choice(SALTS)
    uuid, kind = f"u{seed}", dice.choice(KINDS)
    try:
        match kind:
            case "warm":
                cache.warm(shot(seed), uuid, cache_salt=salt, pin=dice.random() < 0.3)
            case "pin":
                cache.pin(uuid, salt)
            case "unpin":
                cache.unpin(uuid, salt)
            case "evict":
                cache.evict(uuid, cache_salt=salt)
            case "salt" if dice.random() < 0.3:
                cache.evict(salt="alice")
            case "lookup":
                found = cache.lookup(asked(seed, salt))
                assert found.cached_tokens < found.prompt_tokens
            case "clear" if dice.random() < 0.2:
                cache.clear()
            case "events":
                cache.events().close()
            case _:
                cache.stats()
    except (MediaNotCachedError, CacheFullError) as error:
        return type(error).__name__
    return kind


def check_every_step(engine: Engine) -> None:
    """A fault in the books ends the engine's loop, and with it every request."""
    core = engine._frontend._core
    step = core.step

    def checked() -> Any:
        outputs = step()
        core.scheduler.check_integrity()
        core.keeper.check_integrity()
        return outputs

    core.step = checked  # type: ignore[method-assign]


@pytest.mark.parametrize("overlap", [False, True], ids=["in-turn", "overlap"])
def test_whatever_is_done_to_the_caches_changes_no_token(
    tiny_path: Path, wanted: list[tuple[int, ...]], overlap: bool
) -> None:
    """Requests from four threads while a fifth warms, pins, evicts, looks up and listens."""
    events: list[CacheEvent] = []
    with start(tiny_path, None, slots=30, overlap=overlap) as engine:

        def asked(seed: int, salt: str | None) -> ChatPrompt:
            return ChatPrompt(turn(shot(seed), f"u{seed}"), cache_salt=salt)

        def client(number: int) -> list[int]:
            dice, wrong = random.Random(number), []
            for _ in range(10):
                seed = dice.choice(PICTURES)
                output = engine.chat([asked(seed, dice.choice(SALTS))], GREEDY)[0]
                wrong += [seed] * (output.token_ids != wanted[seed])
            return wrong

        check_every_step(engine)
        leave = engine.cache.subscribe(events.append)
        with ThreadPoolExecutor(4) as pool:
            clients = [pool.submit(client, number) for number in range(4)]
            dice, done = random.Random(9), Counter[str]()
            while not all(c.done() for c in clients):
                done[meddle(engine.cache, dice, asked)] += 1
            assert [c.result() for c in clients] == [[]] * 4
        check(engine)
        assert {"pin", "evict", "lookup", "MediaNotCachedError"} <= done.keys()
        leave()
        scheduler = engine._frontend._core.scheduler
        found = replay(events)
        assert found.get(("kv", "device"), set()) == {content.key for _, content in scheduler.prefix.contents()}
        assert found.get(("encoder", "device"), set()) == {*scheduler.encoder_cache.keys()}
        engine.cache.clear()
        check(engine)


# -- every family ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def family_engine(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Engine]]:
    family = FAMILIES[request.param]
    path = family.make(tmp_path_factory.mktemp(request.param))
    kv = KvCacheConfig(num_blocks=512)
    with Engine.from_pretrained(
        path, device="cpu", kv_cache_config=kv, plugins=family.modules(), show_progress=False
    ) as engine:
        yield family, engine


def test_a_warmed_prompt_of_any_family_is_found(family_engine: tuple[Any, Engine]) -> None:
    family, engine = family_engine
    for prompt in family.prompts(0):
        warmed = engine.cache.warm(prompt)
        found = engine.cache.lookup(prompt)
        assert warmed.media_tokens > 0
        assert found.encoded_media == found.media
        assert found.cached_source_tokens == found.source_tokens
        with work(engine) as done:
            output = engine.generate(prompt, GREEDY)[0]
        assert (done.encoded, done.prepared) == (0, 0)
        assert output.usage.cached_tokens == found.device_tokens
        assert found.device_tokens // BLOCK == (found.prompt_tokens - 1) // BLOCK
    check(engine)


def test_a_warmed_item_of_any_family_is_not_encoded_again(family_engine: tuple[Any, Engine]) -> None:
    """Nor computed, where what the decoder reads of it does not depend on the question."""
    family, engine = family_engine
    kind = engine._frontend.pipeline.fusion.kind
    for prompt in family.prompts(50):
        for modality, value in prompt.multi_modal_data.items():
            values = value if isinstance(value, list) else [value]
            warmed = engine.cache.warm(values)
            assert all(w.media_tokens > 0 for w in warmed)
            before = engine.stats()["encoder_calls"]
            again = engine.cache.warm(values, modality=modality)
            assert engine.stats()["encoder_calls"] == before
            if kind == "embed":
                assert all(w.computed_tokens <= BLOCK for w in again)
            if not isinstance(value, list):  # families may prepare several pictures of a request in another way
                engine.generate(prompt, GREEDY)
                assert engine.stats()["encoder_calls"] == before
    check(engine)
