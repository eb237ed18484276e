"""The kinds of steps that requests bring, made up: what a warm-up runs before there is any request."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from mm_core.config import SamplingParams
from mm_core.hookspecs import MediaRequest, Processor
from mm_core.runner.chunk_graphs import ALONE, BESIDE, DECODES
from mm_core.runner.graphs import ladder
from mm_core.scheduler.sequence import EncodeItem, ScheduledBatch, ScheduledSequence
from mm_core.scheduler.sequence import Sequence as SequenceState
from mm_core.types import MediaFeature, MediaItem, PlaceholderRange, PreparedRequest

logger = logging.getLogger(__name__)

_GREEDY = SamplingParams(temperature=0.0)
_SAMPLED = (
    _GREEDY,
    SamplingParams(temperature=0.8, seed=1),
    SamplingParams(top_k=20, top_p=0.9, min_p=0.05, seed=2),
    SamplingParams(temperature=0.0, repetition_penalty=1.1, presence_penalty=0.5, logprobs=2),
)
_SHARED_TOKENS = 256  # as many as a picture of middling size takes


def noise_feature(processor: Processor, side: int) -> MediaFeature | None:
    """A picture of side × side pixels of noise, prepared; None where the family reads none, or none such."""
    if "image" not in processor.modalities:
        return None
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    item = MediaItem("image", b"noise", Image.fromarray(noise), {"width": side, "height": side})
    try:
        feature = processor.prepare(item, processor.variant(item, MediaRequest({"image": 1})))
    except Exception as error:  # the plugin's; no reason not to start
        logger.debug("a picture of %d pixels could not be prepared", side, exc_info=error)
        return None
    return replace(feature, key=b"%d" % side)


@dataclass(frozen=True)
class Sizes:
    """The engine's limits, and the blocks of the KV cache that the steps may touch (two or more)."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int
    position_axes: int

    @property
    def longest_chunk(self) -> int:
        """Tokens of one sequence that a step may take."""
        return min(self.max_num_batched_tokens, self.max_model_len)


class Rehearsal:
    """Makes batches that look like the scheduler's, of sequences nobody asked for.

    Their lengths include 1, multiples of 16 and others: kernels are compiled anew for arguments
    that are. All sampled tokens are first ones, so no step depends on what another has sampled.
    """

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes
        self._ids = itertools.count(-1, -1)

    def text_steps(self) -> Iterator[ScheduledBatch]:
        """Prefill, decode and mixed steps whose sizes pick other variants of kernels: those of graphs that
        will be captured, and powers of two."""
        sizes = self._sizes
        short, longest, chunk = min(300, sizes.max_model_len), sizes.max_model_len, sizes.longest_chunk
        for lengths in ((5,), (17,), (2048,), (chunk,), (256, 293), *((size,) for size in ALONE)):
            if max(lengths) <= longest and sum(lengths) <= sizes.max_num_batched_tokens:
                yield self._batch([], [(0, length) for length in lengths])
        if longest > 200:
            yield self._batch([], [(64, min(100, chunk))])
        most = min(sizes.max_num_seqs, sizes.max_num_batched_tokens)
        powers = {2**i for i in range(most.bit_length())}
        for count in sorted({*ladder(most), *powers}):
            for shared in (False, True) if count in powers and count > 1 else (False,):
                yield self._batch([short] * (count - 1) + [longest], [], shared=shared)
        for count, size in itertools.product({min(n, most - 1) for n in DECODES} - {0}, BESIDE):
            if count + size <= sizes.max_num_batched_tokens and size <= longest:
                yield self._batch([short] * count, [(0, size)])
        yield self._batch([short] * min(8, most), [], _SAMPLED)

    def media_steps(self, feature: MediaFeature, counts: Sequence[int], capacity: int) -> Iterator[ScheduledBatch]:
        """Items encoded together, so many at a time; the first one is put into a prompt. capacity: rows of
        the encoder's slab."""
        length = feature.num_tokens + 2
        for number, count in enumerate(n for n in counts if n * feature.num_tokens <= capacity):
            keys = [b"%b/%d/%d" % (feature.key, number, i) for i in range(count)]
            items = tuple(EncodeItem(key, replace(feature, key=key)) for key in keys)
            batch = ScheduledBatch(-1, ())
            if number == 0 and length <= self._sizes.longest_chunk:
                place = PlaceholderRange(1, feature.num_tokens, (True,) * feature.num_tokens, items[0].feature)
                batch = self._batch([], [(0, length)], ranges=(place,))
            yield replace(batch, encode=items)

    def _batch(
        self,
        decodes: Sequence[int],
        chunks: Sequence[tuple[int, int]],
        params: Sequence[SamplingParams] = (_GREEDY,),
        ranges: tuple[PlaceholderRange, ...] = (),
        shared: bool = False,
    ) -> ScheduledBatch:
        """decodes: KV lengths of sequences with one token each; chunks: (start, length) of the others.
        shared: the sequences begin with the same blocks."""
        parts = [*((kv_len - 1, 1) for kv_len in decodes), *chunks]
        scheduled = []
        for slot, (start, length) in enumerate(parts):
            end = start + length
            positions = np.tile(np.arange(end, dtype=np.int32), (self._sizes.position_axes, 1)) if ranges else None
            request = PreparedRequest("warm-up", (0,) * end, params[slot % len(params)], ranges, positions)
            seq = SequenceState(next(self._ids), request)
            seq.slot = slot
            seq.tables = {"self": self._table(slot, -(-end // self._sizes.block_size), shared)}
            scheduled.append(ScheduledSequence(seq, start, length, True, seq.tables))
        return ScheduledBatch(-1, tuple(scheduled))

    def _table(self, slot: int, count: int, shared: bool) -> list[int]:
        """Blocks of a sequence; with `shared`, its first ones are everybody's."""
        common = min(_SHARED_TOKENS // self._sizes.block_size, count - 1) if shared else 0
        others = self._sizes.num_blocks - 1
        return [0] * common + [1 + (slot + i) % others for i in range(count - common)]
