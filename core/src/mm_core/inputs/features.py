"""Media values to features: recognised by content, looked up, made where they are new."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mm_core.errors import EngineClosedError, MediaNotCachedError, PluginError
from mm_core.hashing import Hasher, media_key
from mm_core.hookspecs import MediaRequest, Processor
from mm_core.inputs.caches import LruMap, ProcessorCache
from mm_core.inputs.coordinator import Steps
from mm_core.inputs.fetch import Fetched, Fetcher, is_quick
from mm_core.inputs.messages import GivenItem
from mm_core.inputs.pinning import Pinner
from mm_core.inputs.prompt import guarded
from mm_core.media.decode import MediaLimits
from mm_core.media.video import VideoSampling
from mm_core.types import MediaFeature, MediaItem, Modality

MAX_NAMES = 65536

Name = tuple[str | None, Modality, str, str]  # (salt, modality, uuid, frame sampling)


@dataclass(frozen=True)
class MediaJob:
    """What all items of one request share. namespace: see `hashing.media_key`."""

    request: MediaRequest
    salt: str | None
    namespace: bytes
    sampling: VideoSampling
    allow_paths: bool


def _name(job: MediaJob, modality: Modality, uuid: str) -> Name:
    """What a uuid stands for: of a video, the frames that these settings pick."""
    return job.salt, modality, uuid, repr(job.sampling) if modality == "video" else ""


@dataclass(eq=False)
class MediaLoader:
    """Processor cache and uuid registry of one pipeline.

    in_pool(name, work) begins work in a thread of the pool. give_way: see `Coordinator`.
    """

    processor: Processor
    family: str
    hasher: Hasher
    limits: MediaLimits
    cache_size: int
    pinner: Pinner
    in_pool: Callable[[str, Callable[[], Any]], Future[Any]]
    give_way: Callable[[], None]

    def __post_init__(self) -> None:
        self.cache = ProcessorCache(self.cache_size)
        self.fetcher = Fetcher(self.hasher, self.limits)
        self._names: LruMap[Name, MediaItem] = LruMap(MAX_NAMES)

    def load(self, items: Sequence[GivenItem], job: MediaJob) -> Steps[list[MediaFeature]]:
        """Features of all items, in the order given: those with content first, then named ones."""
        fresh = [index for index, item in enumerate(items) if item.value is not None]
        loaded = yield from self._load_all([items[i] for i in fresh], job)
        found = dict(zip(fresh, loaded, strict=True))
        for index, (media, _) in found.items():
            uuid = items[index].uuid
            if uuid is not None:
                self._names.put(_name(job, media.modality, uuid), replace(media, data=None))
        features = []
        for index, item in enumerate(items):
            feature = found[index][1] if index in found else (yield from self._recall(item, job))
            features.append(feature)
        return features

    def _load_all(self, items: Sequence[GivenItem], job: MediaJob) -> Steps[list[tuple[MediaItem, MediaFeature]]]:
        """Items with content: recognise them, then find or make their features. What takes long is
        begun for all of them before any of it is waited for."""
        fetched = yield from self._fetch_all(items, job)
        begun: list[tuple[MediaItem, MediaFeature | Future[MediaFeature]]] = []
        for item, found in zip(items, fetched, strict=True):
            begun.append((found.item, self._begin_feature(found, item.uuid, job)))
        loaded = []
        for media, feature in begun:
            if isinstance(feature, Future):
                yield feature
                feature = feature.result()
            loaded.append((media, feature))
        return loaded

    def _fetch_all(self, items: Sequence[GivenItem], job: MediaJob) -> Steps[list[Fetched]]:
        begun: list[Fetched | Future[Fetched]] = []
        try:
            for item in items:
                work = partial(self._fetch, item, job)
                begun.append(work() if is_quick(item.value) else self.in_pool("load", work))
            fetched = []
            for found in begun:
                if isinstance(found, Future):
                    yield found
                    found = found.result()
                fetched.append(found)
            return fetched
        finally:
            for found in begun:
                if isinstance(found, Future):
                    found.cancel()

    def _fetch(self, item: GivenItem, job: MediaJob) -> Fetched:
        return self.fetcher.fetch(
            item.modality,
            item.value,
            job.sampling,
            allow_paths=job.allow_paths,
            sampling_rate=getattr(self.processor, "sampling_rate", None),
        )

    def _begin_feature(self, fetched: Fetched, uuid: str | None, job: MediaJob) -> MediaFeature | Future[MediaFeature]:
        """The feature if it is cached; else the future of its making, which begins unless it has."""
        key, variant = self._key(fetched.item, uuid, job)
        found, mine = self.cache.find_or_claim(key)
        if mine is not None:
            try:
                job_done = self.in_pool("prepare", lambda: self._fill(key, mine, fetched, variant, uuid))
            except EngineClosedError as error:
                self.cache.fail(key, mine, error)
            else:
                job_done.add_done_callback(partial(self._check_filled, key, mine))
        return found

    def _check_filled(self, key: bytes, mine: Future[MediaFeature], done: Future[Any]) -> None:
        """A job that never ran (the pool broke, or was shut) filled nothing: those who wait are told."""
        if not mine.done():
            error = CancelledError() if done.cancelled() else done.exception()
            self.cache.fail(key, mine, error or RuntimeError("nothing was prepared"))

    def _recall(self, given: GivenItem, job: MediaJob) -> Steps[MediaFeature]:
        """The feature of the latest content given under a uuid, in the same salt."""
        media = self._names.get(_name(job, given.modality, given.uuid or ""))
        feature: MediaFeature | Future[MediaFeature] | None = None
        if media is not None:
            key, _ = self._key(media, given.uuid, job)
            feature = self.cache.get(key)
        if isinstance(feature, Future):
            yield feature
            feature = feature.result()
        if feature is None:  # never seen, evicted, or another salt's: one reply for all
            raise MediaNotCachedError(
                f"The content of the {given.modality} named by uuid is not cached. "
                "Send the request again with the content.",
                param="multi_modal_uuids",
            )
        return feature

    def _key(self, media: MediaItem, uuid: str | None, job: MediaJob) -> tuple[bytes, bytes]:
        """The media key, and the variant in it."""
        variant = guarded(self.family, "variant", lambda: self.processor.variant(media, job.request))
        return media_key(self.hasher, job.namespace, variant, media.digest, uuid), variant

    def _fill(self, key: bytes, mine: Future[MediaFeature], fetched: Fetched, variant: bytes, uuid: str | None) -> None:
        # The requests at hand get a pinned copy, as it is they that will be encoded; the cache keeps the other.
        self.cache.fill(key, mine, lambda: self._make(fetched, variant, key, uuid), self.pinner.pinned)

    def _make(self, fetched: Fetched, variant: bytes, key: bytes, uuid: str | None) -> MediaFeature:
        self.give_way()
        item = fetched.item if fetched.item.data is not None else fetched.load()
        feature = guarded(self.family, "prepare", lambda: self.processor.prepare(item, variant))
        if (
            not isinstance(feature, MediaFeature)
            or feature.modality != item.modality
            or min(feature.num_tokens, feature.num_placed) < 1
        ):
            raise PluginError(
                f"Processor of plugin {self.family!r}: prepare() did not give a MediaFeature of modality "
                f"{item.modality!r} with at least one row. Report it to the plugin's author."
            )
        return replace(feature, key=key, uuid=uuid)
