"""The task `transcribe`: speech of any length to text and segments."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

from mm_core import SamplingParams
from mm_core.errors import InvalidParamsError
from mm_core.hookspecs import Checkpoint
from mm_core.media import load_audio
from mm_core.types import TaskProgress
from mm_plugin_whisper.asking import Answer, Asker, Steps, request
from mm_plugin_whisper.options import Options, Segment, Transcription
from mm_plugin_whisper.rules import OneOf, TimestampRules
from mm_plugin_whisper.settings import Sound, Vocabulary
from mm_plugin_whisper.windows import Clip, Piece, Window, split

_WARM = 0.5  # text that was said at this temperature or above is not read by later windows


class Transcriber:
    """The task: called, a generator of requests, as `hookspecs.Task` says. Nothing in it changes."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tokenizer = checkpoint.tokenizer
        self._sound = Sound.from_checkpoint(checkpoint)
        self._words = words = Vocabulary.from_checkpoint(checkpoint)
        self._vocab_size = checkpoint.config.get("vocab_size", 51865)
        self._most_before = checkpoint.config.get("max_target_positions", 448) // 2 - 1
        latest = checkpoint.generation_config.get("max_initial_timestamp_index")
        self._rules = TimestampRules(words.stamps, words.end, words.no_timestamps, latest)

    def __call__(self, audio: Any, **options: Any) -> Steps:
        """audio: a path, bytes, a `data:` URL or (samples, rate). options: the fields of `Options`. Returns a
        `Transcription`, and tells its segments as each window is understood (not where all are heard at once).
        Raises InvalidParamsError and whatever `media.load_audio` does."""
        chosen = Options.read(options)
        language = self._given_language(chosen)
        prompt = self._prompt_ids(chosen.initial_prompt)
        clip = Clip(load_audio(audio, self._sound.sampling_rate).samples, self._sound)
        if language is None and self._words.languages:
            language = yield from self._heard_language(clip.window(0))
        # Where one window follows another, timestamps tell where to go on.
        timed = chosen.timestamps or (not chosen.batched and clip.frames > self._sound.frames)
        opening = self._words.opening(language, chosen.task, timestamps=timed)
        asker = Asker(self._words, self._vocab_size, chosen, opening, self._rules if timed else None)
        if chosen.batched:
            segments = yield from self._together(clip, asker, prompt)
        else:
            segments = yield from self._in_turn(clip, asker, prompt)
        heard = tuple(segment for segment in segments if segment.text)
        codes = {token: code for code, token in self._words.languages.items()}
        text = "".join(segment.text for segment in heard).strip()
        return Transcription(text, heard, "en" if language is None else codes[language], clip.duration)

    def _given_language(self, options: Options) -> int | None:
        """Its id; None where it is to be found out, and for English-only models."""
        if self._words.languages:
            return None if options.language is None else self._words.language_id(options.language)
        if options.task != "transcribe" or str(options.language).lower() not in ("none", "en", "english"):
            raise InvalidParamsError(
                "This model is English-only: it transcribes English. Leave language and task out, or load a "
                "multilingual model.",
                param="language" if options.task == "transcribe" else "task",
            )
        return None

    def _prompt_ids(self, text: str | None) -> tuple[int, ...]:
        """A prompt's tokens, no more than the model reads of what came before."""
        if not text or not text.strip():
            return ()
        ids = self._tokenizer(" " + text.strip(), add_special_tokens=False)["input_ids"]
        if any(token >= self._words.end for token in ids):
            raise InvalidParamsError("initial_prompt spells a special token. Leave it out.", param="initial_prompt")
        return tuple(ids)

    def _heard_language(self, window: Window) -> Steps:
        """The id of the likeliest language."""
        params = SamplingParams(
            max_tokens=1, temperature=0.0, logits_processors=(OneOf(tuple(self._words.languages.values())),)
        )
        (output,) = yield [request(window, (self._words.start,), params)]
        return output.token_ids[0]

    def _in_turn(self, clip: Clip, asker: Asker, prompt: tuple[int, ...]) -> Steps:
        """Segments of a sound, window after window, each from where the one before it was understood up to."""
        options = asker.options
        segments: list[Segment] = []
        said: list[tuple[int, ...]] = [prompt] if prompt else []
        conditioned, seek = options.condition_on_previous_text, 0
        while not clip.over(seek):
            window = clip.window(seek)
            before = [token for part in said for token in self._once(part)] if conditioned else prompt
            (answer,) = yield from asker.ask([window], self._before(before))
            conditioned = options.condition_on_previous_text and answer.temperature < _WARM
            if answer.silent:
                seek += window.frames
                continue
            pieces, step = self._pieces(answer, window, asker, whole=False)
            new = self._segments(pieces, answer, window)
            yield TaskProgress(tuple(segment for segment in new if segment.text))
            segments += new
            said += [piece.tokens for piece in pieces]
            seek += step
        return segments

    def _together(self, clip: Clip, asker: Asker, prompt: tuple[int, ...]) -> Steps:
        """Segments of a sound whose windows are heard at once."""
        windows = clip.chunks()
        answers = yield from asker.ask(windows, self._before(prompt))
        segments: list[Segment] = []
        for window, answer in zip(windows, answers, strict=True):
            if not answer.silent:
                pieces, _ = self._pieces(answer, window, asker, whole=True)
                segments += self._segments(pieces, answer, window)
        return segments

    def _before(self, ids: Sequence[int]) -> tuple[int, ...]:
        return (self._words.previous, *ids[-self._most_before :]) if ids else ()

    def _once(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """A piece's tokens with one timestamp at the end, not two."""
        return tokens[:-1] if len(tokens) > 2 and tokens[-2] >= self._words.stamps else tokens

    def _pieces(self, answer: Answer, window: Window, asker: Asker, *, whole: bool) -> tuple[list[Piece], int]:
        if asker.rules is None:
            return [Piece(0.0, window.end - window.start, answer.tokens)], window.frames
        return split(answer.tokens, self._words.stamps, window.frames, whole=whole)

    def _segments(self, pieces: Sequence[Piece], answer: Answer, window: Window) -> list[Segment]:
        whole = self._text(answer.tokens).strip().encode()
        return [
            Segment(
                start=min(window.start + piece.start, window.end),
                end=min(window.start + piece.end, window.end),
                text=self._text(piece.tokens),
                tokens=piece.tokens,
                avg_logprob=answer.avg_logprob,
                no_speech_prob=answer.no_speech_prob,
                temperature=answer.temperature,
                seek=round(window.start * self._sound.frames_per_second),
                compression_ratio=len(whole) / len(zlib.compress(whole)),
            )
            for piece in pieces
        ]

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode([token for token in tokens if token < self._words.end]))
