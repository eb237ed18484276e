"""Asking about windows, and judging the answers: other temperatures where one is poor, and silence."""

from __future__ import annotations

import math
import zlib
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from mm_core import RequestOutput, SamplingParams, TextPrompt
from mm_core.types import TaskProgress, TaskRequest
from mm_plugin_whisper.options import Options
from mm_plugin_whisper.rules import TimestampRules
from mm_plugin_whisper.settings import Vocabulary
from mm_plugin_whisper.windows import Window

Steps = Generator[Sequence[TaskRequest] | TaskProgress, Sequence[RequestOutput], Any]


@dataclass(frozen=True)
class Answer:
    """What a window said: its tokens without the end, and what is known of them. poor: another temperature may
    do better."""

    tokens: tuple[int, ...]
    avg_logprob: float
    no_speech_prob: float | None
    temperature: float
    silent: bool
    poor: bool


@dataclass(frozen=True)
class Asker:
    """opening: task tokens that an answer begins with. rules: of timestamps, None without them."""

    words: Vocabulary
    vocab_size: int
    options: Options
    opening: tuple[int, ...]
    rules: TimestampRules | None

    def ask(self, windows: Sequence[Window], before: Sequence[int]) -> Steps:
        """An `Answer` of each window, all at once. before: ids that stand before the opening."""
        quiet: list[float | None] = [None] * len(windows)
        answers: dict[int, Answer] = {}
        left = list(range(len(windows)))
        for number, temperature in enumerate(self.options.temperatures):
            requests = [request(windows[i], (*before, *self.opening), self._params(temperature)) for i in left]
            if number == 0 and self.options.no_speech_threshold is not None:
                # What the model makes of the window before anything was said.
                requests += [request(window, (*before, self.words.start), self._only()) for window in windows]
            outputs = yield requests
            if len(outputs) > len(left):
                quiet = [_probability(output, self.words.no_speech) for output in outputs[len(left) :]]
            for i, output in zip(left, outputs[: len(left)], strict=True):
                answers[i] = self._answer(output, temperature, quiet[i])
            left = [i for i in left if answers[i].poor]
            if not left:
                break
        return [answers[i] for i in range(len(windows))]

    def _params(self, temperature: float) -> SamplingParams:
        rules = () if self.rules is None else (self.rules,)
        return SamplingParams(
            max_tokens=None, temperature=temperature, logprobs=0, logits_processors=rules, seed=self.options.seed
        )

    def _only(self) -> SamplingParams:
        return SamplingParams(max_tokens=1, temperature=0.0, logprobs=0, logprob_token_ids=(self.words.no_speech,))

    def _answer(self, output: RequestOutput, temperature: float, quiet: float | None) -> Answer:
        """Judged as `_need_fallback` of transformers does."""
        chosen, options = output.outputs[0], self.options
        tokens = chosen.token_ids
        average = (chosen.cumulative_logprob or 0.0) / max(len(tokens), 1)
        unlikely = options.logprob_threshold is not None and average < options.logprob_threshold
        limit = options.compression_ratio_threshold
        repetitive = limit is not None and compression_ratio(tokens, self.vocab_size) > limit
        threshold = options.no_speech_threshold
        silent = threshold is not None and quiet is not None and quiet > threshold
        silent = silent and (unlikely or options.logprob_threshold is None)
        said = tokens[:-1] if tokens and tokens[-1] == self.words.end else tokens
        return Answer(said, average, quiet, temperature, silent, (unlikely or repetitive) and not silent)


def request(window: Window, ids: Sequence[int], params: SamplingParams) -> TaskRequest:
    """A request about a window, the prompt being `ids`."""
    prompt = TextPrompt(
        prompt_token_ids=list(ids), multi_modal_data={"audio": window.audio}, mm_processor_kwargs=window.kwargs
    )
    return TaskRequest(prompt, params)


def compression_ratio(tokens: Sequence[int], vocab_size: int) -> float:
    """How many times smaller zlib makes the ids, as transformers packs them."""
    width = int(math.log2(vocab_size) / 8) + 1
    packed = b"".join(token.to_bytes(width, "little") for token in tokens)
    return len(packed) / len(zlib.compress(packed))


def _probability(output: RequestOutput, token: int) -> float:
    """Of a token, at the only place of an answer."""
    assert output.logprobs is not None, "they were asked for"
    return math.exp(output.logprobs[0][token].logprob)
