"""Sizes of what the runner allocates once, and the largest step that they allow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mm_core.kernels.shared_prefixes import MIN_SAVED_BYTES
from mm_core.runner.batch import CrossTables, HostBatch, table_width


@dataclass(frozen=True)
class RunnerLimits:
    """Sizes of what the runner allocates once. cuda_graphs: whether decode steps may be captured. source_budget:
    rows of the sources that a step may compute. min_saved_bytes: of keys and values a layer, for shared prefixes
    to be read apart."""

    max_num_seqs: int
    max_model_len: int
    encoder_cache_tokens: int
    max_num_batched_tokens: int
    cuda_graphs: bool = True
    source_budget: int = 0
    min_saved_bytes: int = MIN_SAVED_BYTES


def largest_batch(limits: RunnerLimits, block_size: int, axes: int, source_len: int = 0) -> HostBatch:
    """As many tokens as a step may have, as long chunks of as few sequences as can be, as many of them sampled
    as can be, each with a source of source_len rows. Nothing is written: no token has a slot."""
    tokens = limits.max_num_batched_tokens
    longest = min(tokens, limits.max_model_len)
    bounds = np.minimum(np.arange(0, tokens + longest, longest), tokens).astype(np.int32)
    lens = np.diff(bounds)
    zeros = np.zeros(tokens, np.int32)
    cross = None
    if source_len:
        tables = np.zeros((len(lens), table_width(source_len, block_size)), np.int32)
        cross = CrossTables(tables, np.full(len(lens), source_len, np.int32), source_len)
    return HostBatch(
        token_ids=zeros,
        positions=np.zeros((axes, tokens), np.int32),
        bounds=bounds,
        kv_lens=lens,
        slots=zeros - 1,
        tables=np.zeros((len(lens), table_width(longest, block_size)), np.int32),
        sample_rows=zeros[: limits.max_num_seqs],
        media_rows=zeros[:0],
        media_from=zeros[:0],
        num_decodes=0,
        max_q_len=int(lens.max()),
        max_kv_len=int(lens.max()),
        cross=cross,
    )
