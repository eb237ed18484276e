"""Paged caches made by hand, for tests of a decoder without an engine."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch

from mm_core.layers import AttentionMetadata, ForwardContext, LayerCache

BLOCK = 16


class PagedBatch:
    """Some sequences, of at most `lengths` tokens, and for a decoder with cross-attention their sources; the
    blocks of all tables are dealt in random order from one pool."""

    def __init__(
        self,
        decoder: Any,
        lengths: Sequence[int],
        seed: int = 0,
        sources: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        spec = decoder.kv_specs[0]
        wanted = [-(-n // BLOCK) for n in (*lengths, *sources)]
        free = list(range(sum(wanted) + 3))
        random.Random(seed).shuffle(free)
        tables = torch.full((len(wanted), max(wanted)), -1, dtype=torch.int32)
        for row, count in enumerate(wanted):
            tables[row, :count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
        self.tables = {"self": tables[: len(lengths)], "cross": tables[len(lengths) :]}
        shape = (sum(wanted) + 3, BLOCK, spec.kv_heads, spec.head_dim)
        # NaN where nothing was written: reading it shows
        store = [LayerCache(*torch.full((2, *shape), torch.nan, dtype=dtype)) for _ in range(spec.layers)]
        self.caches = {spec.name: store for spec in decoder.kv_specs}
        self.decoder = decoder
        self.sources = list(sources)
        self.done = [0] * len(lengths)

    def logits(self, chunks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run one chunk of each sequence; returns its logits [len(chunk), vocab] by sequence."""
        return list(self.decoder.logits(self.hidden(chunks)).split([len(c) for c in chunks]))

    def hidden(self, chunks: Sequence[torch.Tensor], rows: torch.Tensor | None = None) -> torch.Tensor:
        """The decoder's output for one chunk of each sequence."""
        counts = [len(c) for c in chunks]
        index = [torch.arange(d, d + n) for d, n in zip(self.done, counts, strict=True)]
        self.done = [d + n for d, n in zip(self.done, counts, strict=True)]
        metadata = {"self": self._metadata("self", counts, self.done, slots=_slots(self.tables["self"], index))}
        if self.sources:
            metadata["cross"] = self._metadata("cross", counts, self.sources, causal=False)
        embeds = self.decoder.embed(torch.cat(list(chunks)))
        kept = embeds.clone()
        positions = torch.cat(index).int()[None]
        hidden: torch.Tensor = self.decoder(embeds, positions, ForwardContext(metadata, self.caches, rows))
        assert torch.equal(embeds, kept)
        return hidden

    def write_sources(self, rows: torch.Tensor) -> None:
        """Write the keys and values of all sources, whose rows lie one after another."""
        index = [torch.arange(n) for n in self.sources]
        slots = _slots(self.tables["cross"], index)
        metadata = self._metadata("cross", self.sources, self.sources, causal=False, slots=slots)
        self.decoder.write_source(rows, ForwardContext({"cross": metadata}, self.caches))

    def _metadata(
        self,
        table: str,
        queries: Sequence[int],
        keys: Sequence[int],
        *,
        causal: bool = True,
        slots: torch.Tensor | None = None,
    ) -> AttentionMetadata:
        return AttentionMetadata(
            block_tables=self.tables[table].clamp(min=0),
            cu_seqlens_q=torch.tensor([0, *queries]).cumsum(0).int(),
            kv_lens=torch.tensor(keys, dtype=torch.int32),
            slot_mapping=slots,
            max_q_len=max(queries),
            max_kv_len=max(keys),
            causal=causal,
        )


def _slots(tables: torch.Tensor, index: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tables[s, i // BLOCK].long() * BLOCK + i % BLOCK for s, i in enumerate(index)])
