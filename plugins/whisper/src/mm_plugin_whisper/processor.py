"""Whisper's processor: task tokens for a prompt, samples for the encoder, which makes the spectrogram."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from mm_core.errors import InvalidParamsError, MediaTooLargeError
from mm_core.hookspecs import Checkpoint, MediaRequest, SamplingDefaults
from mm_core.types import LogitsProcessor, MediaFeature, MediaItem, Modality
from mm_plugin_whisper.rules import Suppress
from mm_plugin_whisper.settings import Sound, Vocabulary

Samples = np.ndarray[Any, np.dtype[np.float32]]


class WhisperProcessor:
    """`hookspecs.Processor` of the family.

    A prompt that begins with `<|startoftranscript|>` or `<|startofprev|>` is taken as it is. Any other text is
    what was said before the clip (Whisper's "prompt"), and the answer begins as the checkpoint's generation
    settings say: English transcribed without timestamps where they say nothing.

    `mm_processor_kwargs`: `frames` and `peak`, for a window of a longer sound (see `framed`): how many frames its
    samples make, and the loudest log10 power of the whole sound. The task `transcribe` sets them.
    """

    modalities: tuple[Modality, ...] = ("audio",)
    limits: Mapping[Modality, int] = {"audio": 1}
    add_special_tokens = False  # Whisper's tokenizer would put task tokens before every text

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tokenizer: Any = checkpoint.tokenizer
        self._sound = Sound.from_checkpoint(checkpoint)
        self.sampling_rate = self._sound.sampling_rate
        self.settings_key = json.dumps(asdict(self._sound)).encode()
        vocabulary = Vocabulary.from_checkpoint(checkpoint)
        text = self.tokenizer.convert_ids_to_tokens
        self._opening = "".join(text(list(vocabulary.default_opening(checkpoint))))
        self._previous, self._start = text(vocabulary.previous), text(vocabulary.start)
        self._defaults = SamplingDefaults((vocabulary.end,), suppressions(checkpoint))

    def placeholder(self, modality: Modality) -> None:
        """None: a clip has no place in the prompt."""

    def placeholder_id(self, modality: Modality) -> None:
        """None."""

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """`<|startofprev|>` and all the messages' text, where there is any, then the default opening."""
        texts = [text for message in messages for text in _texts(message.get("content"))]
        before = f"{self._previous} {' '.join(texts)}" if any(texts) else ""
        return before + self._opening

    def accepts_verbatim(self, prompt: str, counts: Mapping[Modality, int]) -> bool:
        """Whether it begins with a task token, or with what was said before."""
        return counts.get("audio", 0) == 1 and prompt.startswith((self._start, self._previous))

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """Raise InvalidParamsError for anything but `frames` and `peak` together."""
        frames, peak = kwargs.get("frames"), kwargs.get("peak")
        if not kwargs:
            return
        whole = type(frames) is int and 1 <= frames <= self._sound.frames
        if set(kwargs) != {"frames", "peak"} or not whole or type(peak) is not float or not math.isfinite(peak):
            raise InvalidParamsError(
                f"mm_processor_kwargs of whisper are frames, 1 to {self._sound.frames}, and peak, a float, together; "
                "language and task are tokens of the prompt, or arguments of engine.transcribe.",
                param="mm_processor_kwargs",
            )

    def variant(self, item: MediaItem, request: MediaRequest) -> bytes:  # noqa: ARG002
        """JSON of a window's frames and peak; empty for a whole clip."""
        return json.dumps(dict(request.processor_kwargs), sort_keys=True).encode() if request.processor_kwargs else b""

    def prepare(self, item: MediaItem, variant: bytes) -> MediaFeature:
        """`samples` float32, as the frames read them; info: `frames` that they make, and a window's `peak`.

        Raises MediaTooLargeError (code "audio_too_long") for a clip longer than a window.
        """
        sound, samples = self._sound, item.data
        info: dict[str, Any] = json.loads(variant) if variant else {}
        if not variant:
            if len(samples) > sound.chunk:
                raise MediaTooLargeError(
                    f"The clip has {len(samples) / sound.sampling_rate:.2f} s; generate takes up to "
                    f"{sound.chunk // sound.sampling_rate} s. Use engine.transcribe(audio), which takes any length.",
                    code="audio_too_long",
                )
            # Later frames hear nothing but silence.
            info["frames"] = min(sound.frames, (len(samples) + sound.n_fft // 2 - 1) // sound.hop + 1)
            samples = framed(samples, sound.chunk, 0, info["frames"], sound)
        elif len(samples) != (info["frames"] - 1) * sound.hop + sound.n_fft:
            raise InvalidParamsError(
                f"A window of {info['frames']} frames has {(info['frames'] - 1) * sound.hop + sound.n_fft} samples; "
                f"these are {len(samples)}. Use engine.transcribe(audio) instead.",
                param="mm_processor_kwargs",
            )
        return MediaFeature("audio", sound.frames // 2, {"samples": torch.from_numpy(samples)}, info)

    def expand(self, feature: MediaFeature) -> tuple[Sequence[int], Sequence[bool]]:  # noqa: ARG002
        """Nothing: cross-attention reads the rows."""
        return (), ()

    def default_sampling(self) -> SamplingDefaults:
        """`<|endoftext|>`, and the tokens that the checkpoint never says, or never says first."""
        return self._defaults

    def finish(self, text: str, token_ids: Sequence[int]) -> str:  # noqa: ARG002
        """The text as it is."""
        return text


def framed(samples: Samples, total: int, first: int, frames: int, sound: Sound) -> Samples:
    """The samples that frames [first, first + frames) of a sound read, [(frames - 1) · hop + n_fft].

    Frame j is centred on sample j · hop. The sound is continued by silence up to `total` samples, and mirrored
    at its ends, as the centred short-time Fourier transform of torch does.
    """
    half = sound.n_fft // 2
    begin, end = first * sound.hop - half, (first + frames - 1) * sound.hop + half
    low, high = max(begin, 0), min(end, total)
    out = np.zeros(end - begin, np.float32)
    inside = samples[low:high]
    out[low - begin : low - begin + len(inside)] = inside
    for outside in (np.arange(begin, low), np.arange(high, end)):
        mirrored = np.abs(outside)
        mirrored = np.minimum(mirrored, 2 * (total - 1) - mirrored)
        heard = mirrored < len(samples)
        out[outside[heard] - begin] = samples[mirrored[heard]]
    return out


def suppressions(checkpoint: Checkpoint) -> tuple[LogitsProcessor, ...]:
    """The checkpoint's own, from generation_config.json, or config.json where it has no such file."""
    found = checkpoint.generation_config or checkpoint.config
    never, first = found.get("suppress_tokens"), found.get("begin_suppress_tokens")
    rules = [Suppress(tuple(never))] if never else []
    return (*rules, *([Suppress(tuple(first), at_begin=True)] if first else []))


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content] if content else []
    return [part["text"] for part in content or () if part.get("type") == "text" and part.get("text")]
