"""Decode steps as CUDA graphs: one launch instead of hundreds.

A graph is captured for each batch size of a ladder; a batch takes the next larger one, its spare
rows read and write nothing (no keys, no slot). All graphs share one memory pool and the same input
buffers, since one runs at a time. Sampling stays outside.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mm_core.hookspecs import Decoder
from mm_core.kernels.shared_prefixes import SharedPrefixes
from mm_core.layers.captured import capture
from mm_core.layers.context import AttentionMetadata, ForwardContext, LayerCache
from mm_core.runner.batch import HostBatch, table_width
from mm_core.runner.upload import packed_size, split, upload

_SHARED = (8, 16, 32, 64, 128, 192)  # sizes that are captured for shared prefixes as well, beside the largest


def ladder(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture: close together where a step's time grows with them."""
    sizes = {1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, *range(160, 513, 32), max_num_seqs}
    return sorted(size for size in sizes if size <= max_num_seqs)


def resolve_ids(raw: Tensor, last_ids: Tensor) -> Tensor:
    """Token ids [T] int64 from HostBatch.token_ids: negative ones are slots of newly sampled ids."""
    sampled = last_ids.index_select(0, (-1 - raw).clamp_(min=0))
    return torch.where(raw < 0, sampled, raw.long())


def parameter_dtype(decoder: Decoder) -> torch.dtype:
    """The dtype a module computes in: that of its first parameter."""
    dtype: torch.dtype = next(p.dtype for p in decoder.parameters())  # type: ignore[attr-defined]
    return dtype


@dataclass(frozen=True)
class GraphInputs:
    """What graphs are captured over. caches: as a ForwardContext's. last_ids: [slots], the newest sampled ids.
    table_width: blocks of the longest sequence. source_len: keys of the longest source that fits a graph."""

    decoder: Decoder
    caches: Mapping[str, Sequence[LayerCache]]
    last_ids: Tensor
    table_width: int
    max_model_len: int
    source_len: int = 0

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return next(iter(self.caches.values()))[0].k.shape[1]

    def tables(self, sequences: int) -> dict[str, Tensor]:
        """Empty block tables by name."""
        widths = {"self": self.table_width, "cross": table_width(self.source_len, self.block_size)}
        make = functools.partial(torch.zeros, dtype=torch.int32, device=self.last_ids.device)
        return {name: make((sequences, widths[name])) for name in self.caches}

    def fits(self, batch: HostBatch) -> bool:
        """Whether the batch's sources are short enough."""
        return batch.cross is None or batch.cross.max_kv_len <= self.source_len

    def context(
        self, metadata: AttentionMetadata, cross_tables: Tensor | None, cross_lens: Tensor, rows: Tensor | None = None
    ) -> ForwardContext:
        """Of a captured pass: cross-attention's metadata follow from those of the "self" table."""
        tables = {"self": metadata}
        if cross_tables is not None:
            tables["cross"] = replace(
                metadata,
                block_tables=cross_tables,
                kv_lens=cross_lens,
                slot_mapping=None,
                max_kv_len=self.source_len,
                causal=False,
                shared=None,
            )
        return ForwardContext(tables, self.caches, rows)


def upload_tables(batch: HostBatch, device: torch.device) -> dict[str, Tensor]:
    """A batch's block tables by name."""
    arrays = {"self": batch.tables} | ({} if batch.cross is None else {"cross": batch.cross.tables})
    return dict(zip(arrays, upload(list(arrays.values()), device), strict=True))


class DecodeGraphs:
    """Captures and replays decode steps of one model."""

    def __init__(self, inputs: GraphInputs) -> None:
        decoder, device = inputs.decoder, inputs.last_ids.device
        size = len(inputs.last_ids)
        self._inputs = inputs
        self._decoder = decoder
        self._sizes = ladder(size)
        self._shared_sizes = sorted({n for n in _SHARED if n < size} | {size})
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._header = torch.zeros(packed_size(self._shapes(size)), dtype=torch.int32, device=device)
        self._tables = inputs.tables(size)
        self._bounds = torch.arange(size + 1, dtype=torch.int32, device=device)
        self._hidden = torch.empty((size, decoder.hidden_size), dtype=parameter_dtype(decoder), device=device)

    def _shapes(self, size: int) -> list[tuple[int, ...]]:
        """Of the inputs in the header: ids, positions, kv_lens, slots, lengths of sources; members, bounds and
        lens of groups."""
        axes = self._decoder.position_axes
        return [(size,), (axes, size), (size,), (size,), (size,), (size,), (size + 1,), (size,)]

    def capture(self, pool: Any) -> None:
        """Capture all sizes, the largest first, so that the smaller ones fit its memory."""
        for size in reversed(self._sizes):
            for shared in (False, True) if size in self._shared_sizes else (False,):
                views = split(self._header, self._shapes(size))
                self._clear(views)
                run = functools.partial(self._forward, views, size, shared)
                run()
                self._graphs[size, shared] = capture(run, pool)

    @staticmethod
    def _clear(views: Sequence[Tensor]) -> None:
        for view in views:
            view.zero_()
        views[3].fill_(-1)  # no slot: nothing is written

    def _forward(self, views: Sequence[Tensor], size: int, shared: bool) -> None:
        raw, positions, kv_lens, slots, cross_lens, members, bounds, lens = views
        tables = {name: table[:size] for name, table in self._tables.items()}
        metadata = AttentionMetadata(
            block_tables=tables["self"],
            cu_seqlens_q=self._bounds[: size + 1],
            kv_lens=kv_lens,
            slot_mapping=slots.long(),
            max_q_len=1,
            max_kv_len=self._inputs.max_model_len,
            num_decodes=size,
            shared=SharedPrefixes(members, bounds, lens) if shared else None,
        )
        embeds = self._decoder.embed(resolve_ids(raw, self._inputs.last_ids))
        context = self._inputs.context(metadata, tables.get("cross"), cross_lens)
        self._hidden[:size].copy_(self._decoder(embeds, positions, context))

    def run(self, batch: HostBatch) -> Tensor | None:
        """Replay a batch: hidden states [S, hidden], valid until the next one; None where no graph fits."""
        count = len(batch.kv_lens)
        sizes = self._sizes if batch.shared is None else self._shared_sizes
        at = bisect.bisect_left(sizes, count)
        if not batch.only_decodes or at == len(sizes) or not self._inputs.fits(batch):
            return None
        size = sizes[at]
        found = self._graphs.get((size, batch.shared is not None))
        if found is None:
            return None
        header = self._fill(batch, size)
        self._header[: len(header)].copy_(header, non_blocking=True)
        for name, table in upload_tables(batch, self._header.device).items():
            self._tables[name][:count, : table.shape[1]].copy_(table)
        found.replay()
        return self._hidden[:count]

    def _fill(self, batch: HostBatch, size: int) -> Tensor:
        """The header of a batch, spare rows without keys and slots."""
        shapes = self._shapes(size)
        header = torch.empty(packed_size(shapes), dtype=torch.int32, pin_memory=self._header.is_cuda)
        views = (view.numpy() for view in split(header, shapes))
        ids, positions, kv_lens, slots, cross_lens, members, bounds, lens = views
        count = len(batch.kv_lens)
        positions[:, :count], positions[:, count:] = batch.positions, 0
        given = [(ids, batch.token_ids, 0), (kv_lens, batch.kv_lens, 0), (slots, batch.slots, -1)]
        if batch.cross is not None:
            given.append((cross_lens, batch.cross.kv_lens, 0))
        plan = batch.shared
        if plan is not None:
            given += [(members, plan.members, 0), (bounds, plan.bounds, plan.bounds[-1]), (lens, plan.lens, 0)]
        for view, values, rest in given:
            view[: len(values)], view[len(values) :] = values, rest
        return header
