"""Layout: what a sequence's tokens are beside their ids, which decides whose keys and values they can share."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class PlacedItem(NamedTuple):
    """Tokens [offset, end) of a sequence stand for an item's rows."""

    key: bytes
    offset: int
    end: int


class Layout:
    """One for all blocks of a sequence. context: its salt, and what else all of its keys hold, encoded. positions:
    int32 [axes, n] of the prompt's tokens, None where all are their indices; an answer's are their indices plus
    `decode_delta`."""

    __slots__ = ("_decode_delta", "_positions", "_prompt_len", "context", "items")

    def __init__(
        self,
        context: bytes,
        items: tuple[PlacedItem, ...],
        positions: np.ndarray[Any, Any] | None,
        prompt_len: int,
        decode_delta: int,
    ) -> None:
        self.context = context
        self.items = items
        self._positions = positions
        self._prompt_len = prompt_len
        self._decode_delta = decode_delta

    def positions_in(self, start: int, end: int) -> bytes:
        """Positions of tokens [start, end), empty where they are start…end-1.

        The same tokens may stand elsewhere: an answer to a long video continues after its last frame,
        the same answer within the next turn's prompt after its picture's width (M-RoPE).
        """
        if self._positions is None or (start >= self._prompt_len and self._decode_delta == 0):
            return b""
        block = self._place(start, end)
        return b"" if (block == np.arange(start, end)).all() else block.astype(np.int32).tobytes()

    def _place(self, start: int, end: int) -> np.ndarray[Any, Any]:
        """Positions of tokens [start, end), [axes, n] or [n]."""
        own = self._positions
        if own is None:
            return np.arange(start, end, dtype=np.int32)
        cut = min(max(start, self._prompt_len), end)
        after = np.arange(cut, end, dtype=np.int32) + np.int32(self._decode_delta)
        return np.concatenate([own[:, start:cut], np.broadcast_to(after, (len(own), end - cut))], axis=1)

    def same_until(self, other: Layout, start: int, end: int) -> int:
        """The first of tokens [start, end) that is not the same in both beside its id; `end` if all are."""
        if self.context != other.context:
            return start
        mine, theirs = self._items_in(start, end), other._items_in(start, end)
        for item in mine ^ theirs:
            twin = next((t for t in (theirs if item in mine else mine) if t[:2] == item[:2]), None)
            end = min(end, max(item.offset, start) if twin is None else min(item.end, twin.end))
        if end > start and not (self._positions is None and other._positions is None):
            same_place = np.atleast_2d(self._place(start, end) == other._place(start, end)).all(axis=0)
            end = start + int(same_place.argmin()) if not same_place.all() else end
        return end

    def _items_in(self, start: int, end: int) -> set[PlacedItem]:
        return {item for item in self.items if item.offset < end and item.end > start}
