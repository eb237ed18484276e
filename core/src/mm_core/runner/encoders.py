"""The encoder's outputs on the device, and the packed passes that make them, on a stream of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mm_core.errors import MMError, PluginError
from mm_core.hookspecs import Encoder
from mm_core.runner.batch import Ints, MediaPlaces
from mm_core.runner.memory import is_lost, is_out_of_memory
from mm_core.runner.spans import DeviceSpans
from mm_core.runner.stopwatch import Stopwatch
from mm_core.scheduler.sequence import EncodeItem
from mm_core.types import MediaFeature

logger = logging.getLogger(__name__)

# A CPU is 10 to 20 % slower where a pack's activations outgrow its caches (measured with 1,024 to
# 8,192 patches of width 512); below, larger packs save calls.
_CPU_PACK_COST = 4096
_REHEARSED = (1, 2, 4, 8, 16)  # items of one size together


class EncoderRows:
    """A slab of `capacity` rows. Which item may stay, and for how long, is the EncoderCache's business.

    An item's rows lie anywhere in the slab. They are given to another item only after the last step
    that reads them was taken in (an item is evicted only when nobody holds it), so no pass can
    overwrite rows that a decoder still reads.
    """

    def __init__(self, encoder: Encoder, family: str, capacity: int, device: torch.device, spans: DeviceSpans) -> None:
        self.calls = 0
        self.clock = Stopwatch(device)
        self.restore: Callable[[Sequence[int], int], Tensor | None] | None = None  # `TransfersRunner.load_rows`
        self._damaged: set[bytes] = set()
        self._encoder = encoder
        self._family = family
        self._device = device
        self._spans = spans
        self._pack_cost = _CPU_PACK_COST if device.type == "cpu" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        dtype = next((p.dtype for p in _parameters(encoder) if p.is_floating_point()), torch.float32)
        self.slab = torch.empty((capacity, encoder.hidden_size), dtype=dtype, device=device)
        self.places = MediaPlaces()
        self._free: Ints = np.arange(capacity, dtype=np.int32)[::-1].copy()  # a stack
        self._num_free = capacity
        self._ready: dict[bytes, torch.cuda.Event] = {}  # of items that no decoder has waited for yet

    def __contains__(self, key: bytes) -> bool:
        return key in self.places.by_key

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.slab.shape[1] * self.slab.element_size()

    def rehearse(self, examples: Sequence[MediaFeature]) -> None:
        """Let the encoder capture passes, and run it on packs of each example, so that it does."""
        allow = getattr(self._encoder, "use_graphs", None)
        if self._stream is None or allow is None:
            return
        allow()
        with torch.cuda.stream(self._stream):
            for feature in examples:
                for count in _REHEARSED:
                    for _ in range(3):
                        self._encoder([self._on_device(feature)] * count)

    def reserve(self, examples: Sequence[MediaFeature], budget: int) -> None:
        """Run as many of each example as the budget allows, so that torch holds the memory they take."""
        if self._stream is None:
            return
        with torch.cuda.stream(self._stream):
            for feature in examples:
                count = max(budget // max(self._encoder.cost(feature), 1), 1)
                self._encoder([self._on_device(feature)] * count)

    def release(self) -> None:
        """Drop all rows and the encoder."""
        self.places.by_key.clear()
        self.restore = None
        del self._encoder, self.slab

    def drop(self, keys: Sequence[bytes]) -> None:
        """Forget rows that the cache evicted."""
        for key in keys:
            self.places.errors.pop(key, None)
            self._ready.pop(key, None)
            rows = self.places.by_key.pop(key, None)
            if rows is not None:
                self._free[self._num_free : self._num_free + len(rows)] = rows
                self._num_free += len(rows)

    def wait_for(self, keys: Iterable[bytes]) -> None:
        """Make the current stream wait until the rows of these items are there."""
        events = {event for key in keys if (event := self._ready.pop(key, None)) is not None}
        for event in events:
            torch.cuda.current_stream(self._device).wait_event(event)

    def encode(self, items: Sequence[EncodeItem]) -> dict[bytes, MMError]:
        """Items in packed passes; where one fails, its items one by one, so that a bad item fails alone. Stored
        ones are copied back; where what is stored is damaged, they are encoded.

        Returns the items that failed, with their errors.
        """
        failed: dict[bytes, MMError] = {}
        with self.on_stream():
            for pack in self._packs([item for item in items if not item.stored or not self._restore(item)]):
                failed.update(self._encode_pack(pack))
        self.places.errors.update(failed)
        return failed

    def on_stream(self) -> AbstractContextManager[Any]:
        """What writes rows, or reads them for a copy, runs on the encoder's stream."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def read(self, key: bytes, into: Tensor) -> None:
        """An item's rows, one after another, to uint8 [at least as long] on their device, on the current stream."""
        rows, hidden = self.places.by_key[key], self.slab.shape[1]
        found = into[: len(rows) * self.row_bytes].view(self.slab.dtype).view(len(rows), hidden)
        torch.index_select(self.slab, 0, self._index(rows), out=found)

    def _restore(self, item: EncodeItem) -> bool:
        """Copy an item's rows back from the host's memory; False where they are damaged."""
        count = item.feature.num_tokens
        assert self.restore is not None, "rows are stored where there is a host tier"
        found = self.restore(item.stored, count * self.row_bytes)
        if found is None:
            self._damaged.add(item.key)
            return False
        self._store([item], [found.view(self.slab.dtype).view(count, -1)])
        return True

    def take_damaged(self) -> frozenset[bytes]:
        """Items since the last call whose stored rows were damaged: they were encoded."""
        damaged, self._damaged = frozenset(self._damaged), set()
        return damaged

    def _packs(self, items: Sequence[EncodeItem]) -> Iterator[list[EncodeItem]]:
        """All items together on a GPU; on a CPU as many as its caches like."""
        pack: list[EncodeItem] = []
        cost = 0
        for item in items:
            cost += self._encoder.cost(item.feature)
            if pack and self._pack_cost is not None and cost > self._pack_cost:
                yield pack
                pack, cost = [], self._encoder.cost(item.feature)
            pack.append(item)
        if pack:
            yield pack

    def _encode_pack(self, items: Sequence[EncodeItem]) -> dict[bytes, MMError]:
        try:
            cost = sum(self._encoder.cost(item.feature) for item in items)
            with self._spans.span("encoder", "encode", items=len(items), cost=cost), self.clock.running():
                self._encode(items)
            return {}
        except Exception as error:
            if is_out_of_memory(error) or is_lost(error):  # no item's fault
                raise
            if len(items) == 1:
                return {items[0].key: self._explain(error)}
        failed: dict[bytes, MMError] = {}
        for item in items:
            failed.update(self._encode_pack([item]))
        return failed

    def _encode(self, items: Sequence[EncodeItem]) -> None:
        features = [self._on_device(item.feature) for item in items]
        outputs = self._encoder(features)
        self.calls += 1
        if len(outputs) != len(items):
            raise PluginError(f"Encoder of family {self._family!r} gave {len(outputs)} outputs for {len(items)} items.")
        for item, rows in zip(items, outputs, strict=True):
            wanted = (item.feature.num_tokens, self._encoder.hidden_size)
            if tuple(rows.shape) != wanted:
                raise PluginError(
                    f"Encoder of family {self._family!r} gave rows of shape {tuple(rows.shape)} for an item "
                    f"that promised {wanted}. Processor and encoder of the plugin disagree."
                )
        self._store(items, outputs)

    def _on_device(self, feature: MediaFeature) -> MediaFeature:
        if self._stream is None:
            return feature
        # From pinned memory this does not wait; the pipeline pins.
        return replace(
            feature, tensors={name: t.to(self._device, non_blocking=True) for name, t in feature.tensors.items()}
        )

    def _store(self, items: Sequence[EncodeItem], outputs: Sequence[Tensor]) -> None:
        total = sum(len(rows) for rows in outputs)
        if total > self._num_free:
            raise RuntimeError(f"the encoder's slab has {self._num_free} rows free, {total} are wanted")
        top = self._num_free
        taken = self._free[top - total : top].copy()
        self.slab.index_copy_(0, self._index(taken), torch.cat(tuple(outputs)).to(self.slab.dtype))
        event = None
        if self._stream is not None:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        self._num_free -= total
        bounds = np.cumsum([len(rows) for rows in outputs])[:-1]
        for item, rows in zip(items, np.split(taken, bounds), strict=True):
            self.places.by_key[item.key] = rows
            self.places.errors.pop(item.key, None)
            if event is not None:
                self._ready[item.key] = event

    def _index(self, rows: Ints) -> Tensor:
        """[n] int64 on the device."""
        index = torch.from_numpy(rows.astype(np.int64))
        return index if self._stream is None else index.pin_memory().to(self._device, non_blocking=True)

    def _explain(self, error: Exception) -> MMError:
        if isinstance(error, MMError):
            return error
        logger.error("encoder of family %s failed", self._family, exc_info=error)
        fault = PluginError(
            f"Encoder of family {self._family!r} failed with {type(error).__name__}. The log has the "
            "details; report it to the plugin's author."
        )
        fault.__cause__ = error
        return fault


def _parameters(encoder: Any) -> Iterable[Tensor]:
    found = getattr(encoder, "parameters", None)
    return found() if callable(found) else ()
