"""PrefixCache: which block holds the KV of which token prefix.

Keys are chained (`hashing.block_key`): a key stands for the block's tokens and for everything
before them, media included. A hit still compares the block's token ids, so that even a collision
of keys cannot give another request's tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple, Protocol

from mm_core.cache.blocks import BlockPool
from mm_core.cache.layout import Layout
from mm_core.hashing import ROOT

# Of the blocks behind the same one so many are looked at for a partly equal one, the latest first.
MOST_COMPARED = 16


class MediaTag(NamedTuple):
    """An item as the caches know it."""

    key: bytes
    uuid: str | None = None


class BlockContent(NamedTuple):
    """A full block's key and the token ids it was computed from; what else is known of it.

    parent: key of the block before it, `hashing.ROOT` for the first. media: items from the prompt's start to this
    block's end; the last `touches` of them lie in this block. salt: of the request. encoder_cost: what encoding this
    block's share of its items costs, in the encoder's units. number: of blocks before it. layout: of
    the sequence that computed it, where that is known.
    """

    key: bytes
    token_ids: tuple[int, ...]
    parent: bytes = ROOT
    media: tuple[MediaTag, ...] = ()
    touches: int = 0
    salt: str | None = None
    encoder_cost: float = 0.0
    number: int = 0
    layout: Layout | None = None


class PrefixObserver(Protocol):
    """Told of what becomes findable and ceases to be, in the engine's loop: it must not linger."""

    def published(self, block: int, content: BlockContent) -> None:
        """The block's content is findable from now on."""

    def forgotten(self, block: int, content: BlockContent, evicted: bool) -> None:
        """It is not any more. evicted: somebody else gets the block at once, and no step in flight touches it; what
        is in it now can be read by the step that is being scheduled, before that writes. Else it was given up."""


class PrefixCache:
    """Finds and publishes full blocks of a pool.

    observers: told of each publication and of its end. `published` grows with every publication: tells whether a
    lookup can have improved; `forgotten` with every block that is not findable any more.
    """

    def __init__(self, pool: BlockPool) -> None:
        self.published = 0
        self.forgotten = 0
        self.observers: list[PrefixObserver] = []
        self._pool = pool
        self._by_key: dict[bytes, int] = {}
        self._content: dict[int, BlockContent] = {}
        self._children: dict[bytes, dict[int, None]] = {}  # key of a parent → published blocks behind it
        pool.on_forget = self._forgotten

    def __len__(self) -> int:
        return len(self._by_key)

    def find(self, key: bytes) -> int | None:
        """The block published under a key. Whoever shares it compares the token ids too: see `content`."""
        return self._by_key.get(key)

    def content(self, block: int) -> BlockContent | None:
        """What a published block holds; None if it is not published."""
        return self._content.get(block)

    def contents(self) -> list[tuple[int, BlockContent]]:
        """All published blocks, first published first."""
        return list(self._content.items())

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

    def most_alike(
        self, parent: bytes, token_ids: tuple[int, ...], layout: Layout, start: int, least: int
    ) -> tuple[int, int] | None:
        """A published block behind `parent` that begins with many of these tokens of a sequence, which begin at
        `start` in it, and with how many; None if with fewer than `least`. Another would have to have as many more in
        common to be looked for."""
        best, found = least - 1, None
        for block in islice(reversed(self._children.get(parent, {})), MOST_COMPARED):
            content = self._content[block]
            if content.layout is None or content.token_ids[: best + 1] != token_ids[: best + 1]:
                continue
            pairs = zip(content.token_ids, token_ids, strict=False)
            same = next((at for at, (a, b) in enumerate(pairs) if a != b), len(token_ids))
            same = content.layout.same_until(layout, start, start + same) - start
            if same > best:
                best, found = same, block
                if len(token_ids) - same < least:
                    break
        return None if found is None else (found, best)

    def branches(self, blocks: Sequence[int]) -> bool:
        """Whether something else is published behind a run of published blocks: then whoever shares them uses what
        others used too. The next turn of a chat does not, it alone goes on where the turn before it ended."""
        return bool(blocks) and self._content[blocks[-1]].key in self._children

    def publish(self, block: int, content: BlockContent) -> None:
        """Make a computed block findable. A key that is published already keeps its first block."""
        key, parent = content.key, content.parent
        if key in self._by_key:
            return
        self._by_key[key] = block
        self._content[block] = content
        before = self._by_key.get(parent, -1)
        joint = before >= 0 and len(content.media) - content.touches < len(self._content[before].media)
        self._pool.publish(block, before, content.encoder_cost, joint=joint)
        self.published += 1
        siblings = self._children.get(parent)
        if siblings is None:
            self._children[parent] = {block: None}
        else:
            siblings[block] = None
        for child in self._children.get(key, ()):  # left behind by another block with this content
            self._pool.adopt(child, block)
        if self.observers:
            for observer in self.observers:
                observer.published(block, content)

    def forget(self, block: int) -> None:
        """Give a published block's content up: nobody finds it any more. Those who use it go on; it is free when the
        last of them has left."""
        self._pool.unpublish(block)

    def drop(self, blocks: Iterable[int]) -> None:
        """`forget` those of the blocks that are published."""
        for block in blocks:
            if block in self._content:
                self.forget(block)

    def clear(self) -> None:
        """Forget every block that nobody uses and nobody pinned."""
        self._pool.drop_cached()

    def check_integrity(self) -> None:
        """Raise RuntimeError where what is findable is not what the pool keeps, or has lost its place."""
        if {self._content[block].key: block for block in self._content} != self._by_key:
            raise RuntimeError("a block is found under another key than its own")
        if sorted(self._content) != [b for b in range(self._pool.num_blocks) if self._pool.is_published(b)]:
            raise RuntimeError("a block is findable and not published, or the other way round")
        children = {block for siblings in self._children.values() for block in siblings}
        if children != self._content.keys() or not all(self._children.values()):
            raise RuntimeError("a published block is not among those behind its parent")

    def _forgotten(self, block: int, evicted: bool) -> None:
        content = self._content.pop(block)
        del self._by_key[content.key]
        self.forgotten += 1
        siblings = self._children[content.parent]
        del siblings[block]
        if not siblings:
            del self._children[content.parent]
        for child in self._children.get(content.key, ()):
            self._pool.adopt(child, -1)
        if self.observers:
            for observer in self.observers:
                observer.forgotten(block, content, evicted)
