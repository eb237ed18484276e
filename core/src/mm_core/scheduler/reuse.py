"""BlockReuse: which of a sequence's blocks are there already, and who computes which one now."""

from __future__ import annotations

from mm_core.cache.blocks import BlockPool
from mm_core.cache.prefix import BlockContent, PrefixCache
from mm_core.hashing import ROOT, Hasher
from mm_core.scheduler.policy import Candidate
from mm_core.scheduler.sequence import Sequence


class BlockReuse:
    """The prefix cache as the scheduler sees it. Not enabled: nothing is found, published or claimed. copy_tokens: see
    `SchedulerConfig`.

    A claim says that a running sequence is about to compute a block, so that another which wants the
    same one waits and shares it. dropped_claims grows whenever that may have come to its end.
    """

    def __init__(self, pool: BlockPool, hasher: Hasher, *, enabled: bool, copy_tokens: int = 0) -> None:
        self.prefix = PrefixCache(pool)
        self.dropped_claims = 0
        self._block_size = pool.block_size
        self._hasher = hasher
        self._enabled = enabled
        self._copy_tokens = copy_tokens
        self._claims: dict[bytes, Sequence] = {}  # block key → the sequence about to compute it

    @property
    def owners(self) -> list[Sequence]:
        """Sequences that others may wait for."""
        return list(self._claims.values())

    def _usable(self, seq: Sequence) -> int:
        """Full blocks that may be reused: the last token is always computed, it gives the logits."""
        return (seq.num_tokens - 1) // self._block_size

    def look_up(self, seq: Sequence) -> int:
        """How many leading blocks are published, remembered until something is published or forgotten."""
        if not self._enabled:
            return 0
        version = (self.prefix.published, self.prefix.forgotten)
        if seq.seen_version != version:
            usable = self._usable(seq)
            contents = seq.fill_contents(usable, self._block_size, self._hasher)
            known = seq.seen_hits if seq.seen_version[1] == version[1] else 0
            seq.seen_hits = known + len(self.prefix.lookup(contents, known, usable))
            seq.seen_version = version
        return seq.seen_hits

    def measure(self, sequences: list[Sequence], step: int) -> list[Candidate]:
        """Waiting sequences as a policy sees them in a step. What each would compute first: from an item's rows, else
        a block; whether these rows are there does not matter, those who read them stand together while they are."""
        size, look_up = self._block_size, self.look_up
        version = (self.prefix.published, self.prefix.forgotten)
        found: list[Candidate] = []
        for seq in sequences:
            hits = seq.seen_hits if seq.seen_version == version else look_up(seq)
            cached, group = hits * size, b""
            if seq.source is not None:
                source = self.find_source(seq)
                cached += seq.source.num_tokens if source else 0
                wanted = () if source else seq.source.ranges
            else:
                wanted = seq.request.ranges if cached < seq.media_end else ()
            for r in wanted:
                if r.end > cached or seq.source is not None:
                    group = r.feature.key
                    break
            else:
                if hits < len(seq.contents):
                    group = seq.contents[hits].key
            found.append(Candidate(seq.seq_id, cached, step - seq.waiting_since, group))
        return found

    def partly_found(self, seq: Sequence, hits: int) -> tuple[int, int] | None:
        """A block that begins as the first one behind `hits` found ones, and with how many of its tokens: these need
        only be copied. None where that does not pay."""
        start = hits * self._block_size
        end = min(start + self._block_size, seq.num_tokens - 1)  # the last token is always computed
        least = self._copy_tokens
        if start < seq.media_end <= end:  # else a whole item would be encoded for what is in this block of it
            least = min(least, seq.media_end - start)
        if not self._enabled or not least or end - start < least:
            return None
        parent = seq.contents[hits - 1].key if hits else ROOT
        return self.prefix.most_alike(parent, tuple(seq.token_ids[start:end]), seq.layout, start, least)

    def found(self, seq: Sequence) -> list[int]:
        """The blocks that `look_up` counts, not yet shared."""
        return self.prefix.lookup(seq.contents, 0, self.look_up(seq))

    def find_source(self, seq: Sequence) -> list[int]:
        """All blocks of its source, not yet shared; none where one is missing. Remembered as in `look_up`."""
        if not self._enabled:
            return []
        version = (self.prefix.published, self.prefix.forgotten)
        if seq.seen_source_version != version:
            if not seq.seen_source or seq.seen_source_version[1] != version[1]:
                seq.seen_source = self._look_up_source(seq)
            seq.seen_source_version = version
        return seq.seen_source

    def _look_up_source(self, seq: Sequence) -> list[int]:
        if seq.source is None or not self.prefix.lookup(seq.fill_source(1, self._hasher), 0, 1):
            return []  # the usual case: the other keys are not needed
        count = -(-seq.source.num_tokens // self._block_size)
        blocks = self.prefix.lookup(seq.fill_source(count, self._hasher))
        return blocks if len(blocks) == count else []

    def source_contents(self, seq: Sequence, count: int) -> list[BlockContent]:
        """Keys of the first `count` of its source's blocks."""
        return seq.fill_source(count, self._hasher)[:count] if self._enabled else []

    def awaits(self, seq: Sequence) -> bool:
        """Whether another sequence computes its source or its next block now."""
        hits = self.look_up(seq)
        if not self._claims:
            return False
        if seq.source is not None and not self.find_source(seq):
            first = seq.source_contents[0].key
            if self._claims.get(first, seq) is not seq:
                return True
        return hits < self._usable(seq) and self._claims.get(seq.contents[hits].key, seq) is not seq

    def claim(self, seq: Sequence) -> None:
        """The sequence computes what was not found, as far as nobody else does already."""
        if self._enabled and not seq.hidden:
            if seq.source_step:
                self._claims.setdefault(seq.source_contents[0].key, seq)
            for content in seq.contents[seq.num_published_blocks : self._usable(seq)]:
                self._claims.setdefault(content.key, seq)

    def publish(self, seq: Sequence, num_tokens: int) -> None:
        """Blocks filled by the first `num_tokens` tokens become findable: their ids are final now."""
        full = num_tokens // self._block_size
        if full <= seq.num_published_blocks or not self._enabled or seq.hidden:
            return
        contents, table = seq.fill_contents(full, self._block_size, self._hasher), seq.tables["self"]
        for index in range(seq.num_published_blocks, full):
            self.prefix.publish(table[index], contents[index])
            self._drop_claim(contents[index].key, seq)
        seq.num_published_blocks = full

    def publish_source(self, seq: Sequence) -> None:
        """Its source's blocks are computed: they become findable."""
        if self._enabled and not seq.hidden:
            table = seq.tables["cross"]
            for block, content in zip(table, seq.fill_source(len(table), self._hasher), strict=True):
                self.prefix.publish(block, content)
            self._drop_claim(seq.source_contents[0].key, seq)

    def hide(self, seq: Sequence) -> None:
        """Publish nothing more of a live sequence: what it holds was evicted on purpose."""
        seq.hidden = True
        self.drop_claims(seq)

    def drop_claims(self, seq: Sequence) -> None:
        """The sequence computes no more blocks."""
        if self._claims:
            for content in seq.source_contents[:1]:
                self._drop_claim(content.key, seq)
            for content in seq.contents[seq.num_published_blocks :]:
                self._drop_claim(content.key, seq)

    def _drop_claim(self, key: bytes, seq: Sequence) -> None:
        if self._claims.get(key) is seq:
            del self._claims[key]
            self.dropped_claims += 1
