"""Small steps with prompts in them as CUDA graphs: what comes between decode steps while requests arrive.

Launching a step's hundreds of kernels one by one takes a host longer than a small step takes the
device. So steps of some chunks of prompts, beside sequences that decode, are captured for a few
numbers of decoding sequences and of chunk tokens; a step takes the next larger of both. What fills it
up belongs to no sequence and is written nowhere.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm_core.layers.captured import capture
from mm_core.layers.context import AttentionMetadata
from mm_core.runner.batch import HostBatch, Ints
from mm_core.runner.graphs import GraphInputs, parameter_dtype, resolve_ids, upload_tables
from mm_core.runner.upload import packed_size, split

ALONE = (32, 64, 128, 192, 256, 320, 384, 512, 768, 1024)
"""Tokens of chunks without sequences that decode beside them."""
BESIDE = (32, 128, 320, 640, 1024)
"""Tokens of chunks beside sequences that decode."""
DECODES = (16, 64, 256)
"""Sequences that decode."""
CHUNKS = 64
"""Sequences that have chunks."""


@dataclass(frozen=True)
class _Size:
    """Sequences that decode, tokens of chunks, and sequences that these may belong to."""

    decodes: int
    tokens: int
    chunks: int

    @property
    def rows(self) -> int:
        return self.decodes + self.tokens

    @property
    def sequences(self) -> int:
        return self.decodes + self.chunks

    def shapes(self, axes: int) -> list[tuple[int, ...]]:
        """Of ids, positions, slots, encoder rows (-1: none); bounds, kv_lens, lengths of sources and sampled rows."""
        rows, count = self.rows, self.sequences
        return [(rows,), (axes, rows), (rows,), (rows,), (count + 1,), (count,), (count,), (count,)]


class ChunkGraphs:
    """Captures and replays steps of up to DECODES[-1] + CHUNKS sequences and BESIDE[-1] tokens of chunks.

    slab: the encoder's rows, where prompts take them; without, steps with media in prompts fit no graph.
    """

    def __init__(self, inputs: GraphInputs, slab: Tensor | None, max_num_batched_tokens: int) -> None:
        decoder, device, most = inputs.decoder, inputs.last_ids.device, len(inputs.last_ids)
        self._inputs = inputs
        self._decoder = decoder
        self._slab = slab
        self._max_kv_len = inputs.table_width * inputs.block_size
        self._decodes = [0, *sorted({min(count, most) for count in DECODES})]
        self._tokens = {
            count: [n for n in (BESIDE if count else ALONE) if n <= max(max_num_batched_tokens, ALONE[0])]
            for count in self._decodes
        }
        self._chunks = min(CHUNKS, most)
        self._graphs: dict[_Size, torch.cuda.CUDAGraph] = {}
        largest = _Size(self._decodes[-1], max(BESIDE[-1], ALONE[-1]), self._chunks)
        axes = decoder.position_axes
        self._header = torch.zeros(packed_size(largest.shapes(axes)), dtype=torch.int32, device=device)
        self._tables = inputs.tables(largest.sequences)
        dtype = parameter_dtype(decoder)
        self._hidden = torch.empty((largest.sequences, decoder.hidden_size), dtype=dtype, device=device)

    def capture(self, pool: Any) -> None:
        """Capture all sizes, the largest first, so that the smaller ones fit its memory."""
        sizes = [_Size(count, tokens, self._chunks) for count in self._decodes for tokens in self._tokens[count]]
        for size in sorted(sizes, key=lambda size: -size.rows):
            views = split(self._header, size.shapes(self._decoder.position_axes))
            for view in views:
                view.zero_()
            views[2].fill_(-1)
            views[3].fill_(-1)
            run = functools.partial(self._forward, views, size)
            run()
            self._graphs[size] = capture(run, pool)

    def _forward(self, views: Sequence[Tensor], size: _Size) -> None:
        raw, positions, slots, source, bounds, kv_lens, cross_lens, rows = views
        tables = {name: table[: size.sequences] for name, table in self._tables.items()}
        metadata = AttentionMetadata(
            block_tables=tables["self"],
            cu_seqlens_q=bounds,
            kv_lens=kv_lens,
            slot_mapping=slots.long(),
            max_q_len=size.tokens,
            max_kv_len=self._max_kv_len,
            num_decodes=size.decodes,
        )
        embeds = self._decoder.embed(resolve_ids(raw, self._inputs.last_ids))
        if self._slab is not None:
            found = self._slab.index_select(0, source.clamp(min=0)).to(embeds.dtype)
            embeds = torch.where((source >= 0)[:, None], found, embeds)
        context = self._inputs.context(metadata, tables.get("cross"), cross_lens, rows.long())
        self._hidden[: size.sequences].copy_(self._decoder(embeds, positions, context))

    def run(self, batch: HostBatch) -> Tensor | None:
        """Replay a batch: hidden states of the sampled rows, valid until the next one; None where none fits."""
        size = self._fit(batch)
        graph = None if size is None else self._graphs.get(size)
        if size is None or graph is None:
            return None
        header = self._fill(batch, size)
        self._header[: len(header)].copy_(header, non_blocking=True)
        count, decodes = len(batch.kv_lens), batch.num_decodes
        for name, table in upload_tables(batch, self._header.device).items():
            into, width = self._tables[name], table.shape[1]
            into[:decodes, :width].copy_(table[:decodes])
            into[size.decodes : size.decodes + count - decodes, :width].copy_(table[decodes:])
        graph.replay()
        sampled = count if batch.sample_rows is None else len(batch.sample_rows)
        return self._hidden[:sampled]

    def _fit(self, batch: HostBatch) -> _Size | None:
        decodes, count = batch.num_decodes, len(batch.kv_lens)
        if not self._inputs.fits(batch) or (self._slab is None and len(batch.media_rows)):
            return None
        at = bisect.bisect_left(self._decodes, decodes)
        if at == len(self._decodes) or count - decodes > self._chunks:
            return None
        tokens = self._tokens[self._decodes[at]]
        place = bisect.bisect_left(tokens, len(batch.token_ids) - decodes)
        return None if place == len(tokens) else _Size(self._decodes[at], tokens[place], self._chunks)

    def _fill(self, batch: HostBatch, size: _Size) -> Tensor:
        """The header of a batch: its decodes first, then spare rows, then its chunks, then spare rows."""
        shapes = size.shapes(self._decoder.position_axes)
        header = torch.empty(packed_size(shapes), dtype=torch.int32, pin_memory=self._header.is_cuda)
        views = (view.numpy() for view in split(header, shapes))
        ids, positions, slots, source, bounds, kv_lens, cross_lens, rows = views
        decodes, shift = batch.num_decodes, size.decodes - batch.num_decodes
        _spread(ids, batch.token_ids, decodes, shift, 0)
        _spread(slots, batch.slots, decodes, shift, -1)
        _spread(kv_lens, batch.kv_lens, decodes, shift, 0)
        if batch.cross is not None:
            _spread(cross_lens, batch.cross.kv_lens, decodes, shift, 0)
        for axis, values in zip(positions, batch.positions, strict=True):
            _spread(axis, values, decodes, shift, 0)
        source.fill(-1)
        source[_moved(batch.media_rows, decodes, shift)] = batch.media_from
        bounds[: size.decodes] = range(size.decodes)
        chunk_bounds = batch.bounds[decodes:] + shift
        bounds[size.decodes : size.decodes + len(chunk_bounds)] = chunk_bounds
        bounds[size.decodes + len(chunk_bounds) :] = chunk_bounds[-1]
        # Without sample_rows every sequence has one token, and all are sampled.
        sampled = batch.bounds[:-1] if batch.sample_rows is None else batch.sample_rows
        rows[: len(sampled)], rows[len(sampled) :] = _moved(sampled, decodes, shift), 0
        return header


def _spread(view: Ints, values: Ints, decodes: int, shift: int, rest: int) -> None:
    """The first `decodes` values stay, the others move by `shift`; what lies between and behind is `rest`."""
    end = len(values) + shift
    view[:decodes], view[decodes : decodes + shift] = values[:decodes], rest
    view[decodes + shift : end], view[end:] = values[decodes:], rest


def _moved(rows: Ints, decodes: int, shift: int) -> Ints:
    """Batch rows as rows of the captured step."""
    moved: Ints = rows + shift * (rows >= decodes)
    return moved
