"""BlockPool: who holds which KV block. Bookkeeping only; the tensors live in the runner.

Every block is in exactly one state:

    free     no content worth keeping
    cached   nobody uses it, its content is published under a key; evicted oldest first
    in use   one or more sequences hold it
    pending  given up while a step that may still read or write it is in flight
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence


class BlockPool:
    """A fixed number of KV blocks of `block_size` tokens each.

    on_evict is told a block's number when its published content is about to be overwritten.
    """

    def __init__(self, num_blocks: int, block_size: int, on_evict: Callable[[int], None] | None = None) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.on_evict = on_evict
        self.evictions = 0
        self._refs = [0] * num_blocks
        self._published = [False] * num_blocks
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._pending: dict[int, int] = {}  # block → the step that must complete first
        self._steps: list[int] = []  # in flight, in order of launch

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` could hand out now: free ones and evictable cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_pending(self) -> int:
        """Blocks that come back when the steps in flight complete."""
        return len(self._pending)

    def num_cached(self, blocks: Iterable[int]) -> int:
        """How many of these blocks `share` would take from those that `allocate` could hand out."""
        return sum(block in self._cached for block in blocks)

    def counts(self) -> dict[str, int]:
        """Blocks in each state; the values sum to `num_blocks`."""
        free, cached, pending = len(self._free), len(self._cached), len(self._pending)
        in_use = self.num_blocks - free - cached - pending  # `check_integrity` counts them
        return {"free": free, "cached": cached, "in_use": in_use, "pending": pending}

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks for one holder, free ones first, then the oldest cached; None if too few."""
        if count > self.num_available:
            return None
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if self._free:
            block = self._free.popleft()
        else:
            block, _ = self._cached.popitem(last=False)
            self.evictions += 1
            self._published[block] = False
            if self.on_evict is not None:
                self.on_evict(block)
        self._refs[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """One more holder for each block; cached and pending ones come back into use."""
        for block in blocks:
            if self._refs[block] == 0:
                self._cached.pop(block, None)
                self._pending.pop(block, None)
            self._refs[block] += 1

    def publish(self, block: int) -> None:
        """The block's content is final and findable: keep it when its last holder leaves."""
        self._published[block] = True

    def free(self, blocks: Sequence[int]) -> None:
        """One holder less for each block of a table.

        In reverse order, so that a sequence's tail is evicted before its head: the head is what
        other sequences can share.
        """
        for block in reversed(blocks):
            if self._refs[block] <= 0:
                raise RuntimeError(f"block {block} freed twice")
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._retire(block)

    def _retire(self, block: int) -> None:
        if self._steps:
            self._pending[block] = self._steps[-1]
        elif self._published[block]:
            self._cached[block] = None
        else:
            self._free.append(block)

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
            if self._published[block]:
                self._cached[block] = None
            else:
                self._free.append(block)

    def drop_cached(self) -> list[int]:
        """Forget all published content that nobody uses; returns the blocks."""
        pending = [block for block in self._pending if self._published[block]]
        dropped = [*self._cached, *pending]  # a pending one is free, not cached, when its step completes
        for block in dropped:
            self._published[block] = False
            if self.on_evict is not None:
                self.on_evict(block)
        self._free.extend(self._cached)
        self._cached.clear()
        return dropped

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raise RuntimeError unless the states partition the blocks and the references match `tables`."""
        held = [0] * self.num_blocks
        for table in tables:
            for block in table:
                held[block] += 1
        if held != self._refs:
            wrong = [b for b in range(self.num_blocks) if held[b] != self._refs[b]]
            raise RuntimeError(f"blocks {wrong[:8]}: references differ from the sequences' tables")
        idle = [*self._free, *self._cached, *self._pending]
        if len(idle) != len(set(idle)) or any(self._refs[b] for b in idle):
            raise RuntimeError("a block is in two states")
        if len(idle) + sum(1 for refs in self._refs if refs) != self.num_blocks:
            raise RuntimeError(f"blocks leaked: {self.counts()} of {self.num_blocks}")
        if any(self._published[b] for b in self._free) or any(not self._published[b] for b in self._cached):
            raise RuntimeError("a free block is published or a cached one is not")
