"""Requests to prepared requests, in threads, while the GPU works on others.

One thread takes one request from prompt to ids, media and positions; the media of a request may be
spread over idle threads. Preprocessed media are cached by media key and shared while in flight.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mm_core.config import EngineConfig, SamplingParams
from mm_core.errors import (
    EngineClosedError,
    InvalidParamsError,
    MediaNotCachedError,
    PluginError,
    RequestError,
    TooManyMediaError,
)
from mm_core.hashing import encode_fields, get_hasher, media_key
from mm_core.hookspecs import Fusion, MediaRequest, Processor
from mm_core.inputs.caches import LruMap, ProcessorCache, ProcessorCacheStats
from mm_core.inputs.fetch import Fetched, Fetcher
from mm_core.inputs.messages import Given, GivenItem, PromptLike, check_salt, read_prompt
from mm_core.inputs.prompt import PromptRenderer, count_items, guarded, too_long
from mm_core.media.decode import MediaLimits
from mm_core.media.video import VideoSampling
from mm_core.types import MediaFeature, MediaItem, Modality, PlaceholderRange, PreparedRequest

MAX_NAMES = 65536
MAX_THREADS = 8

Name = tuple[str | None, Modality, str, str]  # (salt, modality, uuid, frame sampling)


@dataclass(frozen=True)
class _Job:
    """What all items of one request share."""

    request: MediaRequest
    salt: str | None
    namespace: bytes
    sampling: VideoSampling
    allow_paths: bool


def _name(job: _Job, modality: Modality, uuid: str) -> Name:
    """What a uuid stands for: of a video, the frames that these settings pick."""
    return job.salt, modality, uuid, repr(job.sampling) if modality == "video" else ""


@dataclass(eq=False)
class InputPipeline:
    """Thread pool, processor cache and uuid registry of one engine. Thread-safe.

    family: the family's name. checkpoint_identity: `Checkpoint.identity`. vocab_size: width of the
    logits. stop_token_ids: what ends an answer, e.g. `eos_token_ids(...)`; the processor's own are
    added.
    """

    processor: Processor
    fusion: Fusion
    family: str
    checkpoint_identity: bytes
    config: EngineConfig
    vocab_size: int
    max_model_len: int
    stop_token_ids: Iterable[int] = ()

    def __post_init__(self) -> None:
        config = self.config
        self._hasher = get_hasher(config.hash_algorithm)
        limits = MediaLimits(max_image_pixels=config.max_image_pixels, max_video_frames=config.max_video_frames)
        self._fetcher = Fetcher(self._hasher, limits)
        self._cache = ProcessorCache(config.processor_cache_size)
        self._names: LruMap[Name, MediaItem] = LruMap(MAX_NAMES)
        self._renderer = PromptRenderer(self.processor, self.family, self.vocab_size, self.max_model_len)
        own = self.processor.default_sampling().stop_token_ids
        self._stop_ids = frozenset(self.stop_token_ids) | frozenset(own)
        threads = config.preprocess_threads or min(MAX_THREADS, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mm-inputs")

    def submit(
        self,
        request_id: str,
        prompt: PromptLike,
        params: SamplingParams | None = None,
        apply_chat_template: bool | None = None,
        *,
        allow_paths: bool = True,
    ) -> Future[PreparedRequest]:
        """Prepare one request in the pool; its errors (RequestError) come through the future.

        prompt: a str, a TextPrompt, a dict with its keys, chat messages, or a ChatPrompt.
        allow_paths=False: media given as str must be `data:` URLs (requests from a network).
        Raises EngineClosedError after close().
        """
        work = (request_id, prompt, params or SamplingParams(), apply_chat_template, allow_paths)
        try:
            return self._pool.submit(self._prepare, *work)
        except RuntimeError:
            raise EngineClosedError("The engine was closed. Create a new one.") from None

    def stats(self) -> ProcessorCacheStats:
        """The processor cache's counters."""
        return self._cache.stats()

    def close(self) -> None:
        """Cancel what has not started, and wait for what has."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _prepare(
        self, request_id: str, prompt: PromptLike, params: SamplingParams, template: bool | None, allow_paths: bool
    ) -> PreparedRequest:
        given = read_prompt(prompt, self.family, self.processor.modalities)
        check_salt(given.cache_salt)
        self._check_params(params)
        counts = count_items(given)
        self._check_counts(counts)
        guarded(self.family, "check_kwargs", lambda: self.processor.check_kwargs(given.processor_kwargs))
        ids = self._renderer.render(given, template)
        features = self._features(given, MediaRequest(counts, given.processor_kwargs), allow_paths)
        ids, ranges = self._renderer.expand(ids, features)
        if len(ids) + 1 > self.max_model_len:
            raise too_long(len(ids), self.max_model_len)
        positions, delta = self._positions(ids, ranges)
        return PreparedRequest(
            request_id=request_id,
            token_ids=tuple(ids),
            params=params,
            ranges=ranges,
            positions=positions,
            decode_delta=delta,
            cache_salt=given.cache_salt,
            stop_token_ids=self._stop_ids,
        )

    def _check_params(self, params: SamplingParams) -> None:
        """What SamplingParams cannot check without the vocabulary."""
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            wrong = [i for i in ids if not 0 <= i < self.vocab_size]
            if wrong:
                raise InvalidParamsError(
                    f"{name} holds token id {wrong[0]}; ids go from 0 to {self.vocab_size - 1}.", param=name
                )

    def _check_counts(self, counts: Mapping[Modality, int]) -> None:
        for modality, count in counts.items():
            limit = self.config.limit_mm_per_prompt.get(modality)
            if limit is not None and count > limit:
                raise TooManyMediaError(
                    f"The request has {count} item(s) of {modality}; the limit is {limit}. Send fewer, or raise "
                    f"limit_mm_per_prompt[{modality!r}].",
                    param="multi_modal_data",
                )

    def _positions(
        self, ids: Sequence[int], ranges: Sequence[PlaceholderRange]
    ) -> tuple[np.ndarray[Any, Any] | None, int]:
        found = guarded(self.family, "positions", lambda: self.fusion.positions(ids, ranges))
        if found is None:
            return None, 0
        positions, delta = found
        if positions.ndim != 2 or positions.shape[1] != len(ids) or positions.dtype != np.int32:
            raise PluginError(
                f"Fusion of plugin {self.family!r}: positions() gave {positions.dtype} {list(positions.shape)} for "
                f"{len(ids)} tokens; want int32 [axes, {len(ids)}]. Report it to the plugin's author."
            )
        return positions, int(delta)

    def _features(self, given: Given, request: MediaRequest, allow_paths: bool) -> list[MediaFeature]:
        """Features of all items, in the order given: those with content first, then named ones."""
        if not given.items:
            return []
        settings = self.processor.settings_key
        namespace = encode_fields((given.cache_salt, self.family, self.checkpoint_identity, settings))
        job = _Job(request, given.cache_salt, namespace, self._sampling(request), allow_paths)
        fresh = [index for index, item in enumerate(given.items) if item.value is not None]
        loaded = dict(zip(fresh, self._load_all([given.items[i] for i in fresh], job), strict=True))
        for index, (media, _) in loaded.items():
            uuid = given.items[index].uuid
            if uuid is not None:
                self._names.put(_name(job, media.modality, uuid), replace(media, data=None))
        return [
            loaded[index][1] if index in loaded else self._recall(item, job) for index, item in enumerate(given.items)
        ]

    def _load_all(self, items: Sequence[GivenItem], job: _Job) -> list[tuple[MediaItem, MediaFeature]]:
        """Load items, on idle threads too.

        This thread takes the first item, and then every item that no other thread has begun: it
        waits only for work that is running, so a pool full of requests cannot block itself.
        """
        others: list[Future[tuple[MediaItem, MediaFeature]]] = []
        with contextlib.suppress(RuntimeError):  # closing: nothing new starts in the pool, this request still finishes
            others = [self._pool.submit(self._load, item, job) for item in items[1:]]
        try:
            loaded = [self._load(item, job) for item in items[:1]]
            for index, item in enumerate(items[1:]):
                other = others[index] if index < len(others) else None
                mine = other is None or other.cancel()
                loaded.append(self._load(item, job) if mine or other is None else other.result())
        finally:
            for other in others:
                other.cancel()
        return loaded

    def _load(self, given: GivenItem, job: _Job) -> tuple[MediaItem, MediaFeature]:
        """One item with content: recognise it, then find or make its feature."""
        try:
            fetched = self._fetcher.fetch(given.modality, given.value, job.sampling, allow_paths=job.allow_paths)
            key, variant = self._key(fetched.item, given.uuid, job)
            return fetched.item, self._cache.get_or_prepare(key, lambda: self._make(fetched, variant, key))
        except RequestError as error:
            error.param = error.param or "multi_modal_data"
            raise

    def _recall(self, given: GivenItem, job: _Job) -> MediaFeature:
        """The feature of the latest content given under a uuid, in the same salt."""
        media = self._names.get(_name(job, given.modality, given.uuid or ""))
        feature = None
        if media is not None:
            key, _ = self._key(media, given.uuid, job)
            feature = self._cache.get(key)
        if feature is None:  # never seen, evicted, or another salt's: one reply for all
            raise MediaNotCachedError(
                f"The content of the {given.modality} named by uuid is not cached. "
                "Send the request again with the content.",
                param="multi_modal_uuids",
            )
        return feature

    def _key(self, media: MediaItem, uuid: str | None, job: _Job) -> tuple[bytes, bytes]:
        """The media key, and the variant in it."""
        variant = guarded(self.family, "variant", lambda: self.processor.variant(media, job.request))
        return media_key(self._hasher, job.namespace, variant, media.digest, uuid), variant

    def _make(self, fetched: Fetched, variant: bytes, key: bytes) -> MediaFeature:
        item = fetched.item if fetched.item.data is not None else fetched.load()
        feature = guarded(self.family, "prepare", lambda: self.processor.prepare(item, variant))
        if not isinstance(feature, MediaFeature) or feature.modality != item.modality or feature.num_tokens < 1:
            raise PluginError(
                f"Processor of plugin {self.family!r}: prepare() did not give a MediaFeature of modality "
                f"{item.modality!r} with at least one row. Report it to the plugin's author."
            )
        return replace(feature, key=key)

    def _sampling(self, request: MediaRequest) -> VideoSampling:
        ask: Callable[[MediaRequest], VideoSampling] | None = getattr(self.processor, "video_sampling", None)
        sampling = VideoSampling() if ask is None else guarded(self.family, "video_sampling", lambda: ask(request))
        return replace(sampling, max_frames=min(sampling.max_frames, self.config.max_video_frames))


def eos_token_ids(generation_config: Mapping[str, Any], tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: generation_config.json's `eos_token_id` (an id or a list), and the tokenizer's."""
    declared = generation_config.get("eos_token_id")
    ids = [*(declared if isinstance(declared, list) else [declared]), getattr(tokenizer, "eos_token_id", None)]
    return frozenset(i for i in ids if type(i) is int)
