"""The encoder's outputs on the device, and the packed pass that makes them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mm_core.errors import MMError, PluginError
from mm_core.hookspecs import Encoder
from mm_core.scheduler.sequence import EncodeItem

logger = logging.getLogger(__name__)

# A CPU is 10 to 20 % slower where a pack's activations outgrow its caches (measured with 1,024 to
# 8,192 patches of width 512); below, larger packs save calls.
_CPU_PACK_COST = 4096


class EncoderRows:
    """Rows by media key. What may stay, and for how long, is the EncoderCache's business."""

    def __init__(self, encoder: Encoder, family: str, device: torch.device) -> None:
        self.calls = 0
        self._encoder = encoder
        self._family = family
        self._pack_cost = _CPU_PACK_COST if device.type == "cpu" else None
        self._rows: dict[bytes, Tensor] = {}

    def __getitem__(self, key: bytes) -> Tensor:
        return self._rows[key]

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def release(self) -> None:
        """Drop all rows and the encoder."""
        self._rows.clear()
        del self._encoder

    def drop(self, keys: Sequence[bytes]) -> None:
        """Forget rows that the cache evicted."""
        for key in keys:
            self._rows.pop(key, None)

    def encode(self, items: Sequence[EncodeItem]) -> dict[bytes, MMError]:
        """Items in packed passes; where one fails, its items one by one, so that a bad item fails alone.

        Returns the items that failed, with their errors.
        """
        failed: dict[bytes, MMError] = {}
        for pack in self._packs(items):
            failed.update(self._encode_pack(pack))
        return failed

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
            self._encode(items)
            return {}
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if len(items) == 1:
                return {items[0].key: self._explain(error)}
        failed: dict[bytes, MMError] = {}
        for item in items:
            failed.update(self._encode_pack([item]))
        return failed

    def _encode(self, items: Sequence[EncodeItem]) -> None:
        outputs = self._encoder([item.feature for item in items])
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
            # A view would keep the whole pack alive until its last item is evicted.
            shared = rows.untyped_storage().nbytes() > rows.nbytes
            self._rows[item.key] = rows.clone() if shared else rows

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
