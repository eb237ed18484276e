"""What attention layers need to know of the batch: an argument, never a global."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from mm_core.kernels.paged_attention import CpuPlan, SharedPrefixes


@dataclass(frozen=True)
class AttentionMetadata:
    """One kind of block table (self, cross) for a flattened batch of S sequences and T tokens.

    block_tables: [S, max_blocks] int32. cu_seqlens_q: [S+1] int32, row bounds of each sequence.
    kv_lens: [S] int32, KV tokens each sequence sees, this step's included. slot_mapping: [T]
    int64, where each token's K and V go (block × block_size + offset; -1: nowhere), None where
    nothing is written (cross-attention: `Decoder.write_source` has its own, of the sources' rows).
    num_decodes: the first sequences of the batch, each with exactly one query token. shared: which of
    them begin with the same blocks (None: nobody looked).
    """

    block_tables: Tensor
    cu_seqlens_q: Tensor
    kv_lens: Tensor
    slot_mapping: Tensor | None
    max_q_len: int
    max_kv_len: int
    causal: bool = True
    num_decodes: int = 0
    shared: SharedPrefixes | None = None
    cpu_plan: CpuPlan | None = None  # without a GPU: what all layers' attention shares


class LayerCache(NamedTuple):
    """One layer's keys and values, each [num_blocks, block_size, kv_heads, head_dim]. scales: of an fp8 cache,
    those of k and of v, as `kv_write` takes them; else None."""

    k: Tensor
    v: Tensor
    scales: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class ForwardContext:
    """tables: metadata by table name. caches: for each table those of the layers. rows: [R] int64, the rows
    of the batch whose hidden states the caller wants, or None for all T: a decoder returns those alone, and
    may leave out the others as soon as their keys and values are written."""

    tables: Mapping[str, AttentionMetadata]
    caches: Mapping[str, Sequence[LayerCache]]
    rows: Tensor | None = None
