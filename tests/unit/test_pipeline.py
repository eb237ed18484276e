"""The pipeline: limits, names, the cache and its sharing, and what reaches the future."""

from __future__ import annotations

import gc
import io
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.stub_plugin import PAD, TOKENIZER, VOCAB, StubFusion, StubProcessor, ask, picture, run

from mm_core.config import EngineConfig, SamplingParams
from mm_core.errors import (
    ContextLengthError,
    EngineClosedError,
    InvalidParamsError,
    InvalidPromptError,
    MediaDecodeError,
    MediaNotCachedError,
    MediaTooLargeError,
    MMError,
    PluginError,
    TooManyMediaError,
    UnsupportedMediaError,
)
from mm_core.inputs import ChatPrompt, InputPipeline, eos_token_ids, fetch
from mm_core.media import decoder
from mm_core.types import PreparedRequest, TextPrompt

Make = Callable[..., InputPipeline]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[InputPipeline] = []

    def build(identity: bytes = b"id", fusion: Any = None, max_model_len: int = 200, **config: Any) -> InputPipeline:
        made.append(
            InputPipeline(
                StubProcessor(), fusion or StubFusion(), "stub", identity,
                EngineConfig(**{"preprocess_threads": 4, **config}), VOCAB, max_model_len, (3,),
            )
        )  # fmt: skip
        return made[-1]

    yield build
    for pipeline in made:
        pipeline.processor.gate.set()
        pipeline.close()


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def key_of(request: PreparedRequest, index: int = 0) -> bytes:
    return request.ranges[index].feature.key


def test_a_prepared_request(make: Make) -> None:
    pipeline = make()
    request = run(pipeline, ask([picture(0), picture(1, 40)]))
    assert request.request_id == "r"
    assert list(request.token_ids[:6]) == [PAD] * 6
    assert [(r.offset, r.length) for r in request.ranges] == [(0, 2), (2, 4)]
    assert request.stop_token_ids == {3, 7}
    assert request.positions is None
    assert key_of(request) != key_of(request, 1)
    assert run(pipeline, "hello").ranges == ()
    assert run(pipeline, [{"role": "user", "content": "hello"}]).token_ids == run(pipeline, "hello").token_ids


def test_features_are_cached(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, image = make(), picture()
    keys = {key_of(run(pipeline, ask(value))) for value in (image, png(image), png(image), image)}
    assert len(keys) == 1
    assert len(pipeline.processor.prepared) == 1
    monkeypatch.setattr(decoder, "decode_image", lambda *a: pytest.fail("decoded again"))
    run(pipeline, ask(png(image)))
    stats = pipeline.stats()
    assert (stats.hits, stats.misses, stats.entries, stats.nbytes) == (4, 1, 1, 8 * 20 * 3)


def test_the_cache_is_bounded_by_bytes(make: Make) -> None:
    pipeline = make(processor_cache_size=1000)
    for seed in range(4):
        run(pipeline, ask(picture(seed)))
    assert pipeline.stats().entries == 2
    assert pipeline.stats().nbytes == 960
    run(pipeline, ask(picture(3)))
    run(pipeline, ask(picture(0)))
    assert len(pipeline.processor.prepared) == 5
    run(pipeline, ask(picture(9, 300)))  # larger than the cache: used, not kept
    assert pipeline.stats().nbytes <= 1000
    assert make(processor_cache_size=0).stats().entries == 0


def test_evicted_bytes_are_decoded_again(make: Make) -> None:
    pipeline = make(processor_cache_size=0)
    first, second = (run(pipeline, ask(png(picture()))) for _ in range(2))
    assert key_of(first) == key_of(second)
    assert len(pipeline.processor.prepared) == 2


def test_concurrent_requests_prepare_once(make: Make) -> None:
    pipeline = make()
    pipeline.processor.gate.clear()
    futures = [pipeline.submit("r", ask(picture()), SamplingParams()) for _ in range(8)]
    time.sleep(0.05)
    pipeline.processor.gate.set()
    assert len({key_of(f.result(10)) for f in futures}) == 1
    assert len(pipeline.processor.prepared) == 1


def test_a_failure_reaches_all_and_is_not_kept(make: Make) -> None:
    pipeline = make()
    pipeline.processor.gate.clear()
    pipeline.processor.fault = MediaDecodeError("bad", code="image_aspect")
    futures = [pipeline.submit("r", ask(picture()), SamplingParams()) for _ in range(3)]
    time.sleep(0.05)
    pipeline.processor.gate.set()
    for future in futures:
        with pytest.raises(MediaDecodeError) as caught:
            future.result(10)
        assert (caught.value.code, caught.value.param) == ("image_aspect", "multi_modal_data")
    pipeline.processor.fault = None
    assert run(pipeline, ask(picture())).ranges


@pytest.mark.parametrize("threads", [1, 2])
def test_many_items_never_block_a_small_pool(make: Make, threads: int) -> None:
    pipeline = make(preprocess_threads=threads, max_model_len=2000)
    pictures = [picture(i % 5) for i in range(20)]
    futures = [pipeline.submit("r", ask(pictures), SamplingParams()) for _ in range(6)]
    assert all(len(f.result(20).ranges) == 20 for f in futures)
    assert len(pipeline.processor.prepared) == 5


def test_plugin_failures_name_the_plugin(make: Make) -> None:
    pipeline = make()
    pipeline.processor.fault = ZeroDivisionError("secret")
    with pytest.raises(PluginError, match=r"'stub' failed in prepare\(\) with ZeroDivisionError") as caught:
        run(pipeline, ask(picture()))
    assert "secret" not in str(caught.value)


def test_what_a_request_takes_decoded_is_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """However small it was before; nothing is decoded any more once the bound is met."""
    decoded: list[int] = []
    real = decoder.decode_image
    monkeypatch.setattr(decoder, "decode_image", lambda *a: decoded.append(1) or real(*a))
    pipeline = make(max_decoded_bytes=4 * 20 * 20 * 4, preprocess_threads=1)
    pictures = [png(Image.new("RGB", (20, 20), (seed, 0, 0))) for seed in range(12)]
    with pytest.raises(MediaTooLargeError, match="once they are decoded"):
        run(pipeline, ask(pictures))
    assert len(decoded) == 5
    assert len(run(pipeline, ask(pictures[:4])).ranges) == 4
    assert len(run(pipeline, ask(pictures[:5])).ranges) == 5  # these were seen before


def test_limits_come_before_decoding(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = make(limit_mm_per_prompt={"image": 2})
    monkeypatch.setattr(fetch.Fetcher, "fetch", lambda *a, **k: pytest.fail("fetched"))
    with pytest.raises(TooManyMediaError, match=r"limit_mm_per_prompt\['image'\]"):
        run(pipeline, ask([b"x"] * 64))
    with pytest.raises(UnsupportedMediaError):
        run(pipeline, TextPrompt(prompt="x", multi_modal_data={"audio": b"x"}))


def test_config_ceilings_reach_the_decoder(make: Make) -> None:
    with pytest.raises(MMError, match="max_image_pixels"):
        run(make(max_image_pixels=100), ask(png(picture())))


# -- uuids -------------------------------------------------------------------------------------


def test_uuid_and_content(make: Make) -> None:
    pipeline = make()
    named = run(pipeline, ask(picture(0), ["a"]))
    assert key_of(run(pipeline, ask(png(picture(0)), ["a"]))) == key_of(named)
    assert key_of(run(pipeline, ask(picture(0)))) != key_of(named)
    assert key_of(run(pipeline, ask(None, ["a"]))) == key_of(named)
    for other in (picture(1), picture(1, 50)):
        newer = run(pipeline, ask(other, ["a"]))
        assert key_of(newer) != key_of(named)
        recalled = run(pipeline, ask(None, ["a"]))
        assert key_of(recalled) == key_of(newer)
        assert recalled.token_ids == newer.token_ids
    assert key_of(run(pipeline, ask(picture(0), ["a"]))) == key_of(named)


def test_uuid_alone_may_stand_for_an_item_of_the_same_request(make: Make) -> None:
    request = run(make(), ask([picture(0), None], ["a", "a"]))
    assert key_of(request) == key_of(request, 1)
    both = ask(None, "b")
    with pytest.raises(MediaNotCachedError):
        run(make(), replace(both, multi_modal_data=None))


def test_unknown_evicted_and_foreign_uuids_read_the_same(make: Make) -> None:
    pipeline = make(processor_cache_size=500)
    run(pipeline, ask(picture(0), ["gone"]))
    run(pipeline, ask(picture(1), ["here"], cache_salt="other"))
    texts = set()
    for name in ("never", "gone", "here"):
        with pytest.raises(MediaNotCachedError) as caught:
            run(pipeline, ask(None, [name]))
        texts.add(str(caught.value))
    assert len(texts) == 1
    assert run(pipeline, ask(None, ["here"], cache_salt="other")).ranges


def test_uuid_with_other_settings_is_another_entry(make: Make) -> None:
    pipeline = make()
    run(pipeline, ask(picture(0), ["a"]))
    with pytest.raises(MediaNotCachedError):
        run(pipeline, ask(None, ["a"], mm_processor_kwargs={"size": 3}))


def test_concurrent_first_uses_of_a_uuid(make: Make) -> None:
    pipeline = make()
    futures = [pipeline.submit("r", ask(picture(i, 20 + 10 * i), ["a"]), SamplingParams()) for i in range(4)]
    assert [f.result(10).ranges[0].length for f in futures] == [2, 3, 4, 5]


@pytest.mark.parametrize("uuid", ["", "x" * 129, "../a", "a\0", "ä", 3, b"a", "a b"])
def test_bad_uuids(make: Make, uuid: Any) -> None:
    with pytest.raises(InvalidPromptError) as caught:
        run(make(), ask([picture()], [uuid]))
    assert caught.value.param == "multi_modal_uuids"


def test_uuid_lists_match_the_items(make: Make) -> None:
    pipeline = make()
    for names in (["a"], ["a", "b", "c"], {"a": 1}, 3):
        with pytest.raises(InvalidPromptError):
            run(pipeline, ask([picture(0), picture(1)], names))
    assert key_of(run(pipeline, ask([picture(0)], [None]))) == key_of(run(pipeline, ask(picture(0))))
    with pytest.raises(InvalidPromptError, match="neither content nor uuid"):
        run(pipeline, ask([None]))


# -- checks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("salt", ["", "x" * 129, "a/b", "a\0", "ü", 3, "x" * 10_000])
def test_bad_salts(make: Make, salt: Any) -> None:
    with pytest.raises(InvalidPromptError) as caught:
        run(make(), TextPrompt(prompt="x", cache_salt=salt))
    assert caught.value.param == "cache_salt"


def test_salts_separate(make: Make) -> None:
    pipeline = make()
    requests = [run(pipeline, ask(picture(), cache_salt=salt)) for salt in (None, "a", "b", "a")]
    assert len({key_of(r) for r in requests}) == 3
    assert requests[1].cache_salt == "a"
    chat = ChatPrompt([{"role": "user", "content": [{"type": "image", "image": picture()}]}], cache_salt="a")
    assert key_of(run(pipeline, chat)) == key_of(requests[1])


def test_params_are_checked_against_the_vocabulary(make: Make) -> None:
    pipeline = make()
    for params in (
        SamplingParams(logit_bias={VOCAB: 1.0}), SamplingParams(logit_bias={-1: 1.0}),
        SamplingParams(stop_token_ids=[VOCAB]), SamplingParams(stop_token_ids=[-1]),
    ):  # fmt: skip
        with pytest.raises(InvalidParamsError, match=str(VOCAB - 1)):
            pipeline.submit("r", "x", params).result(10)
    with pytest.raises(InvalidParamsError):
        run(pipeline, ask(picture(), mm_processor_kwargs={"fps": 1}))


def test_context_after_expansion(make: Make) -> None:
    used = len(run(make(), ask(picture())).token_ids)
    assert run(make(max_model_len=used + 1), ask(picture()))
    with pytest.raises(ContextLengthError, match=f"{used} tokens"):
        run(make(max_model_len=used), ask(picture()))


def test_positions(make: Make) -> None:
    fusion = StubFusion()
    pipeline = make(fusion=fusion)
    count = len(run(pipeline, "hello").token_ids)
    fusion.given = (np.zeros((3, count), np.int32), -2)
    request = run(pipeline, "hello")
    assert request.positions is not None
    assert (request.positions.shape, request.decode_delta) == ((3, count), -2)
    fusion.given = (np.zeros((3, count + 1), np.int32), 0)
    with pytest.raises(PluginError, match="'stub'"):
        run(pipeline, "hello")


def test_paths_can_be_shut(make: Make, tmp_path: Any) -> None:
    (tmp_path / "a.png").write_bytes(png(picture()))
    pipeline = make()
    assert run(pipeline, ask(str(tmp_path / "a.png"))).ranges
    with pytest.raises(UnsupportedMediaError):
        run(pipeline, ask(str(tmp_path / "a.png")), allow_paths=False)


def test_close_cancels_what_waits(make: Make) -> None:
    pipeline = make(preprocess_threads=1)
    pipeline.processor.gate.clear()
    first = pipeline.submit("a", ask(picture(0)), SamplingParams())
    second: Future[PreparedRequest] = pipeline.submit("b", ask(picture(1)), SamplingParams())
    time.sleep(0.05)
    closer = threading.Thread(target=pipeline.close)
    closer.start()
    time.sleep(0.02)
    pipeline.processor.gate.set()
    closer.join(10)
    assert len(first.result(10).ranges) == 1
    with pytest.raises(CancelledError):
        second.result(10)
    with pytest.raises(EngineClosedError):
        pipeline.submit("c", "hello", SamplingParams())


def test_eos_token_ids() -> None:
    assert eos_token_ids({"eos_token_id": [5, 6]}, TOKENIZER) == {5, 6, TOKENIZER.eos_token_id}
    assert eos_token_ids({"eos_token_id": 5}, None) == {5}
    assert eos_token_ids({}, None) == frozenset()


def test_a_pool_that_breaks_ends_who_waits(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_core.inputs.pinning.Pinner.start_thread", lambda self: 1 / 0)
    with pytest.raises(BrokenExecutor):
        run(make(), ask(picture()))


def test_no_more_media_are_prepared_than_the_context_has_room_for(make: Make) -> None:
    pipeline = make(max_model_len=10, preprocess_threads=1)
    pictures = [png(Image.new("RGB", (40, 40), (seed, 0, 0))) for seed in range(40)]  # 4 tokens each
    with pytest.raises(ContextLengthError):
        run(pipeline, ask(pictures))
    assert len(pipeline.processor.prepared) < 10


def test_prepared_media_of_all_requests_are_bounded(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds no room waits until a prepared request is over; those that were given up are no hindrance."""
    pipeline = make(max_model_len=2000)
    first = run(pipeline, ask(picture(0)))
    nbytes = pipeline._room.nbytes
    assert nbytes > 0
    monkeypatch.setattr(pipeline._room, "_total", nbytes)
    given_up, second = (pipeline.submit("r", ask(picture(i)), SamplingParams()) for i in (1, 2))
    time.sleep(0.05)
    assert len(pipeline.processor.prepared) == 1
    assert not second.done()
    assert run(pipeline, "hello").token_ids
    given_up.cancel()
    del first
    gc.collect()
    assert second.result(10).ranges
    assert len(pipeline.processor.prepared) == 2
    del second
    gc.collect()
    assert pipeline._room.nbytes == 0
