"""Restores: blocks that are copied back to the device for a waiting sequence, and stay for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from mm_core.cache.blocks import BlockPool
from mm_core.cache.prefix import BlockContent, PrefixCache
from mm_core.scheduler.sequence import Sequence
from mm_core.scheduler.tier_types import Level


class Part(NamedTuple):
    """A block that is being filled with a content from `level`."""

    content: BlockContent
    block: int
    level: Level


@dataclass(slots=True, eq=False)
class RestoreGroup:
    """What is copied back for one sequence, all or nothing of its source.

    table: blocks on which it has one reference each: those that are filled, and those found on the device beside
    them. pending: keys of copies in flight; with none it has landed. bad: keys whose copy failed, or that nobody
    may find. orphan: its sequence has gone.
    """

    seq: Sequence
    table: list[int]
    parts: list[Part]
    source_parts: list[Part]
    pending: set[bytes] = field(default_factory=set)
    bad: set[bytes] = field(default_factory=set)
    orphan: bool = False
    tokens: dict[Level, int] = field(default_factory=lambda: {"host": 0, "disk": 0})  # of its prompt, landed

    @property
    def good(self) -> list[Part]:
        """Blocks that can be published: up to the first bad one, and the whole source or nothing of it."""
        first_bad = next((i for i, part in enumerate(self.parts) if part.content.key in self.bad), len(self.parts))
        source_bad = any(part.content.key in self.bad for part in self.source_parts)
        return self.parts[:first_bad] + ([] if source_bad else self.source_parts)

    @property
    def filled(self) -> set[int]:
        """Blocks that are, or were, filled for it."""
        return {part.block for part in (*self.parts, *self.source_parts)}


class Restores:
    """The groups. on_restored: told of each block before it is published.

    A block with a copy in flight is in some group's table, so it is nobody else's. Blocks that have landed are
    held for their sequence until it starts or ends, or somebody needs the room more.
    """

    def __init__(self, pool: BlockPool, prefix: PrefixCache, on_restored: Callable[[Part], None]) -> None:
        self._pool = pool
        self._prefix = prefix
        self._on_restored = on_restored
        self._groups: dict[int, RestoreGroup] = {}  # by sequence, oldest first
        self._orphans: list[RestoreGroup] = []
        self._filling: dict[bytes, RestoreGroup] = {}  # by key

    @property
    def filling(self) -> int:
        """Blocks with a copy in flight."""
        return len(self._filling)

    @property
    def keys(self) -> Iterable[bytes]:
        """Of those."""
        return self._filling.keys()

    @property
    def groups(self) -> Iterable[RestoreGroup]:
        """Of sequences that wait."""
        return self._groups.values()

    @property
    def tables(self) -> Iterator[list[int]]:
        """Of all groups."""
        return (group.table for group in (*self._groups.values(), *self._orphans))

    def group_of(self, seq: Sequence) -> RestoreGroup | None:
        """A sequence's group."""
        return self._groups.get(seq.seq_id)

    def fills(self, key: bytes) -> bool:
        """Whether a block is on its way to the device."""
        return key in self._filling

    def open(self, group: RestoreGroup) -> None:
        """Copies for a sequence without a group are ordered."""
        for part in (*group.parts, *group.source_parts):
            group.pending.add(part.content.key)
            self._filling[part.content.key] = group
        self._groups[group.seq.seq_id] = group

    def land(self, key: bytes, ok: bool) -> None:
        """A copy has ended. With the last of a group's its good blocks become findable."""
        group = self._filling.pop(key)
        group.pending.remove(key)
        if not ok:
            group.bad.add(key)
        if group.pending:
            return
        kept: set[int] = set()
        for part in group.good:
            if self._prefix.find(part.content.key) is None:  # else somebody computed it meanwhile
                self._on_restored(part)
                self._prefix.publish(part.block, part.content)
                kept.add(part.block)
                group.tokens[part.level] += len(part.content.token_ids)
        lost = group.filled - kept
        self._pool.free([block for block in group.table if block in lost])
        group.table = [block for block in group.table if block not in lost]
        if group.orphan:
            self._orphans.remove(group)
            self._pool.free(group.table)
        elif not kept:
            self._close(group)

    def leave(self, seq: Sequence) -> RestoreGroup | None:
        """The sequence starts, or ends; its group, if it had one. Copies in flight go on for whoever comes next."""
        group = self._groups.get(seq.seq_id)
        if group is not None and group.pending:
            del self._groups[seq.seq_id]
            group.orphan = True
            self._orphans.append(group)
        elif group is not None:
            self._close(group)
        return group

    def give_up(self) -> bool:
        """Let go of the blocks of the latest group that has landed; False if there is none."""
        for group in reversed(self._groups.values()):
            if not group.pending:
                self._close(group)
                return True
        return False

    def _close(self, group: RestoreGroup) -> None:
        del self._groups[group.seq.seq_id]
        self._pool.free(group.table)

    def forget(self, keys: Callable[[bytes], bool]) -> None:
        """Nobody may find these when they have landed."""
        for key, group in self._filling.items():
            if keys(key):
                group.bad.add(key)

    def clear(self) -> None:
        """As `forget` of all, and let go of whatever has no copy in flight."""
        self.forget(self._filling.__contains__)
        while self.give_up():
            pass
        for group in {id(g): g for g in self._filling.values()}.values():
            filled = group.filled
            self._pool.free([block for block in group.table if block not in filled])
            group.table = [block for block in group.table if block in filled]

    def check_integrity(self) -> None:
        """Raise RuntimeError where the groups and the copies in flight differ."""
        groups = [*self._groups.values(), *self._orphans]
        pending = {key: group for group in groups for key in group.pending}
        if pending != self._filling or sum(len(g.pending) for g in groups) != len(pending):
            raise RuntimeError("blocks are on their way to the device for nobody, or for two")
        if any(seq_id != g.seq.seq_id or g.orphan for seq_id, g in self._groups.items()):
            raise RuntimeError("a restored group is another sequence's")
        if any(not g.orphan or not g.pending for g in self._orphans):
            raise RuntimeError("a restored group of a sequence that is gone holds blocks though nothing is in flight")
        if any(not g.filled <= {*g.table} for g in groups if g.pending):
            raise RuntimeError("a block is filled that its group does not hold")
