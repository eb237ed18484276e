"""Media values to features: recognised by content, looked up, made where they are new."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from mm_core.errors import EngineClosedError, MediaNotCachedError, PluginError
from mm_core.hashing import Hasher, media_key
from mm_core.hookspecs import MediaRequest, Processor
from mm_core.inputs.caches import MediaName, NameRegistry, Owner, ProcessorCache
from mm_core.inputs.coordinator import Steps
from mm_core.inputs.fetch import Fetched, Fetcher, is_quick
from mm_core.inputs.limits import DecodedBudget
from mm_core.inputs.messages import GivenItem
from mm_core.inputs.pinning import Pinner
from mm_core.inputs.prompt import guarded
from mm_core.inputs.room import Room, Stay
from mm_core.media.decode import MediaLimits
from mm_core.media.decoder import Decoder
from mm_core.media.video import VideoSampling
from mm_core.types import MediaFeature, MediaItem, Modality

MAX_NAMES = 65536


@dataclass(frozen=True)
class MediaJob:
    """What all items of one request share. namespace: see `hashing.media_key`. peek: leave caches and names as they
    are, to the order of their use. warnings: what the caller should know of the items, added as they come."""

    request: MediaRequest
    salt: str | None
    namespace: bytes
    sampling: VideoSampling
    allow_paths: bool
    budget: DecodedBudget
    stay: Stay
    peek: bool = False
    warnings: list[str] = field(default_factory=list)


def _name(job: MediaJob, modality: Modality, uuid: str) -> MediaName:
    return MediaName(Owner(job.salt, uuid), modality, repr(job.sampling) if modality == "video" else "")


@dataclass(eq=False)
class MediaLoader:
    """Processor cache and uuid registry of one pipeline.

    in_pool(name, work) begins work in a thread of the pool. give_way: see `Coordinator`. room: of what
    requests hold. decoder: see `Fetcher`.
    """

    processor: Processor
    family: str
    hasher: Hasher
    limits: MediaLimits
    cache_size: int
    pinner: Pinner
    in_pool: Callable[[str, Callable[[], Any]], Future[Any]]
    give_way: Callable[[], None]
    room: Room
    decoder: Decoder | None = None

    def __post_init__(self) -> None:
        self.cache = ProcessorCache(self.cache_size)
        self.fetcher = Fetcher(self.hasher, self.limits, self.decoder)
        self.pinned: set[Owner] = set()
        self.names = NameRegistry(MAX_NAMES)

    def load(self, items: Sequence[GivenItem], job: MediaJob) -> Steps[list[MediaFeature]]:
        """Features of all items, in the order given: those with content first, then named ones."""
        fresh = [index for index, item in enumerate(items) if item.value is not None]
        loaded = yield from self._load_all([items[i] for i in fresh], job)
        found = dict(zip(fresh, loaded, strict=True))
        for index, (media, _) in found.items():
            _warn(media, index, job)
            uuid = items[index].uuid
            if uuid is not None and not job.peek:
                self.names.put(_name(job, media.modality, uuid), media)
        features = []
        for index, item in enumerate(items):
            features.append(found[index][1] if index in found else (yield from self._recall(item, index, job)))
        return features

    def _load_all(self, items: Sequence[GivenItem], job: MediaJob) -> Steps[list[tuple[MediaItem, MediaFeature]]]:
        """Items with content, without it: recognise them, then find or make their features. Fetching is begun for all
        before any is waited for; a feature when its item is there, unless those before it are too much already."""
        fetches: deque[Fetched | Future[Fetched]] = deque()
        begun: list[tuple[MediaItem, MediaFeature | Future[MediaFeature]]] = []
        loaded: list[tuple[MediaItem, MediaFeature]] = []
        try:
            for item in items:
                work = partial(self._fetch, item, job)
                fetches.append(work() if is_quick(item.value) else self.in_pool("load", work))
            for item in items:
                found = fetches.popleft()  # what was decoded lives no longer than it is needed
                if isinstance(found, Future):
                    yield found
                    found = found.result()
                yield from self.room.wait(job.stay)
                begun.append((replace(found.item, data=None), self._begin_feature(found, item.uuid, job)))
                del found
                while len(loaded) < len(begun) and _is_there(begun[len(loaded)][1]):
                    loaded.append(self._take(*begun[len(loaded)], job))
        finally:
            for each in fetches:
                if isinstance(each, Future):
                    each.cancel()
        for media, feature in begun[len(loaded) :]:
            if isinstance(feature, Future):
                yield feature
            loaded.append(self._take(media, feature, job))
        return loaded

    def _take(
        self, media: MediaItem, feature: MediaFeature | Future[MediaFeature], job: MediaJob
    ) -> tuple[MediaItem, MediaFeature]:
        """A feature that is there, counted. Raises what making it raised, MediaTooLargeError, ContextLengthError."""
        if isinstance(feature, Future):
            feature = feature.result()
        self.room.count(job.stay, feature)
        return media, feature

    def _fetch(self, item: GivenItem, job: MediaJob) -> Fetched:
        job.budget.check()
        found = self.fetcher.fetch(
            item.modality,
            item.value,
            job.sampling,
            allow_paths=job.allow_paths,
            sampling_rate=getattr(self.processor, "sampling_rate", None),
            salt=job.salt,
        )
        job.budget.take(found.item)
        return found

    def _begin_feature(self, fetched: Fetched, uuid: str | None, job: MediaJob) -> MediaFeature | Future[MediaFeature]:
        """The feature if it is cached; else the future of its making, which begins unless it has."""
        key, variant = self._key(fetched.item, uuid, job)
        if job.peek:
            there = self.cache.peek(key)
            return there or self.in_pool("prepare", lambda: self._make(fetched, variant, key, uuid))
        found, mine = self.cache.find_or_claim(key, Owner(job.salt, uuid))
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

    def _recall(self, given: GivenItem, index: int, job: MediaJob) -> Steps[MediaFeature]:
        """The feature of the latest content given under a uuid, in the same salt."""
        media = self.names.get(_name(job, given.modality, given.uuid or ""), touch=not job.peek)
        feature: MediaFeature | Future[MediaFeature] | None = None
        if media is not None:
            key, _ = self._key(media, given.uuid, job)
            feature = self.cache.peek(key) if job.peek else self.cache.get(key)
        if isinstance(feature, Future):
            yield feature
            feature = feature.result()
        if feature is None:  # never seen, evicted, or another salt's: one reply for all
            raise not_cached(given.modality, "multi_modal_uuids")
        if media is not None:
            _warn(media, index, job)
        self.room.count(job.stay, feature)
        return feature

    # -- by name ---------------------------------------------------------------------------

    def pin(self, owner: Owner) -> bool:
        """Keep features and name of an item; whether they were not kept before.

        Raises MediaNotCachedError where a request could not use the name, CacheFullError where too much is pinned.
        """
        fresh = owner not in self.pinned
        if not self.names.knows(owner) or not self.cache.pin(owner):
            raise not_cached("item", "uuid")
        self.names.pin(owner)
        self.pinned.add(owner)
        return fresh

    def unpin(self, owner: Owner) -> None:
        """Undo `pin`. Raises MediaNotCachedError where nothing was given under that name."""
        if owner not in self.pinned and not self.names.knows(owner):
            raise not_cached("item", "uuid")
        self.pinned.discard(owner)
        self.names.unpin(owner)
        self.cache.unpin(owner)

    def evict(self, wanted: Callable[[Owner], bool]) -> int:
        """Forget names, features and what their bytes were recognised by; how many features there were."""
        self.pinned = {owner for owner in self.pinned if not wanted(owner)}
        digests = {item.digest for item in self.names.drop(wanted)}
        self.fetcher.forget(digests)
        return self.cache.drop(wanted)

    # -- keys and making -------------------------------------------------------------------

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


def _is_there(feature: MediaFeature | Future[MediaFeature]) -> bool:
    return not isinstance(feature, Future) or feature.done()


def _warn(media: MediaItem, index: int, job: MediaJob) -> None:
    """A file that was cut off is used as far as it goes, which its sender has to know."""
    if media.info.get("cut_off"):
        seconds = media.info["samples"] / media.info["sample_rate"]
        job.warnings.append(
            f"Item {index + 1} ({media.modality}) was cut off: {seconds:.2f} s of it are there and were used."
        )


def not_cached(what: str, param: str) -> MediaNotCachedError:
    """The error for a uuid whose content is not known."""
    return MediaNotCachedError(
        f"The content of the {what} named by uuid is not cached. Send the request again with the content.", param=param
    )
