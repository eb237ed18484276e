"""PrefixCache: which block holds the KV of which token prefix.

Keys are chained (`hashing.block_key`): a key stands for the block's tokens and for everything
before them, media included. A hit still compares the block's token ids, so that even a collision
of keys cannot give another request's tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mm_core.cache.blocks import BlockPool
from mm_core.hashing import ROOT


class MediaTag(NamedTuple):
    """An item as the caches know it."""

    key: bytes
    uuid: str | None = None


class BlockContent(NamedTuple):
    """A full block's key and the token ids it was computed from; what else is known of it.

    parent: key of the block before it, `hashing.ROOT` for the first. extra: what enters the key beside parent and
    ids, encoded. media: items from the prompt's start to this block's end; the last `touches` of them lie in this
    block. salt: of the request. encoder_cost: what encoding this block's share of its items costs, in the encoder's
    units.
    """

    key: bytes
    token_ids: tuple[int, ...]
    parent: bytes = ROOT
    extra: bytes = b""
    media: tuple[MediaTag, ...] = ()
    touches: int = 0
    salt: str | None = None
    encoder_cost: float = 0.0


class PrefixCache:
    """Finds and publishes full blocks of a pool."""

    def __init__(self, pool: BlockPool) -> None:
        self.published = 0  # grows with every publication: tells whether a lookup can have improved
        self.forgotten = 0  # grows with every block that is not findable any more
        self._pool = pool
        self._by_key: dict[bytes, int] = {}
        self._content: dict[int, BlockContent] = {}
        pool.on_evict = self._forget

    def __len__(self) -> int:
        return len(self._by_key)

    def lookup(self, contents: Sequence[BlockContent], first: int = 0, end: int | None = None) -> list[int]:
        """Blocks of the longest published run of contents[first:end], not yet shared."""
        blocks: list[int] = []
        for index in range(first, len(contents) if end is None else end):
            content = contents[index]
            block = self._by_key.get(content.key)
            if block is None or self._content[block].token_ids != content.token_ids:
                break
            blocks.append(block)
        return blocks

    def publish(self, block: int, content: BlockContent) -> None:
        """Make a computed block findable. A key that is published already keeps its first block."""
        if content.key in self._by_key:
            return
        self._by_key[content.key] = block
        self._content[block] = content
        self._pool.publish(block)
        self.published += 1

    def clear(self) -> None:
        """Forget every block that nobody uses."""
        self._pool.drop_cached()

    def _forget(self, block: int) -> None:
        content = self._content.pop(block)
        del self._by_key[content.key]
        self.forgotten += 1
