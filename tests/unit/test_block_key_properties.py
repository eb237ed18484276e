"""Keys of KV blocks: everything that the keys and values of a block depend on changes its key, and every one after."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_core.config import SamplingParams
from mm_core.hashing import ROOT, Hasher, block_key, encode_fields, get_hasher, prompt_block_keys, source_key
from mm_core.inputs.sources import SourceMaker
from mm_core.scheduler.sequence import Sequence
from mm_core.types import MediaFeature, PlaceholderRange, PreparedRequest

SIZE = 4
PAD = 500
HASHERS = [get_hasher("xxh3_128"), get_hasher("sha256")]


class Block(NamedTuple):
    """All fields of a block's record."""

    parent: bytes = ROOT
    token_ids: tuple[int, ...] = (1, 2, 3, 4)
    media: tuple[tuple[bytes, int], ...] = ()
    context: bytes = b""
    positions: bytes = b""

    def key(self, hasher: Hasher) -> bytes:
        return block_key(hasher, *self)


FEW = st.sampled_from([b"", b"a", b"b", b"ab"])
BLOCKS = st.builds(
    Block,
    parent=st.sampled_from([ROOT, b"a", b"b"]),
    token_ids=st.lists(st.integers(0, 2), min_size=0, max_size=3).map(tuple),
    media=st.lists(st.tuples(FEW, st.integers(0, 1)), max_size=2).map(tuple),
    context=FEW,
    positions=FEW,
)


@pytest.mark.parametrize("hasher", HASHERS, ids=["xxh3_128", "sha256"])
@settings(max_examples=150, deadline=None)
@given(blocks=st.lists(BLOCKS, min_size=2, max_size=30))
def test_blocks_share_a_key_exactly_where_their_records_are_equal(hasher: Hasher, blocks: list[Block]) -> None:
    keys = [block.key(hasher) for block in blocks]
    assert len(set(keys)) == len(set(blocks)) == len(set(zip(keys, blocks, strict=True)))


@pytest.mark.parametrize("field", Block._fields)
def test_each_field_counts(field: str) -> None:
    other: dict[str, Any] = {
        "parent": b"other", "token_ids": (1, 2, 3, 5), "media": ((b"m", 0),), "context": b"c", "positions": b"p",
    }  # fmt: skip
    for hasher in HASHERS:
        assert Block().key(hasher) != Block()._replace(**{field: other[field]}).key(hasher)


def test_of_an_item_its_key_its_place_and_their_number_count() -> None:
    media = [(), ((b"m", 0),), ((b"n", 0),), ((b"m", 1),), ((b"m", 0), (b"m", 0)), ((b"m", 0), (b"n", 1)),
             ((b"n", 1), (b"m", 0))]  # fmt: skip
    assert len({Block(media=m).key(HASHERS[0]) for m in media}) == len(media)


# -- what the scheduler makes of requests --------------------------------------------------------------


class Asked(NamedTuple):
    """A prompt with one item in it. Its placeholders, which no text can have, say where in a block it begins."""

    text_ids: tuple[int, ...] = tuple(range(10, 10 + 5 * SIZE))
    salt: str | None = None
    kv_context: bytes = b""
    item: bytes = b"item"
    offset: int = 6
    length: int = 7
    axes: int = 0
    shift: int = 0

    @property
    def token_ids(self) -> tuple[int, ...]:
        ids = list(self.text_ids)
        ids[self.offset : self.offset + self.length] = [PAD] * self.length
        return tuple(ids)


def prepared(asked: Asked, keys_ahead: bool) -> PreparedRequest:
    feature = MediaFeature("image", asked.length, {}, key=asked.item)
    ranges = (PlaceholderRange(asked.offset, asked.length, (True,) * asked.length, feature),)
    count = len(asked.token_ids)
    positions = None
    if asked.axes:
        positions = np.tile(np.arange(count, dtype=np.int32), (asked.axes, 1))
        positions[-1, asked.offset :] += asked.shift
    keys = prompt_block_keys(
        HASHERS[0], SIZE, asked.token_ids, [(asked.item, asked.offset, asked.offset + asked.length)],
        encode_fields((asked.salt, asked.kv_context)), positions,
    )  # fmt: skip
    return PreparedRequest(
        "r", asked.token_ids, SamplingParams(), ranges, positions, cache_salt=asked.salt, kv_context=asked.kv_context,
        block_size=SIZE if keys_ahead else 0, block_keys=keys if keys_ahead else (),
    )  # fmt: skip


def keys_of(asked: Asked, keys_ahead: bool = False, **changes: Any) -> list[bytes]:
    sequence = Sequence(0, replace(prepared(asked, keys_ahead), **changes))
    sequence.token_ids += [7] * (2 * SIZE)  # an answer
    contents = sequence.fill_contents(7, SIZE, HASHERS[0])
    assert [c.parent for c in contents] == [ROOT, *(c.key for c in contents[:-1])]
    assert all(c.salt == asked.salt for c in contents)
    return [c.key for c in contents]


# The first block that may differ, for each change.
FIRST = {
    "salt": ("x", 0), "kv_context": (b"x", 0), "item": (b"other", 1), "offset": (5, 1), "shift": (-2, 1),
    "text_ids": ((*range(10, 10 + 4 * SIZE), 0, 1, 2, 3), 4),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRST)
@pytest.mark.parametrize("axes", [0, 3])
def test_what_changes_a_request_changes_its_blocks_from_there_on(name: str, axes: int) -> None:
    if name == "shift" and not axes:
        return
    plain = Asked(axes=axes)
    value, first = FIRST[name]
    before, after = keys_of(plain), keys_of(plain._replace(**{name: value}))
    same = [one == two for one, two in zip(before, after, strict=True)]
    assert same == [True] * first + [False] * (len(before) - first)
    assert len({*before, *after}) == len(before) + len(after) - first


def test_where_an_answer_stands_counts() -> None:
    """An answer's positions continue behind its prompt's, wherever those ended."""
    plain = Asked(axes=3)
    here, there = keys_of(plain), keys_of(plain, decode_delta=-3)
    assert [one == two for one, two in zip(here, there, strict=True)] == [True] * 5 + [False] * 2


ASKED = st.builds(
    Asked,
    text_ids=st.sampled_from([tuple(range(20)), (*range(19), 99), (99, *range(1, 20))]),
    salt=st.sampled_from([None, "a", "b"]),
    kv_context=st.sampled_from([b"", b"a"]),
    item=st.sampled_from([b"item", b"other"]),
    offset=st.integers(0, 3),
    length=st.sampled_from([5, 9]),
    axes=st.sampled_from([0, 3]),
    shift=st.sampled_from([0, -2]),
)


def truth(asked: Asked, end: int) -> tuple[Any, ...]:
    """What tokens [0, end) of a request are to the model."""
    item = None
    if asked.offset < end:
        item = (asked.item, asked.offset)
    shifted = asked.shift if asked.axes and asked.offset < end else 0
    return asked.token_ids[:end], asked.salt, asked.kv_context, item, shifted


@settings(max_examples=150, deadline=None)
@given(asked=st.lists(ASKED, min_size=2, max_size=10), ahead=st.booleans())
def test_requests_share_blocks_exactly_as_far_as_they_are_the_same(asked: list[Asked], ahead: bool) -> None:
    """An item's key says how long it is, as in life: its length goes with it here."""
    given_items = [a._replace(item=a.item + bytes([a.length])) for a in asked]
    for block in range(5):
        keys = [keys_of(a, ahead)[block] for a in given_items]
        truths = [truth(a, (block + 1) * SIZE) for a in given_items]
        assert len(set(keys)) == len(set(truths)) == len(set(zip(keys, truths, strict=True)))


# -- sources of cross-attention ------------------------------------------------------------------------


class Fusion:
    kind = "encoder_decoder"
    decoder_prompt = (0,)


def source_at(
    kind: str = "encoder_decoder", namespace: bytes = b"n", ids: tuple[int, ...] = (5, 6, 7), key: bytes = b"k",
    instruction: tuple[int, ...] = (), count: int = 1,
) -> bytes:  # fmt: skip
    fusion = Fusion()
    fusion.kind = kind
    maker = SourceMaker(fusion, "f", ("audio",), 100, HASHERS[0])  # type: ignore[arg-type]
    length = 0 if kind == "cross_attention" else 1
    feature = MediaFeature("audio", 1, {}, key=key)
    ranges = tuple(PlaceholderRange(i, length, (True,) * length, feature) for i in range(count))
    source = maker.split(namespace, ids, ranges, instruction).source
    assert source is not None
    return source.key


def test_everything_a_source_reads_counts() -> None:
    keys = [
        source_at(), source_at(namespace=b"m"), source_at(ids=(5, 6, 8)), source_at(key=b"l"),
        source_at(instruction=(1,)), source_at(count=2), source_at("cross_attention"),
        source_at("cross_attention", key=b"l"), source_at("cross_attention", namespace=b"m"),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert source_at("cross_attention") == source_at("cross_attention", ids=(1, 2)), "it does not read the prompt"


def test_blocks_of_sources_are_no_blocks_of_prompts() -> None:
    keys = {source_key(HASHERS[0], key, index) for key in (b"a", b"b") for index in range(3)}
    assert len(keys) == 6
    assert keys.isdisjoint({block_key(HASHERS[0], key, (), (), b"") for key in (b"a", b"b")})
