"""Text and sound to features: log-mel spectrograms as Whisper's, cut to the length of the sound."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from mm_core.errors import InvalidParamsError, MediaDecodeError, MediaTooLargeError, PluginError
from mm_core.hookspecs import Checkpoint, MediaRequest, SamplingDefaults
from mm_core.media import log_mel, mel_filters
from mm_core.types import MediaFeature, MediaItem, Modality

PLACEHOLDER = "<|AUDIO|>"
TEMPLATE = (
    "{% set audios = namespace(count=0) %}{% for message in messages %}{% if loop.first and message.role != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'audio' %}{% set audios.count = audios.count + 1 %}"
    "Audio {{ audios.count }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The feature extractor's settings, with transformers' defaults for the family.
DEFAULTS = {"feature_size": 128, "sampling_rate": 16000, "hop_length": 160, "n_fft": 400, "chunk_length": 30}


class Qwen2AudioProcessor:
    """`hookspecs.Processor` of the family."""

    modalities: tuple[Modality, ...] = ("audio",)

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.tokenizer: Any = checkpoint.tokenizer
        given = checkpoint.processor_config.get("feature_extractor", {})
        settings = {name: int(given.get(name, default)) for name, default in DEFAULTS.items()}
        self.settings_key = json.dumps(settings).encode()
        mels, self.sampling_rate, self.hop, self.n_fft, self.seconds = settings.values()
        self._filters = mel_filters(mels, self.n_fft, self.sampling_rate)
        own = checkpoint.read_json("chat_template.json") or {}
        self._template = self.tokenizer.chat_template or own.get("chat_template") or TEMPLATE
        self._audio_id = self.tokenizer.convert_tokens_to_ids(PLACEHOLDER)
        if self._audio_id is None:
            raise PluginError(f"The tokenizer has no token {PLACEHOLDER!r}. Take the checkpoint's own tokenizer.")

    def placeholder(self, modality: Modality) -> str:
        """`<|AUDIO|>`; templates put it between `<|audio_bos|>` and `<|audio_eos|>`."""
        return PLACEHOLDER

    def placeholder_id(self, modality: Modality) -> int:
        """Its token id."""
        return int(self._audio_id)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """By the checkpoint's template, or by transformers' default where it has none, as on the hub."""
        template = self.tokenizer.apply_chat_template
        return str(template(list(messages), chat_template=self._template, tokenize=False, add_generation_prompt=True))

    def accepts_verbatim(self, prompt: str, counts: Mapping[Modality, int]) -> bool:
        """A sound needs its placeholder."""
        return False

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """The family has no options."""
        if kwargs:
            raise InvalidParamsError(f"{next(iter(kwargs))!r} is no option of this processor; it has none.")

    def variant(self, item: MediaItem, request: MediaRequest) -> bytes:
        """Nothing but the sound and the settings changes the features."""
        return b""

    def prepare(self, item: MediaItem, variant: bytes) -> MediaFeature:
        """`mel` float32 [mels, frames]; info: `positions` of the tower, of which two make a row.

        Qwen2-Audio pads to 30 s and then masks what is padded. Here frames behind the sound are left out, but
        for the two that the convolutions see from its last position.
        """
        rate, count = self.sampling_rate, len(item.data)  # mono, at that rate: mm-core has seen to it
        if count > self.seconds * rate:
            raise MediaTooLargeError(f"The sound has {count / rate:.2f} s; the model reads {self.seconds} s. Cut it.")
        frames = -(-count // self.hop)
        positions = (frames - 1) // 2 + 1
        if positions < 2:
            raise MediaDecodeError(f"The sound has {count} samples at {rate} Hz; {2 * self.hop + 1} make one token.")
        padded = F.pad(torch.from_numpy(item.data), (0, self.seconds * rate - count))
        mel = log_mel(padded[None], self._filters, n_fft=self.n_fft, hop_length=self.hop)[0, :, : frames + 2]
        return MediaFeature("audio", positions // 2, {"mel": mel.contiguous()}, {"positions": positions})

    def expand(self, feature: MediaFeature) -> tuple[Sequence[int], Sequence[bool]]:
        """One token a row."""
        return (self.placeholder_id("audio"),) * feature.num_tokens, (True,) * feature.num_tokens

    def default_sampling(self) -> SamplingDefaults:
        """The checkpoint's stop ids are complete."""
        return SamplingDefaults()

    def finish(self, text: str, token_ids: Sequence[int]) -> str:
        """The text as it is."""
        return text
