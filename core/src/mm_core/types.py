"""The values that travel through the house, one per arrow of the data flow.

All are frozen. Nothing here imports torch at run time: the scheduler and the caches use these
values and must stay importable without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

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

    Exactly one of `prompt` and `prompt_token_ids` is given. `multi_modal_data` maps a modality ("image", "video",
    "audio") to one value or a list. `multi_modal_uuids` has, for each modality, one entry an item: a str names the
    item, None leaves it to its content hash; where an entry is given, the item's value may be None and then stands
    for what was given under that name before.
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

    num_tokens: rows the encoder gives for it (= placeholder tokens, or encoder rows for cross-attention). tensors: the
    encoder's inputs, on the CPU. info: small facts that `expand`, `positions` and `cost` need (grids and the like).
    key: the media key, set by the core; nbytes: memory of the tensors, for cache bounds. num_fused: where
    `Fusion.condition` makes another number of rows of the encoder's, how many; those are its placeholder tokens then.
    uuid: the item's name, where it was given one, set by the core (the key depends on it).
    """

    modality: Modality
    num_tokens: int
    tensors: Mapping[str, Tensor]
    info: Mapping[str, Any] = field(default_factory=dict)
    key: bytes = b""
    num_fused: int | None = None
    uuid: str | None = None

    @property
    def num_placed(self) -> int:
        """Rows that fusion places, one a placeholder token."""
        return self.num_tokens if self.num_fused is None else self.num_fused

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@dataclass(frozen=True)
class PlaceholderRange:
    """Where one item lies in the prompt: tokens [offset, offset + length).

    is_media[i] says whether token offset+i is replaced by an encoder row (True) or is a
    separator that the tokenizer knows (False); sum(is_media) == feature.num_placed. Items whose
    rows are read by cross-attention have no tokens in the prompt: length 0, all in `Source.ranges`.
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
        """[num_placed] int64: for each fused row, its token's place within the range."""
        import numpy as np

        return np.flatnonzero(np.asarray(self.is_media, dtype=bool))


@dataclass(frozen=True)
class Source:
    """What the decoder reads by cross-attention: media alone (fusion kind `cross_attention`), or text and
    media through a text encoder (`encoder_decoder`).

    key: of its keys and values in every cache: a hash of salt, model, media keys, `token_ids` and what
    `condition` read. num_tokens: keys and values a layer. token_ids: what the text encoder reads, media
    expanded; empty for media alone. ranges: its media in order; with `token_ids`, where they lie in these,
    else of length 0.
    """

    key: bytes
    num_tokens: int
    token_ids: tuple[int, ...] = ()
    ranges: tuple[PlaceholderRange, ...] = ()


@dataclass(frozen=True)
class PreparedRequest:
    """A request that is ready to be scheduled; everything slow has been done.

    token_ids: the expanded prompt of the decoder. ranges: in prompt order. positions: int32 [axes, n] or
    None for 0…n-1; decode_delta: position of output token i is n + i + decode_delta.
    kv_context: whatever beside tokens and media enters the KV keys (what `condition` read, the source's key).
    block_keys: keys of the prompt's full blocks of `block_size` tokens, computed ahead, or none.
    source: what cross-attention reads, where the family has it; the request's media are there then.
    instruction: token ids that `Fusion.condition` reads. warnings: for `RequestOutput.warnings`.
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
    source: Source | None = None
    instruction: tuple[int, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def media(self) -> tuple[PlaceholderRange, ...]:
        """All items of the request, wherever they are read."""
        return self.ranges if self.source is None else self.source.ranges

    @property
    def user_token_ids(self) -> tuple[int, ...]:
        """The prompt as the user gave it, media expanded: what a text encoder reads, where there is one."""
        return self.source.token_ids if self.source is not None and self.source.token_ids else self.token_ids


@dataclass(frozen=True)
class LogitsRows:
    """What a logits processor may know of the rows it is given, R of them.

    prompt_token_ids: of each row, on the host. output_token_ids: [R, L] int64 on the logits' device, -1
    beyond a row's end; the newest token may be there before the host knows it. num_output_tokens: of each
    row, on the host and as int64 [R] on the device (`lengths`); L is at least their maximum.
    """

    prompt_token_ids: Sequence[tuple[int, ...]]
    output_token_ids: Tensor
    num_output_tokens: Sequence[int]
    lengths: Tensor


class LogitsProcessor(Protocol):
    """Changes the logits of the requests that name it in `SamplingParams.logits_processors`.

    Called once a step for all rows whose requests have an equal one (`==` and `hash`, so a frozen
    dataclass does): logits [R, vocab] float32 on the model's device, which it may write to. Returns
    [R, vocab]. It must not wait for the device (no `.item()`, no `.cpu()`): it is called while steps run.
    """

    def __call__(self, logits: Tensor, rows: LogitsRows) -> Tensor:
        """[R, vocab] → [R, vocab]."""
        ...


@dataclass(frozen=True)
class TaskRequest:
    """One request of a task. prompt: as `Engine.generate` takes it. params: SamplingParams, or None."""

    prompt: Any
    params: Any = None
    apply_chat_template: bool | None = None


@dataclass(frozen=True)
class TaskProgress:
    """What a task knows before its end, yielded between its requests; it is sent an empty sequence for it. value: the
    family's matter."""

    value: Any


@dataclass(frozen=True)
class TaskOptions:
    """How a task is run. cache_salt: of all its requests. allow_paths: whether media of its requests may be paths.
    on_progress: called with each `TaskProgress.value`; on_output: with each request's RequestOutput, as soon as those
    asked with it are there, too. Both must return quickly."""

    cache_salt: str | None = None
    allow_paths: bool = True
    on_progress: Callable[[Any], None] | None = None
    on_output: Callable[[Any], None] | None = None


@dataclass(frozen=True)
class Logprob:
    """Natural log-probability of one token under the model's own distribution, and its rank from 1."""

    logprob: float
    rank: int
    decoded_token: str = ""


@dataclass(frozen=True)
class Usage:
    """Token counts of one request. `cached_tokens` of what the decoder reads as its prompt were served from
    the KV cache; `media_tokens` of the prompt stand for media (rows, where the decoder attends to media that
    have no place in it); `encoded_media_tokens` of those were encoded for this request (0 where the encoder
    cache, or the KV cache, had them)."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    media_tokens: int = 0
    encoded_media_tokens: int = 0


CacheLevel = Literal["device", "host", "disk"]


@dataclass(frozen=True)
class CacheEvent:
    """What happened to one KV block or one item's encoder rows, told to `engine.cache.subscribe`.

    kind: "stored" (computed, findable from now on), "offloaded" (copied to the host's memory or to disk),
    "restored" (copied back to the device, findable there), "evicted" (gone from `level`). cache: "kv" or
    "encoder". key: of the block, or the media key. parent: of a block, its parent's key. token_ids: of a block.
    num_tokens: of the block, or rows. uuids: of the items that the block or the rows hold something of.
    """

    kind: Literal["stored", "offloaded", "restored", "evicted"]
    cache: Literal["kv", "encoder"]
    level: CacheLevel
    key: bytes
    num_tokens: int
    parent: bytes = b""
    token_ids: tuple[int, ...] = ()
    uuids: tuple[str, ...] = ()


@dataclass(frozen=True)
class CacheLookup:
    """What of a prompt is cached now. prompt_tokens: of the decoder's prompt; device_tokens of them would be found
    on the device, and host_tokens and disk_tokens behind those could be restored. media: items of the prompt;
    encoded_media of them have their encoder rows on the device, restorable_media others in host or disk.
    source_tokens: what the decoder reads by cross-attention, where the family does; cached_source_tokens of them
    (all or none) would be found or restored."""

    prompt_tokens: int
    device_tokens: int
    host_tokens: int = 0
    disk_tokens: int = 0
    media: int = 0
    encoded_media: int = 0
    restorable_media: int = 0
    source_tokens: int = 0
    cached_source_tokens: int = 0

    @property
    def cached_tokens(self) -> int:
        """Tokens that need not be computed."""
        return self.device_tokens + self.host_tokens + self.disk_tokens


@dataclass(frozen=True)
class CompletionOutput:
    """One of a request's `n` answers. stop_reason: the stop string or token id that ended it. hidden_tokens: how many
    at the end of `token_ids` are no part of the text: 1 where a token ended it, unless it is shown."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    logprobs: tuple[Mapping[int, Logprob], ...] | None = None
    cumulative_logprob: float | None = None
    hidden_tokens: int = 0


@dataclass(frozen=True)
class RequestMetrics:
    """When a request got where, in seconds of `time.perf_counter()`; None: it has not come so far.

    arrival: the engine was asked. prepared: ids and media were ready for the scheduler. started: its first answer
    was scheduled for the first time; known with its first output. first_token, last_token: the engine's loop handed
    out the first, and the latest, token of any answer.
    token_times: the same for every token of the first answer, with `record_timeline=True`.
    """

    arrival: float
    prepared: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    token_times: tuple[float, ...] | None = None
    started: float | None = None


@dataclass(frozen=True)
class RequestOutput:
    """A request's answers so far. `text` and friends are those of the first answer.

    metrics: when it happened; two outputs that differ in nothing else are equal. warnings: what was used only in
    part, as a sound file that was cut off.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    usage: Usage
    finished: bool
    metrics: RequestMetrics | None = field(default=None, compare=False)
    warnings: tuple[str, ...] = ()

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
