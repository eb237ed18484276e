"""Sequences that begin with the same blocks: who decodes together with whom, planned on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

Ints = np.ndarray[Any, np.dtype[np.int32]]

# Bytes of keys and values that a layer must save for the second launch and the partial results to pay. Prefixes
# that several sequences read at once come from the GPU's second-level cache in good part, so little is saved by
# reading them once: with 240 x 272 tokens of 2 KB (133 MB) 45 us became 66 on an H100, with 240 x 592 of 16 KB
# (2.3 GB) 938 became less than half.
MIN_SAVED_BYTES = 2**28
# A group shares at least so many tokens: each member writes and reads a partial result for them.
MIN_SHARED = 64


@dataclass(frozen=True)
class SharedPrefixes:
    """Groups of single-token sequences whose block tables begin with the same blocks.

    A shared prefix is read once for its whole group, then each sequence's own rest. S is the number of
    single-token sequences, which come first in their batch. members: [S] int32, the sequences, those of a
    group one after another. bounds: [S + 1] int32, group g is members[bounds[g] : bounds[g + 1]]; groups
    past the last are empty. lens: [S] int32, for each group the tokens its members share (a multiple of
    block_size, less than any member's kv_len; 0: nothing, each reads its own keys alone).

    At most S / 2 groups share anything, and they come first. Where bounds ends before S, members holds the
    sequences 0 .. bounds[S] - 1 in some order, and the rest of the batch shares nothing.
    """

    members: Tensor
    bounds: Tensor
    lens: Tensor


@dataclass(frozen=True)
class SharedPlan:
    """`SharedPrefixes` as arrays of the host, sizes S, S + 1 and S, and the tokens of KV saved each step."""

    members: Ints
    bounds: Ints
    lens: Ints
    saved: int


def plan_shared_prefixes(tables: Ints, kv_lens: Ints, block_size: int, *, min_saved: int) -> SharedPlan | None:
    """The groups that save the most reads, or None where they save fewer than min_saved tokens a step.

    tables: [S, W] int32 block tables of single-token sequences; kv_lens: [S]. The block of a sequence's
    last token is never shared, so a plan stays valid while the same sequences grow.

    Of nested prefixes (a system prompt, and below it a picture) each sequence takes part in one: children
    of a prefix leave its group where that saves more than staying.
    """
    full = (kv_lens.astype(np.int64) - 1) // block_size  # blocks that may be shared
    order, depths = _sort(tables, full, max(1, -(-MIN_SHARED // block_size)))
    if not len(order):
        return None
    groups, saved = _choose(order, depths)
    if saved * block_size < min_saved:
        return None
    return _plan(groups, len(kv_lens), block_size, saved)


def _sort(tables: Ints, full: Any, least: int) -> tuple[Any, Any]:
    """Sequences that share `least` blocks with another, sorted so that equal beginnings are neighbours, and
    for each but the last the blocks it shares with the next one."""
    able = np.flatnonzero(full >= least)
    # The last block of the shortest useful prefix names the prefix, nearly always: most batches end here.
    _, index, counts = np.unique(tables[able, least - 1], return_inverse=True, return_counts=True)
    able = able[counts[index] > 1]
    if len(able) < 2:
        return able[:0], able[:0]
    width = min(int(full[able].max()), tables.shape[1])
    rows = np.where(np.arange(width) < full[able, None], tables[able, :width], -1 - able[:, None]).astype(np.int32)
    # As strings of bytes: equal beginnings are neighbours in any order of the values.
    keys = np.ascontiguousarray(rows).view(np.dtype((np.void, 4 * width))).ravel()
    at = np.argsort(keys)
    rows = rows[at]
    differ = np.ones((len(at) - 1, width + 1), dtype=bool)
    np.not_equal(rows[1:], rows[:-1], out=differ[:, :-1])
    depths = differ.argmax(axis=1)
    depths[depths < least] = 0
    return able[at], depths


Spans = list[tuple[int, int]]


class _Node:
    """Neighbours [start, end) that share `depth` blocks, and the most blocks that groups among them save."""

    __slots__ = ("best", "depth", "end", "groups", "kids", "start")

    def __init__(self, start: int, end: int, depth: int = 0) -> None:
        self.start, self.end, self.depth = start, end, depth
        self.best = 0
        self.groups: list[tuple[int, Spans]] = []  # blocks shared, by whom
        self.kids: list[_Node] = []  # those that have groups of their own

    def close(self) -> None:
        """A child leaves this node's group where its own groups save more than its staying."""
        staying, count, at = [], self.end - self.start, self.start
        for kid in self.kids:
            size = kid.end - kid.start
            if kid.best > size * self.depth:
                self.best += kid.best
                self.groups += kid.groups
                staying.append((at, kid.start))
                count, at = count - size, kid.end
        if count > 1 and self.depth:
            self.best += (count - 1) * self.depth
            self.groups.append((self.depth, [*staying, (at, self.end)]))


def _choose(order: Any, depths: Any) -> tuple[list[tuple[int, Any]], int]:
    """Groups as (blocks shared, sequences), and the blocks they save: the tree of common beginnings,
    built left to right over the depths between neighbours, each node decided when it is complete."""
    after = np.append(depths, 0)
    falls = np.append(False, after[1:] < after[:-1])  # rows that end a deeper node stand by themselves
    same = np.append(False, after[1:] == after[:-1])
    starts = np.flatnonzero(~same | np.append(False, falls[:-1]))
    ends = np.append(starts[1:], len(order))
    open_nodes = [_Node(0, len(order))]
    # A run of rows that are equally deep is one child, as it would be row by row.
    for start, end, depth in zip(starts.tolist(), ends.tolist(), after[starts].tolist(), strict=True):
        first = start
        while open_nodes[-1].depth > depth:
            node = open_nodes.pop()
            node.end, first = end, node.start
            node.close()
            if open_nodes[-1].depth < depth:
                open_nodes.append(_Node(first, end, depth))
            open_nodes[-1].kids.append(node)
        if open_nodes[-1].depth < depth:
            open_nodes.append(_Node(first, end, depth))
    root = open_nodes[0]
    root.close()
    groups = [
        (d, order[spans[0][0] : spans[0][1]] if len(spans) == 1 else np.concatenate([order[a:b] for a, b in spans]))
        for d, spans in root.groups
    ]
    return groups, root.best


def _plan(groups: list[tuple[int, Any]], count: int, block_size: int, saved: int) -> SharedPlan:
    """Groups first, then everybody else alone."""
    alone = np.ones(count, dtype=bool)
    for _, seqs in groups:
        alone[seqs] = False
    members = np.concatenate([*(seqs for _, seqs in groups), np.flatnonzero(alone)]).astype(np.int32)
    bounds = np.full(count + 1, count, dtype=np.int32)
    lens = np.zeros(count, dtype=np.int32)
    ends = np.cumsum([0, *(len(seqs) for _, seqs in groups)])
    singles = np.arange(ends[-1] + 1, count + 1)
    bounds[: len(ends)] = ends
    bounds[len(ends) : len(ends) + len(singles)] = singles
    lens[: len(groups)] = [depth * block_size for depth, _ in groups]
    return SharedPlan(members, bounds, lens, saved * block_size)
