"""From a ScheduledBatch (plain Python) to the flattened tensors of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mm_core.kernels.paged_attention import plan_cpu
from mm_core.layers.context import AttentionMetadata
from mm_core.scheduler.sequence import ScheduledBatch, ScheduledSequence


@dataclass(frozen=True)
class MediaSpan:
    """Encoder rows [first, last) of item `key` replace the embeddings of batch rows `rows`."""

    key: bytes
    first: int
    last: int
    rows: Tensor | slice
    seq_id: int


@dataclass(frozen=True)
class BatchInputs:
    """One step's inputs: T tokens of S sequences, of which R are sampled.

    token_ids: [T] int64. positions: [axes, T] int32. tables: attention metadata by table name.
    sample_rows: [R] int64, the rows whose logits are wanted, or None where all rows are.
    """

    token_ids: Tensor
    positions: Tensor
    tables: dict[str, AttentionMetadata]
    sample_rows: Tensor | None
    media: tuple[MediaSpan, ...]


def build_inputs(batch: ScheduledBatch, axes: int, block_size: int, device: torch.device) -> BatchInputs:
    """Flatten a batch. Sequences keep their order; each contributes its `length` newest tokens."""
    scheduled = batch.sequences
    lengths = np.fromiter((s.length for s in scheduled), np.int32, len(scheduled))
    bounds = np.zeros(len(scheduled) + 1, np.int32)
    np.cumsum(lengths, out=bounds[1:])
    tokens: list[int] = []
    for s in scheduled:
        tokens += s.seq.token_ids[s.start : s.start + s.length]
    samples = [int(bounds[i + 1]) - 1 for i, s in enumerate(scheduled) if s.samples]
    every_row = len(samples) == len(tokens)
    return BatchInputs(
        token_ids=_to(np.asarray(tokens, np.int64), device),
        positions=_to(_positions(scheduled, bounds, axes), device),
        tables={"self": _self_table(scheduled, lengths, bounds, block_size, device)},
        sample_rows=None if every_row else _to(np.asarray(samples, np.int64), device),
        media=tuple(span for i, s in enumerate(scheduled) for span in _media_spans(s, int(bounds[i]), device)),
    )


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _positions(scheduled: tuple[ScheduledSequence, ...], bounds: np.ndarray, axes: int) -> np.ndarray:
    """[axes, T]: the request's own positions in its prompt, n + i + decode_delta after it."""
    out = np.empty((axes, int(bounds[-1])), np.int32)
    for i, s in enumerate(scheduled):
        first, end = s.start, s.start + s.length
        own = s.seq.request.positions
        split = s.seq.prompt_len if own is not None else 0
        inside = max(min(end, split) - first, 0)  # tokens of this chunk that lie in the prompt
        row = int(bounds[i])
        if own is not None and inside:
            out[:, row : row + inside] = own[:, first : first + inside]
        delta = s.seq.request.decode_delta if own is not None else 0
        out[:, row + inside : row + s.length] = np.arange(first + inside + delta, end + delta, dtype=np.int32)
    return out


def _self_table(
    scheduled: tuple[ScheduledSequence, ...],
    lengths: np.ndarray,
    bounds: np.ndarray,
    block_size: int,
    device: torch.device,
) -> AttentionMetadata:
    starts = np.fromiter((s.start for s in scheduled), np.int32, len(scheduled))
    kv_lens = starts + lengths
    width = -(-int(kv_lens.max()) // block_size)
    tables = np.zeros((len(scheduled), width), np.int32)
    for i, s in enumerate(scheduled):
        table = s.tables["self"]
        count = min(len(table), width)
        tables[i, :count] = table[:count]
    # Absolute position of every row, from which its slot follows.
    owner = np.repeat(np.arange(len(scheduled)), lengths)
    place = np.arange(int(bounds[-1])) - bounds[:-1][owner] + starts[owner]
    slots = tables[owner, place // block_size].astype(np.int64) * block_size + place % block_size
    block_tables, cu_seqlens_q, lens = (_to(array, device) for array in (tables, bounds, kv_lens))
    on_cpu = device.type == "cpu"
    return AttentionMetadata(
        block_tables,
        cu_seqlens_q,
        lens,
        slot_mapping=_to(slots, device),
        max_q_len=int(lengths.max()),
        max_kv_len=int(kv_lens.max()),
        cpu_plan=plan_cpu(block_tables, cu_seqlens_q, lens, block_size) if on_cpu else None,
    )


def _media_spans(s: ScheduledSequence, row: int, device: torch.device) -> list[MediaSpan]:
    """The encoder rows that fall into tokens [start, start + length) of a sequence."""
    spans: list[MediaSpan] = []
    for r in s.seq.ranges:
        if r.offset >= s.start + s.length or r.end <= s.start:
            continue
        tokens = r.row_tokens
        first, last = np.searchsorted(tokens, [s.start - r.offset, s.start + s.length - r.offset])
        if first == last:
            continue
        place = tokens[first:last] + (r.offset - s.start + row)
        contiguous = int(place[-1] - place[0]) == len(place) - 1
        rows = slice(int(place[0]), int(place[-1]) + 1) if contiguous else _to(place, device)
        spans.append(MediaSpan(r.feature.key, int(first), int(last), rows, s.seq.seq_id))
    return spans
