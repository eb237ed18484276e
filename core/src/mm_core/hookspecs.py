"""The plugin contract: the hooks, and the objects they build.

Hooks run once, while a model loads; nothing per token goes through pluggy. A plugin implements
them with `@hookimpl` as module-level functions (or methods of an object) and is found through
the entry-point group `mm_core`, the entry point's name being the family's name.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import pluggy

from mm_core.benchspecs import BenchFamily
from mm_core.types import (
    LogitsProcessor,
    MediaFeature,
    MediaItem,
    Modality,
    ModelFamily,
    PlaceholderRange,
    RequestOutput,
    TaskProgress,
    TaskRequest,
)

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor, nn

API_VERSION = 1
PROJECT = "mm_core"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class Checkpoint(Protocol):
    """What a hook sees of a checkpoint: settings and tokenizer, no weights, nothing executed."""

    name: str
    path: Path
    identity: bytes
    config: Mapping[str, Any]

    @property
    def text_config(self) -> Mapping[str, Any]:
        """Settings of the language model, whichever config layout holds them; `rope_theta` and
        `rope_scaling` (with `type`/`mrope_section`) in the flat spelling."""
        ...

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """generation_config.json, or an empty mapping."""
        ...

    @property
    def processor_config(self) -> Mapping[str, Mapping[str, Any]]:
        """Preprocessing settings by part: "image_processor", "video_processor", "feature_extractor",
        from preprocessor_config.json or processor_config.json, whichever the checkpoint has."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer, loaded once by transformers' AutoTokenizer."""
        ...

    def read_json(self, name: str) -> Mapping[str, Any] | None:
        """A JSON object beside config.json, or None where the file is absent."""
        ...


@dataclass(frozen=True)
class BuildContext:
    """Where and how modules are built: parameters are created empty on `device` in `dtype`."""

    device: torch.device
    dtype: torch.dtype
    max_model_len: int


@dataclass(frozen=True)
class WeightMap:
    """How a checkpoint's tensor names become a module's parameter names.

    rename: (regex, replacement) pairs; the first pattern that matches from the name's start
    decides (re.sub, once); a name no pattern matches is not this module's. fused: (suffix of the
    renamed name's stem, name of the fused parameter's stem, shard number): `("q_proj",
    "qkv_proj", 0)` makes `x.q_proj.weight` the first shard of `x.qkv_proj.weight`; a fused
    parameter carries `shard_sizes`, its rows per shard. ignore: regexes of tensors that may be in
    the checkpoint and are not needed. tied: {parameter name: parameter name it shares}.
    """

    rename: tuple[tuple[str, str], ...]
    fused: tuple[tuple[str, str, int], ...] = ()
    ignore: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class MediaRequest:
    """What a processor may know of the request an item is part of."""

    counts: Mapping[Modality, int]
    processor_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SamplingDefaults:
    """What a family adds to every request: stop ids beside those of generation_config.json, and logits
    processors, which come before the request's own."""

    stop_token_ids: tuple[int, ...] = ()
    logits_processors: tuple[LogitsProcessor, ...] = ()


@runtime_checkable
class Processor(Protocol):
    """Text and media to features. Thread-safe; torch only where tensors are made.

    What a processor may also have:

    video_sampling(request: MediaRequest) -> media.VideoSampling: which frames of a video file to decode.
    sampling_rate: int: audio comes to `prepare` mono at this rate (Hz), resampled by core.
    limits: Mapping[Modality, int]: how many items of a modality a request may have.
    add_special_tokens: bool: whether a raw prompt gets what the tokenizer puts around a text (default True).
    start_chat: bool: whether a chat prompt begins with what the tokenizer puts before a text (default False).
    """

    tokenizer: Any
    modalities: tuple[Modality, ...]
    settings_key: bytes  # the checkpoint's preprocessing settings, serialised; enters every media key

    def placeholder(self, modality: Modality) -> str | None:
        """The text that stands for one item in a prompt, e.g. `<|image_pad|>`; None where items have no
        place in it (cross-attention). It is one token."""
        ...

    def placeholder_id(self, modality: Modality) -> int | None:
        """The token id of `placeholder(modality)`, or None."""
        ...

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Messages (OpenAI roles; content a str or parts of type text/image/video/audio) to a
        prompt that ends where the assistant begins."""
        ...

    def accepts_verbatim(self, prompt: str, counts: Mapping[Modality, int]) -> bool:
        """Whether a prompt without placeholders is complete as it stands with these media."""
        ...

    def check_kwargs(self, kwargs: Mapping[str, Any]) -> None:
        """Raise InvalidParamsError for an unknown or out-of-range `mm_processor_kwargs` entry."""
        ...

    def variant(self, item: MediaItem, request: MediaRequest) -> bytes:
        """Everything beside the content that changes the features; enters every media key.
        Reads `item.info` only (the content may be absent)."""
        ...

    def prepare(self, item: MediaItem, variant: bytes) -> MediaFeature:
        """Features of one item: pure in its two arguments."""
        ...

    def expand(self, feature: MediaFeature) -> tuple[Sequence[int], Sequence[bool]]:
        """Token ids that replace the placeholder, and which of them take an encoder row. Two empty lists
        where cross-attention reads the rows."""
        ...

    def default_sampling(self) -> SamplingDefaults:
        """Stop ids the family needs beside the checkpoint's."""
        ...

    def finish(self, text: str, token_ids: Sequence[int]) -> str:
        """Repair of a finished answer's text; most families return it unchanged."""
        ...


class Encoder(Protocol):
    """Packed features to rows: an nn.Module; `hidden_size` is the rows' width.

    An encoder that runs some passes as CUDA graphs (`layers.CapturedPasses`) also has `use_graphs()`.
    The engine calls it once the weights are there and every launch does its work: before, and where
    graphs are switched off, nothing may be captured.
    """

    hidden_size: int
    weight_map: WeightMap

    def cost(self, feature: MediaFeature) -> int:
        """What encoding the item costs, in the encoder's own units (patches, frames)."""
        ...

    def __call__(self, features: Sequence[MediaFeature]) -> list[Tensor]:
        """All items in one pass: one [num_tokens, hidden_size] tensor an item, in order.

        The features' tensors are on the encoder's device already. On a GPU the call must not wait
        for the device: it runs ahead, on a stream of its own."""
        ...


class Fusion(Protocol):
    """How rows and text become the decoder's input.

    kind: `embed`: rows replace placeholders in the decoder's prompt. `cross_attention`: the decoder attends
    to the rows. `encoder_decoder`: a text encoder reads prompt and rows, the decoder attends to what it gives.

    What a fusion may also have:

    decoder_prompt: tuple[int, ...]: what the decoder begins with; needed for `encoder_decoder`.
    instruction(text: str) -> Sequence[int]: of a request's prompt (media left out), the ids that `condition`
    reads; they enter the request's KV keys. Called once a request.
    condition(rows: Sequence[Tensor], instructions: Sequence[Sequence[int]]) -> list[Tensor]: each item's
    encoder rows [num_tokens, encoder.hidden_size] to what is placed, [num_fused, hidden], with the instruction
    of its request. Such a fusion is an nn.Module with a `weight_map`. The encoder's rows stay as they are in
    the cache, whatever is asked about them.
    """

    kind: Literal["embed", "cross_attention", "encoder_decoder"]

    def positions(
        self, token_ids: Sequence[int], ranges: Sequence[PlaceholderRange]
    ) -> tuple[np.ndarray[Any, Any], int] | None:
        """([axes, n] int32, decode_delta), or None for 0…n-1. Called once a request."""
        ...


@dataclass(frozen=True)
class KVCacheSpec:
    """The KV memory of one block table: `layers` layers of K and V [block, slot, kv_heads, head_dim]."""

    name: str
    layers: int
    kv_heads: int
    head_dim: int


class Decoder(Protocol):
    """The language model: an nn.Module over flattened batches (T tokens of all sequences).

    A decoder with cross-attention has two `kv_specs` of one shape, "self" and "cross": their blocks come
    from one pool. It also has

    write_source(rows: Tensor, context: layers.ForwardContext) -> None: [N, hidden] of several sources one
    after another; projects them to every layer's keys and values and writes these where
    context.tables["cross"].slot_mapping [N] says.
    encode_source(embeds: Tensor, bounds: Tensor, longest: int) -> Tensor: for kind `encoder_decoder`, the text
    encoder: embedded texts [N, hidden], rows in place, of the sources bounds [S + 1] int32 → [N, hidden].
    """

    hidden_size: int
    vocab_size: int
    position_axes: int
    kv_specs: tuple[KVCacheSpec, ...]

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] int64 → [T, hidden_size]."""
        ...

    def __call__(self, inputs_embeds: Tensor, positions: Tensor, context: Any) -> Tensor:
        """[T, hidden], [axes, T] int32, layers.ForwardContext → [T, hidden], final norm applied; where
        the context names `rows`, [R, hidden] of those alone, in their order."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] → [R, vocab_size]."""
        ...


@dataclass(frozen=True)
class DecoderSpec:
    """Which decoder serves a checkpoint, and how its tensors are named there.

    build: makes the module from a BuildContext, e.g. `functools.partial(LlamaDecoder, config)`.
    max_model_len: the longest context the checkpoint was made for.
    """

    build: Callable[[BuildContext], nn.Module]
    weight_map: WeightMap
    max_model_len: int


Task = Callable[..., Generator[Sequence[TaskRequest] | TaskProgress, Sequence[RequestOutput], Any]]
"""A task beside generation. Called with the user's keyword arguments, it yields requests, receives
their outputs in order, and returns the result. It may yield a TaskProgress where it knows a part of the result.
It raises InvalidParamsError for arguments that make no sense."""


class HookSpecs:
    """The hooks themselves. `mm_families` is called on every plugin, `mm_bench` by `mm bench` on each that
    has it, the others on the owner of a checkpoint."""

    @hookspec
    def mm_families(self) -> list[ModelFamily]:  # type: ignore[empty-body]
        """The families this plugin serves. Must not import torch."""

    @hookspec(firstresult=True)
    def mm_processor(self, family: str, checkpoint: Checkpoint) -> Processor:  # type: ignore[empty-body]
        """The family's processor; called on the owner only."""

    @hookspec(firstresult=True)
    def mm_encoder(self, family: str, checkpoint: Checkpoint, context: BuildContext) -> Encoder:  # type: ignore[empty-body]
        """The family's encoder; called on the owner only."""

    @hookspec(firstresult=True)
    def mm_fusion(self, family: str, checkpoint: Checkpoint, context: BuildContext) -> Fusion:  # type: ignore[empty-body]
        """How rows and text are fused; called on the owner only."""

    @hookspec(firstresult=True)
    def mm_decoder(self, family: str, checkpoint: Checkpoint) -> DecoderSpec:  # type: ignore[empty-body]
        """The decoder; called on the owner, then on core's default."""

    @hookspec(firstresult=True)
    def mm_tasks(self, family: str, checkpoint: Checkpoint) -> Mapping[str, Task]:  # type: ignore[empty-body]
        """Named tasks beside generation, e.g. "transcribe", for `Engine.task`; called on the owner only."""

    @hookspec(firstresult=True)
    def mm_bench(self, family: str) -> BenchFamily:  # type: ignore[empty-body]
        """How `mm bench` measures the family; must not import torch. Not needed to run models."""
