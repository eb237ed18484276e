"""From a trace's requests to the scheduler's: token ids and media keys that are equal where the trace's are."""

from __future__ import annotations

from typing import Any

import numpy as np

from mm_core.bench.traces import Media, Text, TraceRequest
from mm_core.config import SamplingParams
from mm_core.hashing import Hasher, encode_fields, media_digest, media_key, prompt_block_keys
from mm_core.types import MediaFeature, PlaceholderRange, PreparedRequest

PLACEHOLDER_ID = 1
FIRST_ID, NUM_IDS = 1000, 100_000  # of texts: [FIRST_ID, FIRST_ID + NUM_IDS)
_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def text_ids(text: Text) -> list[int]:
    """The text's token ids: SplitMix64 (Steele et al. 2014) of its seed and each place."""
    with np.errstate(over="ignore"):
        state = (np.uint64(text.seed) * _MIX_1 + np.arange(1, text.tokens + 1, dtype=np.uint64)) * _GOLDEN
        state = (state ^ (state >> np.uint64(30))) * _MIX_1
        state = (state ^ (state >> np.uint64(27))) * _MIX_2
        state ^= state >> np.uint64(31)
    ids: list[int] = (state % np.uint64(NUM_IDS) + np.uint64(FIRST_ID)).astype(np.int64).tolist()
    return ids


class RequestMaker:
    """Makes prepared requests, with keys by the engine's own code. family: what the keys say the model is."""

    def __init__(self, hasher: Hasher, block_size: int, family: str = "trace") -> None:
        self._hasher = hasher
        self._block_size = block_size
        self._family = family
        self._texts: dict[Text, list[int]] = {}
        self._places: dict[int, tuple[bool, ...]] = {}
        self._features: dict[tuple[str | None, str], MediaFeature] = {}
        self._params: dict[int, SamplingParams] = {}

    def make(self, request: TraceRequest, request_id: str) -> PreparedRequest:
        """The request, ready to be scheduled."""
        ids: list[int] = []
        ranges: list[PlaceholderRange] = []
        for segment in request.segments:
            if isinstance(segment, Text):
                ids += self.text(segment)
            else:
                places = self._places.setdefault(segment.rows, (True,) * segment.rows)
                feature = self._feature(segment, request.salt)
                ranges.append(PlaceholderRange(len(ids), segment.rows, places, feature))
                ids += [PLACEHOLDER_ID] * segment.rows
        media = [(r.feature.key, r.offset, r.end) for r in ranges]
        context = encode_fields((request.salt, b""))
        return PreparedRequest(
            request_id=request_id,
            token_ids=tuple(ids),
            params=self._sampling(request.answer.tokens),
            ranges=tuple(ranges),
            cache_salt=request.salt,
            block_size=self._block_size,
            block_keys=prompt_block_keys(self._hasher, self._block_size, ids, media, context),
        )

    def text(self, text: Text) -> list[int]:
        """Token ids of a text, kept for the next one who asks."""
        if text not in self._texts:
            self._texts[text] = text_ids(text)
        return self._texts[text]

    def _feature(self, item: Media, salt: str | None) -> MediaFeature:
        if (salt, item.name) not in self._features:
            digest = media_digest(self._hasher, item.kind, (item.rows, item.cost), item.name.encode("utf-8", "replace"))
            key = media_key(self._hasher, encode_fields((salt, self._family)), b"", digest, None)
            info: dict[str, Any] = {"cost": item.cost}
            self._features[salt, item.name] = MediaFeature(item.kind, item.rows, {}, info, key)
        return self._features[salt, item.name]

    def _sampling(self, tokens: int) -> SamplingParams:
        if tokens not in self._params:
            self._params[tokens] = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True)
        return self._params[tokens]
