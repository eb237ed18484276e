"""Values of the tiers behind the device, and what the planner asks of a disk and tells observers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from mm_core.cache.prefix import BlockContent

Level = Literal["host", "disk"]
Move = Literal["offloaded", "restored", "evicted"]


class DiskPlace(Protocol):
    """What a DiskTier knows of an entry that can be read."""

    @property
    def places(self) -> tuple[int, ...]:
        """Where it lies."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of a block; empty for a source's."""


class Disk(Protocol):
    """The books of a DiskTier, as the planner keeps them in the engine's loop.

    An entry is reserved (being written), committed, or gone. `reserve` evicts none that is reserved or held.
    """

    def find(self, key: bytes) -> DiskPlace | None:
        """A committed entry."""

    def reserve(self, key: bytes, count: int, token_ids: tuple[int, ...], num_rows: int) -> Sequence[int] | None:
        """Places for a new entry, evicting committed ones; None where the key is there already, or too little is."""

    def commit(self, key: bytes) -> None:
        """A reserved entry is written: findable from now on."""

    def drop(self, key: bytes) -> None:
        """Forget a committed entry at once (a held one's places come back with `release`), or a reserved one, when
        nothing writes it any more. Nothing if it is not there."""

    def hold(self, key: bytes) -> None:
        """It is about to be read: its places stay."""

    def release(self, key: bytes) -> None:
        """Undo one `hold`."""

    def clear(self) -> None:
        """Drop all committed entries. Reserved ones stay reserved: `commit` or `drop` follows."""

    def counts(self) -> dict[str, int]:
        """Places and entries, for `stats`."""

    def check_integrity(self) -> None:
        """Raise RuntimeError where the books do not balance."""


class TierObserver(Protocol):
    """Told of what moves between the levels, in the engine's loop."""

    def moved(self, move: Move, level: Level, content: BlockContent, num_rows: int) -> None:
        """offloaded: a block, or an item's rows, findable in `level` from now on. restored: from `level`; findable on
        the device at once. evicted: not findable in `level` any more. (What leaves the disk is not told of here.)"""


@dataclass(frozen=True)
class TierConfig:
    """slot_bytes: of a KV block over all layers. row_bytes: of an encoder row. max_filling: bytes on their way to
    the device at a time, unless one sequence alone wants more. max_spills: copies to disk in flight. max_tries:
    restores for a sequence before it computes what is missing instead."""

    slot_bytes: int
    row_bytes: int = 0
    max_filling: int = 2**30
    max_spills: int = 16
    max_tries: int = 3


@dataclass
class TierStats:
    """Counters since start, of blocks and items, their tokens and rows. host_hits, disk_hits: tokens of prompts that
    came from there before they began. dropped: left the device and could not be stored."""

    offloaded: int = 0
    offloaded_tokens: int = 0
    offloaded_rows: int = 0
    restored: int = 0
    restored_tokens: int = 0
    restored_items: int = 0
    restored_rows: int = 0
    spilled: int = 0
    dropped: int = 0
    damaged: int = 0
    declined: int = 0
    given_up: int = 0
    orphaned: int = 0
    host_hits: int = 0
    disk_hits: int = 0


class Stored(NamedTuple):
    """Blocks of a run that lie in the host's memory, on disk only, and on the device behind such."""

    host: int = 0
    disk: int = 0
    device: int = 0
