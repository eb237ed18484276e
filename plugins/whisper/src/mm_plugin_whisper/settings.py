"""What a checkpoint says about sound and about Whisper's special tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from mm_core.errors import CheckpointError, InvalidParamsError
from mm_core.hookspecs import Checkpoint

TASKS = ("transcribe", "translate")
_DEFAULT_LANGUAGE = "en"
_MULTILINGUAL_VOCABULARY = 51865  # from this size on, as in openai/whisper


@dataclass(frozen=True)
class Sound:
    """How samples become frames. chunk: samples of a window; mels: bands; hop and n_fft: samples."""

    sampling_rate: int = 16000
    chunk: int = 480000
    mels: int = 80
    n_fft: int = 400
    hop: int = 160

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """From the feature extractor's settings. Raises CheckpointError where they do not fit config.json."""
        part = checkpoint.processor_config.get("feature_extractor", {})
        rate, hop = part.get("sampling_rate", 16000), part.get("hop_length", 160)
        sound = cls(
            rate, part.get("chunk_length", 30) * rate, part.get("feature_size", 80), part.get("n_fft", 400), hop
        )
        bands, rows = checkpoint.config.get("num_mel_bins", 80), checkpoint.config.get("max_source_positions", 1500)
        if sound.mels != bands or sound.frames != 2 * rows or part.get("dither"):
            raise CheckpointError(
                f"preprocessor_config.json makes {sound.frames} frames of {sound.mels} bands (dither "
                f"{part.get('dither', 0)}); the model of config.json reads {2 * rows} of {bands}, without dither. "
                "Fetch both from the same place."
            )
        return sound

    @property
    def frames(self) -> int:
        """Frames of a window; the encoder makes half as many rows."""
        return self.chunk // self.hop

    @property
    def frames_per_second(self) -> int:
        """Frames in a second of sound."""
        return self.sampling_rate // self.hop


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the special tokens. previous: `<|startofprev|>`; languages: by code, empty for English-only
    models, as tasks is then. Timestamps are the ids from `stamps` on, one for every two frames."""

    start: int
    end: int
    previous: int
    no_timestamps: int
    languages: Mapping[str, int]
    tasks: Mapping[str, int]

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Self:
        """From generation_config.json, what it lacks from the tokenizer. Raises CheckpointError."""
        found, config = checkpoint.generation_config, checkpoint.config
        start = found.get("decoder_start_token_id", config.get("decoder_start_token_id", 50257))
        end = found.get("eos_token_id", config.get("eos_token_id", 50256))
        lookup = _Lookup(checkpoint)
        languages: dict[str, int] = {}
        tasks: dict[str, int] = {}
        if found.get("is_multilingual", config.get("vocab_size", 0) >= _MULTILINGUAL_VOCABULARY):
            languages = {k.strip("<|>"): v for k, v in (found.get("lang_to_id") or lookup.languages()).items()}
            tasks = dict(found.get("task_to_id") or {name: lookup(f"<|{name}|>") for name in TASKS})
        return cls(
            start=start,
            end=end[0] if isinstance(end, list) else end,
            previous=found.get("prev_sot_token_id") or lookup("<|startofprev|>"),
            no_timestamps=found.get("no_timestamps_token_id") or lookup("<|notimestamps|>"),
            languages=languages,
            tasks=tasks,
        )

    @property
    def stamps(self) -> int:
        """`<|0.00|>`."""
        return self.no_timestamps + 1

    @property
    def no_speech(self) -> int:
        """`<|nospeech|>`, `<|nocaptions|>` in older checkpoints."""
        return self.no_timestamps - 1

    def language_id(self, language: str) -> int:
        """Of a code ("de") or an English name ("German"). Raises InvalidParamsError."""
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        given = language.lower().strip("<|>") if isinstance(language, str) else ""
        code = given if given in self.languages else TO_LANGUAGE_CODE.get(given, "")
        if code not in self.languages:
            known = ", ".join(sorted(self.languages)) or "none: it is English-only"
            raise InvalidParamsError(
                f"language={str(language)[:40]!r} is not one of this model's languages ({known}).", param="language"
            )
        return self.languages[code]

    def opening(self, language: int | None, task: str, *, timestamps: bool) -> tuple[int, ...]:
        """What an answer begins with. language: an id; None for English-only models."""
        said = () if language is None else (language, self.tasks[task])
        return (self.start, *said, *(() if timestamps else (self.no_timestamps,)))

    def default_opening(self, checkpoint: Checkpoint) -> tuple[int, ...]:
        """Without timestamps, in the language and with the task that the checkpoint's generation settings name;
        else English, transcribed."""
        if not self.languages:
            return self.opening(None, "transcribe", timestamps=False)
        found = checkpoint.generation_config
        language, task = found.get("language"), found.get("task")
        forced = found.get("forced_decoder_ids") or checkpoint.config.get("forced_decoder_ids") or []
        ids = {pair[1] for pair in forced}
        if language is None and task is None:
            language = next((code for code, i in self.languages.items() if i in ids), None)
            task = next((name for name, i in self.tasks.items() if i in ids), None)
        spoken = self.language_id(language or _DEFAULT_LANGUAGE)
        return self.opening(spoken, task or "transcribe", timestamps=False)


class _Lookup:
    """Special tokens by their spelling, for checkpoints whose generation settings lack them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __call__(self, text: str) -> int:
        tokenizer: Any = self._checkpoint.tokenizer
        found = tokenizer.get_vocab().get(text)
        if found is None:
            raise CheckpointError(
                f"Neither generation_config.json nor the tokenizer has {text!r}, which whisper needs. Fetch "
                "generation_config.json and the tokenizer's files of the model again."
            )
        return int(found)

    def languages(self) -> dict[str, int]:
        """Those that the tokenizer knows."""
        from transformers.models.whisper.tokenization_whisper import LANGUAGES

        known = self._checkpoint.tokenizer.get_vocab()
        return {code: known[f"<|{code}|>"] for code in LANGUAGES if f"<|{code}|>" in known}
