"""The runner's host side: flattened batches, packed uploads, the encoder's slab."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mm_core.config import SamplingParams
from mm_core.errors import PluginError
from mm_core.runner.batch import TABLE_STEP, BatchBuilder, MediaPlaces
from mm_core.runner.encoders import EncoderRows
from mm_core.runner.graphs import ladder, resolve_ids
from mm_core.runner.spans import DeviceSpans
from mm_core.runner.upload import ALIGN, upload
from mm_core.scheduler.sequence import EncodeItem, ScheduledBatch, ScheduledSequence
from mm_core.scheduler.sequence import Sequence as SequenceState
from mm_core.tracing import SpanRecorder
from mm_core.types import MediaFeature, PlaceholderRange, PreparedRequest, Source

CPU = torch.device("cpu")
BLOCK = 4


def scheduled(slot: int, start: int, length: int, ids: list[int], table: list[int], **extra: Any) -> ScheduledSequence:
    """Tokens [start, start + length) of a sequence whose known ids are `ids`."""
    prompt = extra.pop("prompt_len", len(ids))
    request = PreparedRequest("r", tuple(ids[:prompt]), SamplingParams(max_tokens=99), **extra)
    seq = SequenceState(slot, request)
    seq.token_ids = list(ids)
    seq.slot = slot
    return ScheduledSequence(seq, start, length, start + length >= len(ids), {"self": table})


def builder(axes: int = 1) -> BatchBuilder:
    return BatchBuilder(max_num_seqs=4, max_model_len=64, block_size=BLOCK, axes=axes)


def test_a_mixed_batch_is_flattened() -> None:
    decode = scheduled(2, 5, 1, [1, 2, 3, 4, 5, 6], [7, 3])
    chunk = scheduled(0, 2, 3, [11, 12, 13, 14, 15], [9, 1])
    host = builder().build(ScheduledBatch(1, (decode, chunk)), MediaPlaces())
    assert host.token_ids.tolist() == [6, 13, 14, 15]
    assert host.positions.tolist() == [[5, 2, 3, 4]]
    assert host.bounds.tolist() == [0, 1, 4]
    assert host.kv_lens.tolist() == [6, 5]
    assert host.slots.tolist() == [3 * BLOCK + 1, 9 * BLOCK + 2, 9 * BLOCK + 3, 1 * BLOCK]
    assert host.tables[:, :2].tolist() == [[7, 3], [9, 1]]
    assert host.tables.shape[1] % TABLE_STEP == 0
    assert host.sample_rows is not None
    assert host.sample_rows.tolist() == [0, 3]
    assert (host.num_decodes, host.max_q_len, host.max_kv_len) == (1, 3, 6)
    assert not host.only_decodes


def test_an_id_that_only_the_device_knows_is_named_by_its_slot() -> None:
    pending = scheduled(3, 6, 1, [1, 2, 3, 4, 5, 6], [0, 1])
    tail = scheduled(1, 4, 3, [1, 2, 3, 4, 5, 6], [2, 3])  # resumed: two known ids and the newest one
    host = builder().build(ScheduledBatch(1, (pending, tail)), MediaPlaces())
    assert host.token_ids.tolist() == [-4, 5, 6, -2]
    last_ids = torch.tensor([90, 91, 92, 93])
    assert resolve_ids(torch.from_numpy(host.token_ids), last_ids).tolist() == [93, 5, 6, 91]


def test_a_batch_of_decodes_is_recognised_and_a_partial_chunk_of_one_token_is_not() -> None:
    full = scheduled(0, 2, 1, [1, 2, 3], [0])
    part = scheduled(1, 1, 1, [1, 2, 3], [1])
    assert builder().build(ScheduledBatch(1, (full,)), MediaPlaces()).only_decodes
    assert not builder().build(ScheduledBatch(1, (full, part)), MediaPlaces()).only_decodes


def test_tables_grow_and_a_slot_forgets_its_last_sequence() -> None:
    made = builder()
    first = scheduled(0, 0, 8, list(range(8)), [5, 6])
    assert made.build(ScheduledBatch(1, (first,)), MediaPlaces()).tables[0, :2].tolist() == [5, 6]
    first.tables["self"].append(8)  # append-only while it runs
    grown = ScheduledSequence(first.seq, 8, 1, True, first.tables)
    assert made.build(ScheduledBatch(2, (grown,)), MediaPlaces()).tables[0, :3].tolist() == [5, 6, 8]
    other = scheduled(0, 0, 4, list(range(4)), [2])
    other.seq.seq_id = 99
    assert made.build(ScheduledBatch(3, (other,)), MediaPlaces()).tables[0, 0] == 2
    resumed = ScheduledSequence(other.seq, 0, 4, True, {"self": [3]}, epoch=1)
    assert made.build(ScheduledBatch(4, (resumed,)), MediaPlaces()).tables[0, 0] == 3


def test_tables_of_sources_grow_beside_the_others_and_are_forgotten_with_them() -> None:
    made = BatchBuilder(max_num_seqs=4, max_model_len=64, block_size=BLOCK, axes=1, cross=True)
    short, long = (Source(name, rows) for name, rows in ((b"s", 5), (b"l", 4 * TABLE_STEP + 3)))
    one = scheduled(0, 0, 2, [1, 2], [5], source=short)
    one.tables["cross"] = [8, 9]  # type: ignore[index]
    plain = scheduled(2, 0, 1, [1], [6])
    host = made.build(ScheduledBatch(1, (plain, one)), MediaPlaces()).cross
    assert host is not None
    assert (host.kv_lens.tolist(), host.max_kv_len) == ([0, 5], 5)
    assert host.tables[1, :2].tolist() == [8, 9]
    assert host.tables.shape == (2, TABLE_STEP)
    two = scheduled(1, 0, 2, [1, 2], [7], source=long)
    two.tables["cross"] = list(range(20, 20 + TABLE_STEP + 1))  # type: ignore[index]
    wide = made.build(ScheduledBatch(2, (one, two)), MediaPlaces()).cross
    assert wide is not None
    assert wide.tables.shape == (2, 2 * TABLE_STEP)
    assert wide.tables[0, :2].tolist() == [8, 9], "what was there before the others grew"
    assert wide.tables[1, : TABLE_STEP + 1].tolist() == two.tables["cross"]
    other = scheduled(1, 0, 2, [1, 2], [3], source=short)
    other.seq.seq_id = 99
    other.tables["cross"] = [30, 31]  # type: ignore[index]
    last = made.build(ScheduledBatch(3, (other,)), MediaPlaces()).cross
    assert last is not None
    assert last.tables[0, :2].tolist() == [30, 31]
    assert builder().build(ScheduledBatch(1, (plain,)), MediaPlaces()).cross is None


def test_positions_follow_the_request_inside_the_prompt_and_its_delta_after_it() -> None:
    own = np.array([[0, 1, 1, 2], [0, 1, 2, 2]], np.int32)
    s = scheduled(0, 2, 4, [1, 2, 3, 4, 5, 6], [0, 1], prompt_len=4, positions=own, decode_delta=-1)
    host = builder(axes=2).build(ScheduledBatch(1, (s,)), MediaPlaces())
    assert host.positions.tolist() == [[1, 2, 3, 4], [2, 2, 3, 4]]


def test_media_rows_of_a_chunk_are_found_and_missing_media_fail_their_sequence() -> None:
    feature = MediaFeature("image", 3, {}, key=b"a")
    ranges = (PlaceholderRange(1, 4, (True, False, True, True), feature),)
    s = scheduled(0, 2, 3, [1, 9, 8, 9, 9, 2], [0, 1], ranges=ranges)
    places = MediaPlaces()
    places.by_key[b"a"] = np.array([30, 10, 20], np.int32)
    host = builder().build(ScheduledBatch(1, (s,)), places)
    assert host.media_rows.tolist() == [1, 2]  # tokens 3 and 4; token 2 is a separator
    assert host.media_from.tolist() == [10, 20]
    places.by_key.clear()
    places.errors[b"a"] = PluginError("broken")
    failed = builder().build(ScheduledBatch(1, (s,)), places)
    assert failed.failed == {0: places.errors[b"a"]}
    assert not len(failed.media_rows)


def test_uploads_arrive_whole_and_aligned() -> None:
    arrays = [np.arange(5, dtype=np.int32), np.empty(0, np.int32), np.arange(6, dtype=np.int32).reshape(2, 3)]
    sent = upload(arrays, CPU)
    for array, tensor in zip(arrays, sent, strict=True):
        assert tensor.shape == array.shape
        assert tensor.numpy().tolist() == array.tolist()
        assert tensor.storage_offset() % ALIGN == 0


@pytest.mark.parametrize("most", [1, 3, 8, 100, 256])
def test_the_ladder_of_graph_sizes_ends_at_the_most_there_can_be(most: int) -> None:
    sizes = ladder(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    assert sizes[0] == 1


class _Encoder:
    hidden_size = 2

    def __init__(self) -> None:
        self.calls = 0

    def cost(self, feature: MediaFeature) -> int:
        return feature.num_tokens

    def __call__(self, features: list[MediaFeature]) -> list[torch.Tensor]:
        if any(f.key == b"bad" for f in features):
            raise ValueError("cannot read this one")
        return [f.tensors["x"].repeat(1, 2) for f in features]


def item(key: bytes, rows: int) -> EncodeItem:
    values = torch.arange(rows, dtype=torch.float32)[:, None] + 100 * key[0]
    return EncodeItem(key, MediaFeature("image", rows, {"x": values}, key=key))


def rows_of(store: EncoderRows, key: bytes) -> list[float]:
    return store.slab[torch.from_numpy(store.places.by_key[key].astype(np.int64)), 0].tolist()


def test_the_slab_holds_rows_in_any_place_and_takes_back_what_is_dropped() -> None:
    store = EncoderRows(_Encoder(), "fake", 10, CPU, DeviceSpans(None, CPU))  # type: ignore[arg-type]
    assert store.encode([item(b"a", 4), item(b"b", 3), item(b"c", 3)]) == {}
    store.drop([b"b"])
    assert b"b" not in store
    store.drop([b"a"])
    assert store.encode([item(b"d", 6)]) == {}  # more than either hole
    assert rows_of(store, b"c") == [9900.0 + i for i in range(3)]
    assert rows_of(store, b"d") == [10000.0 + i for i in range(6)]
    taken = np.concatenate(list(store.places.by_key.values()))
    assert len(set(taken.tolist())) == 9


def test_a_bad_item_fails_alone_and_leaves_no_rows() -> None:
    store = EncoderRows(_Encoder(), "fake", 10, CPU, DeviceSpans(None, CPU))  # type: ignore[arg-type]
    failed = store.encode([item(b"a", 2), item(b"bad", 2), item(b"c", 2)])
    assert set(failed) == {b"bad"}
    assert isinstance(failed[b"bad"], PluginError)
    assert b"bad" not in store
    assert store.places.errors == failed
    assert rows_of(store, b"c") == [9900.0, 9901.0]


def test_device_spans_reach_the_recorder_on_the_hosts_clock() -> None:
    recorder = SpanRecorder()
    spans = DeviceSpans(recorder, CPU)
    with spans.span("decoder", "decode", tokens=3):
        pass
    spans.resolve()
    (span,) = recorder.take()
    assert (span.track, span.name, span.args) == ("decoder", "decode", {"tokens": 3})
    assert span.end_ns >= span.start_ns
    with DeviceSpans(None, CPU).span("decoder", "decode"):
        pass
