"""`engine.cache`: what warm, pin and evict do, to the tokens and to the caches (fp32, greedy)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cached import (
    BLOCK,
    FEATURE,
    ROWS,
    SMALL,
    TEXT,
    answer,
    check,
    data_url,
    flood,
    png,
    shot,
    start,
    turn,
    work,
)
from support.e2e import GREEDY, ask, check_message
from support.pictures import frames, picture

from mm_core import Engine, KvCacheConfig, SamplingParams, TextPrompt
from mm_core.engine.messages import EvictItems
from mm_core.errors import CacheFullError, MediaNotCachedError
from mm_core.inputs import ChatPrompt


@pytest.fixture(scope="module")
def truth(tiny_path: Path) -> Iterator[Callable[[Any], tuple[int, ...]]]:
    """The tokens of an engine that reuses nothing."""
    kv = KvCacheConfig(num_blocks=256, enable_block_reuse=False)
    with Engine.from_pretrained(tiny_path, kv_cache_config=kv, processor_cache_size=0, show_progress=False) as engine:
        yield lambda prompt: answer(engine, prompt).token_ids


@pytest.fixture
def fresh(request: pytest.FixtureRequest, tiny_path: Path) -> Iterator[Engine]:
    with start(tiny_path, overlap=getattr(request, "param", False)) as engine:
        yield engine
        check(engine)


# -- warm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["pil", "bytes", "path", "str", "url", "array", "parts"])
def test_a_warmed_picture_is_computed_before_it_is_asked_about(
    fresh: Engine, truth: Callable[[Any], tuple[int, ...]], tmp_path: Path, form: str
) -> None:
    image = shot(1)
    (tmp_path / "a.png").write_bytes(png(image))
    value: Any = {
        "pil": image,
        "bytes": png(image),
        "path": tmp_path / "a.png",
        "str": str(tmp_path / "a.png"),
        "url": data_url(image),
        "array": np.asarray(image),
        "parts": turn(image, text="Whose is it?"),
    }[form]
    warmed = fresh.cache.warm(value, "pic")
    assert (warmed.cached_tokens, warmed.media_tokens, warmed.encoded_media_tokens) == (0, ROWS, ROWS)
    assert warmed.computed_tokens == warmed.prompt_tokens > ROWS
    with work(fresh) as done:
        output = answer(fresh, turn(image, "pic"))
    assert (done.encoded, done.prepared) == (0, 0)
    item_end = warmed.prompt_tokens - (0 if form != "parts" else len(output.prompt_token_ids) - ROWS)
    assert output.usage.cached_tokens >= item_end // BLOCK * BLOCK > 0
    assert output.usage.cached_tokens >= ROWS
    assert output.token_ids == truth(turn(image))
    assert answer(fresh, turn(uuid="pic")).token_ids == output.token_ids, "by name alone"
    assert fresh.cache.warm(value, "pic").computed_tokens < BLOCK + 1


def test_items_of_other_kinds_are_told_by_their_content(fresh: Engine, truth: Callable[[Any], tuple[int, ...]]) -> None:
    clip = np.stack(frames(3, 4))
    values: list[Any] = [clip, (clip, 2.0), {"frames": list(clip), "fps": 2.0}]
    for number, value in enumerate(values):
        fresh.cache.warm(value, f"v{number}")
        with work(fresh) as done:
            output = answer(fresh, turn(value, f"v{number}", modality="video"))
        assert (done.encoded, done.prepared) == (0, 0)
        assert output.usage.cached_tokens > 0
        assert output.token_ids == truth(turn(value, modality="video"))
    assert fresh.cache.warm([shot(1), shot(2)], modality="video").media_tokens > 0, "pictures of one video"


@pytest.mark.parametrize(
    "prompt",
    [TEXT, TextPrompt(prompt=TEXT), {"prompt": TEXT}, [{"role": "user", "content": TEXT}], ask(picture(2), TEXT)],
    ids=["str", "TextPrompt", "dict", "chat", "picture"],
)
def test_a_warmed_prompt_is_cached_but_for_its_last_token(
    fresh: Engine, truth: Callable[[Any], tuple[int, ...]], prompt: Any
) -> None:
    steps = fresh.stats()["steps"]
    warmed = fresh.cache.warm(prompt)
    assert (warmed.cached_tokens, warmed.computed_tokens) == (0, warmed.prompt_tokens)
    assert fresh.stats()["generated_tokens"] == 1
    assert fresh.stats()["steps"] - steps <= 2
    output = answer(fresh, prompt)
    assert output.usage.cached_tokens == (warmed.prompt_tokens - 1) // BLOCK * BLOCK > 0
    assert output.token_ids == truth(prompt)


def test_a_list_is_warmed_at_once_and_each_keeps_its_name(fresh: Engine) -> None:
    warmed = fresh.cache.warm([shot(1), turn(shot(2)), TEXT], ["a", "b", None])
    assert [w.media_tokens for w in warmed] == [ROWS, ROWS, 0]
    with work(fresh) as done:
        for uuid in "ab":
            assert answer(fresh, turn(uuid=uuid)).usage.cached_tokens >= ROWS
        assert answer(fresh, TEXT).usage.cached_tokens > 0
    assert (done.encoded, done.prepared) == (0, 0)


def test_what_is_warmed_is_as_separate_as_requests_are(fresh: Engine) -> None:
    fresh.cache.warm(shot(1), "a", cache_salt="alice")
    for prompt in (ChatPrompt(turn(uuid="a")), ChatPrompt(turn(uuid="a"), cache_salt="bob")):
        with pytest.raises(MediaNotCachedError):
            fresh.chat([prompt])
        assert fresh.cache.lookup(ChatPrompt(turn(shot(1), "a"), cache_salt=prompt.cache_salt)).cached_tokens == 0
    assert fresh.chat([ChatPrompt(turn(uuid="a"), cache_salt="alice")], GREEDY)[0].usage.cached_tokens >= ROWS


def test_processor_settings_are_the_items_too(fresh: Engine) -> None:
    small = {"max_pixels": 112 * 112}
    warmed = fresh.cache.warm(shot(1), "a", mm_processor_kwargs=small)
    assert warmed.media_tokens < ROWS
    with work(fresh) as done:
        fresh.chat([ChatPrompt(turn(shot(1), "a"), mm_processor_kwargs=small)], GREEDY)
    assert (done.encoded, done.prepared) == (0, 0)
    with work(fresh) as done:
        answer(fresh, turn(shot(1), "a"))
    assert (done.encoded, done.prepared) == (1, 1)


# -- pin and unpin ---------------------------------------------------------------------------------


def test_a_pinned_picture_outlives_a_flood_that_evicts_another(
    tiny_path: Path, truth: Callable[[Any], tuple[int, ...]]
) -> None:
    with start(tiny_path, **SMALL) as engine:
        kept = engine.cache.warm(shot(1), "kept", pin=True)
        engine.cache.warm(shot(2), "other")
        shared = (kept.prompt_tokens // BLOCK - ROWS // BLOCK) * BLOCK
        for first in range(10, 110, 20):  # what took long to compute, as measured, stays longer
            flood(engine, first)
            if engine.cache.lookup(turn(shot(2), "other")).device_tokens <= shared:
                break
        assert engine.stats()["block_evictions"] > 20
        with work(engine) as done:
            output = answer(engine, turn(uuid="kept"))
        assert (done.encoded, done.prepared) == (0, 0)
        assert output.usage.cached_tokens >= kept.prompt_tokens // BLOCK * BLOCK
        assert output.token_ids == truth(turn(shot(1)))
        by_generate = engine.generate(ask(uuid="kept"), GREEDY)[0]
        assert by_generate.token_ids == truth(ask(shot(1)))
        with pytest.raises(MediaNotCachedError):
            answer(engine, turn(uuid="other"))
        found = engine.cache.lookup(turn(shot(2), "other"))
        assert (found.encoded_media, found.device_tokens) <= (0, shared)
        with work(engine) as done:
            assert answer(engine, turn(shot(2), "other")).token_ids == truth(turn(shot(2)))
        assert (done.encoded, done.prepared) == (1, 1)
        check(engine)
        engine.cache.unpin("kept")
        stats = engine.cache.stats()
        assert (stats.processor.pinned, stats.encoder.pinned, stats.device.pinned) == (0, 0, 0)
        flood(engine, 30)
        with pytest.raises(MediaNotCachedError):
            answer(engine, turn(uuid="kept"))
        check(engine)


def test_what_is_asked_later_about_a_pinned_picture_is_pinned_up_to_it(tiny_path: Path) -> None:
    with start(tiny_path, **SMALL) as engine:
        answer(engine, turn(shot(1), "a"))
        before = engine.cache.pin("a")
        assert before.encoder_rows == ROWS
        assert before.features == 1
        assert before.kv_tokens >= ROWS
        prompt = ask(uuid="a", text="Quite another beginning?")
        answer(engine, prompt)
        assert engine.cache.stats().device.pinned > before.kv_tokens
        flood(engine, 10)
        assert answer(engine, prompt).usage.cached_tokens >= ROWS
        check(engine)


@pytest.mark.parametrize("level", ["KV", "encoder", "processor"])
def test_no_more_than_half_of_a_cache_is_pinned_and_nothing_by_half(tiny_path: Path, level: str) -> None:
    remedy = {"KV": "num_blocks", "encoder": "encoder_cache_tokens", "processor": "processor_cache_size"}[level]
    sizes = dict(SMALL, num_blocks=200, encoder_cache_tokens=100 * ROWS, processor_cache_size=100 * FEATURE)
    sizes[remedy] = SMALL[remedy]
    with start(tiny_path, **sizes) as engine:
        pinned = 0

        def pin_more() -> None:
            nonlocal pinned
            for number in range(20):
                engine.cache.warm(shot(number), f"p{number}", pin=True)
                pinned += 1

        with pytest.raises(CacheFullError, match=remedy) as caught:
            pin_more()
        assert caught.value.code == "cache_full"
        assert "Unpin" in str(caught.value)
        check_message(caught.value)
        assert 1 <= pinned <= 4
        stats = engine.cache.stats()
        assert stats.processor.pinned <= stats.processor.capacity // 2
        assert stats.encoder.pinned == pinned * ROWS <= stats.encoder.capacity // 2
        assert stats.device.pinned <= stats.device.capacity // 2
        features = engine.cache.pin("p0").features
        assert (features, stats.processor.pinned % pinned) == (1, 0)
        flood(engine, 50)
        assert answer(engine, turn(uuid="p0")).usage.cached_tokens >= ROWS
        if level == "processor":
            with pytest.raises(MediaNotCachedError):
                answer(engine, turn(uuid=f"p{pinned}"))
        engine.cache.unpin("p0")
        engine.cache.warm(shot(pinned), f"p{pinned}", pin=True)
        check(engine)


@pytest.mark.parametrize("tiers", [{}, {"host_cache_size": 2**22}], ids=["device", "host"])
def test_pins_yield_the_blocks_that_a_request_could_not_run_without(
    tiny_path: Path, truth: Callable[[Any], tuple[int, ...]], tiers: dict[str, Any]
) -> None:
    """One that fits beside what is pinned costs no pin; one that lacks a few blocks takes these, from the end."""
    with start(tiny_path, num_blocks=24, tiers=tiers) as engine:
        engine.cache.warm(shot(1), "a", pin=True)
        answer(engine, turn(uuid="a"))  # its last block, which ends with text, joins
        pinned = engine.cache.stats().device.pinned
        assert pinned > ROWS
        free, tokens = 24 * BLOCK - pinned, len(truth("a b c"))

        def words(count: int) -> TextPrompt:
            return TextPrompt(prompt_token_ids=[20 + (7 * i + count) % 200 for i in range(count)])

        for lacking in (0, 1, 3, pinned // BLOCK):
            prompt = words(free + lacking * BLOCK - tokens)
            assert answer(engine, prompt).token_ids == truth(prompt)
            left = pinned - lacking * BLOCK
            assert engine.cache.stats().device.pinned == left
            found = engine.cache.lookup(turn(shot(1), "a"))
            assert found.device_tokens == min(left, found.prompt_tokens - 1)
            kept = max((found.prompt_tokens - 1) // BLOCK * BLOCK - left, 0) if tiers else 0
            assert found.host_tokens == kept
            assert answer(engine, turn(uuid="a")).token_ids == truth(turn(shot(1))), "the name is pinned all the same"
            assert engine.cache.stats().device.pinned == pinned, "and so is what is computed from it again"
        check(engine)


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside-others"])
def test_pinned_rows_yield_to_a_picture_that_they_leave_no_room_for(
    tiny_path: Path, truth: Callable[[Any], tuple[int, ...]], alone: bool
) -> None:
    """The oldest of them, and no more than that picture lacks; it does not wait until nobody else runs."""
    with start(tiny_path, encoder_cache_tokens=ROWS + 32) as engine:
        for number in range(3):
            assert engine.cache.warm(picture(number), f"p{number}", pin=True).media_tokens == 12
        assert answer(engine, turn(picture(9))).usage.encoded_media_tokens == 12, "there is room beside them"
        assert engine.cache.stats().encoder.pinned == 36
        beside = None if alone else engine.stream(TEXT, SamplingParams(max_tokens=400, ignore_eos=True))
        if beside is not None:
            next(beside)
        output = answer(engine, turn(shot(1)))
        assert beside is None or engine.stats()["running"] == 1, "the other still runs"
        assert (output.usage.encoded_media_tokens, output.token_ids) == (ROWS, truth(turn(shot(1))))
        assert engine.cache.stats().encoder.pinned == 24
        for number, encoded in ((1, 0), (2, 0), (0, 12)):
            output = answer(engine, ask(uuid=f"p{number}"))
            assert (output.usage.encoded_media_tokens, output.token_ids) == (encoded, truth(ask(picture(number))))
        assert engine.cache.stats().encoder.pinned == 36, "encoded again, it is pinned again"
        if beside is not None:
            beside.close()
        check(engine)


def test_a_pinned_name_stays_when_more_names_come_than_there_is_room_for(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mm_core.inputs.features.MAX_NAMES", 4)
    with start(tiny_path) as engine:
        for uuid in ("kept", "other"):
            answer(engine, turn(picture(1), uuid))
        engine.cache.pin("kept")
        for number in range(6):
            answer(engine, turn(picture(2), f"n{number}"))
        answer(engine, turn(uuid="kept"))
        with pytest.raises(MediaNotCachedError):
            answer(engine, turn(uuid="other"))


# -- evict -----------------------------------------------------------------------------------------


def test_what_is_evicted_is_computed_again_and_its_name_means_nothing(
    fresh: Engine, truth: Callable[[Any], tuple[int, ...]]
) -> None:
    for uuid, seed in (("gone", 1), ("stays", 2)):
        answer(fresh, turn(shot(seed), uuid))
    answer(fresh, ask(shot(1), uuid="gone"))
    fresh.cache.pin("gone")
    before = fresh.cache.lookup(turn(shot(1), "gone"))
    assert (before.encoded_media, before.device_tokens >= ROWS) == (1, True)
    evicted = fresh.cache.evict("gone")
    assert (evicted.encoder_items, evicted.features) == (1, 1)
    assert evicted.kv_blocks >= 2 * ROWS // BLOCK
    found = fresh.cache.lookup(turn(shot(1), "gone"))
    assert found.encoded_media == 0
    assert found.device_tokens <= before.device_tokens - ROWS
    for prompt in (turn(uuid="gone"), ask(uuid="gone")):
        with pytest.raises(MediaNotCachedError):
            answer(fresh, prompt)
    with pytest.raises(MediaNotCachedError):
        fresh.cache.pin("gone")
    with work(fresh) as done:
        assert answer(fresh, turn(shot(1), "gone")).token_ids == truth(turn(shot(1)))
    assert (done.encoded, done.prepared, done.cached) == (1, 1, found.device_tokens)
    with work(fresh) as done:
        assert answer(fresh, turn(uuid="stays")).usage.cached_tokens >= ROWS
    assert (done.encoded, done.prepared) == (0, 0)
    assert fresh.cache.evict("never") == fresh.cache.evict("gone", cache_salt="alice") == type(evicted)()


@pytest.mark.parametrize("fresh", [False, True], ids=["in-turn", "overlap"], indirect=True)
def test_running_requests_go_on_and_leave_nothing_of_what_was_evicted(
    fresh: Engine, truth: Callable[[Any], tuple[int, ...]]
) -> None:
    """Evicted in the middle of a request, and while others wait: right tokens, and no trace of the item afterwards."""
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    prompt = turn(shot(1), "gone")
    wanted = fresh.chat(prompt, params)[0].token_ids
    fresh.cache.clear()
    stream = fresh.stream(prompt, params)
    next(stream)
    threads = [threading.Thread(target=lambda: fresh.chat(prompt, params)) for _ in range(3)]
    for thread in threads:
        thread.start()
    evicted = fresh.cache.evict("gone")
    assert evicted.kv_blocks + evicted.encoder_items > 0
    last = None
    for update in stream:
        last = update
    assert last is not None
    assert last.token_ids == wanted
    for thread in threads:
        thread.join()
    fresh.cache.evict("gone")
    check(fresh)
    found = fresh.cache.lookup(prompt)
    assert found.encoded_media == 0
    assert found.device_tokens < ROWS
    assert answer(fresh, prompt).token_ids == truth(turn(shot(1)))


@pytest.mark.parametrize("fresh", [False, True], ids=["in-turn", "overlap"], indirect=True)
def test_one_request_that_runs_publishes_nothing_more(fresh: Engine) -> None:
    params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    stream = fresh.stream(turn(shot(1), "gone"), params)
    next(stream)
    fresh.cache.evict("gone")
    output = list(stream)[-1]
    fresh.wait_idle()
    assert output.usage.completion_tokens == 60
    assert fresh.cache.evict("gone").kv_blocks == 0, "nothing was published since"
    assert fresh.cache.lookup(turn(shot(1), "gone")).device_tokens < ROWS
    assert fresh.cache.stats().encoder.entries == 0


@pytest.mark.parametrize("overlap", [False, True], ids=["in-turn", "overlap"])
def test_rows_in_use_go_with_their_last_reader(
    tiny_path: Path, truth: Callable[[Any], tuple[int, ...]], overlap: bool
) -> None:
    """Evicted between two chunks of a prompt, the first of which ends within the picture."""
    with start(tiny_path, max_num_batched_tokens=48, max_num_seqs=4, overlap=overlap) as engine:
        core, doomed = engine._frontend._core, set[bytes]()
        step, rows = core.step, core.scheduler.encoder_cache

        def evicting() -> Any:
            outputs = step()
            if not doomed and rows.room < rows.capacity:
                core.handle(EvictItems(-1, "gone"))
                doomed.update(core.keeper.doomed)
            return outputs

        core.step = evicting  # type: ignore[method-assign]
        assert answer(engine, turn(shot(1), "gone")).token_ids == truth(turn(shot(1)))
        assert len(doomed) == 1
        engine.wait_idle()
        assert (engine.cache.stats().encoder.entries, core.keeper.doomed) == (0, set())
        assert engine.cache.evict("gone").kv_blocks == 0
        check(engine)


def test_all_of_a_salt_goes_and_nothing_else(fresh: Engine) -> None:
    for salt in (None, "alice", "bob"):
        fresh.chat([ChatPrompt(turn(shot(1), "a"), cache_salt=salt)], GREEDY)
        fresh.generate(TextPrompt(prompt=TEXT, cache_salt=salt), GREEDY)
    fresh.cache.pin("a", "alice")
    evicted = fresh.cache.evict(salt="alice")
    assert (evicted.encoder_items, evicted.features) == (1, 1)
    assert fresh.cache.stats().device.pinned == 0
    for salt, there in ((None, True), ("alice", False), ("bob", True)):
        text = fresh.cache.lookup(TextPrompt(prompt=TEXT, cache_salt=salt))
        media = fresh.cache.lookup(ChatPrompt(turn(shot(1), "a"), cache_salt=salt))
        assert (text.device_tokens > 0, media.device_tokens > 0, media.encoded_media == 1) == (there,) * 3
    with pytest.raises(MediaNotCachedError):
        fresh.chat([ChatPrompt(turn(uuid="a"), cache_salt="alice")])
    fresh.chat([ChatPrompt(turn(uuid="a"), cache_salt="bob")], GREEDY)


def test_clear_forgets_everything(fresh: Engine) -> None:
    answer(fresh, turn(shot(1), "a"))
    fresh.cache.warm(shot(2), "b", cache_salt="s", pin=True)
    fresh.cache.clear()
    stats = fresh.cache.stats()
    levels = (stats.processor, stats.encoder, stats.device)
    assert [(level.entries, level.used, level.pinned) for level in levels] == [(0, 0, 0)] * 3
    with pytest.raises(MediaNotCachedError):
        answer(fresh, turn(uuid="a"))
    assert fresh.cache.lookup(turn(shot(1), "a")).cached_tokens == 0


def test_names_of_one_salt_are_nobody_elses(fresh: Engine) -> None:
    fresh.cache.warm(shot(1), "a", cache_salt="alice")
    texts = set()
    for call in (fresh.cache.pin, fresh.cache.unpin):
        for args in (("a",), ("a", "bob"), ("b", "alice")):
            with pytest.raises(MediaNotCachedError) as caught:
                call(*args)
            texts.add(str(caught.value))
    assert len(texts) == 1
    fresh.cache.evict("a", cache_salt="bob")
    fresh.cache.evict("a")
    fresh.cache.evict(salt="bob")
    fresh.cache.pin("a", "alice")
    fresh.cache.unpin("a", "alice")
    fresh.cache.unpin("a", "alice")  # known, though not pinned
