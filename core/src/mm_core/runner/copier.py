"""Copies between blocks and slots, as a device makes them: a CPU at once, a GPU on streams of its own."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mm_core.runner.host_memory import Bytes, HostMemory
from mm_core.runner.memory import is_lost
from mm_core.runner.slots import SlotLayout
from mm_core.runner.spans import DeviceSpans
from mm_core.runner.upload import upload

logger = logging.getLogger(__name__)


_PIECE_BYTES = 32 * 2**20  # of what comes back: half a millisecond
_LOADED_BYTES = 32 * 2**20  # of rows on their way back: torch is to hold so much


class Rows(Protocol):
    """Encoder rows on the device (`encoders.EncoderRows`)."""

    def __contains__(self, key: bytes) -> bool: ...

    def on_stream(self) -> AbstractContextManager[Any]:
        """What writes rows runs on this stream."""

    def read(self, key: bytes, into: Tensor) -> None:
        """An item's rows, one after another, to uint8 [at least as long] on their device."""


class Ticket:
    """`count` copies that were launched together; without a GPU they have ended. failed: they could not be made.
    seconds: they took, once they have ended, where that is measured."""

    def __init__(self, count: int, seconds: float = 0.0, *, failed: bool = False) -> None:
        self.count = count
        self.failed = failed
        self.seconds = seconds

    def ended(self) -> bool:
        """Whether the host knows that they have."""
        return True

    def wait(self) -> None:
        """Until they have."""


class Copier(Protocol):
    """What a device does for `TransfersRunner`. Copies are launched in the order of the calls; a call tells of a
    part of them each, in order, and of fewer than were asked for where there is no room. Only a lost device raises;
    `copy` also raises what else goes wrong."""

    def store(self, blocks: Sequence[int], slots: Sequence[int]) -> list[Ticket]:
        """Blocks to slots; on the current stream they are read first."""

    def store_rows(self, rows: Rows, key: bytes, slots: Sequence[int]) -> list[Ticket]:
        """An item's rows to slots."""

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Whole blocks to others, on the current stream."""

    def restore(self, slots: Sequence[int], blocks: Sequence[int]) -> list[Ticket]:
        """Slots to blocks, behind whatever was launched before and reads these."""

    def load(self, slots: Sequence[int], nbytes: int) -> tuple[Tensor, Ticket]:
        """The slots' first bytes together, uint8 [nbytes], on the device for its current stream; the slots are read
        when the ticket ends. Raises what goes wrong."""

    def contents(self, blocks: Sequence[int]) -> Iterator[Bytes]:
        """What blocks hold, on the host, in order; nothing else may run. Waits."""

    def close(self) -> None:
        """Let go of the memory."""


class CpuCopier:
    """Plain copies: they have ended when a call returns."""

    def __init__(self, layout: SlotLayout, memory: HostMemory | None, spans: DeviceSpans) -> None:
        self._layout = layout
        self._memory = memory
        self._spans = spans

    def store(self, blocks: Sequence[int], slots: Sequence[int]) -> list[Ticket]:
        """See `Copier`."""
        assert self._memory is not None
        with self._spans.span("copies out", "store", slots=len(slots)):
            for block, slot in zip(blocks, slots, strict=True):
                self._layout.read(block, self._memory.slot(slot))
        return [Ticket(len(blocks))]

    def store_rows(self, rows: Rows, key: bytes, slots: Sequence[int]) -> list[Ticket]:
        """See `Copier`."""
        assert self._memory is not None
        together = torch.empty(len(slots) * self._layout.slot_bytes, dtype=torch.uint8)
        with self._spans.span("copies out", "store rows", slots=len(slots)):
            rows.read(key, together)
            for slot, part in zip(slots, together.view(len(slots), -1), strict=True):
                self._memory.slot(slot).copy_(part)
        return [Ticket(1)]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See `Copier`."""
        self._layout.copy(torch.tensor(sources), torch.tensor(targets))

    def restore(self, slots: Sequence[int], blocks: Sequence[int]) -> list[Ticket]:
        """See `Copier`."""
        assert self._memory is not None
        begin = time.perf_counter()
        with self._spans.span("copies in", "restore", slots=len(slots)):
            for slot, block in zip(slots, blocks, strict=True):
                self._layout.write(self._memory.slot(slot), block)
        return [Ticket(len(blocks), time.perf_counter() - begin)]

    def load(self, slots: Sequence[int], nbytes: int) -> tuple[Tensor, Ticket]:
        """See `Copier`."""
        assert self._memory is not None
        with self._spans.span("copies in", "restore rows", slots=len(slots)):
            return torch.cat([run.memory.view(-1) for run in self._memory.runs(slots)])[:nbytes], Ticket(1)

    def contents(self, blocks: Sequence[int]) -> Iterator[Bytes]:
        """See `Copier`."""
        for block in blocks:
            slot = torch.empty(self._layout.slot_bytes, dtype=torch.uint8)
            self._layout.read(block, slot)
            yield slot.numpy().data

    def close(self) -> None:
        """See `Copier`."""
        self._layout = SlotLayout(())


class _Enqueued(Ticket):
    """event: recorded behind the copies. then: called once, when they have ended. times: pairs of events around
    what counts as the copies' time."""

    def __init__(self, count: int, then: Callable[[], None] | None = None) -> None:
        super().__init__(count)
        self.event = _event()
        self.times: list[tuple[Any, Any]] = []
        self._then = then

    def ended(self) -> bool:
        if not self.event.query():
            return False
        then, self._then = self._then, None
        if then is not None:
            then()
        if self.times:
            self.seconds = sum(begin.elapsed_time(end) for begin, end in self.times) / 1e3
            self.times.clear()
        return True

    def wait(self) -> None:
        self.event.synchronize()


class Ring:
    """`size` places handed out in order and given back in the same order."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._head = 0
        self._used = 0
        self._taken: deque[int] = deque()

    def take(self, count: int, *, whole: bool = False) -> tuple[int, int] | None:
        """(first, how many) of up to `count` places that lie side by side; `whole`: all of them or None."""
        if not self._used:
            self._head = 0
        skip = self.size - self._head if whole and count > self.size - self._head else 0
        first = 0 if skip else self._head
        got = min(count, self.size - self._used - skip, self.size - first)
        if got < (count if whole else 1):
            return None
        self._head = (first + got) % self.size
        self._used += skip + got
        self._taken.append(skip + got)
        return first, got

    def give_back(self) -> None:
        """The places that were taken first."""
        self._used -= self._taken.popleft()


class GpuCopier:
    """Through staging, so that each direction is one gather or scatter and few large copies.

    store_slots: of the ring that what leaves is gathered into, on the stream that last used it; a copy on the
    outward stream empties it. restore_slots: of staging that what comes back is copied to and scattered from, both
    on the inward stream, piece by piece.
    """

    def __init__(
        self,
        layout: SlotLayout,
        memory: HostMemory | None,
        device: torch.device,
        spans: DeviceSpans,
        store_slots: int = 0,
        restore_slots: int = 0,
    ) -> None:
        self._layout = layout
        self._memory = memory
        self._device = device
        self._spans = spans
        self._out, self._in = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
        self._ring = Ring(store_slots)
        shape = (store_slots + restore_slots, layout.slot_bytes)
        staging = torch.empty(shape if memory is not None else (0, layout.slot_bytes), dtype=torch.uint8, device=device)
        self._leaving, self._coming = staging[:store_slots], staging[store_slots:]
        self._reads: deque[tuple[frozenset[int], Any]] = deque()  # blocks, until these events

    def warm(self) -> None:
        """Run each operation once on block 0, which keeps its content: the first use of a kernel takes long."""
        self.copy([0], [0])
        for stream in (torch.cuda.current_stream(self._device), self._in):
            if self._memory is None:
                break
            with torch.cuda.stream(stream):
                block = self._upload([0])
                self._layout.gather(block, self._leaving[:1])
                self._layout.scatter(self._leaving[:1], block)
                torch.empty(_LOADED_BYTES, dtype=torch.uint8, device=self._device)
        torch.cuda.synchronize(self._device)

    def _upload(self, numbers: Sequence[int]) -> Tensor:
        (there,) = upload([np.asarray(numbers, np.int32)], self._device)
        return there.long()

    def store(self, blocks: Sequence[int], slots: Sequence[int]) -> list[Ticket]:
        """See `Copier`."""
        at, tickets = 0, []
        while at < len(blocks) and (place := self._ring.take(len(blocks) - at)) is not None:
            first, count = place
            mine, staged = blocks[at : at + count], self._leaving[first : first + count]

            def gather(mine: Sequence[int] = mine, staged: Tensor = staged) -> None:
                self._layout.gather(self._upload(mine), staged)
                self._note_read(mine)

            tickets.append(self._to_host(gather, staged, slots[at : at + count], count))
            at += count
        return tickets

    def store_rows(self, rows: Rows, key: bytes, slots: Sequence[int]) -> list[Ticket]:
        """See `Copier`."""
        place = self._ring.take(len(slots), whole=True)
        if place is None:
            return []
        staged = self._leaving[place[0] : place[0] + place[1]]
        with rows.on_stream():
            return [self._to_host(lambda: rows.read(key, staged.view(-1)), staged, slots, 1)]

    def _to_host(self, gather: Callable[[], None], staged: Tensor, slots: Sequence[int], count: int) -> Ticket:
        """Gather on the current stream, then copy to the slots on the outward one."""
        assert self._memory is not None
        ticket = _Enqueued(count, self._ring.give_back)
        try:
            gather()
            self._out.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._out), self._spans.span("copies out", "store", slots=len(slots)):
                for first, memory in self._memory.runs(slots):
                    memory.copy_(staged[first : first + len(memory)], non_blocking=True)
        except Exception as error:
            self._failed(ticket, error)
            self._out.wait_stream(torch.cuda.current_stream(self._device))  # the gather may have begun
        ticket.event.record(self._out)
        return ticket

    def _failed(self, ticket: Ticket, error: Exception) -> None:
        if is_lost(error):
            raise error
        logger.warning("a copy to or from the host's memory failed", exc_info=error)
        ticket.failed = True

    def _note_read(self, blocks: Sequence[int]) -> None:
        """The current stream reads these blocks: what is restored into them has to wait until it has."""
        if self._memory is None:
            return
        self._forget_reads()
        event = _event()
        event.record()
        self._reads.append((frozenset(blocks), event))

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """See `Copier`."""
        both = self._upload([*sources, *targets])
        self._layout.copy(both[: len(sources)], both[len(sources) :])
        self._note_read(sources)

    def restore(self, slots: Sequence[int], blocks: Sequence[int]) -> list[Ticket]:
        """See `Copier`."""
        self._forget_reads()
        step = len(self._coming)
        if all(read.isdisjoint(blocks) for read, _ in self._reads):
            # What comes first is dealt with while the rest is copied. Pieces that wait would keep others from that.
            step = min(step, max(_PIECE_BYTES // self._layout.slot_bytes, 1))
        with torch.cuda.stream(self._in):
            return [self._restore(slots[at : at + step], blocks[at : at + step]) for at in range(0, len(slots), step)]

    def _restore(self, slots: Sequence[int], blocks: Sequence[int]) -> Ticket:
        assert self._memory is not None
        ticket = _Enqueued(len(slots))
        marks = [_event(timing=True) for _ in range(4)]
        try:
            marks[0].record(self._in)
            with self._spans.span("copies in", "restore", slots=len(slots)):
                for first, memory in self._memory.runs(slots):
                    self._coming[first : first + len(memory)].copy_(memory, non_blocking=True)
            marks[1].record(self._in)
            self._wait_for_reads(blocks)
            marks[2].record(self._in)
            self._layout.scatter(self._coming[: len(slots)], self._upload(blocks))
            marks[3].record(self._in)
            ticket.times = [(marks[0], marks[1]), (marks[2], marks[3])]
        except Exception as error:
            self._failed(ticket, error)
        ticket.event.record(self._in)
        return ticket

    def _forget_reads(self) -> None:
        while self._reads and self._reads[0][1].query():
            self._reads.popleft()

    def _wait_for_reads(self, blocks: Sequence[int]) -> None:
        for read, event in self._reads:
            if not read.isdisjoint(blocks):
                self._in.wait_event(event)

    def load(self, slots: Sequence[int], nbytes: int) -> tuple[Tensor, Ticket]:
        """See `Copier`."""
        assert self._memory is not None
        user = torch.cuda.current_stream(self._device)
        ticket = _Enqueued(1)
        with torch.cuda.stream(self._in), self._spans.span("copies in", "restore rows", slots=len(slots)):
            there = torch.empty((len(slots), self._layout.slot_bytes), dtype=torch.uint8, device=self._device)
            for first, memory in self._memory.runs(slots):
                there[first : first + len(memory)].copy_(memory, non_blocking=True)
            ticket.event.record(self._in)
        there.record_stream(user)
        user.wait_event(ticket.event)
        return there.view(-1)[:nbytes], ticket

    def contents(self, blocks: Sequence[int]) -> Iterator[Bytes]:
        """See `Copier`."""
        torch.cuda.synchronize(self._device)
        step = len(self._leaving)
        for at in range(0, len(blocks), step):
            mine = blocks[at : at + step]
            staged = self._leaving[: len(mine)]
            self._layout.gather(self._upload(mine), staged)
            for content in staged.cpu().numpy():
                yield content.data

    def close(self) -> None:
        """See `Copier`."""
        self._layout = SlotLayout(())
        self._leaving = self._coming = torch.empty(0)


def _event(*, timing: bool = False) -> Any:
    return torch.cuda.Event(enable_timing=timing)  # type: ignore[no-untyped-call]
