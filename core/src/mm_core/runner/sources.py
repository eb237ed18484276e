"""What decoders read by cross-attention: keys and values of sources, computed once each into blocks of the KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mm_core.errors import MMError, PluginError
from mm_core.layers.context import AttentionMetadata, ForwardContext
from mm_core.runner.batch import FusedItem, Ints, table_width
from mm_core.runner.encoders import EncoderRows
from mm_core.runner.fusing import Conditioner, Modules, explain
from mm_core.runner.memory import KVCache, is_lost, is_out_of_memory
from mm_core.runner.spans import DeviceSpans
from mm_core.runner.upload import upload
from mm_core.scheduler.sequence import Sequence as SequenceState


@dataclass(frozen=True)
class HostSources:
    """S sources of N rows together, all int32. token_ids: [N] of the text encoder, or empty. media_rows,
    media_from: [M], which rows are media's, and where these lie: in the slab, or with `items` in what
    `Fusion.condition` makes of them. bounds: [S + 1]. slots: [N], places in the KV cache, -1: nowhere.
    tables: [S, W] block numbers."""

    token_ids: Ints
    media_rows: Ints
    media_from: Ints
    bounds: Ints
    slots: Ints
    tables: Ints
    items: Sequence[FusedItem] = ()

    @property
    def longest(self) -> int:
        """Rows of the longest source."""
        return int(np.diff(self.bounds).max())


class SourceWriter:
    """Computes sources on the decoder's stream, several in one call."""

    def __init__(
        self, modules: Modules, rows: EncoderRows, conditioner: Conditioner | None, kv: KVCache, spans: DeviceSpans
    ) -> None:
        self.calls = 0
        self._modules = modules
        self._rows = rows
        self._conditioner = conditioner
        self._kv = kv
        self._spans = spans

    def write(self, sequences: Sequence[SequenceState]) -> dict[bytes, MMError]:
        """Write the sources of these sequences into their "cross" tables; the sources that failed, by their keys.

        Where a call fails, its sources are computed one by one, so that a bad one fails alone.
        """
        failed: dict[bytes, MMError] = {}
        good: list[SequenceState] = []
        for seq in sequences:
            errors = self._rows.places.errors
            found = [errors[r.feature.key] for r in _source(seq).ranges if r.feature.key in errors]
            if found:
                failed[_source(seq).key] = found[0]
            else:
                good.append(seq)
        return failed | (self._together(good) if good else {})

    def _together(self, sequences: Sequence[SequenceState]) -> dict[bytes, MMError]:
        try:
            host = self._build(sequences)
            with self._spans.span("decoder", "source", sources=len(sequences), projected=len(host.slots)):
                self.run(host)
            return {}
        except Exception as error:
            if is_out_of_memory(error) or is_lost(error):  # no source's fault
                raise
            if len(sequences) == 1:
                what = f"The cross-attention source of family {self._modules.family!r}"
                return {_source(sequences[0]).key: explain(error, what)}
        failed: dict[bytes, MMError] = {}
        for seq in sequences:
            failed |= self._together([seq])
        return failed

    def _build(self, sequences: Sequence[SequenceState]) -> HostSources:
        parts: list[Ints] = []
        into: list[np.ndarray[Any, Any]] = []
        items: list[FusedItem] = []
        conditions, begin = self._conditioner is not None, 0
        for seq in sequences:
            source, placed = _source(seq), begin
            for r in source.ranges:
                parts.append(self._rows.places.by_key[r.feature.key])
                items.append(FusedItem(seq.seq_id, parts[-1], seq.request.instruction, r.feature.num_placed))
                count = r.feature.num_placed
                into.append(r.row_tokens + r.offset + begin if source.token_ids else np.arange(placed, placed + count))
                placed += count
            if placed - begin != source.num_tokens and not source.token_ids:
                raise PluginError(f"A source of {source.num_tokens} rows has media of {placed - begin}.")
            begin += source.num_tokens
        media_rows = np.concatenate([*into, _NONE]).astype(np.int32)
        return HostSources(
            np.asarray([i for seq in sequences for i in _source(seq).token_ids], np.int32),
            media_rows,
            np.arange(len(media_rows), dtype=np.int32) if conditions else np.concatenate([*parts, _NONE]),
            np.cumsum([0, *(_source(seq).num_tokens for seq in sequences)]).astype(np.int32),
            np.concatenate([self._slots(seq) for seq in sequences]),
            self._tables(sequences),
            items if conditions else (),
        )

    def _slots(self, seq: SequenceState) -> Ints:
        tokens = np.arange(_source(seq).num_tokens)
        table, size = np.asarray(seq.tables["cross"], np.int32), self._kv.block_size
        slots: Ints = (table[tokens // size] * size + tokens % size).astype(np.int32)
        return slots

    def _tables(self, sequences: Sequence[SequenceState]) -> Ints:
        longest = max(_source(seq).num_tokens for seq in sequences)
        tables = np.zeros((len(sequences), table_width(longest, self._kv.block_size)), np.int32)
        for row, seq in zip(tables, sequences, strict=True):
            row[: len(seq.tables["cross"])] = seq.tables["cross"]
        return tables

    def run(self, host: HostSources) -> None:
        """Rows, where needed through the text encoder, to keys and values."""
        arrays = [host.token_ids, host.media_rows, host.media_from, host.bounds, host.slots, host.tables]
        ids, media_rows, media_from, bounds, slots, tables = upload(arrays, self._rows.slab.device)
        rows = self._source_rows(host, ids, media_rows, media_from, bounds)
        metadata = AttentionMetadata(
            tables,
            bounds,
            bounds.diff(),
            slot_mapping=slots.long(),
            max_q_len=host.longest,
            max_kv_len=host.longest,
            causal=False,
        )
        decoder: Any = self._modules.decoder
        decoder.write_source(rows, ForwardContext({"cross": metadata}, self._kv.caches))
        self.calls += 1

    def _source_rows(
        self, host: HostSources, ids: Tensor, media_rows: Tensor, media_from: Tensor, bounds: Tensor
    ) -> Tensor:
        """[N, hidden] that the decoder projects. Raises what a conditioned item failed with."""
        found = self._rows.slab
        if host.items and self._conditioner is not None:
            found, failed = self._conditioner.run(host.items)
            for error in failed.values():
                raise error
        found = found.index_select(0, media_from)
        if not self._modules.reads_text:
            return found
        decoder: Any = self._modules.decoder
        embeds = decoder.embed(ids.long())
        if len(host.media_rows):
            embeds.index_copy_(0, media_rows.long(), found.to(embeds.dtype))
        rows: Tensor = decoder.encode_source(embeds, bounds, host.longest)
        if rows.shape != embeds.shape:
            raise PluginError(
                f"encode_source of family {self._modules.family!r} made {tuple(rows.shape)} of "
                f"{tuple(embeds.shape)}: one row a token, as wide as the embeddings, is wanted."
            )
        return rows


def made_up_sources(rows: int, longest: int, reads_text: bool) -> HostSources:
    """As many rows as there may be, in sources as long as can be, that are written nowhere."""
    bounds = np.minimum(np.arange(0, rows + longest, longest), rows).astype(np.int32)
    zeros = np.zeros(rows, np.int32)
    media = _NONE if reads_text else zeros
    ids = zeros if reads_text else _NONE
    tables = np.zeros((len(bounds) - 1, 1), np.int32)
    return HostSources(ids, media, media, bounds, zeros - 1, tables)


def _source(seq: SequenceState) -> Any:
    assert seq.request.source is not None, "only sequences with a source have one to write"
    return seq.request.source


_NONE: Ints = np.empty(0, np.int32)
