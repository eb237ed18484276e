"""Running a family's tasks: generators of requests, many at once. What a task does is the plugin's alone."""

from __future__ import annotations

import inspect
import logging
import queue
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from mm_core.config import SamplingParams
from mm_core.engine.frontend import Frontend
from mm_core.errors import BatchError, ConfigError, EngineClosedError, InvalidParamsError, MMError, PluginError
from mm_core.inputs.messages import ChatPrompt
from mm_core.types import RequestOutput, TaskOptions, TaskProgress, TaskRequest, TextPrompt

logger = logging.getLogger(__name__)

T = TypeVar("T")
Outcome = Sequence[RequestOutput] | MMError
_Event = tuple["_Waiting", int, RequestOutput | MMError]


class TaskRun:
    """One task under way. Raises ConfigError for an unknown task, InvalidParamsError for arguments that it does
    not take, EngineClosedError, whatever of the MMError tree the task raises, and PluginError for anything else.
    The listeners of `options` are called in the thread that `advance` is.

    `result` is the task's once `advance` gave None.
    """

    def __init__(
        self, frontend: Frontend, name: str, inputs: Mapping[str, Any], options: TaskOptions | None = None
    ) -> None:
        self._options = options or TaskOptions()
        model = vars(frontend).get("model")
        if model is None:
            raise EngineClosedError("The engine is closed. Make a new one with Engine.from_pretrained(...).")
        self._where = f"Plugin '{model.family}': task '{name}'"
        self.result: Any = None
        task = model.tasks.get(name)
        if task is None:
            known = f"It has: {', '.join(sorted(model.tasks))}." if model.tasks else "It has none; use generate()."
            raise ConfigError(f"Family '{model.family}' has no task {str(name)[:40]!r}. {known}")
        _check_arguments(name, task, inputs)
        started = self._guarded(lambda: task(**inputs))
        if not isinstance(started, Generator):
            raise PluginError(f"{self._where} gave a {type(started).__name__}. A task is a generator function.")
        self._generator: Generator[Sequence[TaskRequest] | TaskProgress, Sequence[RequestOutput], Any] = started

    def advance(self, outcome: Outcome = ()) -> list[TaskRequest] | None:
        """Hand over what came of the requests before (nothing, at the start): their outputs in order, or the
        error of one, which is thrown into the task. The next requests, or None at the end."""
        try:
            for output in () if isinstance(outcome, MMError) else outcome:
                self._tell(self._options.on_output, output)
            return self._guarded(lambda: self._next(outcome))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the task where it stands. Idempotent."""
        try:
            self._generator.close()
        except Exception:  # what it raises on its way out helps nobody any more
            logger.warning("%s did not close", self._where, exc_info=True)

    def _next(self, outcome: Outcome) -> list[TaskRequest] | None:
        try:
            if isinstance(outcome, MMError):
                requests = self._generator.throw(outcome)
            else:
                requests = self._generator.send(outcome) if outcome else next(self._generator)
            while isinstance(requests, TaskProgress):
                self._tell(self._options.on_progress, requests.value)
                requests = self._generator.send(())
        except StopIteration as end:
            self.result = end.value
            return None
        if isinstance(outcome, EngineClosedError):  # nothing that it asks now can be answered
            raise outcome
        if not isinstance(requests, list | tuple) or not all(isinstance(r, TaskRequest) for r in requests):
            raise PluginError(f"{self._where} yielded {type(requests).__name__}. It yields lists of TaskRequest.")
        if not requests:
            raise PluginError(f"{self._where} yielded no request. It yields at least one, or returns.")
        return [_salted(request, self._options.cache_salt) for request in requests]

    def _tell(self, listener: Callable[[Any], None] | None, value: Any) -> None:
        if listener is None:
            return
        try:
            listener(value)
        except Exception:  # it is not the task's, which goes on
            logger.warning("%s: its listener failed", self._where, exc_info=True)

    def _guarded(self, step: Callable[[], T]) -> T:
        try:
            return step()
        except MMError:
            raise
        except Exception as error:
            raise PluginError(
                f"{self._where} failed with {type(error).__name__}. Report it to the plugin's author with the log."
            ) from error


def _check_arguments(name: str, task: Callable[..., Any], inputs: Mapping[str, Any]) -> None:
    takes = inspect.signature(task).parameters.values()
    named = {p.name: p for p in takes if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    anything = any(p.kind is p.VAR_KEYWORD for p in takes)
    unknown = [key for key in inputs if key not in named and not anything]
    missing = [key for key, p in named.items() if p.default is p.empty and key not in inputs]
    if unknown or missing:
        fault = f"does not take {str(unknown[0])[:40]!r}" if unknown else f"needs {missing[0]!r}"
        raise InvalidParamsError(
            f"Task {name!r} {fault}. Its arguments are: {', '.join(named) or 'none'}.", param=(unknown or missing)[0]
        )


def _salted(request: TaskRequest, salt: str | None) -> TaskRequest:
    """The request in the caller's caches, whatever salt the task gave it."""
    prompt: Any = request.prompt
    if salt is None:
        return request
    if isinstance(prompt, str):
        prompt = TextPrompt(prompt=prompt, cache_salt=salt)
    elif isinstance(prompt, list | tuple):
        prompt = ChatPrompt(prompt, cache_salt=salt)
    elif isinstance(prompt, Mapping):
        prompt = {**prompt, "cache_salt": salt}
    elif isinstance(prompt, TextPrompt | ChatPrompt):
        prompt = replace(prompt, cache_salt=salt)
    return replace(request, prompt=prompt)


class _Waiting:
    """The requests that a task waits for."""

    def __init__(self, place: int, run: TaskRun, count: int) -> None:
        self.place = place
        self.run = run
        self.request_ids: list[str] = []
        self.outputs: list[RequestOutput | None] = [None] * count
        self.missing = count


class TaskDriver:
    """Runs tasks to their ends, in the caller's thread: what they do between requests is done here, one after
    another, while the requests of all of them run.

    on_end: called for each task that ended, well or not. At most `limit` tasks are open at a time (their media
    take memory), and a task whose requests are done comes before one that has not begun.
    """

    def __init__(
        self, frontend: Frontend, name: str, on_end: Callable[[], Any], options: TaskOptions | None = None
    ) -> None:
        self._options = options or TaskOptions()
        self._frontend = frontend
        self._name = name
        self._on_end = on_end
        self._limit = 2 * frontend.config.max_num_seqs
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._open: dict[int, _Waiting] = {}
        self._ended: dict[int, Any] = {}

    def run(self, inputs: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Each task's result, or the MMError that ended it, in order."""
        waiting = deque(enumerate(inputs))
        try:
            while waiting or self._open:
                may_begin = bool(waiting) and len(self._open) < self._limit
                try:
                    event = self._events.get(block=not may_begin)
                except queue.Empty:
                    self._begin(*waiting.popleft())
                else:
                    self._take(*event)
        except BaseException:  # Ctrl-C included: leave nothing running that nobody waits for
            for left in self._open.values():
                self._abort(left)
                left.run.close()
            raise
        return [self._ended[place] for place in range(len(inputs))]

    def _begin(self, place: int, inputs: Mapping[str, Any]) -> None:
        try:
            run = TaskRun(self._frontend, self._name, inputs, self._options)
        except MMError as error:
            self._end(place, error)
        else:
            self._advance(place, run, ())

    def _advance(self, place: int, run: TaskRun, outcome: Outcome) -> None:
        """Let a task go on, and begin the requests it asks."""
        try:
            requests = run.advance(outcome)
        except MMError as error:
            self._end(place, error)
            return
        if requests is None:
            self._end(place, run.result)
            return
        waiting = self._open[place] = _Waiting(place, run, len(requests))
        for index, request in enumerate(requests):
            self._ask(waiting, index, request)

    def _ask(self, waiting: _Waiting, index: int, request: TaskRequest) -> None:
        def listener(result: RequestOutput | MMError) -> None:
            self._events.put((waiting, index, result))

        params = SamplingParams() if request.params is None else request.params
        template = request.apply_chat_template
        try:
            added = self._frontend.add(
                request.prompt, params, listener, apply_chat_template=template, allow_paths=self._options.allow_paths
            )
        except MMError as error:
            listener(error)
        else:
            waiting.request_ids.append(added)

    def _take(self, waiting: _Waiting, index: int, result: RequestOutput | MMError) -> None:
        if self._open.get(waiting.place) is not waiting:  # of requests that were given up
            return
        if isinstance(result, MMError):
            self._abort(waiting)
            self._go_on(waiting, result)
            return
        waiting.outputs[index] = result
        waiting.missing -= 1
        if not waiting.missing:
            self._go_on(waiting, [output for output in waiting.outputs if output is not None])

    def _go_on(self, waiting: _Waiting, outcome: Outcome) -> None:
        del self._open[waiting.place]
        self._advance(waiting.place, waiting.run, outcome)

    def _abort(self, waiting: _Waiting) -> None:
        for request_id in waiting.request_ids:
            self._frontend.abort(request_id)

    def _end(self, place: int, result: Any) -> None:
        self._ended[place] = result
        self._on_end()


def unwrap(results: list[Any]) -> list[Any]:
    """All results; where some are errors, the error of the one, or BatchError of several."""
    errors = {i: r for i, r in enumerate(results) if isinstance(r, MMError)}
    if not errors:
        return results
    if len(results) == 1:
        raise errors[0]
    raise BatchError([None if isinstance(r, MMError) else r for r in results], errors)
