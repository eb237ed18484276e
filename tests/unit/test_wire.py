"""What the engine's process and its parent say to each other: it arrives as it was, and garbage ends it."""

from __future__ import annotations

import dataclasses
import socket
import threading
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import stub_plugin

from mm_core import errors
from mm_core.config import MAX_SEED, EngineConfig, KvCacheConfig, SamplingParams
from mm_core.engine.messages import CacheReply, Held, LevelStats, TokenOutput
from mm_core.engine.process import wire
from mm_core.engine.process.faults import from_fault, to_fault
from mm_core.engine.process.launch import Launch, import_plugins, plugin_names
from mm_core.engine.process.plain import pack, unpack
from mm_core.engine.process.requests import as_rule, check_portable, from_rule, from_wire, to_wire
from mm_core.engine.process.wire import Channel, Outputs, ProtocolError, Submitted, WireRule
from mm_core.errors import ConfigError, InvalidParamsError, MediaDecodeError, MMError, PluginError
from mm_core.types import (
    CacheEvent,
    CacheLookup,
    LogitsRows,
    Logprob,
    MediaFeature,
    PlaceholderRange,
    PreparedRequest,
    Source,
)


def crossed(message: Any, *, engine: bool = False) -> Any:
    one, other = socket.socketpair()
    with one, other:
        sender = threading.Thread(target=Channel(one, engine=not engine).send, args=(message,))
        sender.start()
        found = Channel(other, engine=engine).receive()
        sender.join()
        return found


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text() | st.integers(-9, 2**40), inner, max_size=4)
        | st.frozensets(st.integers(0, 9), max_size=3)
    ),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_values_keep_their_types(value):
    def kinds(v: Any) -> Any:
        if isinstance(v, dict):
            return {k: kinds(x) for k, x in v.items()}
        return (type(v), [kinds(x) for x in v]) if isinstance(v, list | tuple) else type(v)

    found = msgspec.msgpack.Decoder(ext_hook=unpack).decode(msgspec.msgpack.encode(pack(value)))
    assert found == value
    assert kinds(found) == kinds(value)


def test_numpy_arrives_and_objects_do_not():
    value = {"grid": np.arange(6, dtype=np.int32).reshape(2, 3), "one": np.float32(0.5), "set": {1, 2}}
    found = msgspec.msgpack.Decoder(ext_hook=unpack).decode(msgspec.msgpack.encode(pack(value)))
    assert found["grid"].dtype == np.int32
    assert found["grid"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["one"] == np.float32(0.5)
    assert type(found["one"]) is np.float32
    found["grid"][0] = 9  # it can be written to
    deep: list[Any] = []
    for _ in range(200):
        deep = [deep]
    for wrong in (object(), {(1, 2): 3}, torch.zeros(1), 2**70, deep, np.array([object()])):
        with pytest.raises(PluginError, match="engine_process=False"):
            pack(wrong)
    with pytest.raises(ValueError, match="extension"):
        unpack(99, memoryview(b"\x90"))


EVERY = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, MMError)]


@pytest.mark.parametrize("kind", [e for e in EVERY if e is not errors.BatchError])
def test_errors_arrive_by_name(kind):
    found = from_fault(to_fault(kind("what went wrong")))
    assert type(found) is kind
    assert (str(found), found.code) == ("what went wrong", kind.code)


def test_an_error_keeps_its_details():
    found = from_fault(to_fault(MediaDecodeError("no picture", param="image", code="odd")))
    assert (str(found), found.param, found.code) == ("no picture", "image", "odd")  # type: ignore[attr-defined]

    class Own(PluginError):
        code = "own"

    found = from_fault(to_fault(Own("a plugin's own \ud800")))
    assert (type(found), found.code) == (PluginError, "own")
    assert type(from_fault(wire.Fault("os", "?"))) is errors.EngineError
    assert type(from_fault(wire.Fault("annotations", "?"))) is errors.EngineError


def feature(key: bytes, **info: Any) -> MediaFeature:
    return MediaFeature("image", 3, {"x": torch.arange(4)}, info, key, 2, "name")


STAYS = {"warnings"}  # of the caller, who has the request


def full_request() -> PreparedRequest:
    one, two = feature(b"a", grid=(1, 2, 3), rate=None), feature(b"b", sizes=[(1, 2)])
    ranges = (PlaceholderRange(0, 3, (True, False, True), one), PlaceholderRange(4, 3, (True, True, False), two),
              PlaceholderRange(8, 3, (True, False, True), one))  # fmt: skip
    return PreparedRequest(
        request_id="req-1",
        token_ids=tuple(range(12)),
        params=SamplingParams(n=2, seed=MAX_SEED, stop=("\ud800", "b"), logit_bias={3: 1.5}, stop_token_ids=(4,)),
        ranges=ranges,
        positions=np.arange(36, dtype=np.int32).reshape(3, 12),
        decode_delta=-4,
        cache_salt="salt",
        kv_context=b"context",
        stop_token_ids=frozenset({1, 2}),
        block_size=16,
        block_keys=(b"k1", b"k2"),
        source=Source(b"s", 7, (5, 6), (PlaceholderRange(0, 0, (), two),)),
        instruction=(9, 8),
    )


def test_every_field_of_a_request_crosses():
    request = full_request()
    sent = crossed(Submitted(to_wire(request, "p")), engine=True).request
    tensors = {"x": torch.arange(4)}
    found = from_wire(sent, lambda _: tensors, "p")
    blank = PreparedRequest("", (), None)
    for each in dataclasses.fields(PreparedRequest):
        if each.name in STAYS:
            continue
        wanted, got = getattr(request, each.name), getattr(found, each.name)
        assert repr(wanted) != repr(getattr(blank, each.name)), f"{each.name} is not tested"
        if each.name == "params":
            front = {"stop": (), "include_stop_str_in_output": False, "skip_special_tokens": True}
            assert got == wanted.model_copy(update=front)
        elif each.name == "positions":
            assert got.dtype == np.int32
            assert got.tolist() == wanted.tolist()
        else:
            assert repr(got) == repr(wanted), each.name
    assert found.ranges[0].feature is found.ranges[2].feature
    for each in dataclasses.fields(MediaFeature):
        assert repr(getattr(found.ranges[0].feature, each.name)) == repr(getattr(request.ranges[0].feature, each.name))


@dataclasses.dataclass(frozen=True)
class Rule:
    ids: tuple[int, ...]

    def __call__(self, logits: Any, rows: LogitsRows) -> Any:
        return logits


@dataclasses.dataclass
class Loose(Rule.__base__):  # type: ignore[misc, name-defined]
    ids: tuple[int, ...] = ()

    def __call__(self, logits: Any, rows: LogitsRows) -> Any:
        return logits

    __hash__ = object.__hash__


def test_rules_of_the_family_cross_by_name():
    package = Rule.__module__.partition(".")[0]
    request = dataclasses.replace(full_request(), params=SamplingParams(logits_processors=(Rule((1, 2)),)))
    sent = crossed(Submitted(to_wire(request, package)), engine=True).request
    assert from_rule(sent.rules[0], package) == Rule((1, 2))
    check_portable(SamplingParams(logits_processors=(Rule((1,)),)), package)
    for wrong in (lambda logits, rows: logits, Loose(), dataclasses.make_dataclass("X", [], frozen=True)):
        with pytest.raises(InvalidParamsError, match="engine_process=False"):
            check_portable(SamplingParams(logits_processors=(wrong,)), package)
    with pytest.raises(InvalidParamsError):
        as_rule(Rule((1,)), "another")
    for module, name in (
        ("os", "system"),
        ("subprocess", "Popen"),
        (Rule.__module__, "pytest"),
        (f"{package}x", "Rule"),
    ):
        with pytest.raises(ProtocolError):
            from_rule(WireRule(module, name, {}), package)
    with pytest.raises(ProtocolError):
        from_rule(WireRule("os", "system", {}), "")


def test_a_family_s_own_processors_are_added_there():
    request = dataclasses.replace(full_request(), params=SamplingParams(logits_processors=(print, Rule((1,)))))
    package = Rule.__module__.partition(".")[0]
    sent = crossed(Submitted(to_wire(request, package, num_own=1)), engine=True).request
    assert from_wire(sent, lambda _: {}, package, (len,)).params.logits_processors == (len, Rule((1,)))


def test_outputs_cross():
    outputs = [
        TokenOutput("a", 0, 5),
        TokenOutput("b", 1, 6, {6: Logprob(-0.5, 1, "x"), 7: Logprob(float("-inf"), 9)}, "stop", 4, 3, 2, None, 1.5),
        TokenOutput("c", 0, None, finish_reason="error", error=InvalidParamsError("no", param="n")),
    ]
    found = crossed(Outputs(12.5, outputs))
    assert found.when == 12.5
    assert found.outputs[:2] == outputs[:2]
    error = found.outputs[2].error
    assert (type(error), str(error), error.param) == (InvalidParamsError, "no", "n")


@pytest.mark.parametrize(
    "result",
    [None, True, False, Held(1, 2, 3, 4), CacheLookup(5, 4, 3), (LevelStats("host", "tokens", "bytes", 1, 2, 3),), (),
     (CacheEvent("stored", "kv", "device", b"k", 16, b"p", (1, 2), ("u",)),)],
)  # fmt: skip
def test_replies_cross(result):
    reply = CacheReply(3, result)
    assert wire.from_reply(crossed(wire.as_reply(reply))) == reply


def test_replies_with_errors_cross():
    found = wire.from_reply(crossed(wire.as_reply(CacheReply(3, error=errors.CacheFullError("full", param="uuid")))))
    assert (type(found.error), str(found.error)) == (errors.CacheFullError, "full")


def test_settings_cross():
    config = EngineConfig(kv_cache_config=KvCacheConfig(num_blocks=7), limit_mm_per_prompt={"image": 2}, seed=5)
    start = crossed(Launch("m", config, ((True, "a"),)).message(), engine=True)
    assert EngineConfig(**start.config) == config
    assert start.plugins == [(True, "a")]


def test_plugins_travel_by_name():
    names = plugin_names(["installed", stub_plugin])
    assert names == ((False, "installed"), (True, stub_plugin.__name__))
    assert import_plugins(names) == ["installed", stub_plugin]
    import types

    for wrong in (object(), types.ModuleType("nowhere")):
        with pytest.raises(ConfigError, match="engine_process=False"):
            plugin_names([wrong])


def receive(data: bytes, *, engine: bool = False) -> Any:
    one, other = socket.socketpair()
    with other:
        with one:
            one.sendall(data)
        return Channel(other, engine=engine).receive()


def test_the_end_and_half_messages():
    whole = bytes(wire.encode(wire.Close()))
    assert receive(b"", engine=True) is None
    assert receive(whole[:-1], engine=True) is None
    assert isinstance(receive(whole, engine=True), wire.Close)


@settings(max_examples=200)
@given(st.binary(max_size=200), st.booleans())
def test_garbage_is_no_message(data, engine):
    frame = len(data).to_bytes(4, "little") + data
    try:
        found = receive(frame, engine=engine)
    except ProtocolError:
        return
    assert type(found).__module__ == wire.__name__


def test_a_frame_of_absurd_length_is_refused():
    with pytest.raises(ProtocolError, match="bytes"):
        receive(b"\xff\xff\xff\xff")


def test_messages_of_the_other_direction_are_refused():
    with pytest.raises(ProtocolError):
        receive(bytes(wire.encode(wire.Close())))


def test_messages_come_in_order_whatever_the_chunks():
    sent = [wire.Progress("x" * n) for n in (0, 10, 300_000, 5)]
    data = b"".join(bytes(wire.encode(each)) for each in sent)
    one, other = socket.socketpair()
    with one, other:
        threading.Thread(target=lambda: [one.sendall(data[i : i + 7919]) for i in range(0, len(data), 7919)]).start()
        channel = Channel(other, engine=False)
        assert [channel.receive() for _ in sent] == sent
