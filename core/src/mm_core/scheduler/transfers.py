"""Copies between the device, the host's memory and the disk: what the scheduler orders, what comes of it.

A slot is a place in the host's memory as large as one KV block with all its layers; encoder rows take as many
slots as they need. A place is the same on disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple


class BlockStore(NamedTuple):
    """A block's content to a slot, read before the step writes anything."""

    key: bytes
    block: int
    slot: int


class RowStore(NamedTuple):
    """An item's encoder rows to slots, read before they are dropped."""

    key: bytes
    slots: tuple[int, ...]


class BlockRestore(NamedTuple):
    """A slot's content to a block that nobody reads or writes; from `place` to the slot first, where it is on disk
    only."""

    key: bytes
    block: int
    slot: int
    place: int | None = None


class BlockCopy(NamedTuple):
    """The first `num_tokens` tokens' keys and values of one block to another, in the step, before it writes."""

    source: int
    target: int
    num_tokens: int


class Spill(NamedTuple):
    """Slots to places on disk. token_ids: of a block; num_rows: of an item."""

    key: bytes
    slots: tuple[int, ...]
    places: tuple[int, ...]
    token_ids: tuple[int, ...] = ()
    num_rows: int = 0


@dataclass(frozen=True)
class Transfers:
    """What a step orders: done in this order, before anything else of the step."""

    stores: tuple[BlockStore, ...] = ()
    row_stores: tuple[RowStore, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    restores: tuple[BlockRestore, ...] = ()
    spills: tuple[Spill, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.stores or self.row_stores or self.copies or self.restores or self.spills)


NO_TRANSFERS = Transfers()


class TransferDone(NamedTuple):
    """A store, restore or spill ended; each of those ordered is told of once. ok: False where the copy could not be
    made, or what was to be restored is damaged (`damaged`): then the target holds nothing. seconds: it took, for
    restores on their own, else 0."""

    kind: Literal["store", "row_store", "restore", "spill"]
    key: bytes
    ok: bool = True
    damaged: bool = False
    nbytes: int = 0
    seconds: float = 0.0
