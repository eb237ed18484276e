"""Engine: the synchronous front door."""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from mm_core.config import EngineConfig, SamplingParams
from mm_core.engine.cache import CacheControl
from mm_core.engine.frontend import Frontend
from mm_core.engine.tasks import TaskDriver, unwrap
from mm_core.errors import EngineError, InvalidParamsError, InvalidPromptError, MMError
from mm_core.tracing import Span
from mm_core.types import RequestOutput, TaskOptions, TextPrompt, TextPromptDict

Prompt = str | TextPrompt | TextPromptDict
Messages = Sequence[Mapping[str, Any]]
_PROGRESS_DELAY_S = 2.0


class Engine:
    """A loaded model that answers prompts.

        engine = Engine.from_pretrained("Qwen/Qwen2-VL-7B-Instruct")
        outputs = engine.generate(TextPrompt(prompt="What is this?", multi_modal_data={"image": picture}))
        print(outputs[0].text)

    Thread-safe: several threads may call it at once and their requests share batches. Use it as a
    context manager, or call `close()`.
    """

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    @property
    def cache(self) -> CacheControl:
        """What is cached: warm, pin, evict, look up, watch."""
        return CacheControl(self._frontend)

    @classmethod
    def from_pretrained(cls, model: str | Any, *, plugins: Sequence[Any] | None = None, **options: Any) -> Self:
        """Load a model from a directory or the hub.

        model: directory, or hub id (then `revision=` may pin it). plugins: modules or objects with
        hooks that are not installed as packages. options: the fields of `EngineConfig`.
        Raises ConfigError, PluginError, CheckpointError or OutOfMemoryError.
        """
        return cls(Frontend(str(model), EngineConfig(**options), plugins))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        apply_chat_template: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer one prompt or a list of them; always a list, in order.

        sampling_params: one for all, or one each. A single prompt's error is raised as it is; in a
        list the others still run, then BatchError tells which failed and holds the rest.
        """
        batch = _as_list(prompts)
        return self._run(batch, _params_for(sampling_params, len(batch)), apply_chat_template)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation (OpenAI messages) or a list of them; always a list, in order.

        User text is never parsed for special tokens.
        """
        batch = _as_conversations(messages)
        return self._run(batch, _params_for(sampling_params, len(batch)), None)

    def stream(
        self,
        prompt: Prompt | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        apply_chat_template: bool | None = None,
    ) -> Iterator[RequestOutput]:
        """Answer one prompt (or conversation), yielding the text so far after each token.

        Leaving the loop early aborts the request.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        return _Stream(self._frontend, prompt, params, apply_chat_template)

    def task(self, name: str, options: TaskOptions | None = None, /, **inputs: Any) -> Any:
        """Run one of the family's tasks beside generation, e.g. `engine.task("transcribe", audio="talk.wav")`.

        inputs: what the task takes; what it returns is the family's matter (see its README). Raises ConfigError
        for a task that the family does not have, InvalidParamsError for inputs that it does not take.
        options: its caches, and who is told of its progress.
        """
        (result,) = self.tasks(name, [inputs], options)
        return result

    def tasks(self, name: str, inputs: Sequence[Mapping[str, Any]], options: TaskOptions | None = None) -> list[Any]:
        """Run a task for each of `inputs`, all at once; the results in order.

        A single one's error is raised as it is; of several the others still run, then BatchError tells which
        failed and holds the rest.
        """
        if not isinstance(inputs, Sequence) or not all(isinstance(each, Mapping) for each in inputs):
            raise InvalidParamsError("tasks() takes a list of dicts, the task's arguments by name.", param="inputs")
        with self._progress(len(inputs), f"Task {name}", "task") as bar:
            results = TaskDriver(self._frontend, name, bar.update, options).run(inputs)
        return unwrap(results)

    def transcribe(self, audio: Any, **options: Any) -> Any:
        """Short form of `task("transcribe", audio=…, **options)`; a list of clips gives a list of results.

        audio: path, bytes, `data:` URL or `(samples, rate)`, of any length; or a list of these.
        """
        if isinstance(audio, list):
            return self.tasks("transcribe", [{"audio": clip, **options} for clip in audio])
        return self.task("transcribe", audio=audio, **options)

    def _run(
        self, prompts: Sequence[Any], params: Sequence[SamplingParams], apply_chat_template: bool | None
    ) -> list[RequestOutput]:
        done: queue.SimpleQueue[tuple[int, RequestOutput | MMError]] = queue.SimpleQueue()
        ids: list[str] = []
        try:
            for index, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
                ids.append(
                    self._frontend.add(
                        prompt,
                        param,
                        lambda result, index=index: done.put((index, result)),  # type: ignore[misc]
                        apply_chat_template=apply_chat_template,
                    )
                )
            results = self._collect(done, len(prompts))
        except BaseException:  # Ctrl-C included: leave nothing running that nobody waits for
            for request_id in ids:
                self._frontend.abort(request_id)
            raise
        return unwrap(results)

    def _collect(
        self, done: queue.SimpleQueue[tuple[int, RequestOutput | MMError]], count: int
    ) -> list[RequestOutput | MMError]:
        results: dict[int, RequestOutput | MMError] = {}
        with self._progress(count, "Answering", "req") as bar:
            while len(results) < count:
                index, result = done.get()
                results[index] = result
                bar.update()
        return [results[index] for index in range(count)]

    def _progress(self, count: int, what: str, unit: str) -> Any:
        hidden = count < 2 or not self._frontend.config.show_progress
        return tqdm(total=count, unit=unit, desc=what, delay=_PROGRESS_DELAY_S, disable=hidden)

    def stats(self) -> dict[str, Any]:
        """Counters: tokens (prompt, cached, generated), steps, preemptions, blocks by state, caches."""
        return self._frontend.stats()

    def timeline(self) -> list[Span]:
        """What ran when since the last call: needs `record_timeline=True`, else ConfigError."""
        return self._frontend.timeline()

    def wait_idle(self, timeout: float = 10.0) -> None:
        """Wait until nothing runs or waits; EngineError after `timeout` seconds."""
        end = time.monotonic() + timeout
        busy = ("running", "waiting", "steps_in_flight")
        while self._frontend.num_live or any(map(self.stats().__getitem__, busy)):
            if time.monotonic() > end:
                raise EngineError(f"Requests still run after {timeout} s.")
            time.sleep(0.005)

    def clear_cache(self) -> None:
        """Forget all reusable KV blocks that no request uses."""
        self._frontend.clear_cache()

    def close(self) -> None:
        """Abort what runs, stop the threads, release the memory. Idempotent."""
        self._frontend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Stream(Iterator[RequestOutput]):
    """A running request's updates. Dropping it aborts the request, even before its first update:
    a generator would do so only once it was started."""

    def __init__(
        self, frontend: Frontend, prompt: Any, params: SamplingParams, apply_chat_template: bool | None
    ) -> None:
        self._updates: queue.SimpleQueue[RequestOutput | MMError] = queue.SimpleQueue()
        self._frontend = frontend
        self._request_id: str | None = None
        self._request_id = frontend.add(
            prompt, params, self._updates.put, stream=True, apply_chat_template=apply_chat_template
        )

    def __next__(self) -> RequestOutput:
        if self._request_id is None:
            raise StopIteration
        try:
            update = self._updates.get()
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if isinstance(update, MMError):
            self._request_id = None
            raise update
        if update.finished:
            self._request_id = None
        return update

    def close(self) -> None:
        """Abort the request, if it still runs. Idempotent."""
        request_id, self._request_id = self._request_id, None
        if request_id is not None:
            self._frontend.abort(request_id)

    def __del__(self) -> None:
        self.close()


def _as_list(prompts: Any) -> list[Any]:
    if isinstance(prompts, str | TextPrompt | Mapping):
        return [prompts]
    if isinstance(prompts, Sequence) and prompts and not isinstance(prompts, bytes | bytearray | memoryview):
        return list(prompts)
    raise InvalidPromptError(
        f"generate() takes a str, a TextPrompt, a dict with its keys, or a non-empty list of these; "
        f"got {type(prompts).__name__}.",
        param="prompts",
    )


def _as_conversations(messages: Any) -> list[Any]:
    if isinstance(messages, Sequence) and messages and not isinstance(messages, str):
        return [messages] if isinstance(messages[0], Mapping) else list(messages)
    raise InvalidPromptError(
        "chat() takes a non-empty list of messages such as [{'role': 'user', 'content': 'Hello'}], "
        "or a list of such lists.",
        param="messages",
    )


def _params_for(given: Any, count: int) -> list[SamplingParams]:
    if given is None:
        given = SamplingParams()
    params = [given] * count if isinstance(given, SamplingParams) else given
    if not isinstance(params, Sequence) or not all(isinstance(p, SamplingParams) for p in params):
        raise InvalidParamsError(
            f"sampling_params is {type(given).__name__}; give one SamplingParams(...) or a list of them.",
            param="sampling_params",
        )
    if len(params) != count:
        raise InvalidParamsError(
            f"{len(params)} sampling_params for {count} prompts; give one for all, or one each.",
            param="sampling_params",
        )
    return list(params)
