"""Host memory and disk of a world without tensors: every slot and place tells what it holds, copies end late.

What is copied is read when a device would read it: blocks and rows when the step is launched, slots and places when
the copy ends. Until then the target holds nothing that may be read.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from mm_core.scheduler.transfers import BlockRestore, Spill, TransferDone, Transfers

if TYPE_CHECKING:
    from support.fake_model import FakeRunner

UNSET = "nothing that may be read"


@dataclass
class CopyFaults:
    """How often a copy cannot be made, and how often what comes back is found damaged. late: how likely a copy is to
    end at a poll."""

    fails: float = 0.0
    damaged: float = 0.0
    late: float = 0.5


class _Copy(NamedTuple):
    done: TransferDone
    end: Callable[[bool], bool]  # told whether to find damage; whether it worked
    blocks: frozenset[int] = frozenset()  # written while it is in flight
    written: frozenset[int] = frozenset()  # slots
    read: frozenset[int] = frozenset()  # slots
    places: frozenset[int] = frozenset()


class FakeTransfers:
    """Slots and places behind a `FakeRunner`."""

    def __init__(self, runner: FakeRunner, num_slots: int, slot_bytes: int = 8, seed: int = 0) -> None:
        self.slots: list[Any] = [UNSET] * num_slots
        self.places: dict[int, Any] = {}
        self.faults = CopyFaults()
        self.counts = dict.fromkeys(("store", "row_store", "restore", "spill", "failed", "damaged", "damaged_rows"), 0)
        self.hold_back = False  # only what is waited for ends
        self._runner = runner
        self._slot_bytes = slot_bytes
        self._dice = random.Random(seed)
        self._copies: list[_Copy] = []

    @property
    def pending(self) -> int:
        """Copies not told of yet."""
        return len(self._copies)

    @property
    def filling(self) -> set[int]:
        """Blocks with a copy in flight."""
        return {block for copy in self._copies for block in copy.blocks}

    def _content(self, block: int) -> tuple[Any, ...]:
        size = self._runner.block_size
        return tuple(self._runner.slots.get(place, UNSET) for place in range(block * size, (block + 1) * size))

    def _put(self, block: int, content: Sequence[Any]) -> None:
        for row, value in enumerate(content):
            self._runner.slots[block * self._runner.block_size + row] = value

    # -- launching -------------------------------------------------------------------------

    def launch(self, transfers: Transfers) -> None:
        for key, block, slot in transfers.stores:
            self._store("store", key, (slot,), [self._content(block)])
            assert block not in self.filling, "a block is stored while it is filled"
        for key, slots in transfers.row_stores:
            rows = [self._runner.slab[place] for place in self._runner.rows[key]]
            assert None not in rows, "spoilt rows are stored"
            self._store("row_store", key, slots, self._cut(rows, len(slots)))
        for copy in transfers.copies:
            assert not {copy.source, copy.target} & self.filling
            content = self._content(copy.target)
            self._put(copy.target, self._content(copy.source)[: copy.num_tokens] + content[copy.num_tokens :])
        for order in transfers.restores:
            self._restore(order)
        for spill in transfers.spills:
            self._spill(spill)

    def _cut(self, rows: list[Any], count: int) -> list[Any]:
        size = -(-len(rows) // count)
        return [tuple(rows[i * size : (i + 1) * size]) for i in range(count)]

    def _check_slots(self, slots: Sequence[int], *, write: bool) -> None:
        for copy in self._copies:
            assert not copy.written & {*slots}, "a slot is used while something is copied to it"
            assert not (write and copy.read & {*slots}), "a slot is written while it is read"

    def _store(self, kind: Any, key: bytes, slots: Sequence[int], contents: list[Any]) -> None:
        assert len(slots) == len(contents) == len(set(slots))
        self._check_slots(slots, write=True)
        for slot in slots:
            self.slots[slot] = UNSET

        def end(bad: bool) -> bool:
            for slot, content in zip(slots, contents, strict=True):
                self.slots[slot] = (key, content)
            return True

        done = TransferDone(kind, key, nbytes=len(slots) * self._slot_bytes)
        self._copies.append(_Copy(done, end, written=frozenset(slots)))

    def _restore(self, order: BlockRestore) -> None:
        key, block, slot, place = order
        self._check_slots([slot], write=place is not None)
        assert block not in self.filling, "a block is filled twice"
        assert not any(block in step.blocks for step in self._runner.in_flight), "a block in use is filled"
        self._put(block, [UNSET] * self._runner.block_size)
        if place is not None:
            self.slots[slot] = UNSET
            assert not any(place in copy.places and copy.done.kind == "spill" for copy in self._copies)

        def end(bad: bool) -> bool:
            if bad:
                return False
            if place is not None:
                self.slots[slot] = self.places[place]
            found, content = self.slots[slot]
            assert found == key, "another block is copied back"
            self._put(block, content)
            return True

        done = TransferDone("restore", key, nbytes=self._slot_bytes, seconds=1e-3)
        use = {"read": frozenset([slot])} if place is None else {"written": frozenset([slot])}
        places = frozenset() if place is None else frozenset([place])
        self._copies.append(_Copy(done, end, frozenset([block]), places=places, **use))

    def _spill(self, spill: Spill) -> None:
        self._check_slots(spill.slots, write=False)
        assert not any({*spill.places} & copy.places for copy in self._copies), "a place is written while it is used"
        for place in spill.places:
            self.places[place] = (b"", UNSET)

        def end(bad: bool) -> bool:
            for slot, place in zip(spill.slots, spill.places, strict=True):
                assert self.slots[slot][0] == spill.key, "another block is written to disk"
                self.places[place] = self.slots[slot]
            return True

        done = TransferDone("spill", spill.key, nbytes=len(spill.slots) * self._slot_bytes)
        self._copies.append(_Copy(done, end, read=frozenset(spill.slots), places=frozenset(spill.places)))

    # -- ends ------------------------------------------------------------------------------

    def poll(self, wait: bool = False) -> list[TransferDone]:
        assert self._copies or not wait, "nothing to wait for"
        ended = [] if self.hold_back else [c for c in self._copies if self._dice.random() < self.faults.late]
        if wait and not ended:
            ended = [self._dice.choice(self._copies)]
        self._dice.shuffle(ended)
        for copy in ended:
            self._copies.remove(copy)
        return [self._end(copy) for copy in ended]

    def _end(self, copy: _Copy) -> TransferDone:
        kind = copy.done.kind
        self.counts[kind] += 1
        if self._dice.random() < self.faults.fails:
            self.counts["failed"] += 1
            return copy.done._replace(ok=False)
        damaged = kind == "restore" and self._dice.random() < self.faults.damaged
        self.counts["damaged"] += damaged
        ok = copy.end(damaged)
        return copy.done._replace(ok=ok, damaged=not ok)

    def read_rows(self, key: bytes, slots: Sequence[int]) -> list[Any] | None:
        """An item's rows; None where they are damaged."""
        self._check_slots(slots, write=False)
        if self._dice.random() < self.faults.damaged:
            self.counts["damaged_rows"] += 1
            return None
        assert {self.slots[slot][0] for slot in slots} == {key}, "another item's rows are copied back"
        return [row for slot in slots for row in self.slots[slot][1]]


class _Place(NamedTuple):
    places: tuple[int, ...]
    token_ids: tuple[int, ...]
    num_rows: int = 0


class FakeDisk:
    """The books of a disk, least recently written leaves first."""

    def __init__(self, num_places: int) -> None:
        self._free = list(range(num_places))
        self._num_places = num_places
        self._entries: OrderedDict[bytes, _Place] = OrderedDict()
        self._reserved: dict[bytes, _Place] = {}
        self._held: dict[bytes, int] = {}
        self._leaving: dict[bytes, _Place] = {}

    def find(self, key: bytes) -> _Place | None:
        return self._entries.get(key)

    def reserve(self, key: bytes, count: int, token_ids: tuple[int, ...], num_rows: int) -> tuple[int, ...] | None:
        if key in self._entries or key in self._reserved or key in self._leaving:
            return None
        for old in [k for k in self._entries if k not in self._held]:
            if len(self._free) >= count:
                break
            self._free += self._entries.pop(old).places
        if len(self._free) < count:
            return None
        places = tuple(self._free.pop() for _ in range(count))
        self._reserved[key] = _Place(places, token_ids, num_rows)
        return places

    def commit(self, key: bytes) -> None:
        self._entries[key] = self._reserved.pop(key)

    def drop(self, key: bytes) -> None:
        if key in self._reserved:
            self._free += self._reserved.pop(key).places
        elif key in self._entries:
            entry = self._entries.pop(key)
            if key in self._held:
                self._leaving[key] = entry
            else:
                self._free += entry.places

    def hold(self, key: bytes) -> None:
        assert key in self._entries
        self._held[key] = self._held.get(key, 0) + 1

    def release(self, key: bytes) -> None:
        self._held[key] -= 1
        if not self._held[key]:
            del self._held[key]
            if key in self._leaving:
                self._free += self._leaving.pop(key).places

    def clear(self) -> None:
        for key in list(self._entries):
            self.drop(key)

    def counts(self) -> dict[str, int]:
        return {"places": self._num_places, "free": len(self._free), "entries": len(self._entries)}

    def check_integrity(self) -> None:
        entries = [*self._entries.values(), *self._reserved.values(), *self._leaving.values()]
        places = sorted([*self._free, *(place for entry in entries for place in entry.places)])
        assert places == list(range(self._num_places)), "a place is lost, or in two states"

    def check_idle(self) -> None:
        assert not self._held
        assert not self._reserved
        assert not self._leaving
