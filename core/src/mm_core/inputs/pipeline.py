"""Requests to prepared requests, in threads, while the GPU works on others.

One thread takes all requests from prompt to ids, media and positions, as far as that is Python; the
media of a request are decoded and preprocessed by a pool of threads. Preprocessed media are cached by
media key and shared while in flight.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mm_core.config import EngineConfig, SamplingParams
from mm_core.errors import EngineClosedError, InvalidParamsError, PluginError, RequestError, TooManyMediaError
from mm_core.hashing import encode_fields, get_hasher, prompt_block_keys
from mm_core.hookspecs import Fusion, MediaRequest, Processor
from mm_core.inputs.caches import ProcessorCacheStats
from mm_core.inputs.coordinator import Coordinator, Steps, nobody
from mm_core.inputs.features import MediaJob, MediaLoader
from mm_core.inputs.limits import DecodedBudget, check_knobs, make_decoder, media_limits
from mm_core.inputs.messages import Given, PromptLike, check_salt, read_prompt
from mm_core.inputs.pinning import Pinner
from mm_core.inputs.pool import Pool
from mm_core.inputs.prompt import PromptRenderer, count_items, guarded, is_long, too_long
from mm_core.inputs.room import Room, Stay
from mm_core.inputs.sources import Parts, SourceMaker
from mm_core.inputs.warm import WarmPrompt, read_warm
from mm_core.media.audio import Audio
from mm_core.media.timing import TimedDecoder
from mm_core.media.video import VideoSampling
from mm_core.structured.grammars import Grammars, outcome
from mm_core.structured.tokens import read_tokens
from mm_core.tracing import Span, SpanRecorder
from mm_core.types import MediaFeature, Modality, PlaceholderRange, PreparedRequest

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

MAX_THREADS = 8
MAX_WARM = 256

_REQUESTS = 4  # whose media may be as large as one request's can be, at a time; of smaller ones as many as fit

_ANY_SAMPLING = VideoSampling()  # of requests without videos


@dataclass(frozen=True)
class _Ask:
    """A request as it came; about: what its spans tell."""

    request_id: str
    prompt: PromptLike | WarmPrompt
    params: SamplingParams
    template: bool | None
    allow_paths: bool
    peek: bool = False
    about: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "about", {"request_id": self.request_id, "media": 0})


@dataclass(eq=False)
class InputPipeline:
    """Thread pool, processor cache and uuid registry of one engine. Thread-safe.

    family: the family's name. checkpoint_identity: `Checkpoint.identity`. vocab_size: width of the
    logits. stop_token_ids: what ends an answer, e.g. `eos_token_ids(...)`; the processor's own are
    added. pin_for: put features into pinned memory, from which this GPU copies by itself. recorder:
    gets a span a request. give_way: called before each stretch of Python, to let more urgent
    threads go first. grammars: those that the engine core has, where it is in this process.
    """

    processor: Processor
    fusion: Fusion
    family: str
    checkpoint_identity: bytes
    config: EngineConfig
    vocab_size: int
    max_model_len: int
    stop_token_ids: Iterable[int] = ()
    pin_for: torch.device | None = None
    give_way: Callable[[], None] = nobody
    recorder: SpanRecorder | None = None
    grammars: Grammars | None = None

    def __post_init__(self) -> None:
        config = self.config
        self._hasher = get_hasher(config.hash_algorithm)
        self._renderer = PromptRenderer(self.processor, self.family, self.vocab_size, self.max_model_len)
        pinner = Pinner(self.pin_for, config.processor_cache_size)
        self._decoder = TimedDecoder(make_decoder(config))
        self._room = Room(_REQUESTS * config.max_decoded_bytes)
        self._media = MediaLoader(
            self.processor, self.family, self._hasher, media_limits(config), config.processor_cache_size, pinner,
            self._in_pool, self.give_way, self._room, self._decoder,
        )  # fmt: skip
        own = self.processor.default_sampling()
        self._stop_ids = frozenset(self.stop_token_ids) | frozenset(own.stop_token_ids)
        self._logits_processors = tuple(own.logits_processors)
        self._grammars = self.grammars or Grammars(
            lambda: read_tokens(self.processor.tokenizer, self.vocab_size, self._stop_ids)
        )
        self._sources = SourceMaker(self.fusion, self.family, self.processor.modalities, self.vocab_size, self._hasher)
        kv_config = config.kv_cache_config
        self._block_size: int = kv_config.block_size if kv_config.enable_block_reuse else 0
        self._plain_checked = False
        self._namespace = self._namespace_of(None)
        threads = config.preprocess_threads or min(MAX_THREADS, os.cpu_count() or 1)
        self._pool = Pool(threads, "mm-media", pinner.start_thread)
        pinner.warm(min(config.max_num_seqs, MAX_WARM))
        self._coordinator = Coordinator("mm-inputs", self.give_way)

    def submit(
        self,
        request_id: str,
        prompt: PromptLike | WarmPrompt,
        params: SamplingParams | None = None,
        apply_chat_template: bool | None = None,
        *,
        allow_paths: bool = True,
        peek: bool = False,
    ) -> Future[PreparedRequest]:
        """Prepare one request; its errors (RequestError) come through the future.

        prompt: a str, a TextPrompt, a dict with its keys, chat messages, a ChatPrompt, or a WarmPrompt.
        allow_paths=False: media given as str must be `data:` URLs (requests from a network).
        peek: only to look it up: nothing is cached, or more recently used, for it.
        Raises EngineClosedError after close().
        """
        ask = _Ask(request_id, prompt, params or SamplingParams(), apply_chat_template, allow_paths, peek)
        steps = self._prepare(ask)
        try:
            return self._coordinator.submit(steps if self.recorder is None else self._recorded(ask, steps))
        except RuntimeError:
            raise EngineClosedError("The engine was closed. Create a new one.") from None

    def read(self, prompt: PromptLike | WarmPrompt) -> Given:
        """A prompt's plain form; no media are touched. Raises RequestError."""
        if isinstance(prompt, WarmPrompt):
            return read_warm(prompt, self.family, self.processor.modalities)
        return read_prompt(prompt, self.family, self.processor.modalities)

    def tokenize(self, prompt: PromptLike, apply_chat_template: bool | None = None) -> list[int]:
        """A prompt's ids, each item of media being one placeholder (no media are touched). Raises RequestError."""
        return self._renderer.render(self.read(prompt), apply_chat_template)

    def decode_audio(self, data: bytes) -> Future[Audio]:
        """A recording's samples, mono, at the rate that the model hears (its own, where the model hears none). Its
        errors (MediaError and its kinds) come through the future. Raises EngineClosedError after close()."""
        rate = getattr(self.processor, "sampling_rate", None)
        return self._in_pool("audio", lambda: self._decoder.audio(data, rate))

    def warm_grammars(self) -> None:
        """Do now what the first request with a grammar would wait for. Raises MissingExtraError."""
        self._grammars.warm()

    @property
    def media(self) -> MediaLoader:
        """Features and names."""
        return self._media

    def stats(self) -> ProcessorCacheStats:
        """The processor cache's counters."""
        return self._media.cache.stats()

    def decoded(self) -> dict[str, dict[str, float]]:
        """Items that were decoded, and seconds, by modality."""
        return self._decoder.taken()

    def close(self) -> None:
        """Cancel what waits, for its turn or for media not begun, and wait for what runs."""
        self._coordinator.refuse()
        self._decoder.close()
        self._grammars.close()
        try:
            self._pool.shutdown()
        finally:
            self._coordinator.close()

    def _prepare(self, ask: _Ask) -> Steps[PreparedRequest]:
        given = self.read(ask.prompt)
        ask.about["media"] = len(given.items)
        check_salt(given.cache_salt)
        self._check_params(ask.params)
        counts = count_items(given)
        self._sources.check(counts)
        self._check_counts(counts)
        self._check_kwargs(given.processor_kwargs)
        if ask.params.structured is not None and not ask.peek:
            compiled = self._grammars.start(
                ask.params.structured, check=True, salt=given.cache_salt, bounded=not ask.allow_paths
            )
            yield compiled
            outcome(compiled)
        if is_long(given):
            ids = yield from self._apart("tokenize", lambda: self._renderer.render(given, ask.template))
        else:
            ids = self._renderer.render(given, ask.template)
        if not given.items:
            return self._put_together(ask, given, ids, [])
        return (yield from self._with_media(ask, given, ids, MediaRequest(counts, given.processor_kwargs)))

    def _with_media(self, ask: _Ask, given: Given, ids: list[int], request: MediaRequest) -> Steps[PreparedRequest]:
        # In a prompt each item has at least as many tokens as rows, but where they are read beside it.
        places = self.max_model_len if self.fusion.kind == "embed" else None
        stay = Stay(self.config.max_decoded_bytes, places)
        self._room.enter(stay)
        try:
            self.give_way()
            yield from self._room.wait(stay)
            features, warnings = yield from self._features(given, request, ask, stay)
            self.give_way()
            prepared = self._put_together(ask, given, ids, features)
            prepared = replace(prepared, warnings=warnings) if warnings else prepared
        except BaseException:
            self._room.leave(stay)
            raise
        self._room.keep(stay, prepared)
        return prepared

    def _put_together(self, ask: _Ask, given: Given, ids: list[int], features: list[MediaFeature]) -> PreparedRequest:
        salt = given.cache_salt
        instruction = self._sources.instruction(lambda: self._renderer.instruction(given, ids)) if features else ()
        ids, ranges = self._renderer.expand(ids, features)
        if isinstance(ask.prompt, WarmPrompt) and ask.prompt.is_item and ranges and self.fusion.kind == "embed":
            ids = ids[: ranges[-1].end]  # what comes behind the item is for the questions to say
        if len(ids) + 1 > self.max_model_len:
            raise too_long(len(ids), self.max_model_len)
        parts = self._sources.split(self._salted(salt), ids, ranges, instruction)
        positions, delta = self._positions(parts.token_ids, parts.ranges)
        return PreparedRequest(
            request_id=ask.request_id,
            token_ids=parts.token_ids,
            params=self._with_own(ask.params),
            ranges=parts.ranges,
            positions=positions,
            decode_delta=delta,
            cache_salt=salt,
            kv_context=parts.kv_context,
            stop_token_ids=self._stop_ids,
            block_size=self._block_size,
            block_keys=self._block_keys(parts, positions, salt),
            source=parts.source,
            instruction=instruction,
        )

    def _with_own(self, params: SamplingParams) -> SamplingParams:
        """The request's parameters behind the family's own logits processors."""
        if not self._logits_processors:
            return params
        return params.model_copy(update={"logits_processors": (*self._logits_processors, *params.logits_processors)})

    def _apart(self, name: str, work: Callable[[], T]) -> Steps[T]:
        """Do something in the pool, and wait for it."""
        done = self._in_pool(name, work)
        yield done
        return done.result()

    def _in_pool(self, name: str, work: Callable[[], T]) -> Future[T]:
        try:
            timed = work if self.recorder is None else lambda: self._timed(name, work)
            return self._pool.submit(timed, first=name == "prepare")
        except RuntimeError:
            raise EngineClosedError("The engine was closed before the request was ready.") from None

    def _recorded(self, ask: _Ask, steps: Steps[T]) -> Steps[T]:
        """A request's steps, each with a span on track 0, that of the thread that runs them all."""
        while True:
            start = time.perf_counter_ns()
            try:
                awaited = next(steps)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]
            finally:
                self._record(0, start, ask.about)
            yield awaited

    def _timed(self, name: str, work: Callable[[], T]) -> T:
        start = time.perf_counter_ns()
        try:
            return work()
        finally:
            index = int(threading.current_thread().name.rpartition("_")[2]) + 1
            self._record(index, start, {"part": name})

    def _record(self, thread: int, start_ns: int, about: Mapping[str, Any]) -> None:
        if self.recorder is not None:
            self.recorder.add(Span(f"preprocess {thread}", "preprocess", start_ns, time.perf_counter_ns(), about))

    def _block_keys(self, parts: Parts, positions: Any, salt: str | None) -> tuple[bytes, ...]:
        """Keys of the prompt's blocks, as the scheduler would compute them."""
        if not self._block_size:
            return ()
        media = [(r.feature.key, r.offset, r.end) for r in parts.ranges]
        context = encode_fields((salt, parts.kv_context))
        return prompt_block_keys(self._hasher, self._block_size, parts.token_ids, media, context, positions)

    def _check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """The plugin's check; that no options at all are right needs to be asked only once."""
        if kwargs or not self._plain_checked:
            check_knobs(kwargs, self.config)
            guarded(self.family, "check_kwargs", lambda: self.processor.check_kwargs(kwargs))
            self._plain_checked = self._plain_checked or not kwargs

    def _check_params(self, params: SamplingParams) -> None:
        """What SamplingParams cannot check without the vocabulary."""
        for name in ("logit_bias", "stop_token_ids", "logprob_token_ids"):
            wrong = [i for i in getattr(params, name) if not 0 <= i < self.vocab_size]
            if wrong:
                raise InvalidParamsError(
                    f"{name} holds token id {wrong[0]}; ids go from 0 to {self.vocab_size - 1}.", param=name
                )

    def _check_counts(self, counts: Mapping[Modality, int]) -> None:
        taken: Mapping[Modality, int] = getattr(self.processor, "limits", {})
        for modality, count in counts.items():
            if count > taken.get(modality, count):
                raise TooManyMediaError(
                    f"The request has {count} item(s) of {modality}; family {self.family!r} takes {taken[modality]} "
                    "a request. Send the others in requests of their own.",
                    param="multi_modal_data",
                )
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

    def _features(
        self, given: Given, request: MediaRequest, ask: _Ask, stay: Stay
    ) -> Steps[tuple[list[MediaFeature], tuple[str, ...]]]:
        """Features of all items, in the order given, and what the caller should know of them."""
        namespace = self._salted(given.cache_salt)
        sampling = self._sampling(request) if "video" in request.counts else _ANY_SAMPLING
        budget = DecodedBudget(self.config.max_decoded_bytes)
        job = MediaJob(request, given.cache_salt, namespace, sampling, ask.allow_paths, budget, stay, ask.peek)
        try:
            return (yield from self._media.load(given.items, job)), tuple(job.warnings)
        except RequestError as error:
            error.param = error.param or "multi_modal_data"
            raise

    def _salted(self, salt: str | None) -> bytes:
        return self._namespace if salt is None else self._namespace_of(salt)

    def _namespace_of(self, salt: str | None) -> bytes:
        return encode_fields((salt, self.family, self.checkpoint_identity, self.processor.settings_key))

    def _sampling(self, request: MediaRequest) -> VideoSampling:
        ask: Callable[[MediaRequest], VideoSampling] | None = getattr(self.processor, "video_sampling", None)
        sampling = VideoSampling() if ask is None else guarded(self.family, "video_sampling", lambda: ask(request))
        return replace(sampling, max_frames=min(sampling.max_frames, self.config.max_video_frames))


def eos_token_ids(generation_config: Mapping[str, Any], tokenizer: Any) -> frozenset[int]:
    """Ids that end an answer: generation_config.json's `eos_token_id` (an id or a list), and the tokenizer's."""
    declared = generation_config.get("eos_token_id")
    ids = [*(declared if isinstance(declared, list) else [declared]), getattr(tokenizer, "eos_token_id", None)]
    return frozenset(i for i in ids if type(i) is int)
