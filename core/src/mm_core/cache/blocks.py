"""BlockPool: who holds which KV block. Bookkeeping only; the tensors live in the runner.

Every block is in exactly one state:

    free     no content worth keeping
    cached   nobody uses it, its content is published under a key; what is worth least is evicted first
    in use   one or more sequences hold it
    pending  given up while a step that may still read or write it is in flight
    pinned   nobody uses it, but it was asked to stay: neither free nor evictable
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence

# Worth of a block that nobody uses any more: of its encoder cost, how often it was found, the worth of what was
# evicted last, and a number that grows with every use.
BlockWorth = Callable[[float, int, float, int], float]


def by_last_use(encoder_cost: float, hits: int, clock: float, stamp: int) -> float:  # noqa: ARG001
    """Least recently used first."""
    return float(stamp)


class BlockPool:
    """A fixed number of KV blocks of `block_size` tokens each.

    on_forget is told a block's number when its content ceases to be findable, and whether somebody else gets the
    block at once (evicted), or the content was given up on purpose. worth: says what stays; a block can be found only
    through its parent, so it is never evicted after that.
    """

    def __init__(self, num_blocks: int, block_size: int, on_forget: Callable[[int, bool], None] | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.on_forget = on_forget
        self.worth: BlockWorth = by_last_use
        self.evictions = 0
        self._refs = [0] * num_blocks
        self._published = [False] * num_blocks
        self._free: deque[int] = deque(range(num_blocks))
        self._pins: dict[int, int] = {}  # block → how often it was pinned
        self._pinned: set[int] = set()  # of those, the ones that nobody uses
        self._pending: dict[int, int] = {}  # block → the step that must complete first
        self._steps: list[int] = []  # in flight, in order of launch
        # What is known of published blocks.
        self._parent = [-1] * num_blocks
        self._encoder_cost = [0.0] * num_blocks
        self._joint = [False] * num_blocks  # whether it goes on with an item of its parent's
        self._hits = [0] * num_blocks
        self._floor = [0.0] * num_blocks  # the most that it was worth, or a child of it
        # The cached ones.
        self._plain = [0.0] * num_blocks  # what it would be worth without its share of items
        self._children = [0] * num_blocks  # cached ones
        self._num_cached = 0
        self._order = [0] * num_blocks  # of its entry in the heap; 0: not cached
        self._heap: list[tuple[float, int, int]] = []  # (worth, order, block), with stale ones
        self._last_order = 0
        self._clock = 0.0
        self._stamp = 0
        self._weighed: dict[tuple[float, int], float] = {}  # of this stamp

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could hand out now: free ones and evictable cached ones."""
        return len(self._free) + self._num_cached

    @property
    def num_pending(self) -> int:
        """Blocks that come back when the steps in flight complete."""
        return len(self._pending)

    def num_cached(self, blocks: Iterable[int]) -> int:
        """How many of these blocks `share` would take from those that `allocate` could hand out."""
        order = self._order
        return sum(order[block] > 0 for block in blocks)

    def counts(self) -> dict[str, int]:
        """Blocks in each state; the values sum to `num_blocks`."""
        free, cached, pending, pinned = len(self._free), self._num_cached, len(self._pending), len(self._pinned)
        in_use = self.num_blocks - free - cached - pending - pinned  # `check_integrity` counts them
        return {"free": free, "cached": cached, "in_use": in_use, "pending": pending, "pinned": pinned}

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    # -- who holds what --------------------------------------------------------------------

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks for one holder, free ones first, then the cached ones of least worth; None if too few."""
        if count > self.num_available:
            return None
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        block = self._free.popleft() if self._free else self._evict()
        self._refs[block] = 1
        return block

    def share(self, blocks: Iterable[int], *, hit: bool = False) -> None:
        """One more holder for each block; those that nobody used come back into use. hit: it makes them worth more."""
        for block in blocks:
            if self._refs[block] == 0:
                if self._order[block]:
                    self._uncache(block)
                else:
                    self._pending.pop(block, None)
                    self._pinned.discard(block)
            self._refs[block] += 1
            self._hits[block] += hit

    def free(self, blocks: Sequence[int]) -> None:
        """One holder less for each block of a table."""
        for block in reversed(blocks):
            if self._refs[block] <= 0:
                raise RuntimeError(f"block {block} freed twice")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                if self._steps:
                    self._pending[block] = self._steps[-1]
                else:
                    self._settle(block)
        self._tick()

    def _settle(self, block: int) -> None:
        """Nobody uses the block, no step in flight touches it."""
        if not self._published[block]:
            self._free.append(block)
        elif block in self._pins:
            self._pinned.add(block)
        else:
            self._cache(block)

    def begin_step(self, step: int) -> None:
        """A step that may touch any block in use was launched."""
        self._steps.append(step)

    def complete_step(self, step: int) -> None:
        """The step and all before it are done: what waited for them is free or cached now."""
        self._steps = [s for s in self._steps if s > step]
        if not self._pending:
            return
        done = [block for block, last in self._pending.items() if last <= step]
        for block in done:
            del self._pending[block]
            self._settle(block)
        self._tick()

    # -- what is in them -------------------------------------------------------------------

    def publish(self, block: int, parent: int = -1, encoder_cost: float = 0.0, *, joint: bool = False) -> None:
        """The block's content is final and findable: keep it when its last holder leaves. parent: the published
        block before it. joint: some of an item lies in both."""
        self._published[block] = True
        self._parent[block] = parent
        self._encoder_cost[block] = encoder_cost
        self._joint[block] = joint

    def is_published(self, block: int) -> bool:
        """Whether the block's content is findable."""
        return self._published[block]

    def adopt(self, block: int, parent: int) -> None:
        """The published block before a published one is another now, in use; -1: there is none any more."""
        cached = self._order[block] > 0
        if cached and self._parent[block] >= 0:
            self._children[self._parent[block]] -= 1
        self._parent[block] = parent
        if parent >= 0:
            self._floor[parent] = max(self._floor[parent], self._floor[block])
            self._children[parent] += cached

    def unpublish(self, block: int) -> None:
        """The block's content is given up, pins and all: it is free as soon as nobody uses it."""
        self._pins.pop(block, None)
        if self._order[block] or block in self._pinned:
            if self._order[block]:
                self._uncache(block)
            self._pinned.discard(block)
            self._free.append(block)
        self._forget(block, evicted=False)

    def _forget(self, block: int, *, evicted: bool) -> None:
        self._published[block] = False
        self._hits[block], self._floor[block], self._parent[block] = 0, 0.0, -1
        if self.on_forget is not None:
            self.on_forget(block, evicted)

    def pin(self, block: int) -> None:
        """Keep a published block even where room is wanted, until it was unpinned as often. The caller bounds this:
        what is pinned is lost to sequences. `on_forget` ends all pins of a block."""
        if not self._published[block]:
            raise RuntimeError(f"block {block} is pinned though it holds nothing findable")
        self._pins[block] = self._pins.get(block, 0) + 1
        if self._order[block]:
            self._uncache(block)
            self._pinned.add(block)

    def unpin(self, block: int) -> None:
        """Undo one `pin`."""
        if block not in self._pins:
            raise RuntimeError(f"block {block} is unpinned though nobody pinned it")
        self._pins[block] -= 1
        if not self._pins[block]:
            del self._pins[block]
            if block in self._pinned:
                self._pinned.remove(block)
                self._cache(block)

    def surrender(self, count: int, spared: Collection[int] = ()) -> int:
        """Free up to `count` pinned blocks that nobody uses, ends of chains first, as if they had been evicted: for a
        sequence that could never run beside them, and will share the `spared` ones. How many there were."""
        given = 0
        while given < count:
            kept = {self._parent[block] for block in self._pinned}.union(spared)
            ends = [block for block in self._pinned if block not in kept]
            if not ends:
                break
            for block in ends[: count - given]:
                del self._pins[block]
                self._pinned.remove(block)
                self._free.append(block)
                self._forget(block, evicted=True)
                self.evictions += 1
                given += 1
        return given

    def drop_cached(self) -> list[int]:
        """Forget all published content that nobody uses and nobody pinned; returns the blocks."""
        idle = [block for block in range(self.num_blocks) if self._order[block]]
        pending = [block for block in self._pending if self._published[block] and block not in self._pins]
        dropped = [*idle, *pending]  # a pending one is free, not cached, when its step completes
        for block in dropped:
            self.unpublish(block)
        return dropped

    # -- what leaves first -----------------------------------------------------------------

    def _tick(self) -> None:
        self._stamp += 1
        self._weighed.clear()

    def _cache(self, block: int) -> None:
        """Nobody uses a published block: what it is worth decides how long it stays.

        A parent is never worth less than its child, and among equals what came first leaves first: tables are freed
        from the tail. So blocks that nobody could find do not outlive their parents.
        """
        cost, hits = self._encoder_cost[block], self._hits[block]
        own = self._weigh(cost, hits)
        self._plain[block] = self._weigh(0.0, hits) if cost else own
        worth = max(own, self._floor[block])
        self._num_cached += 1
        self._push(worth, block)
        parent = self._parent[block]
        if parent >= 0:
            self._children[parent] += 1
        while parent >= 0 and self._floor[parent] <= worth:
            if not self._order[parent]:
                self._floor[parent] = worth
                break  # in use, the usual case
            self._push(worth, parent)
            parent = self._parent[parent]

    def _weigh(self, encoder_cost: float, hits: int) -> float:
        key = encoder_cost, hits
        worth = self._weighed.get(key)
        if worth is None:
            worth = self._weighed[key] = self.worth(encoder_cost, hits, self._clock, self._stamp)
        return worth

    def _push(self, worth: float, block: int) -> None:
        if len(self._heap) > 2 * self._num_cached + 64:  # mostly stale
            self._heap = [item for item in self._heap if self._order[item[2]] == item[1]]
            heapq.heapify(self._heap)
        self._last_order += 1
        self._order[block] = self._last_order
        self._floor[block] = worth
        heapq.heappush(self._heap, (worth, self._last_order, block))

    def _uncache(self, block: int) -> None:
        self._order[block] = 0
        self._num_cached -= 1
        if self._parent[block] >= 0:
            self._children[self._parent[block]] -= 1

    def _evict(self) -> int:
        """The cached block of least worth, its content forgotten.

        What is left of an item has to be encoded again as a whole where its end is missing: it is worth no more than
        text then.
        """
        while True:
            worth, order, block = heapq.heappop(self._heap)
            if self._order[block] == order:
                break
        self._clock = max(self._clock, worth)
        self._uncache(block)
        parent = self._parent[block]
        last_of_item = parent >= 0 and self._joint[block] and self._order[parent] and not self._children[parent]
        if last_of_item and self._plain[parent] < self._floor[parent]:
            self._push(self._plain[parent], parent)
        self.evictions += 1
        self._forget(block, evicted=True)
        return block

    # -- checks ----------------------------------------------------------------------------

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise RuntimeError unless the states partition the blocks and the references match `tables`."""
        held = [0] * self.num_blocks
        for table in tables:
            for block in table:
                held[block] += 1
        if held != self._refs:
            wrong = [b for b in range(self.num_blocks) if held[b] != self._refs[b]]
            raise RuntimeError(f"blocks {wrong[:8]}: references differ from the sequences' tables")
        places = {block: (worth, order) for worth, order, block in self._heap if self._order[block] == order}
        idle = [*self._free, *places, *self._pending, *self._pinned]
        if len(idle) != len(set(idle)) or any(self._refs[b] for b in idle):
            raise RuntimeError("a block is in two states")
        if len(places) != self._num_cached or sum(map(bool, self._order)) != self._num_cached:
            raise RuntimeError("a cached block cannot be evicted, or is counted twice")
        if len(idle) + sum(1 for refs in self._refs if refs) != self.num_blocks:
            raise RuntimeError(f"blocks leaked: {self.counts()} of {self.num_blocks}")
        if any(self._published[b] for b in self._free) or any(not self._published[b] for b in places):
            raise RuntimeError("a free block is published or a cached one is not")
        if any(not self._published[b] for b in self._pins) or not self._pinned <= self._pins.keys():
            raise RuntimeError("a block is pinned that holds nothing findable, or kept without a pin")
        if any(b in places for b in self._pins):
            raise RuntimeError("a pinned block can be evicted")
        children = [0] * self.num_blocks
        for block in places:
            children[self._parent[block]] += self._parent[block] >= 0
        if children != self._children:
            raise RuntimeError("cached blocks behind another are miscounted")
        for block, place in places.items():
            if self._parent[block] in places and places[self._parent[block]] < place:
                raise RuntimeError(f"block {block} outlives the one through which it is found")
