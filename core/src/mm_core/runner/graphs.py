"""Decode steps as CUDA graphs: one launch instead of hundreds.

A graph is captured for each batch size of a ladder; a batch takes the next larger one, its spare
rows read and write nothing (no keys, no slot). All graphs share one memory pool and the same input
buffers, since one runs at a time. Sampling stays outside.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mm_core.hookspecs import Decoder
from mm_core.kernels.shared_prefixes import SharedPrefixes
from mm_core.layers.captured import capture
from mm_core.layers.context import AttentionMetadata, ForwardContext
from mm_core.runner.batch import HostBatch
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


class DecodeGraphs:
    """Captures and replays decode steps of one model."""

    def __init__(
        self,
        decoder: Decoder,
        caches: Mapping[str, Sequence[tuple[Tensor, Tensor]]],
        last_ids: Tensor,
        table_width: int,
        max_model_len: int,
    ) -> None:
        device = last_ids.device
        size = len(last_ids)
        self._decoder = decoder
        self._caches = caches
        self._last_ids = last_ids
        self._max_model_len = max_model_len
        self._sizes = ladder(size)
        self._shared_sizes = sorted({n for n in _SHARED if n < size} | {size})
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._header = torch.zeros(packed_size(self._shapes(size)), dtype=torch.int32, device=device)
        self._tables = torch.zeros((size, table_width), dtype=torch.int32, device=device)
        self._bounds = torch.arange(size + 1, dtype=torch.int32, device=device)
        self._hidden = torch.empty((size, decoder.hidden_size), dtype=parameter_dtype(decoder), device=device)

    def _shapes(self, size: int) -> list[tuple[int, ...]]:
        """Of the inputs in the header: ids, positions, kv_lens, slots; members, bounds and lens of groups."""
        return [(size,), (self._decoder.position_axes, size), (size,), (size,), (size,), (size + 1,), (size,)]

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
        raw, positions, kv_lens, slots, members, bounds, lens = views
        metadata = AttentionMetadata(
            block_tables=self._tables[:size],
            cu_seqlens_q=self._bounds[: size + 1],
            kv_lens=kv_lens,
            slot_mapping=slots.long(),
            max_q_len=1,
            max_kv_len=self._max_model_len,
            num_decodes=size,
            shared=SharedPrefixes(members, bounds, lens) if shared else None,
        )
        embeds = self._decoder.embed(resolve_ids(raw, self._last_ids))
        context = ForwardContext(dict.fromkeys(self._caches, metadata), self._caches)
        self._hidden[:size].copy_(self._decoder(embeds, positions, context))

    def run(self, batch: HostBatch) -> Tensor | None:
        """Replay a batch: hidden states [S, hidden], valid until the next one; None where no graph fits."""
        count = len(batch.kv_lens)
        sizes = self._sizes if batch.shared is None else self._shared_sizes
        at = bisect.bisect_left(sizes, count)
        if not batch.only_decodes or at == len(sizes):
            return None
        size = sizes[at]
        found = self._graphs.get((size, batch.shared is not None))
        if found is None:
            return None
        header = self._fill(batch, size)
        self._header[: len(header)].copy_(header, non_blocking=True)
        (tables,) = upload([batch.tables], self._tables.device)
        self._tables[:count, : tables.shape[1]].copy_(tables)
        found.replay()
        return self._hidden[:count]

    def _fill(self, batch: HostBatch, size: int) -> Tensor:
        """The header of a batch, spare rows without keys and slots."""
        shapes = self._shapes(size)
        header = torch.empty(packed_size(shapes), dtype=torch.int32, pin_memory=self._header.is_cuda)
        ids, positions, kv_lens, slots, members, bounds, lens = (view.numpy() for view in split(header, shapes))
        count = len(batch.kv_lens)
        positions[:, :count], positions[:, count:] = batch.positions, 0
        given = [(ids, batch.token_ids, 0), (kv_lens, batch.kv_lens, 0), (slots, batch.slots, -1)]
        plan = batch.shared
        if plan is not None:
            given += [(members, plan.members, 0), (bounds, plan.bounds, plan.bounds[-1]), (lens, plan.lens, 0)]
        for view, values, rest in given:
            view[: len(values)], view[len(values) :] = values, rest
        return header
