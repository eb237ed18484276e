"""What a caller of `transcribe` may choose, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from mm_core.errors import InvalidParamsError
from mm_plugin_whisper.settings import TASKS


@dataclass(frozen=True)
class Segment:
    """A piece of speech. start, end: in seconds. tokens: timestamps included. Of the window it was heard in:
    avg_logprob, of its tokens under the model's own distribution; no_speech_prob, None where nobody asked; seek, its
    first frame; compression_ratio, how many times smaller zlib makes its text (as openai/whisper tells it)."""

    start: float
    end: float
    text: str
    tokens: tuple[int, ...]
    avg_logprob: float
    no_speech_prob: float | None
    temperature: float
    seek: int = 0
    compression_ratio: float = 0.0


@dataclass(frozen=True)
class Transcription:
    """What was said. language: a code such as "en"; duration: of the sound, in seconds."""

    text: str
    segments: tuple[Segment, ...]
    language: str
    duration: float


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a caller may choose beside the audio.

    language: a code or an English name; None: the first window tells. task: "transcribe", or "translate" (to
    English). timestamps: segments with times; without, one segment a window. batched: windows cut at quiet places
    and heard all at once, each for itself, instead of one after another. initial_prompt: text that is taken to
    come before. condition_on_previous_text: each window reads the text of those before it. temperature: those
    after the first are tried where an answer repeats itself (compressed, its tokens shrink by more than
    compression_ratio_threshold) or is unlikely (avg_logprob below logprob_threshold). A window is silent where
    its answer is unlikely and no_speech_prob above no_speech_threshold. None switches a threshold off. seed: makes
    answers above temperature 0 repeatable.
    """

    language: str | None = None
    task: str = "transcribe"
    timestamps: bool = True
    batched: bool = False
    initial_prompt: str | None = None
    condition_on_previous_text: bool = False
    temperature: float | Sequence[float] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    compression_ratio_threshold: float | None = 1.35
    logprob_threshold: float | None = -1.0
    no_speech_threshold: float | None = 0.6
    seed: int | None = None

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> Self:
        """Raises InvalidParamsError for what is unknown or makes no sense."""
        known = [field.name for field in fields(cls)]
        for name in given:
            if name not in known:
                raise InvalidParamsError(
                    f"transcribe does not take {name[:40]!r}. Its arguments are audio, {', '.join(known)}.", param=name
                )
        options = cls(**given)
        for name in ("timestamps", "batched", "condition_on_previous_text"):
            _want(name, getattr(options, name), bool, "True or False")
        for name in ("compression_ratio_threshold", "logprob_threshold", "no_speech_threshold"):
            _want(name, getattr(options, name), float | int | None, "a number or None")
        _want("seed", options.seed, int | None, "a whole number or None")
        _want("initial_prompt", options.initial_prompt, str | None, "a str or None")
        if options.task not in TASKS:
            raise InvalidParamsError(
                f"task={str(options.task)[:40]!r}: it is 'transcribe' or 'translate'.", param="task"
            )
        if not options.temperatures:
            raise InvalidParamsError("temperature is empty. Pass a number, or several.", param="temperature")
        return options

    @property
    def temperatures(self) -> tuple[float, ...]:
        """One after another."""
        given = self.temperature
        return tuple(given) if isinstance(given, Sequence) else (given,)


def _want(name: str, value: Any, kind: Any, told: str) -> None:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise InvalidParamsError(f"{name}={str(value)[:40]!r}: it is {told}.", param=name)
