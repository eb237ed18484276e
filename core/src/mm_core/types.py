"""The values that travel through the house, one per arrow of the data flow.

All are frozen. Nothing here imports torch at run time: the scheduler and the caches use these
values and must stay importable without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Modality = Literal["image", "video", "audio"]
MODALITIES: tuple[Modality, ...] = ("image", "video", "audio")


class FinishReason(StrEnum):
    """Why a sequence ended. The values are what OpenAI clients expect, plus `abort` and `error`."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class TextPromptDict(TypedDict, total=False):
    """A `TextPrompt` spelled as a dict, as users of other engines write it."""

    prompt: str
    prompt_token_ids: Sequence[int]
    multi_modal_data: Mapping[str, Any]
    multi_modal_uuids: Mapping[str, Any]
    mm_processor_kwargs: Mapping[str, Any]
    cache_salt: str


@dataclass(frozen=True, kw_only=True)
class TextPrompt:
    """What a user asks: text (or token ids) and media.

    Exactly one of `prompt` and `prompt_token_ids` is given. `multi_modal_data` maps a modality
    ("image", "video", "audio") to one value or a list. `multi_modal_uuids` has, for each
    modality, one entry an item: a str names the item, None leaves it to its content hash; where
    an entry is given, the item's value may be None and then stands for what was given under that
    name before.
    """

    prompt: str | None = None
    prompt_token_ids: Sequence[int] | None = None
    multi_modal_data: Mapping[str, Any] | None = None
    multi_modal_uuids: Mapping[str, Any] | None = None
    mm_processor_kwargs: Mapping[str, Any] | None = None
    cache_salt: str | None = None


@dataclass(frozen=True)
class ModelFamily:
    """What a plugin supports, told without importing torch.

    name: the family's name, e.g. "qwen2vl"; equal to the entry point's name.
    architectures: the strings in a checkpoint's config.json that the plugin claims.
    api_version: the version of the hook contract the plugin was written for.
    """

    name: str
    architectures: tuple[str, ...]
    modalities: tuple[Modality, ...]
    api_version: int = 1


@dataclass(frozen=True)
class MediaItem:
    """One loaded, normalised item.

    image: `data` is an RGB `PIL.Image.Image`. video: `data` is a uint8 array
    [frames, height, width, 3]. audio: `data` is float32 mono [samples].
    `info` is what is known beside the content and survives without it: for images (width,
    height), for videos the fps and frame times, for audio the sample rate. `data` is None where
    the content was given before under a uuid, or was never decoded because its features are
    cached.
    """

    modality: Modality
    digest: bytes
    data: Any
    info: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MediaFeature:
    """One preprocessed item, as its encoder takes it.

    num_tokens: rows the encoder gives for it (= placeholder tokens, or encoder rows for
    cross-attention). tensors: the encoder's inputs, on the CPU. info: small facts that
    `expand`, `positions` and `cost` need (grids and the like). key: the media key, set by the
    core; nbytes: memory of the tensors, for cache bounds.
    """

    modality: Modality
    num_tokens: int
    tensors: Mapping[str, Tensor]
    info: Mapping[str, Any] = field(default_factory=dict)
    key: bytes = b""

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass(frozen=True)
class PlaceholderRange:
    """Where one item lies in the prompt: tokens [offset, offset + length).

    is_media[i] says whether token offset+i is replaced by an encoder row (True) or is a
    separator that the tokenizer knows (False); sum(is_media) == feature.num_tokens.
    """

    offset: int
    length: int
    is_media: tuple[bool, ...]
    feature: MediaFeature

    @property
    def end(self) -> int:
        """One past the range's last token."""
        return self.offset + self.length

    @cached_property
    def row_tokens(self) -> np.ndarray[Any, Any]:
        """[num_tokens] int64: for each encoder row, its token's place within the range."""
        import numpy as np

        return np.flatnonzero(np.asarray(self.is_media, dtype=bool))


@dataclass(frozen=True)
class PreparedRequest:
    """A request that is ready to be scheduled; everything slow has been done.

    token_ids: the expanded prompt. ranges: in prompt order. positions: int32 [axes, n] or None
    for 0…n-1; decode_delta: position of output token i is n + i + decode_delta.
    kv_context: whatever beside tokens and media enters the KV keys (what `condition` read).
    block_keys: keys of the prompt's full blocks of `block_size` tokens, computed ahead, or none.
    """

    request_id: str
    token_ids: tuple[int, ...]
    params: Any  # SamplingParams; config.py lies above this module
    ranges: tuple[PlaceholderRange, ...] = ()
    positions: np.ndarray[Any, Any] | None = None
    decode_delta: int = 0
    cache_salt: str | None = None
    kv_context: bytes = b""
    stop_token_ids: frozenset[int] = frozenset()
    block_size: int = 0
    block_keys: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Logprob:
    """Natural log-probability of one token under the model's own distribution, and its rank from 1."""

    logprob: float
    rank: int
    decoded_token: str = ""


@dataclass(frozen=True)
class Usage:
    """Token counts of one request. `cached_tokens` of the prompt were served from the KV cache;
    `media_tokens` of the prompt stand for media; `encoded_media_tokens` of those were encoded for
    this request (0 where the encoder cache, or the KV cache, had them)."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    media_tokens: int = 0
    encoded_media_tokens: int = 0


@dataclass(frozen=True)
class CompletionOutput:
    """One of a request's `n` answers. `stop_reason` is the stop string or token id that ended it."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[Mapping[int, Logprob], ...] | None = None
    cumulative_logprob: float | None = None


@dataclass(frozen=True)
class RequestMetrics:
    """When a request got where, in seconds of `time.perf_counter()`; None: it has not come so far.

    arrival: the engine was asked. prepared: ids and media were ready for the scheduler. first_token,
    last_token: the engine's loop handed out the first, and the latest, token of any answer.
    token_times: the same for every token of the first answer, with `record_timeline=True`.
    """

    arrival: float
    prepared: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    token_times: tuple[float, ...] | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A request's answers so far. `text` and friends are those of the first answer.

    metrics: when it happened; two outputs that differ in nothing else are equal.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    usage: Usage
    finished: bool
    metrics: RequestMetrics | None = field(default=None, compare=False)

    @property
    def text(self) -> str:
        """Text of the first answer."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Output token ids of the first answer."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str | None:
        """Finish reason of the first answer; None while it runs."""
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> tuple[Mapping[int, Logprob], ...] | None:
        """Log-probabilities of the first answer, one mapping a token, where asked for."""
        return self.outputs[0].logprobs
