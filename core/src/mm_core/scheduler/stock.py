"""Stock: where what a sequence wants lies: on the device, in the host's memory, or on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from mm_core.cache.host import HostTier
from mm_core.cache.prefix import BlockContent, PrefixCache
from mm_core.scheduler.tier_types import Disk, Stored


class Found(NamedTuple):
    """Where a content lies: in a block of the device, else in the host's memory, else at a place on disk."""

    content: BlockContent
    block: int | None = None
    place: int | None = None

    @property
    def in_host(self) -> bool:
        """Whether it is to be copied from the host's memory."""
        return self.block is None and self.place is None


class Stock:
    """Looks in all levels; as on the device, a hit compares token ids. What is on its way to the device (`comes`) is
    nowhere until it is there."""

    def __init__(self, prefix: PrefixCache, host: HostTier, disk: Disk | None, comes: Callable[[bytes], bool]) -> None:
        self._prefix = prefix
        self._host = host
        self._disk = disk
        self._comes = comes

    def find(self, content: BlockContent) -> Found | None:
        """The nearest level that has it."""
        block = self._prefix.find(content.key)
        if block is not None:
            return Found(content, block) if self._prefix.lookup([content]) else None
        if self._comes(content.key):
            return None
        entry = self._host.find(content.key)
        if entry is not None:
            return Found(content) if entry.content.token_ids == content.token_ids and not entry.num_rows else None
        stored = None if self._disk is None or content.key in self._host else self._disk.find(content.key)
        if stored is None or tuple(stored.token_ids) != content.token_ids or len(stored.places) != 1:
            return None
        return Found(content, place=stored.places[0])

    def run(self, contents: Iterable[BlockContent]) -> list[Found]:
        """As many of the first as are there."""
        run = []
        for content in contents:
            found = self.find(content)
            if found is None:
                break
            run.append(found)
        return run

    def count(self, contents: Iterable[BlockContent]) -> Stored:
        """`run` by level."""
        run = self.run(contents)
        device = sum(found.block is not None for found in run)
        disk = sum(found.place is not None for found in run)
        return Stored(len(run) - device - disk, disk, device)

    def by_way_of_host(self, run: list[Found], cross: list[Found]) -> tuple[list[Found], list[Found]]:
        """The part of a run, and all of a source or nothing, that can come back: what is on disk goes by way of the
        host's memory, which must have room for it beside what else of this it is to hold."""
        from_disk = sum(found.place is not None for found in (*run, *cross))
        if not from_disk:
            return run, cross
        room = self._host.room - sum(found.in_host for found in (*run, *cross))
        of_source = sum(found.place is not None for found in cross)
        if of_source > room:
            cross, of_source = [], 0
        room -= of_source
        for index, found in enumerate(run):
            room -= found.place is not None
            if room < 0:
                return run[:index], cross
        return run, cross
