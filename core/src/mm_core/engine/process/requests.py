"""Prepared requests as they cross: their media by their places in the arena, their ids packed."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import msgspec
import numpy as np

from mm_core.config import SamplingParams
from mm_core.engine.process.arena import Slot
from mm_core.engine.process.plain import pack
from mm_core.engine.process.wire import (
    ProtocolError,
    WireFeature,
    WireRange,
    WireRequest,
    WireRule,
    WireSource,
    WireTensor,
)
from mm_core.errors import InvalidParamsError, InvalidPromptError, PluginError
from mm_core.types import MediaFeature, Modality, PlaceholderRange, PreparedRequest, Source

_FRONT_ONLY = {"stop", "include_stop_str_in_output", "skip_special_tokens", "logits_processors"}


def check_portable(params: SamplingParams, package: str) -> None:
    """Raise InvalidParamsError for logits processors that do not cross; package: the family's plugin's."""
    for processor in params.logits_processors:
        as_rule(processor, package)


def as_rule(processor: Any, package: str) -> WireRule:
    """A processor by name: the plugin's own, frozen dataclasses of plain values."""
    kind = type(processor)
    module, name = kind.__module__, kind.__qualname__
    frozen = dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen  # type: ignore[attr-defined]
    if not (frozen and _within(module, package) and name.isidentifier()):
        raise _not_portable(name)
    try:
        return WireRule(module, name, pack({f.name: getattr(processor, f.name) for f in dataclasses.fields(kind)}))
    except PluginError:
        raise _not_portable(name) from None


def from_rule(rule: WireRule, package: str) -> Any:
    """The processor again. Raises ProtocolError for anything that is no frozen dataclass of the plugin's package."""
    kind = None
    if _within(rule.module, package):
        kind = getattr(importlib.import_module(rule.module), rule.name, None)
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise ProtocolError(f"{rule.module}.{rule.name} is no logits processor")
    return kind(**rule.values)


def _within(module: str, package: str) -> bool:
    return bool(package) and (module == package or module.startswith(f"{package}."))


def _not_portable(name: str) -> InvalidParamsError:
    return InvalidParamsError(
        f"The logits processor {name[:40]} is a callable of this process and the engine runs in another. Use "
        "logit_bias or structured output, or make the engine with engine_process=False.",
        param="logits_processors",
    )


def own_that_stay(params: SamplingParams, package: str) -> int:
    """How many of a family's own logits processors do not cross: all of them, where one does not."""
    try:
        check_portable(params, package)
    except InvalidParamsError:
        return len(params.logits_processors)
    return 0


def package_of(processor: object) -> str:
    """The package that a family's plugin is in, by its processor."""
    return type(processor).__module__.partition(".")[0]


def to_wire(request: PreparedRequest, package: str, num_own: int = 0) -> WireRequest:
    """The request without its media's tensors. num_own: logits processors that the family adds to every request, and
    that the engine's process adds itself.

    Raises what the request ends with: PluginError for facts of media that are no plain data, and the like.
    """
    places: dict[bytes, int] = {}
    features: list[WireFeature] = []

    def place(feature: MediaFeature) -> int:
        if feature.key not in places:
            places[feature.key] = len(features)
            features.append(_feature(feature))
        return places[feature.key]

    def lay(ranges: Sequence[PlaceholderRange]) -> list[WireRange]:
        return [WireRange(r.offset, r.length, bytes(r.is_media), place(r.feature)) for r in ranges]

    source, positions, params = request.source, request.positions, cast(SamplingParams, request.params)
    try:
        values = pack(params.model_dump(exclude=_FRONT_ONLY, exclude_defaults=True))
    except PluginError as error:
        raise InvalidParamsError(f"The sampling parameters cannot be sent to the engine: {error}") from None
    return WireRequest(
        request_id=request.request_id,
        token_ids=_ints(request.token_ids),
        params=values,
        rules=[as_rule(p, package) for p in params.logits_processors[num_own:]],
        features=features,
        ranges=lay(request.ranges),
        axes=0 if positions is None else positions.shape[0],
        positions=b"" if positions is None else np.ascontiguousarray(positions, np.int32).tobytes(),
        decode_delta=request.decode_delta,
        cache_salt=request.cache_salt,
        kv_context=request.kv_context,
        stop_token_ids=list(request.stop_token_ids),
        block_size=request.block_size,
        block_keys=list(request.block_keys),
        source=None
        if source is None
        else WireSource(source.key, source.num_tokens, _ints(source.token_ids), lay(source.ranges)),
        instruction=_ints(request.instruction),
    )


def from_wire(
    wire: WireRequest,
    tensors_of: Callable[[WireFeature], Mapping[str, Any]],
    package: str,
    own: Sequence[Any] = (),
) -> PreparedRequest:
    """The request again. own: logits processors that the family adds. Raises ProtocolError."""
    features = [
        MediaFeature(
            cast(Modality, f.modality), f.num_tokens, tensors_of(f), f.info, f.key, f.num_fused, f.uuid
        )
        for f in wire.features
    ]  # fmt: skip

    def lay(ranges: Sequence[WireRange]) -> tuple[PlaceholderRange, ...]:
        return tuple(PlaceholderRange(r.offset, r.length, _mask(r.mask), features[r.feature]) for r in ranges)

    processors = (*own, *(from_rule(rule, package) for rule in wire.rules))
    source = wire.source
    positions = np.frombuffer(bytearray(wire.positions), np.int32).reshape(wire.axes, -1) if wire.axes else None
    return PreparedRequest(
        request_id=wire.request_id,
        token_ids=_tuple(wire.token_ids),
        params=SamplingParams(**wire.params, logits_processors=processors),
        ranges=lay(wire.ranges),
        positions=positions,
        decode_delta=wire.decode_delta,
        cache_salt=wire.cache_salt,
        kv_context=wire.kv_context,
        stop_token_ids=frozenset(wire.stop_token_ids),
        block_size=wire.block_size,
        block_keys=tuple(wire.block_keys),
        source=None
        if source is None
        else Source(source.key, source.num_tokens, _tuple(source.token_ids), lay(source.ranges)),
        instruction=_tuple(wire.instruction),
    )


def with_slots(wire: WireRequest, slots: Mapping[bytes, Slot]) -> WireRequest:
    """The request with its media's places in the arena, by their keys."""
    return msgspec.structs.replace(wire, features=[_placed(f, slots[f.key]) for f in wire.features])


def _placed(feature: WireFeature, slot: Slot) -> WireFeature:
    tensors = [WireTensor(t.name, t.dtype, list(t.shape), t.offset) for t in slot.tensors]
    return msgspec.structs.replace(feature, number=slot.number, offset=slot.offset, nbytes=slot.nbytes, tensors=tensors)


def _feature(feature: MediaFeature) -> WireFeature:
    info = pack(dict(feature.info))
    name = (feature.num_fused, feature.uuid)
    return WireFeature(feature.modality, feature.num_tokens, info, feature.key, *name)


def _ints(ids: Sequence[int]) -> bytes:
    try:
        return np.asarray(ids, np.int32).tobytes()
    except OverflowError:
        raise InvalidPromptError("A token id has more than 31 bits.", param="prompt_token_ids") from None


def _tuple(packed: bytes) -> tuple[int, ...]:
    return tuple(np.frombuffer(packed, np.int32).tolist())


def _mask(packed: bytes) -> tuple[bool, ...]:
    return tuple(map(bool, packed))
