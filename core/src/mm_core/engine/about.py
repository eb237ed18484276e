"""What a frontend tells of itself and its engine, beside answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mm_core.config import EngineConfig
from mm_core.engine.core_thread import CoreThread
from mm_core.engine.front_model import FrontModel
from mm_core.engine.health import EngineHealth, ModelInfo
from mm_core.engine.live import Live
from mm_core.engine.loading import LoadedModel
from mm_core.engine.messages import ClearCache
from mm_core.engine.process.supervisor import EngineProcess
from mm_core.engine.startup import StartupTimes
from mm_core.errors import ConfigError, EngineClosedError, InvalidPromptError
from mm_core.inputs.pipeline import InputPipeline
from mm_core.tracing import Span, SpanRecorder


class About:
    """The part of a `Frontend` that only tells."""

    config: EngineConfig
    model: LoadedModel | FrontModel
    max_model_len: int
    pipeline: InputPipeline
    recorder: SpanRecorder | None
    startup: StartupTimes
    _name: str
    _closed: bool
    _live: dict[str, Live]
    _thread: CoreThread | EngineProcess

    @property
    def num_live(self) -> int:
        """Requests that have not ended, queued and being prepared ones included."""
        return len(self._live)

    @property
    def num_started(self) -> int:
        """Those of them that have a token."""
        return sum([live.first_token is not None for live in list(self._live.values())])

    def stats(self) -> dict[str, Any]:
        """Counters of engine core and input pipeline."""
        pipeline = self.pipeline
        parts = {"processor_cache": asdict(pipeline.stats()), "decoded": pipeline.decoded()}
        parts["startup"] = dict(self.startup.seconds)
        return {**self._thread.stats(), **parts}

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """The text of ids, special tokens shown. Raises InvalidPromptError for ids outside the vocabulary."""
        tokenizer = self.model.processor.tokenizer
        wrong = next((i for i in token_ids if type(i) is not int or not 0 <= i < len(tokenizer)), None)
        if wrong is not None:
            raise InvalidPromptError(
                f"Token id {str(wrong)[:40]} is not in the vocabulary of {len(tokenizer)}.", param="tokens"
            )
        return str(tokenizer.decode(list(token_ids)))

    @property
    def info(self) -> ModelInfo:
        """What is loaded. Raises EngineClosedError."""
        model = vars(self).get("model")
        if model is None:
            raise EngineClosedError("The engine is closed. Make a new one with Engine.from_pretrained(...).")
        return ModelInfo(
            self._name, model.family, model.processor.modalities, self.max_model_len, model.vocab_size,
            tuple(sorted(model.tasks)), dict(getattr(model.processor, "limits", {})),
        )  # fmt: skip

    def health(self, stall_timeout_s: float = 30.0) -> EngineHealth:
        """How the engine's loop does; see `EngineHealth`. Costs nothing."""
        if self._closed:
            return EngineHealth("closed")
        return self._thread.health(stall_timeout_s)

    def timeline(self) -> list[Span]:
        """The spans recorded since the last call; ConfigError where nothing is recorded."""
        if self.recorder is None:
            raise ConfigError("No timeline is kept. Make the engine with record_timeline=True.")
        spans = self.recorder.take()
        if isinstance(self._thread, EngineProcess):
            spans += self._thread.take_spans()
        return spans

    def clear_cache(self) -> None:
        """Forget reusable KV blocks."""
        self._thread.send(ClearCache())
