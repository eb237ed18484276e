"""Frontend: what `Engine` and `AsyncEngine` share. Requests in, texts out, by callback."""

from __future__ import annotations

import gc
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any

from mm_core.config import EngineConfig, SamplingParams
from mm_core.engine.about import About
from mm_core.engine.core import EngineCore
from mm_core.engine.core_thread import CoreThread
from mm_core.engine.delivery import OutputThread
from mm_core.engine.desk import CacheDesk
from mm_core.engine.live import Listener, Live
from mm_core.engine.loading import build_core, build_pipeline, check_vocabulary, load_model
from mm_core.engine.messages import Abort, PinItem, Submit, TokenOutput
from mm_core.engine.output import RequestText, WholeTexts
from mm_core.engine.precedence import Precedence
from mm_core.engine.process.front import load_front
from mm_core.engine.process.launch import Launch, plugin_names
from mm_core.engine.process.parent import Listeners
from mm_core.engine.process.requests import check_portable, own_that_stay, package_of
from mm_core.engine.process.supervisor import EngineProcess
from mm_core.engine.startup import StartupTimes
from mm_core.errors import (
    EngineClosedError,
    EngineDiedError,
    EngineError,
    InvalidParamsError,
    MMError,
    RequestAbortedError,
)
from mm_core.inputs.prompt import guarded
from mm_core.tracing import SpanRecorder
from mm_core.types import PreparedRequest, RequestOutput

logger = logging.getLogger(__name__)

# Outputs that are made text of, and told to a listener, before the engine's thread is let through.
_STRETCH = 8


class Frontend(About):
    """Owns the model, the input pipeline and the engine core: its thread, or its process.

    A listener is called with the request's RequestOutput when it ends (and after every token
    with stream=True), or once with the error that ended it. It runs in the engine's threads and
    must return quickly.

    recorder: what ran when, where `config.record_timeline` asks for it.
    """

    _core: EngineCore

    def __init__(self, name: str, config: EngineConfig, plugins: Sequence[Any] | None) -> None:
        self.config = config
        self._name = name
        self.recorder = SpanRecorder() if config.record_timeline else None
        self.startup = StartupTimes(show_progress=config.show_progress)
        self.precedence = Precedence()
        self._outputs = OutputThread(self._on_outputs)
        self.desk = CacheDesk(lambda message: self._thread.send(message))
        # Reentrant: a stream that the garbage collector finds aborts its request, whatever its thread holds.
        self._lock = threading.RLock()
        self._live: dict[str, Live] = {}
        self._ids = itertools.count()
        self._closed = False
        # Prepared media take memory until their request ends: only so many are begun at a time.
        self._room = 2 * config.max_num_seqs
        self._queued: deque[str] = deque()
        # What close() does, last one first, each whatever the others raise. A start that fails does it at once.
        with ExitStack() as ends:
            self._start(name, plugins, ends)
            self._ends = ends.pop_all()

    def _start(self, name: str, plugins: Sequence[Any] | None, ends: ExitStack) -> None:
        for last in (self.startup.close, self._release, self.desk.close, self._end_all):
            ends.callback(last)
        self._outputs.start()
        ends.callback(self._outputs.close)
        if self.config.engine_process:
            self._load_beside(name, plugins, ends)
        else:
            self._thread = CoreThread(lambda: self._load(name, plugins), self._outputs.put)
            ends.callback(self._thread.close)
        give_way = self.precedence.give_way
        self.pipeline = build_pipeline(self.model, self.config, self.max_model_len, self.recorder, give_way)
        ends.callback(self.pipeline.close)
        self._texts = WholeTexts(self.model.processor.tokenizer)
        # A full collection looks at all of torch, for tenths of a second in some step: what is there now stays.
        with self.startup.part("garbage"):
            gc.collect()
            ends.callback(gc.unfreeze)
            gc.freeze()
        self.startup.finish()

    def _load(self, name: str, plugins: Sequence[Any] | None) -> EngineCore:
        self.model = load_model(name, self.config, plugins, self.startup)
        self._core, self.max_model_len = build_core(self.model, self.config, self.recorder)
        if self.model.device.type == "cuda":  # on a CPU the operators themselves take the time, without the lock
            self._core.precedence = self.precedence
        self._core.notify = self.desk.take
        return self._core

    def _load_beside(self, name: str, plugins: Sequence[Any] | None, ends: ExitStack) -> None:
        """The core in a process of its own, and meanwhile here what it does not need."""
        launch = Launch(name, self.config, plugin_names(plugins))
        listeners = Listeners(self._outputs.put_at, self.desk.take, self._on_death, self._on_restart)
        self._thread = engine = EngineProcess(launch, listeners, self.startup)
        ends.callback(engine.close)
        front = load_front(name, self.config, plugins, self.startup)
        facts = engine.wait_ready()
        check_vocabulary(name, front.processor, facts.vocab_size)
        self._package, own = package_of(front.processor), front.processor.default_sampling().logits_processors
        engine.speak_of(self._package, own_that_stay(SamplingParams(logits_processors=own), self._package))
        self.model, self.max_model_len = replace(front, vocab_size=facts.vocab_size), facts.max_model_len

    def _on_death(self, error: EngineDiedError) -> None:
        """The engine's process died: all that has not ended ends, behind the outputs that came from it."""
        self.desk.go_down(error)
        with self._lock:  # what comes later is refused by `add`
            ended = list(self._live)
        self._outputs.call(lambda: self._end_dead(ended, str(error)))

    def _end_dead(self, ended: Sequence[str], text: str) -> None:
        for request_id in ended:
            self._fail(request_id, EngineDiedError(text))

    def _on_restart(self) -> None:
        self.desk.come_up()
        with suppress(MMError):  # it died once more: the one after it is told
            for owner in list(self.pipeline.media.pinned):  # what is computed anew of them joins
                self.desk.ask(PinItem, owner.uuid, owner.salt)

    def _refusal(self, params: SamplingParams) -> MMError | None:
        """Why the engine's process cannot take a request, if it cannot."""
        engine = self._thread
        if not isinstance(engine, EngineProcess):
            return None
        if engine.refusal is not None:
            return EngineDiedError(str(engine.refusal))
        try:
            check_portable(params, self._package)
        except InvalidParamsError as error:
            return error
        return None

    # -- requests --------------------------------------------------------------------------

    def add(
        self,
        prompt: Any,
        params: SamplingParams,
        listener: Listener,
        *,
        stream: bool = False,
        apply_chat_template: bool | None = None,
        allow_paths: bool = True,
    ) -> str:
        """Start a request; returns its id. A request that is refused ends through its listener.

        allow_paths=False: media given as str must be `data:` URLs (prompts that come from a network).

        Raises EngineClosedError, and InvalidParamsError where `params` is no SamplingParams.
        """
        if not isinstance(params, SamplingParams):
            raise InvalidParamsError(
                f"sampling_params is a {type(params).__name__}; give SamplingParams(...).", param="sampling_params"
            )
        request_id = f"req-{next(self._ids)}"
        live = Live(listener, stream, (prompt, params, apply_chat_template), allow_paths, time.perf_counter())
        with self._lock:
            if self._closed:
                raise EngineClosedError("The engine is closed. Make a new one with Engine.from_pretrained(...).")
            self._live[request_id] = live
            refusal = self._refusal(params)
            if refusal is None:
                self._queued.append(request_id)
        if refusal is not None:
            self._end(request_id, refusal)
        self._begin_queued()
        return request_id

    def _begin_queued(self) -> None:
        """Begin to prepare queued requests, in order of arrival, while there is room."""
        while self._queued:
            with self._lock:
                if self._closed or not self._queued or self._room <= 0:
                    return
                request_id = self._queued.popleft()
                live = self._live.get(request_id)
                if live is None or live.ask is None:  # aborted while it was queued
                    continue
                ask, live.ask, live.busy = live.ask, None, True
                self._room -= 1
            try:
                live.preparing = self.pipeline.submit(request_id, *ask, allow_paths=live.allow_paths)
            except MMError as error:  # closed since the look above
                live.busy = False
                self._end(request_id, error)
            else:
                live.preparing.add_done_callback(partial(self._on_prepared, request_id, live))
                if request_id not in self._live:  # aborted meanwhile
                    live.preparing.cancel()

    def _on_prepared(self, request_id: str, begun: Live, done: Future[PreparedRequest]) -> None:
        with self._lock:
            begun.busy = False
            self._room += (gone := request_id not in self._live)  # its end left that to this
        if gone:
            self._begin_queued()
            return
        try:
            request = done.result()
        except CancelledError:
            self._end(request_id, EngineClosedError("The engine was closed before the request ended."))
            return
        except BaseException as error:  # a plugin's sys.exit, a tokenizer's panic: this thread must live on
            self._end(request_id, _fault("Preparing the request", error))
            return
        with self._lock:
            live = self._live.get(request_id)
            if live is None:  # aborted meanwhile
                return
            text = RequestText(request, self.model.processor.tokenizer, self._finish_text, stream=live.stream)
            live.text, live.plain = text, text.plain
            live.open = set(range(request.params.n))
            live.prompt_tokens = len(request.user_token_ids)
            live.media_tokens = sum([r.feature.num_placed for r in request.media])
            live.token_times = None if self.recorder is None else []
            live.prepared = time.perf_counter()
            self._thread.send(Submit(request))

    def _finish_text(self, text: str, token_ids: Sequence[int]) -> str:
        return str(guarded(self.model.family, "finish", lambda: self.model.processor.finish(text, token_ids)))

    def abort(self, request_id: str) -> None:
        """End a request wherever it is; its listener gets RequestAbortedError. Unknown ids are ignored."""
        live = self._live.get(request_id)
        if live is None:
            return
        # First forgotten, then aborted: a request that is prepared just now is not submitted behind its abort.
        self._end(request_id, RequestAbortedError("The request was aborted."))
        if live.preparing is not None:
            live.preparing.cancel()
        self._thread.send(Abort(request_id))

    def _end(self, request_id: str, result: RequestOutput | MMError) -> None:
        with self._lock:
            live = self._live.pop(request_id, None)
            if live is not None and live.ask is None and not live.busy:  # else what it took is still held
                self._room += 1
        if live is not None:
            live.tell(result)
        self._begin_queued()

    # -- outputs (in a thread of their own) ------------------------------------------------

    def _on_outputs(self, when: float, outputs: Sequence[TokenOutput]) -> None:
        """A step's outputs. Most are a token of an answer that goes on and whose text nobody waits for."""
        lives, slow = self._live, 0
        ended: list[tuple[Live, RequestText, TokenOutput]] = []
        for output in outputs:
            live = lives.get(output.request_id)
            if live is None or live.text is None:
                continue
            token = output.token_id
            try:
                if live.plain and token is not None and output.error is None:
                    live.text.append(output.index, token)
                    live.stamp(when, output.index)
                    if output.finish_reason is not None:
                        ended.append((live, live.text, output))
                else:
                    slow += 1
                    if slow % _STRETCH == 0:
                        self.precedence.give_way()
                    self._on_output(live, live.text, output, when)
            except BaseException as error:  # of one request's text; the others' tokens are behind it in the list
                self._on_fault(output, error)
        for skip in (True, False):
            self._end_plain([e for e in ended if e[1].skip_special_tokens is skip], skip)

    def _end_plain(self, ended: Sequence[tuple[Live, RequestText, TokenOutput]], skip_special_tokens: bool) -> None:
        """Answers that end in one step: their texts are decoded together, so that all are there soon."""
        try:
            shown = [text.shown(output.index, output.finish_reason) for _, text, output in ended]
            decoded: list[str | None] = [*self._texts.decode(shown, skip_special_tokens=skip_special_tokens)]
        except BaseException:  # one by one then: whose fault it is shows there
            decoded = [None] * len(ended)
        for (live, text, output), whole in zip(ended, decoded, strict=True):
            try:
                self._end_answer(live, text, output, whole)
            except BaseException as error:
                self._on_fault(output, error)

    def _end_answer(self, live: Live, text: RequestText, output: TokenOutput, whole: str | None) -> None:
        if whole is None:
            (whole,) = self._texts.decode(
                [text.shown(output.index, output.finish_reason)], skip_special_tokens=text.skip_special_tokens
            )
        text.end(output.index, whole, output.finish_reason or "", output.stop_reason)
        live.count(output)
        live.open.discard(output.index)
        if not live.open:
            self._end(output.request_id, live.output(text))

    def _on_fault(self, output: TokenOutput, error: BaseException) -> None:
        logger.warning("request %s failed", output.request_id, exc_info=error)
        self._fail(output.request_id, _fault("Making text of the tokens", error))

    def _on_output(self, live: Live, text: RequestText, output: TokenOutput, when: float) -> None:
        if output.error is not None:
            self._fail(output.request_id, output.error)
        elif output.index not in live.open:
            return
        elif output.finish_reason == "abort":
            self._end(output.request_id, EngineClosedError("The engine was closed before the request ended."))
        else:
            self._on_token(live, text, output, when)

    def _fail(self, request_id: str, error: MMError) -> None:
        self._thread.send(Abort(request_id))
        self._end(request_id, error)

    def _on_token(self, live: Live, text: RequestText, output: TokenOutput, when: float) -> None:
        tokens = [] if output.token_id is None else [output.token_id]
        logprobs = [output.logprobs] * len(tokens)
        if tokens:
            live.stamp(when, output.index)
        stop = text.update(output.index, tokens, logprobs, output.finish_reason, output.stop_reason)
        if stop is not None and output.finish_reason is None:
            self._thread.send(Abort(output.request_id, output.index, stopped=True))
        live.count(output)
        if stop is not None or output.finish_reason is not None:
            live.open.discard(output.index)
        if not live.open:
            self._end(output.request_id, live.output(text))
        elif live.stream:
            with self._lock:  # nothing comes behind the error of an abort
                if output.request_id in self._live:
                    live.tell(live.output(text))

    # -- the end ---------------------------------------------------------------------------

    def close(self) -> None:
        """Abort what runs and release the device. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._ends.close()

    def _end_all(self) -> None:
        for request_id in list(self._live):
            self._end(request_id, EngineClosedError("The engine was closed before the request ended."))

    def _release(self) -> None:
        vars(self).pop("model", None)
        if hasattr(self, "_core"):  # else loading failed
            self._core.release()


def _fault(what: str, error: BaseException) -> MMError:
    """What the caller is told of an unforeseen error: its kind; the rest is for the log."""
    if isinstance(error, MMError):
        return error
    fault = EngineError(f"{what} failed with {type(error).__name__}. This is a bug: please report it with the log.")
    fault.__cause__ = error
    return fault
