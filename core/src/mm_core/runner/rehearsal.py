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
from mm_core.types import MediaFeature, MediaItem, PlaceholderRange, PreparedRequest, Source

logger = logging.getLogger(__name__)

_GREEDY = SamplingParams(temperature=0.0)
_SAMPLED = (
    _GREEDY,
    SamplingParams(temperature=0.8, seed=1),
    SamplingParams(top_k=20, top_p=0.9, min_p=0.05, seed=2),
    SamplingParams(temperature=0.0, repetition_penalty=1.1, presence_penalty=0.5, logprobs=2),
)
_SOUND_S = 30
_PROMPT = 4  # tokens of a decoder's prompt where media are read by cross-attention
_TEXTS = ((5,), (17,), (300,), (40, 64, 100))  # tokens of sources that are text, run together
_SHARED_TOKENS = 256  # as many as a picture of middling size takes


def noise_feature(processor: Processor, side: int) -> MediaFeature | None:
    """A picture of side × side pixels of noise, prepared, or half a minute of noise where the family reads no
    pictures; None where it reads neither, or none such."""
    item = _noise(processor, side)
    if item is None:
        return None
    try:
        feature = processor.prepare(item, processor.variant(item, MediaRequest({item.modality: 1})))
    except Exception as error:  # the plugin's; no reason not to start
        logger.debug("%s noise (%d) could not be prepared", item.modality, side, exc_info=error)
        return None
    return replace(feature, key=b"%d" % side)


def noise_features(processor: Processor, sides: Sequence[int]) -> tuple[MediaFeature, ...]:
    """Noise of several sizes, those that give different shapes: a family may have one size for all."""
    found: dict[object, MediaFeature] = {}
    for feature in (noise_feature(processor, side) for side in sides):
        if feature is not None:
            shapes = tuple((name, tuple(t.shape)) for name, t in sorted(feature.tensors.items()))
            found.setdefault((feature.num_tokens, shapes), feature)
    return tuple(found.values())


def _noise(processor: Processor, side: int) -> MediaItem | None:
    dice = np.random.default_rng(0)
    if "image" in processor.modalities:
        pixels = dice.integers(0, 256, (side, side, 3), dtype=np.uint8)
        return MediaItem("image", b"noise", Image.fromarray(pixels), {"width": side, "height": side})
    rate = getattr(processor, "sampling_rate", None)
    if "audio" in processor.modalities and rate:
        samples = dice.uniform(-0.5, 0.5, _SOUND_S * rate).astype(np.float32)
        return MediaItem("audio", b"noise", samples, {"sample_rate": rate, "samples": len(samples)})
    return None


@dataclass(frozen=True)
class Sizes:
    """The engine's limits, and the blocks of the KV cache that the steps may touch (two or more). source_len:
    keys of the longest source, 0 without cross-attention; reads_text: whether a text encoder makes sources;
    instruction: what `Fusion.condition` reads of a request."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    num_blocks: int
    position_axes: int
    source_len: int = 0
    reads_text: bool = False
    instruction: tuple[int, ...] = ()

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
        for lengths in _TEXTS if sizes.reads_text else ():
            if sum(lengths) <= sizes.source_len:
                yield self._with_sources([self._source((), (0,) * length) for length in lengths])

    def media_steps(self, feature: MediaFeature, counts: Sequence[int], capacity: int) -> Iterator[ScheduledBatch]:
        """Items encoded together, so many at a time; the first one is put into a prompt. capacity: rows of
        the encoder's slab."""
        for number, count in enumerate(n for n in counts if n * feature.num_tokens <= capacity):
            keys = [b"%b/%d/%d" % (feature.key, number, i) for i in range(count)]
            items = tuple(EncodeItem(key, replace(feature, key=key)) for key in keys)
            if self._sizes.source_len:
                batch = self._with_sources([self._media_source(item.feature) for item in items])
            else:
                batch = self._prompt_with(items[0].feature) if number == 0 else ScheduledBatch(-1, ())
            yield replace(batch, encode=items)

    def _prompt_with(self, feature: MediaFeature) -> ScheduledBatch:
        """A step of a prompt that holds the item, where one fits."""
        length = feature.num_placed + 2
        if length > self._sizes.longest_chunk:
            return ScheduledBatch(-1, ())
        place = PlaceholderRange(1, feature.num_placed, (True,) * feature.num_placed, feature)
        return self._batch([], [(0, length)], ranges=(place,))

    def _media_source(self, feature: MediaFeature) -> Source:
        count = feature.num_placed
        if not self._sizes.reads_text:
            return self._source((PlaceholderRange(0, 0, (), feature),), (), count)
        return self._source((PlaceholderRange(1, count, (True,) * count, feature),), (0,) * (count + 2))

    def _source(self, ranges: tuple[PlaceholderRange, ...], ids: tuple[int, ...], rows: int = 0) -> Source:
        return Source(b"warm-up %d" % next(self._ids), rows or len(ids), ids, ranges)

    def _with_sources(self, sources: Sequence[Source]) -> ScheduledBatch:
        """A step that computes sources, and one short prompt for each."""
        sources = sources[: min(self._sizes.max_num_seqs, self._sizes.max_num_batched_tokens)]
        length = min(_PROMPT, self._sizes.longest_chunk // len(sources))
        batch = self._batch([], [(0, max(length, 1))] * len(sources), sources=sources)
        return replace(batch, sources=tuple(s.seq for s in batch.sequences))

    def _batch(
        self,
        decodes: Sequence[int],
        chunks: Sequence[tuple[int, int]],
        params: Sequence[SamplingParams] = (_GREEDY,),
        ranges: tuple[PlaceholderRange, ...] = (),
        shared: bool = False,
        sources: Sequence[Source] = (),
    ) -> ScheduledBatch:
        """decodes: KV lengths of sequences with one token each; chunks: (start, length) of the others.
        shared: the sequences begin with the same blocks. sources: of the sequences, where not any will do."""
        parts = [*((kv_len - 1, 1) for kv_len in decodes), *chunks]
        scheduled = []
        for slot, (start, length) in enumerate(parts):
            end = start + length
            positions = np.tile(np.arange(end, dtype=np.int32), (self._sizes.position_axes, 1)) if ranges else None
            source = sources[slot] if sources else self._any_source()
            request = PreparedRequest(
                "warm-up",
                (0,) * end,
                params[slot % len(params)],
                ranges,
                positions,
                source=source,
                instruction=self._sizes.instruction,
            )
            seq = SequenceState(next(self._ids), request)
            seq.slot = slot
            seq.tables = {"self": self._table(slot, -(-end // self._sizes.block_size), shared)}
            if source is not None:
                seq.tables["cross"] = self._table(slot, -(-source.num_tokens // self._sizes.block_size), False)
            scheduled.append(ScheduledSequence(seq, start, length, True, seq.tables))
        return ScheduledBatch(-1, tuple(scheduled))

    def _any_source(self) -> Source | None:
        """What a sequence reads whose source was computed before."""
        count = self._sizes.source_len
        return Source(b"warm-up", count) if count else None

    def _table(self, slot: int, count: int, shared: bool) -> list[int]:
        """Blocks of a sequence; with `shared`, its first ones are everybody's."""
        common = min(_SHARED_TOKENS // self._sizes.block_size, count - 1) if shared else 0
        others = self._sizes.num_blocks - 1
        return [0] * common + [1 + (slot + i) % others for i in range(count - common)]
