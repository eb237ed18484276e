"""What is reused, and what a uuid and a salt mean for it (rows D, I17 and I18 of the bad-input list).

Everything is asked twice: as prompts of `generate` and as messages of `chat`.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.e2e import GREEDY, IMAGE, ask, check_message, settle, turn
from support.pictures import frames, picture

from mm_core import Engine, KvCacheConfig, RequestOutput, TextPrompt
from mm_core.cache import BlockContent
from mm_core.errors import InvalidPromptError, MediaDecodeError, MediaNotCachedError, RequestError
from mm_core.hashing import get_hasher
from mm_core.inputs import ChatPrompt
from mm_core.inputs.fetch import Fetcher
from mm_core.media import MediaLimits
from mm_core.scheduler.sequence import Sequence

SYSTEM = 47  # tokens of the chat template's own that are the same in every question: two blocks, and some of a third
BEGIN = 15  # that prompts which are given as they are can have in common before their pictures
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


@pytest.fixture(scope="module", params=["generate", "chat"])
def way(request: pytest.FixtureRequest) -> str:
    """How `answer` asks."""
    return str(request.param)


@pytest.fixture(scope="module")
def engine(tiny_path: Path, way: str) -> Iterator[Engine]:
    kv = KvCacheConfig(num_blocks=512)
    with Engine.from_pretrained(tiny_path, kv_cache_config=kv, show_progress=False) as made:
        made.way = way  # type: ignore[attr-defined]
        yield made


@pytest.fixture(scope="module")
def truth(tiny_path: Path, way: str) -> Iterator[Engine]:
    """An engine that reuses no KV block and is given neither uuid nor salt: what the tokens must be."""
    kv = KvCacheConfig(num_blocks=256, enable_block_reuse=False)
    with Engine.from_pretrained(tiny_path, kv_cache_config=kv, processor_cache_size=0, show_progress=False) as made:
        made.way = way  # type: ignore[attr-defined]
        yield made


def answer(engine: Engine, prompt: TextPrompt) -> RequestOutput:
    if getattr(engine, "way", "generate") == "chat":
        return engine.chat([as_messages(prompt)], GREEDY)[0]
    return engine.generate(prompt, GREEDY)[0]


def as_messages(prompt: TextPrompt) -> ChatPrompt:
    """The same question as one user message: its media in their places, each with its uuid."""
    data, names = prompt.multi_modal_data or {}, prompt.multi_modal_uuids or {}
    items: dict[str, list[dict[str, Any]]] = {}
    for modality in {**data, **names}:
        values, uuids = data.get(modality), names.get(modality)
        uuids = uuids if isinstance(uuids, list) else [uuids]
        values = values if isinstance(values, list) else [values] * len(uuids)
        uuids = uuids if modality in names else [None] * len(values)
        items[modality] = [part_of(modality, v, u) for v, u in zip(values, uuids, strict=True)]
    text = re.sub("<[|]im_(?:start|end)[|]>(?:user|assistant)?\n?", "", prompt.prompt or "")
    parts: list[dict[str, Any]] = []
    for piece in re.split("<[|]vision_start[|]>(<[|](?:image|video)_pad[|]>)<[|]vision_end[|]>", text):
        modality = {"<|image_pad|>": "image", "<|video_pad|>": "video"}.get(piece)
        if modality is not None:
            parts.append(items[modality].pop(0))
        elif piece:
            parts.append({"type": "text", "text": piece})
    assert not any(items.values())
    return ChatPrompt([{"role": "user", "content": parts}], prompt.mm_processor_kwargs, prompt.cache_salt)


def part_of(modality: str, value: Any, uuid: Any) -> dict[str, Any]:
    part: dict[str, Any] = {"type": modality, modality: value, "uuid": uuid}
    return {key: entry for key, entry in part.items() if key == "type" or entry is not None}


@dataclass
class Work:
    """What a stretch of requests made the engine do."""

    encoded: int = 0
    prepared: int = 0
    cached_tokens: int = 0


@contextmanager
def work(engine: Engine) -> Iterator[Work]:
    before, done = engine.stats(), Work()
    yield done
    after = engine.stats()
    done.encoded = after["encoder_calls"] - before["encoder_calls"]
    done.prepared = after["processor_cache"]["misses"] - before["processor_cache"]["misses"]
    done.cached_tokens = after["cached_tokens"] - before["cached_tokens"]
    settle(engine)


def encoded_bytes(seed: int, kind: str) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, kind)
    return buffer.getvalue()


# -- without names ---------------------------------------------------------------------------------


def test_the_same_picture_twice_is_encoded_once(engine: Engine, truth: Engine) -> None:
    with work(engine) as first:
        cold = answer(engine, ask(picture(10)))
    with work(engine) as second:
        warm = answer(engine, ask(picture(10)))
    assert (first.encoded, first.prepared) == (1, 1)
    assert (second.encoded, second.prepared) == (0, 0)
    assert warm.usage.cached_tokens == second.cached_tokens > 0
    assert cold.token_ids == warm.token_ids == answer(truth, ask(picture(10))).token_ids


def test_the_same_picture_behind_another_text_reuses_the_encoder_only(engine: Engine, truth: Engine) -> None:
    answer(engine, ask(picture(11)))
    prompt = TextPrompt(prompt=f"The cat sleeps.{IMAGE}Describe", multi_modal_data={"image": picture(11)})
    with work(engine) as done:
        output = answer(engine, prompt)
    assert (done.encoded, done.prepared) == (0, 0)
    assert done.cached_tokens <= (SYSTEM if engine.way == "chat" else 0)  # type: ignore[attr-defined]
    assert output.usage.encoded_media_tokens == 0
    assert output.token_ids == answer(truth, prompt).token_ids


@pytest.mark.parametrize("kind", ["PNG", "BMP"])
def test_the_same_picture_in_another_container_hits(engine: Engine, kind: str) -> None:
    cold = answer(engine, ask(picture(12)))
    with work(engine) as done:
        warm = answer(engine, ask(encoded_bytes(12, kind)))
    assert (done.encoded, done.prepared) == (0, 0)
    assert warm.usage.cached_tokens > 0
    assert warm.token_ids == cold.token_ids


def twins() -> dict[str, list[Image.Image]]:
    """I17: pictures with the same bytes: they hash alike wherever only the bytes are hashed."""
    tall = picture(13, 56, 112)
    index = np.asarray(picture(13, 84, 84).convert("L")) // 4
    palettes = []
    for step in (37, 91):
        image = Image.frombytes("P", (84, 84), index.tobytes())
        image.putpalette([step * i * (channel + 1) % 256 for i in range(64) for channel in range(3)])
        palettes.append(image)
    return {
        "shape": [tall, Image.frombytes("RGB", (112, 56), tall.tobytes())],
        "palette": palettes,
        "mode": [Image.fromarray(index * 4), Image.frombytes("RGB", (28, 84), (index * 4).tobytes())],
        "grey or palette": [Image.fromarray(index), palettes[0]],
    }


@pytest.mark.parametrize("name", ["shape", "palette", "mode", "grey or palette"])
@pytest.mark.parametrize("uuid", [None, "twin"])
def test_i17_twins_in_bytes_are_not_twins(engine: Engine, truth: Engine, name: str, uuid: str | None) -> None:
    one, two = twins()[name]
    assert one.tobytes() == two.tobytes()
    outputs = [answer(engine, ask(p, uuid=uuid)) for p in (one, two, one)]
    assert [o.token_ids for o in outputs] == [answer(truth, ask(p)).token_ids for p in (one, two, one)]
    assert outputs[0].token_ids != outputs[1].token_ids
    assert outputs[2].usage.cached_tokens >= 16, "the first one is found again"


def test_i18_the_same_pixels_have_one_entry_however_they_come(engine: Engine, truth: Engine) -> None:
    image = picture(14)
    forms = [encoded_bytes(14, "PNG"), encoded_bytes(14, "BMP"), np.asarray(image), image]
    wanted = answer(truth, ask(image)).token_ids
    with work(engine) as done:
        assert [answer(engine, ask(form)).token_ids for form in forms] == [wanted] * 4
    assert (done.encoded, done.prepared) == (1, 1)


# -- with names: D1 … D10 --------------------------------------------------------------------------


def test_d1_same_uuid_same_bytes_hits(engine: Engine) -> None:
    cold = answer(engine, ask(picture(20), uuid="d1"))
    with work(engine) as done:
        warm = answer(engine, ask(picture(20), uuid="d1"))
    assert (done.encoded, done.prepared) == (0, 0)
    assert warm.usage.cached_tokens > 0
    assert warm.token_ids == cold.token_ids


@pytest.mark.parametrize("size", [(112, 84), (168, 56)])
def test_d2_same_uuid_other_bytes(engine: Engine, truth: Engine, size: tuple[int, int]) -> None:
    old, new, name = picture(21), picture(22, *size), f"d2-{size[0]}"
    wanted_old, wanted_new = (answer(truth, ask(p)).token_ids for p in (old, new))
    assert wanted_old != wanted_new
    assert answer(engine, ask(old, uuid=name)).token_ids == wanted_old
    assert answer(engine, ask(new, uuid=name)).token_ids == wanted_new, "a stale answer"
    assert answer(engine, ask(uuid=name)).token_ids == wanted_new, "the uuid now means the new bytes"
    with work(engine) as done:
        assert answer(engine, ask(old, uuid=name)).token_ids == wanted_old
    assert (done.encoded, done.prepared) == (0, 0), "the old entry is untouched"
    assert answer(engine, ask(uuid=name)).token_ids == wanted_old


def test_d3_uuid_alone_gives_the_tokens_of_its_bytes(engine: Engine, truth: Engine) -> None:
    wanted = answer(truth, ask(picture(23))).token_ids
    answer(engine, ask(picture(23), uuid="d3"))
    forms: list[dict[str, Any]] = [
        {"multi_modal_data": {"image": [None]}, "multi_modal_uuids": {"image": ["d3"]}},
        {"multi_modal_data": {"image": None}, "multi_modal_uuids": {"image": ["d3"]}},
        {"multi_modal_uuids": {"image": ["d3"]}},
        {"multi_modal_uuids": {"image": "d3"}},
    ]
    with work(engine) as done:
        outputs = [answer(engine, TextPrompt(prompt=ask().prompt, **form)) for form in forms]
    assert {o.token_ids for o in outputs} == {wanted}
    assert (done.encoded, done.prepared) == (0, 0)
    part = {"type": "image", "uuid": "d3"}
    chat = engine.chat([{"role": "user", "content": [part, {"type": "text", "text": "Describe"}]}], GREEDY)[0]
    assert chat.usage.media_tokens == 12


def test_d3_bytes_and_name_in_one_request(engine: Engine, truth: Engine) -> None:
    prompt = turn(f"{IMAGE}{IMAGE}Describe these images.")
    pair = {"multi_modal_data": {"image": [None, picture(24)]}, "multi_modal_uuids": {"image": ["d3b", "d3b"]}}
    both = {"multi_modal_data": {"image": [picture(24)] * 2}}
    wanted = answer(truth, TextPrompt(prompt=prompt, **both)).token_ids
    assert answer(engine, TextPrompt(prompt=prompt, **pair)).token_ids == wanted


def test_d4_d5_unknown_names_of_any_kind_get_one_reply(engine: Engine) -> None:
    """Never seen, another tenant's, of another modality, prepared otherwise: nobody learns which."""
    answer(engine, ask(picture(25), uuid="d5", cache_salt="alice"))
    assert answer(engine, ask(uuid="d5", cache_salt="alice")).usage.cached_tokens > 0
    clip = TextPrompt(prompt=turn(VIDEO), multi_modal_data={"video": {"frames": frames(1, 2), "fps": 2.0}},
                      multi_modal_uuids={"video": ["film"]}, cache_salt="alice")  # fmt: skip
    answer(engine, clip)
    unknown = [
        ask(uuid="never-seen"), ask(uuid="d5"), ask(uuid="d5", cache_salt="bob"), ask(uuid="d5", cache_salt="Alice"),
        ask(uuid="film", cache_salt="alice"),
        ask(uuid="d5", cache_salt="alice", mm_processor_kwargs={"max_pixels": 56 * 56}),
    ]  # fmt: skip
    texts = set()
    for prompt in unknown:
        with pytest.raises(MediaNotCachedError, match="with the content") as caught:
            answer(engine, prompt)
        assert (caught.value.code, caught.value.param) == ("media_not_cached", "multi_modal_uuids")
        check_message(caught.value)
        texts.add(str(caught.value))
    assert len(texts) == 1
    settle(engine)


def test_d4_evicted_content_is_not_cached(tiny_path: Path) -> None:
    """A picture is 112 × 84 × 3 bytes; the cache here holds one of them."""
    kv = KvCacheConfig(num_blocks=64)
    options: dict[str, Any] = {"kv_cache_config": kv, "processor_cache_size": 40_000, "show_progress": False}
    with Engine.from_pretrained(tiny_path, **options) as engine:
        first = answer(engine, ask(picture(26), uuid="a"))
        assert answer(engine, ask(uuid="a")).token_ids == first.token_ids
        answer(engine, ask(picture(27), uuid="b"))
        with pytest.raises(MediaNotCachedError):
            answer(engine, ask(uuid="a"))
        assert answer(engine, ask(picture(26), uuid="a")).token_ids == first.token_ids, "sending it again helps"
        settle(engine)


ODD_UUIDS: list[Any] = ["", "x" * 129, "../etc", "a\0b", "a b", "ümlaut", "\ud800", 5, 1.5, b"bytes", ["nested"], True]


@pytest.mark.parametrize("uuid", ODD_UUIDS, ids=ascii)
def test_d6_odd_uuids_are_refused(engine: Engine, uuid: Any) -> None:
    for prompt in (
        TextPrompt(prompt=turn(IMAGE), multi_modal_data={"image": [picture(1)]}, multi_modal_uuids={"image": [uuid]}),
        TextPrompt(prompt=turn(IMAGE), multi_modal_uuids={"image": [uuid]}),
    ):
        with pytest.raises(InvalidPromptError, match="1 to 128") as caught:
            answer(engine, prompt)
        assert caught.value.param == ("messages" if engine.way == "chat" else "multi_modal_uuids")  # type: ignore[attr-defined]
        check_message(caught.value)
    settle(engine)


def test_d6_the_longest_name_is_fine_and_a_digest_is_no_name(engine: Engine) -> None:
    name = "Az09_.:-" * 16
    first = answer(engine, ask(picture(28), uuid=name))
    assert answer(engine, ask(uuid=name)).token_ids == first.token_ids
    item = Fetcher(get_hasher("xxh3_128"), MediaLimits()).fetch("image", picture(28)).item
    requests = [engine._frontend.pipeline.submit("r", ask(picture(28), uuid=u)).result(10) for u in (name, None)]
    for digest in (item.digest.hex(), *(r.media[0].feature.key.hex() for r in requests)):
        with pytest.raises(MediaNotCachedError):
            answer(engine, ask(uuid=digest))


def test_d7_lengths_and_null_entries(engine: Engine) -> None:
    prompt, pair = turn(f"{IMAGE}{IMAGE}Describe these images."), [picture(29), picture(30)]
    for uuids in (["a"], ["a", "b", "c"], []):
        wrong = TextPrompt(prompt=prompt, multi_modal_data={"image": pair}, multi_modal_uuids={"image": uuids})
        with pytest.raises(InvalidPromptError, match=f"{len(uuids)} uuids for 2 items"):
            engine.generate(wrong, GREEDY)
    plain = answer(engine, TextPrompt(prompt=prompt, multi_modal_data={"image": pair}))
    with work(engine) as done:
        mixed = answer(engine, TextPrompt(
            prompt=prompt, multi_modal_data={"image": pair}, multi_modal_uuids={"image": [None, "d7"]}))  # fmt: skip
    assert (done.encoded, done.prepared) == (1, 1), "the unnamed one is known by its content, the named one is new"
    assert mixed.token_ids == plain.token_ids
    with work(engine) as done:
        null = answer(engine, TextPrompt(
            prompt=prompt, multi_modal_data={"image": pair}, multi_modal_uuids={"image": [None, None]}))  # fmt: skip
    assert (done.encoded, done.prepared) == (0, 0)
    assert null.usage.cached_tokens > 0


@pytest.mark.parametrize(
    "prompt",
    [
        TextPrompt(prompt=turn(IMAGE), multi_modal_data={"image": [None]}),
        TextPrompt(prompt=turn(IMAGE), multi_modal_uuids={"image": [None]}),
        TextPrompt(prompt=turn(IMAGE), multi_modal_data={"image": [None]}, multi_modal_uuids={"image": [None]}),
    ],
)
def test_d8_neither_content_nor_uuid(engine: Engine, prompt: TextPrompt) -> None:
    with pytest.raises(InvalidPromptError, match="neither content nor uuid"):
        answer(engine, prompt)
    with pytest.raises(RequestError, match="placeholder"):
        engine.generate(TextPrompt(prompt=turn(IMAGE), multi_modal_data={"image": None}), GREEDY)


def test_d9_one_name_for_a_picture_a_film_and_other_settings(engine: Engine, truth: Engine) -> None:
    clip = {"video": {"frames": frames(2, 4), "fps": 2.0}}
    film = TextPrompt(prompt=turn(f"{VIDEO}Describe"), multi_modal_data=clip, multi_modal_uuids={"video": ["d9"]})
    small = {"max_pixels": 56 * 56}
    first = answer(engine, ask(picture(31), uuid="d9"))
    with work(engine) as done:
        moving = answer(engine, film)
        little = answer(engine, ask(picture(31), uuid="d9", mm_processor_kwargs=small))
    assert (done.encoded, done.prepared) == (2, 2)
    assert little.usage.media_tokens < first.usage.media_tokens
    assert little.token_ids == answer(truth, ask(picture(31), mm_processor_kwargs=small)).token_ids
    assert moving.token_ids == answer(truth, TextPrompt(prompt=film.prompt, multi_modal_data=clip)).token_ids
    assert answer(engine, ask(uuid="d9")).token_ids == first.token_ids
    again = TextPrompt(prompt=film.prompt, multi_modal_uuids={"video": ["d9"]})
    assert answer(engine, again).token_ids == moving.token_ids


def test_d10_first_uses_of_a_name_at_once(engine: Engine, truth: Engine) -> None:
    pictures = [picture(40 + i) for i in range(6)]
    wanted = [answer(truth, ask(p)).token_ids for p in pictures]
    assert len(set(wanted)) > 3
    with ThreadPoolExecutor(6) as pool:
        given = list(pool.map(lambda p: answer(engine, ask(p, uuid="d10")).token_ids, pictures))
    assert given == wanted
    assert answer(engine, ask(uuid="d10")).token_ids in wanted


def test_bytes_that_fail_leave_the_name_as_it_was(engine: Engine) -> None:
    first = answer(engine, ask(picture(32), uuid="kept"))
    with pytest.raises(MediaDecodeError):
        answer(engine, ask(encoded_bytes(33, "PNG")[:-200], uuid="kept"))
    assert answer(engine, ask(uuid="kept")).token_ids == first.token_ids


# -- salts -----------------------------------------------------------------------------------------


def test_a_salt_separates_every_cache(engine: Engine) -> None:
    text = TextPrompt(prompt="The quick brown fox jumps over the lazy dog while the cat sleeps in the warm sun.")
    outputs = []
    for salt in (None, "carol", "dave", "Dave"):
        with work(engine) as cold:
            first = answer(engine, ask(picture(34), cache_salt=salt))
        same = SYSTEM if engine.way == "chat" else BEGIN  # type: ignore[attr-defined]
        shared = same if salt is None else 0
        assert (cold.encoded, cold.prepared) == (1, 1), salt
        assert cold.cached_tokens <= shared, salt
        with work(engine) as cold:
            plain = answer(engine, TextPrompt(prompt=text.prompt, cache_salt=salt))
        assert cold.cached_tokens <= same, salt
        with work(engine) as warm:
            answer(engine, ask(picture(34), cache_salt=salt))
            answer(engine, TextPrompt(prompt=text.prompt, cache_salt=salt))
        assert (warm.encoded, warm.prepared) == (0, 0)
        assert warm.cached_tokens >= 32
        outputs.append((first.token_ids, plain.token_ids))
    assert len(set(outputs)) == 1, "a salt changes speed, never tokens"


@pytest.mark.parametrize("salt", ["", "x" * 129, "a\0", "ä", "a b", "a:b", "\ud800", 7, b"x", ["x"]], ids=ascii)
def test_odd_salts_are_refused(engine: Engine, salt: Any) -> None:
    with pytest.raises(InvalidPromptError, match="cache_salt") as caught:
        answer(engine, TextPrompt(prompt="The cat", cache_salt=salt))
    assert (caught.value.code, caught.value.param) == ("invalid_prompt", "cache_salt")
    check_message(caught.value)
    settle(engine)


def known(contents: list[BlockContent]) -> list[tuple[Any, ...]]:
    return [(c.key, c.token_ids, c.parent, c.media, c.touches, c.salt) for c in contents]


def test_keys_computed_with_the_prompt_are_the_schedulers_own(engine: Engine) -> None:
    """A picture, its M-RoPE positions and a salt: all that enters a block's key."""
    pipeline, size = engine._frontend.pipeline, KvCacheConfig().block_size
    prompt = ask(picture(29), "Describe this image. " * 20, cache_salt="s")
    request = pipeline.submit("r", prompt, GREEDY).result(10)
    count = len(request.token_ids) // size
    assert len(request.block_keys) == count > 3
    early, late = Sequence(0, request), Sequence(1, replace(request, block_keys=()))
    hasher = get_hasher("xxh3_128")
    for upto in (2, count):
        assert known(early.fill_contents(upto, size, hasher)) == known(late.fill_contents(upto, size, hasher))
    assert tuple(c.key for c in late.contents) == request.block_keys
    other = Sequence(2, replace(request, block_size=2 * size))
    assert known(other.fill_contents(count, size, hasher)) == known(late.contents), "keys for other blocks are not used"
