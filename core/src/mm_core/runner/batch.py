"""From a ScheduledBatch (plain Python) to the numbers of one forward pass, still on the host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mm_core.errors import MMError
from mm_core.kernels.shared_prefixes import SharedPlan, plan_shared_prefixes
from mm_core.scheduler.sequence import ScheduledBatch, ScheduledSequence

Ints = np.ndarray[Any, np.dtype[np.int32]]

# Widths of block tables are rounded up to this many blocks: kernels are compiled anew where an
# argument stops being divisible by 16.
TABLE_STEP = 16


@dataclass(frozen=True)
class CrossTables:
    """What a batch's sequences read by cross-attention. tables: [S, W] block numbers; kv_lens: [S], 0 where a
    sequence has no source."""

    tables: Ints
    kv_lens: Ints
    max_kv_len: int


@dataclass(frozen=True)
class FusedItem:
    """An item for `Fusion.condition`, and for whom. places: [num_tokens], its encoder rows in the slab."""

    seq_id: int
    places: Ints
    instruction: tuple[int, ...]
    num_placed: int


@dataclass(frozen=True)
class HostBatch:
    """One step's inputs: T tokens of S sequences, of which R are sampled. All int32.

    token_ids: [T]; -1 - slot where the token's id is the newest one sampled for that slot, which
    only the device knows. positions: [axes, T]. bounds: [S + 1], rows of each sequence. kv_lens: [S].
    slots: [T], places in the KV cache. tables: [S, W] block numbers. sample_rows: [R], the rows whose
    logits are wanted, or None where all rows are. media_rows, media_from: [M], batch rows that take
    encoder rows, and which: places in the slab, or with `items` in what `Fusion.condition` makes of these,
    one after another. cross: where the decoder has cross-attention. failed: sequences whose media are not
    there, by seq_id. new_owners: slots that another sequence had the last time.
    """

    token_ids: Ints
    positions: Ints
    bounds: Ints
    kv_lens: Ints
    slots: Ints
    tables: Ints
    sample_rows: Ints | None
    media_rows: Ints
    media_from: Ints
    num_decodes: int
    max_q_len: int
    max_kv_len: int
    shared: SharedPlan | None = None
    cross: CrossTables | None = None
    items: Sequence[FusedItem] = ()
    failed: Mapping[int, MMError] = field(default_factory=dict)
    new_owners: Sequence[int] = ()

    @property
    def only_decodes(self) -> bool:
        """Whether every sequence has one token, sampled and without media: what graphs are captured for."""
        return self.num_decodes == len(self.kv_lens) and self.sample_rows is None and not len(self.media_rows)


class MediaPlaces:
    """Where the encoder rows of each item lie. What the batch builder asks of the encoder's side."""

    def __init__(self) -> None:
        self.by_key: dict[bytes, Ints] = {}
        self.errors: dict[bytes, MMError] = {}


def table_width(tokens: int, block_size: int) -> int:
    """Blocks of so many tokens, rounded up to TABLE_STEP, one step at least."""
    return max(-(-tokens // (block_size * TABLE_STEP)), 1) * TABLE_STEP


class TableMirror:
    """Block tables by slot, [slots, width]; append-only while a slot keeps its owner."""

    def __init__(self, slots: int, width: int) -> None:
        self._tables = np.zeros((slots, width), np.int32)
        self._filled = [0] * slots

    def clear(self, slot: int) -> None:
        """The slot has another owner."""
        self._filled[slot] = 0

    def update(self, slot: int, table: Sequence[int]) -> None:
        """Add what is new of the slot's table, widening all where it is longer than any before."""
        filled, count = self._filled[slot], len(table)
        if count > filled:
            if count > self._tables.shape[1]:
                wider = table_width(count, 1) - self._tables.shape[1]
                self._tables = np.pad(self._tables, ((0, 0), (0, wider)))
            self._tables[slot, filled:count] = table[filled:]
            self._filled[slot] = count

    def take(self, slots: Ints, width: int) -> Ints:
        """The first `width` blocks of these slots, in order."""
        return self._tables[slots, :width]


class BatchBuilder:
    """Keeps a mirror of every running sequence's block tables, so that a step adds only what is new.

    cross: whether the decoder has cross-attention. conditioned: whether `Fusion.condition` comes between
    the encoder's rows and the batch. min_saved: tokens that reading shared prefixes once has to save.
    """

    def __init__(
        self,
        max_num_seqs: int,
        max_model_len: int,
        block_size: int,
        axes: int,
        *,
        cross: bool = False,
        conditioned: bool = False,
        min_saved: int = 1,
    ) -> None:
        self._width = table_width(max_model_len, block_size)
        self._block_size = block_size
        self._axes = axes
        self._tables = TableMirror(max_num_seqs, self._width)
        self._cross = TableMirror(max_num_seqs, TABLE_STEP) if cross else None
        self._conditioned = conditioned
        self._min_saved = min_saved
        self._owners: list[tuple[int, int]] = [(-1, -1)] * max_num_seqs
        self._delta = np.zeros(max_num_seqs, np.int32)
        self._members: list[tuple[int, int]] = []  # of the batch that `_plan` was made for
        self._plan: SharedPlan | None = None

    @property
    def width(self) -> int:
        """Blocks of the longest sequence there can be, rounded up."""
        return self._width

    def build(self, batch: ScheduledBatch, places: MediaPlaces) -> HostBatch:
        """Flatten a batch. Sequences keep their order; each contributes its `length` newest tokens."""
        scheduled = batch.sequences
        count = len(scheduled)
        rows = [s.seq.slot for s in scheduled]
        new = [s.seq.slot for s in scheduled if self._mirror(s)]
        starts = np.fromiter((s.start for s in scheduled), np.int32, count)
        lengths = np.fromiter((s.length for s in scheduled), np.int32, count)
        bounds = np.zeros(count + 1, np.int32)
        np.cumsum(lengths, out=bounds[1:])
        kv_lens = starts + lengths
        slots = np.asarray(rows, np.int32)
        decodes = batch.num_decodes
        tables = self._tables.take(slots, table_width(int(kv_lens.max()), self._block_size))
        # Absolute place of every row within its sequence, from which its cache slot follows.
        owner = np.repeat(np.arange(count), lengths)
        place = np.arange(int(bounds[-1]), dtype=np.int32) - bounds[:-1][owner] + starts[owner]
        cache_slots = tables[owner, place // self._block_size] * self._block_size + place % self._block_size
        sampled = np.fromiter((s.samples for s in scheduled), bool, count)
        media_rows, media_from, items, failed = self._media(scheduled, bounds, places)
        return HostBatch(
            token_ids=self._token_ids(scheduled, int(bounds[-1])),
            positions=self._positions(scheduled, place + self._delta[slots][owner], bounds),
            bounds=bounds,
            kv_lens=kv_lens,
            slots=cache_slots.astype(np.int32, copy=False),
            tables=tables,
            sample_rows=None if decodes == count and sampled.all() else (bounds[1:][sampled] - 1),
            media_rows=media_rows,
            media_from=media_from,
            num_decodes=decodes,
            max_q_len=int(lengths.max()),
            max_kv_len=int(kv_lens.max()),
            shared=self._shared(scheduled[:decodes], tables[:decodes], kv_lens[:decodes]),
            cross=self._cross_tables(scheduled, slots),
            items=items,
            failed=failed,
            new_owners=new,
        )

    def _mirror(self, s: ScheduledSequence) -> bool:
        """Bring the sequence's row up to date; whether the slot was another's before."""
        seq = s.seq
        slot = seq.slot
        owner = (seq.seq_id, s.epoch)
        is_new = self._owners[slot] != owner
        if is_new:
            self._owners[slot] = owner
            for mirror in (self._tables, self._cross):
                if mirror is not None:
                    mirror.clear(slot)
            self._delta[slot] = 0 if seq.request.positions is None else seq.request.decode_delta
        self._tables.update(slot, s.tables["self"])
        if self._cross is not None:
            self._cross.update(slot, s.tables.get("cross", ()))
        return is_new

    def _cross_tables(self, scheduled: Sequence[ScheduledSequence], slots: Ints) -> CrossTables | None:
        if self._cross is None:
            return None
        sources = (s.seq.request.source for s in scheduled)
        lens = np.fromiter((0 if source is None else source.num_tokens for source in sources), np.int32, len(scheduled))
        longest = int(lens.max())
        return CrossTables(self._cross.take(slots, table_width(longest, self._block_size)), lens, longest)

    def _token_ids(self, scheduled: Sequence[ScheduledSequence], total: int) -> Ints:
        ids: list[int] = []
        for s in scheduled:
            known = s.seq.token_ids
            if s.length == 1:
                ids.append(known[s.start] if s.start < len(known) else -1 - s.seq.slot)
            else:
                ids += known[s.start : s.start + s.length]
                if s.start + s.length > len(known):
                    ids.append(-1 - s.seq.slot)
        return np.fromiter(ids, np.int32, total)

    def _positions(self, scheduled: Sequence[ScheduledSequence], after: np.ndarray[Any, Any], bounds: Ints) -> Ints:
        """[axes, T]: the request's own positions in its prompt, index + decode_delta after it."""
        out = np.empty((self._axes, len(after)), np.int32)
        out[:] = after
        for i, s in enumerate(scheduled):
            own = s.seq.request.positions
            if own is None or s.start >= s.seq.prompt_len:
                continue
            inside = min(s.start + s.length, s.seq.prompt_len) - s.start
            out[:, bounds[i] : bounds[i] + inside] = own[:, s.start : s.start + inside]
        return out

    def _media(
        self, scheduled: Sequence[ScheduledSequence], bounds: Ints, places: MediaPlaces
    ) -> tuple[Ints, Ints, list[FusedItem], dict[int, MMError]]:
        """The encoder rows that fall into each sequence's tokens, and where they go."""
        into: list[np.ndarray[Any, Any]] = []
        source: list[Ints] = []
        items: list[FusedItem] = []
        placed = 0  # rows that `items` become
        failed: dict[int, MMError] = {}
        for s, row in zip(scheduled, bounds, strict=False):
            for r in () if s.start >= s.seq.prompt_len else s.seq.ranges:
                if r.offset >= s.start + s.length or r.end <= s.start:
                    continue
                if r.feature.key in places.errors:
                    failed[s.seq.seq_id] = places.errors[r.feature.key]
                    continue
                tokens = r.row_tokens
                first, last = np.searchsorted(tokens, [s.start - r.offset, s.start + s.length - r.offset])
                into.append(tokens[first:last] + (r.offset - s.start + int(row)))
                found = places.by_key[r.feature.key]
                if self._conditioned:
                    items.append(FusedItem(s.seq.seq_id, found, s.seq.request.instruction, r.feature.num_placed))
                    found = np.arange(placed, placed + r.feature.num_placed, dtype=np.int32)
                    placed += r.feature.num_placed
                source.append(found[first:last])
        if not into:
            return _NONE, _NONE, items, failed
        return np.concatenate(into).astype(np.int32), np.concatenate(source), items, failed

    def _shared(self, decodes: Sequence[ScheduledSequence], tables: Ints, kv_lens: Ints) -> SharedPlan | None:
        """Which decoding sequences begin with the same blocks: the same as long as they are the same ones."""
        if len(decodes) < 2:
            return None
        members = [self._owners[s.seq.slot] for s in decodes]
        if members != self._members:
            self._members = members
            self._plan = plan_shared_prefixes(tables, kv_lens, self._block_size, min_saved=self._min_saved)
        return self._plan


_NONE: Ints = np.empty(0, np.int32)
