"""Frontend: what `Engine` and `AsyncEngine` share. Requests in, texts out, by callback."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mm_core.config import EngineConfig, SamplingParams
from mm_core.engine.core import CoreThread, EngineCore
from mm_core.engine.loading import LoadedModel, build_core, build_pipeline, load_model
from mm_core.engine.messages import Abort, ClearCache, Submit, TokenOutput
from mm_core.engine.output import RequestText
from mm_core.errors import EngineClosedError, EngineError, InvalidParamsError, MMError, RequestAbortedError
from mm_core.inputs.prompt import guarded
from mm_core.types import PreparedRequest, RequestOutput, Usage

logger = logging.getLogger(__name__)

Listener = Callable[[RequestOutput | MMError], None]


@dataclass
class _Live:
    """A request between `add` and its end. ask is what to prepare, until that begins; text is None
    until it is done."""

    listener: Listener
    stream: bool
    ask: tuple[Any, SamplingParams, bool | None] | None
    text: RequestText | None = None
    open: set[int] = field(default_factory=set)
    usage: Usage = field(default_factory=Usage)
    preparing: Future[PreparedRequest] | None = None


class Frontend:
    """Owns the model, the input pipeline and the engine core's thread.

    A listener is called with the request's RequestOutput when it ends (and after every token
    with stream=True), or once with the error that ended it. It runs in the engine's threads and
    must return quickly.
    """

    model: LoadedModel
    max_model_len: int
    _core: EngineCore

    def __init__(self, name: str, config: EngineConfig, plugins: Sequence[Any] | None) -> None:
        self.config = config
        self._thread = CoreThread(lambda: self._load(name, plugins), self._on_outputs)
        self.pipeline = build_pipeline(self.model, config, self.max_model_len)
        # Reentrant: a stream that the garbage collector finds aborts its request, whatever its thread holds.
        self._lock = threading.RLock()
        self._live: dict[str, _Live] = {}
        self._ids = itertools.count()
        self._closed = False
        # Prepared media take memory until their request ends: only so many are begun at a time.
        self._room = 2 * config.max_num_seqs
        self._queued: deque[str] = deque()

    def _load(self, name: str, plugins: Sequence[Any] | None) -> EngineCore:
        self.model = load_model(name, self.config, plugins)
        self._core, self.max_model_len = build_core(self.model, self.config)
        return self._core

    # -- requests --------------------------------------------------------------------------

    def add(
        self,
        prompt: Any,
        params: SamplingParams,
        listener: Listener,
        *,
        stream: bool = False,
        apply_chat_template: bool | None = None,
    ) -> str:
        """Start a request; returns its id. A request that is refused ends through its listener.

        Raises EngineClosedError, and InvalidParamsError where `params` is no SamplingParams.
        """
        if not isinstance(params, SamplingParams):
            raise InvalidParamsError(
                f"sampling_params is a {type(params).__name__}; give SamplingParams(...).", param="sampling_params"
            )
        request_id = f"req-{next(self._ids)}"
        live = _Live(listener, stream, (prompt, params, apply_chat_template))
        with self._lock:
            if self._closed:
                raise EngineClosedError("The engine is closed. Make a new one with Engine.from_pretrained(...).")
            self._live[request_id] = live
            self._queued.append(request_id)
        self._begin_queued()
        return request_id

    def _begin_queued(self) -> None:
        """Begin to prepare queued requests, in order of arrival, while there is room."""
        while True:
            with self._lock:
                if self._closed or not self._queued or self._room <= 0:
                    return
                request_id = self._queued.popleft()
                live = self._live.get(request_id)
                if live is None or live.ask is None:  # aborted while it was queued
                    continue
                ask, live.ask = live.ask, None
                self._room -= 1
            try:
                live.preparing = self.pipeline.submit(request_id, *ask)
            except MMError as error:  # closed since the look above
                self._end(request_id, error)
            else:
                live.preparing.add_done_callback(lambda done, i=request_id: self._on_prepared(i, done))  # type: ignore[misc]

    def _on_prepared(self, request_id: str, done: Future[PreparedRequest]) -> None:
        try:
            request = done.result()
        except CancelledError:
            self._end(request_id, EngineClosedError("The engine was closed before the request ended."))
            return
        except MMError as error:
            self._end(request_id, error)
            return
        except BaseException as error:  # a plugin's sys.exit, a tokenizer's panic: this thread must live on
            self._end(request_id, _fault("Preparing the request", error))
            return
        with self._lock:
            live = self._live.get(request_id)
            if live is None:  # aborted meanwhile
                return
            live.text = RequestText(request, self.model.processor.tokenizer, self._finish_text)
            live.open = set(range(request.params.n))
            live.usage = Usage(
                prompt_tokens=len(request.token_ids),
                media_tokens=sum(r.feature.num_tokens for r in request.ranges),
            )
            self._thread.send(Submit(request))

    def _finish_text(self, text: str, token_ids: Sequence[int]) -> str:
        return str(guarded(self.model.family, "finish", lambda: self.model.processor.finish(text, token_ids)))

    def abort(self, request_id: str) -> None:
        """End a request wherever it is; its listener gets RequestAbortedError. Unknown ids are ignored."""
        live = self._live.get(request_id)
        if live is None:
            return
        if live.preparing is not None:
            live.preparing.cancel()
        # First forgotten, then aborted: a request that is prepared just now is not submitted behind its abort.
        self._end(request_id, RequestAbortedError("The request was aborted."))
        self._thread.send(Abort(request_id))

    def _end(self, request_id: str, result: RequestOutput | MMError) -> None:
        with self._lock:
            live = self._live.pop(request_id, None)
            if live is not None and live.ask is None:
                self._room += 1
        if live is not None:
            _tell(live, result)
        self._begin_queued()

    # -- outputs (in the core's thread) ----------------------------------------------------

    def _on_outputs(self, outputs: Sequence[TokenOutput]) -> None:
        for output in outputs:
            try:
                self._on_output(output)
            except BaseException as error:  # of one request's text; the others' tokens are behind it in the list
                logger.warning("request %s failed", output.request_id, exc_info=True)
                self._fail(output.request_id, _fault("Making text of the tokens", error))

    def _on_output(self, output: TokenOutput) -> None:
        live = self._live.get(output.request_id)
        if live is None or live.text is None:
            return
        if output.error is not None:
            self._fail(output.request_id, output.error)
        elif output.index not in live.open:
            return
        elif output.finish_reason == "abort":
            self._end(output.request_id, EngineClosedError("The engine was closed before the request ended."))
        else:
            self._on_token(live, live.text, output)

    def _fail(self, request_id: str, error: MMError) -> None:
        self._thread.send(Abort(request_id))
        self._end(request_id, error)

    def _on_token(self, live: _Live, text: RequestText, output: TokenOutput) -> None:
        tokens = [] if output.token_id is None else [output.token_id]
        logprobs = [output.logprobs] * len(tokens)
        stop = text.update(output.index, tokens, logprobs, output.finish_reason, output.stop_reason)
        if stop is not None and output.finish_reason is None:
            self._thread.send(Abort(output.request_id, output.index, stopped=True))
        live.usage = _count(live.usage, output)
        if stop is not None or output.finish_reason is not None:
            live.open.discard(output.index)
        if not live.open:
            self._end(output.request_id, text.output(live.usage))
        elif live.stream:
            _tell(live, text.output(live.usage))

    # -- the rest --------------------------------------------------------------------------

    @property
    def num_live(self) -> int:
        """Requests that have not ended, queued and being prepared ones included."""
        return len(self._live)

    def stats(self) -> dict[str, Any]:
        """Counters of engine core and input pipeline."""
        return {**self._thread.stats(), "processor_cache": asdict(self.pipeline.stats())}

    def clear_cache(self) -> None:
        """Forget reusable KV blocks."""
        self._thread.send(ClearCache())

    def close(self) -> None:
        """Abort what runs and release the device. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.pipeline.close()
        self._thread.close()
        for request_id in list(self._live):
            self._end(request_id, EngineClosedError("The engine was closed before the request ended."))
        self._core.release()
        del self.model


def _tell(live: _Live, result: RequestOutput | MMError) -> None:
    """Call a listener; its fault is its own, not other requests'."""
    try:
        live.listener(result)
    except Exception:
        logger.exception("a listener failed")


def _fault(what: str, error: BaseException) -> MMError:
    """What the caller is told of an unforeseen error: its kind; the rest is for the log."""
    if isinstance(error, MMError):
        return error
    fault = EngineError(f"{what} failed with {type(error).__name__}. This is a bug: please report it with the log.")
    fault.__cause__ = error
    return fault


def _count(usage: Usage, output: TokenOutput) -> Usage:
    """Usage with one more output of the core taken in; prompt-side counts are those of the first answer."""
    first = output.index == 0
    return replace(
        usage,
        completion_tokens=usage.completion_tokens + (output.token_id is not None),
        cached_tokens=output.cached_tokens if first else usage.cached_tokens,
        # An item encoded again after a preemption counts once: more than there is was not asked for.
        encoded_media_tokens=min(max(usage.encoded_media_tokens, output.encoded_rows), usage.media_tokens),
    )
