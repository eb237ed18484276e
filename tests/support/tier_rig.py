"""KV blocks, encoder rows and slots in host memory, with the real copies between them and no engine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm_core.runner.encoders import EncoderRows
from mm_core.runner.host_memory import HostMemory
from mm_core.runner.slots import SlotLayout
from mm_core.runner.spans import DeviceSpans
from mm_core.runner.transfers import Disk, TierOptions, TransfersRunner
from mm_core.scheduler.sequence import EncodeItem
from mm_core.scheduler.transfers import BlockRestore, BlockStore, TransferDone, Transfers
from mm_core.types import MediaFeature


@dataclass(frozen=True)
class Shape:
    """Of the KV cache; scales: there is a second store, uint8, as beside an fp8 one."""

    layers: int = 3
    blocks: int = 24
    block_size: int = 16
    heads: int = 2
    head_dim: int = 8
    dtype: torch.dtype = torch.float32
    scales: bool = False


class PlainEncoder:
    """Rows are the item's tensor."""

    hidden_size = 24

    def __call__(self, features: Sequence[MediaFeature]) -> list[Tensor]:
        return [feature.tensors["rows"] for feature in features]

    def cost(self, feature: MediaFeature) -> int:
        return feature.num_tokens


def item(key: bytes, rows: Tensor, stored: tuple[int, ...] = ()) -> EncodeItem:
    return EncodeItem(key, MediaFeature("image", len(rows), {"rows": rows}, key=key), stored)


class TierRig:
    """`slots` of host memory behind the blocks of `shape`."""

    def __init__(
        self,
        shape: Shape = Shape(),
        slots: int = 16,
        device: str = "cpu",
        checksums: bool = False,
        disk: Disk | None = None,
        staging: tuple[int, int] = (64, 64),
        spans: DeviceSpans | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.stores = tuple(make_stores(shape, self.device))
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.rows = EncoderRows(PlainEncoder(), "plain", 512, self.device, spans or DeviceSpans(None, self.device))
        self.slot_bytes = SlotLayout(self.stores).slot_bytes
        self.memory = HostMemory(slots * self.slot_bytes, self.slot_bytes, pinned=self.stream is not None)
        options = TierOptions(self.memory, checksums, disk, *staging)
        with self.on_stream():
            self.transfers = TransfersRunner(
                self.stores, self.rows, self.device, spans or DeviceSpans(None, self.device), options
            )
        self.rows.restore = self.transfers.load_rows

    def on_stream(self) -> Any:
        """The decoder's stream."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def launch(self, **orders: Any) -> None:
        """Order transfers, as a step does."""
        with self.on_stream(), torch.inference_mode():
            self.transfers.launch(Transfers(**{name: tuple(given) for name, given in orders.items()}))

    def finish(self) -> list[TransferDone]:
        """Wait for all that was ordered."""
        done: list[TransferDone] = []
        end = time.monotonic() + 60
        while self.transfers.pending:
            assert time.monotonic() < end, "orders that nobody was told of"
            done += self.transfers.poll(wait=True)
        return done

    def store(self, blocks: Sequence[int], slots: Sequence[int]) -> list[TransferDone]:
        """Store blocks and wait."""
        self.launch(stores=[BlockStore(name(b), b, s) for b, s in zip(blocks, slots, strict=True)])
        return self.finish()

    def restore(self, blocks: Sequence[int], slots: Sequence[int], places: Sequence[int] = ()) -> list[TransferDone]:
        """Restore blocks and wait."""
        given = [*places] or [None] * len(slots)
        orders = [BlockRestore(name(b), b, s, p) for b, s, p in zip(blocks, slots, given, strict=True)]
        self.launch(restores=orders)
        return self.finish()

    def content(self, block: int) -> list[Tensor]:
        """A copy of what a block holds, as bytes."""
        self.wait()
        return [store[:, :, block].clone().view(torch.uint8) for store in self.stores]

    def wipe(self, blocks: Sequence[int]) -> None:
        """Let a step overwrite blocks, behind what was launched."""
        with self.on_stream():
            for store in self.stores:
                store.view(torch.uint8)[:, :, list(blocks)] = 0xAB

    def wait(self) -> None:
        """For the device."""
        if self.stream is not None:
            torch.cuda.synchronize(self.device)

    def flip(self, slot: int, bit: int) -> None:
        """Damage a slot."""
        memory = self.memory.slot(slot)
        memory[bit // 8] ^= 1 << (bit % 8)

    def close(self) -> None:
        self.wait()
        self.transfers.close()


def name(block: int) -> bytes:
    return b"block %d" % block


def make_stores(shape: Shape, device: torch.device) -> list[Tensor]:
    """Random bytes."""
    outer = (shape.layers, 2, shape.blocks, shape.block_size, shape.heads)
    generator = torch.Generator(device).manual_seed(1)

    def noise(*sizes: int) -> Tensor:
        return torch.randint(0, 256, sizes, dtype=torch.uint8, device=device, generator=generator)

    stores = [noise(*outer, shape.head_dim * shape.dtype.itemsize).view(shape.dtype)]
    if shape.scales:
        stores.append(noise(*outer))
    return stores
