"""What the two processes say to each other: typed messages in msgpack, each behind its length. Never pickle."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Any

import msgspec

from mm_core.engine.messages import CacheReply, Held, LevelStats, TokenOutput
from mm_core.engine.process.faults import Fault, from_fault, to_fault
from mm_core.engine.process.plain import unpack
from mm_core.errors import MMError
from mm_core.types import CacheEvent, CacheLookup

MAX_FRAME = 2**28  # bytes; more is no message of ours
_RECEIVE = 2**18


class ProtocolError(Exception):
    """What came is no message."""


class _Struct(msgspec.Struct, array_like=True):
    """Fields in order, without names: of two processes of one release."""


class WireTensor(_Struct):
    """See `arena.PlacedTensor`."""

    name: str
    dtype: str
    shape: list[int]
    offset: int


class WireFeature(_Struct):
    """A MediaFeature. number, offset, nbytes: of its slot in the arena; 0: it comes without its tensors."""

    modality: str
    num_tokens: int
    info: Any
    key: bytes
    num_fused: int | None
    uuid: str | None
    number: int = 0
    offset: int = 0
    nbytes: int = 0
    tensors: list[WireTensor] = []


class WireRange(_Struct):
    """A PlaceholderRange. mask: a byte a token. feature: its place among the request's."""

    offset: int
    length: int
    mask: bytes
    feature: int


class WireSource(_Struct):
    """A Source. token_ids: int32."""

    key: bytes
    num_tokens: int
    token_ids: bytes
    ranges: list[WireRange]


class WireRule(_Struct):
    """A logits processor of the family: a frozen dataclass, by name."""

    module: str
    name: str
    values: Any


class WireRequest(_Struct):
    """A PreparedRequest. token_ids, instruction: int32. positions: int32 of so many axes (0: there are none)."""

    request_id: str
    token_ids: bytes
    params: Any
    rules: list[WireRule]
    features: list[WireFeature]
    ranges: list[WireRange]
    axes: int
    positions: bytes
    decode_delta: int
    cache_salt: str | None
    kv_context: bytes
    stop_token_ids: list[int]
    block_size: int
    block_keys: list[bytes]
    source: WireSource | None
    instruction: bytes


# -- to the engine's process ---------------------------------------------------------------


class Start(_Struct, tag="start"):
    """The first message. config: EngineConfig's fields. plugins: modules by import name, installed ones by name."""

    model: str
    config: Any
    plugins: list[tuple[bool, str]]
    arena_bytes: int
    log_level: int


class Family(_Struct, tag="family"):
    """Before the first request. package: of the family's plugin, whose logits processors cross by name. own: whether
    those that the family adds to every request do not, and the engine's process makes them itself."""

    package: str
    own: bool


class Submitted(_Struct, tag="submit"):
    """`messages.Submit`."""

    request: WireRequest


class Aborted(_Struct, tag="abort"):
    """`messages.Abort`."""

    request_id: str
    index: int | None
    stopped: bool


class Cleared(_Struct, tag="clear"):
    """`messages.ClearCache`."""


class Query(_Struct, tag="query"):
    """A CacheQuery that is all plain fields. kind: its class' name."""

    kind: str
    values: Any


class LookedUp(_Struct, tag="lookup"):
    """`messages.LookUp`; the request's media come without their tensors."""

    query_id: int
    request: WireRequest


class Ask(_Struct, tag="ask"):
    """Counters, or with spans what was recorded; answered by Told of the same number."""

    number: int
    spans: bool = False


class Close(_Struct, tag="close"):
    """End: abort what runs, give back the device."""


# -- from the engine's process -------------------------------------------------------------


class Progress(_Struct, tag="progress"):
    """What the start is doing."""

    doing: str


class Ready(_Struct, tag="ready"):
    """Loaded. seconds: what its parts took."""

    max_model_len: int
    vocab_size: int
    device: str
    seconds: dict[str, float]


class Failed(_Struct, tag="failed"):
    """The start failed; the process ends."""

    fault: Fault


class Outputs(_Struct, tag="out"):
    """A step's outputs. when: `time.perf_counter()`, one clock for all processes of a machine."""

    when: float
    outputs: list[TokenOutput]


class Replied(_Struct, tag="reply"):
    """A CacheReply, its result in the field of its type."""

    query_id: int
    held: Held | None = None
    lookup: CacheLookup | None = None
    flag: bool | None = None
    levels: list[LevelStats] | None = None
    events: list[CacheEvent] | None = None
    fault: Fault | None = None


class News(_Struct, tag="news"):
    """`messages.CacheNews`."""

    events: list[CacheEvent]


class Told(_Struct, tag="told"):
    """Answers Ask. spans: (track, name, start_ns, end_ns, args) each."""

    number: int
    stats: Any = None
    spans: list[tuple[str, str, int, int, Any]] | None = None


class Beat(_Struct, tag="beat"):
    """The process lives. steps: taken so far; idle: seconds since the last one, or since there was nothing to do."""

    steps: int
    idle: float
    busy: bool


class Released(_Struct, tag="released"):
    """Slots of the arena of which nothing is held: (number, requests that named it since the last word of it)."""

    slots: list[tuple[int, int]]


class Log(_Struct, tag="log"):
    """A line for the log."""

    name: str
    level: int
    text: str
    created: float


ToEngine = Start | Family | Submitted | Aborted | Cleared | Query | LookedUp | Ask | Close
FromEngine = Progress | Ready | Failed | Outputs | Replied | News | Told | Beat | Released | Log


def as_reply(reply: CacheReply) -> Replied:
    """A reply as it travels."""
    number, result = reply.query_id, reply.result
    if reply.error is not None:
        return Replied(number, fault=to_fault(reply.error))
    match result:
        case Held():
            return Replied(number, held=result)
        case CacheLookup():
            return Replied(number, lookup=result)
        case bool():
            return Replied(number, flag=result)
        case tuple() if result and isinstance(result[0], LevelStats):
            return Replied(number, levels=list(result))
        case tuple():
            return Replied(number, events=list(result))  # type: ignore[arg-type]
    return Replied(number)


def from_reply(reply: Replied) -> CacheReply:
    """A reply as it was."""
    if reply.fault is not None:
        return CacheReply(reply.query_id, error=from_fault(reply.fault))
    listed = reply.levels if reply.levels is not None else reply.events
    if listed is not None:
        return CacheReply(reply.query_id, tuple(listed))  # type: ignore[arg-type]
    found = (each for each in (reply.held, reply.lookup, reply.flag) if each is not None)
    return CacheReply(reply.query_id, next(found, None))


def _enc_hook(value: Any) -> Any:
    if isinstance(value, MMError):
        return to_fault(value)
    raise NotImplementedError(f"a {type(value).__name__} does not travel")


def _dec_hook(kind: type, value: Any) -> Any:
    if issubclass(kind, MMError):
        return from_fault(msgspec.convert(value, Fault))
    raise NotImplementedError(f"a {kind.__name__} does not travel")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_enc_hook)
_TO_ENGINE: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(ToEngine, ext_hook=unpack, dec_hook=_dec_hook)
_FROM_ENGINE: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(
    FromEngine, ext_hook=unpack, dec_hook=_dec_hook
)


def encode(message: ToEngine | FromEngine) -> bytearray:
    """The message behind its length."""
    frame = bytearray(4)
    _ENCODER.encode_into(message, frame, 4)
    frame[:4] = (len(frame) - 4).to_bytes(4, "little")
    return frame


class Channel:
    """One end of the connection. `send` from any thread, `receive` from one."""

    def __init__(self, connection: socket.socket, *, engine: bool) -> None:
        self._connection = connection
        self._decoder: msgspec.msgpack.Decoder[Any] = _TO_ENGINE if engine else _FROM_ENGINE
        self._buffer = bytearray()
        self._lock = threading.Lock()

    def send(self, *messages: ToEngine | FromEngine) -> None:
        """Send, waiting for room. Raises OSError where nobody is at the other end."""
        self.send_frames(b"".join(map(encode, messages)))

    def send_frames(self, frames: bytes | bytearray) -> None:
        """Send what `encode` gave."""
        with self._lock:
            self._connection.sendall(frames)

    def receive(self) -> Any:
        """The next message, waiting for it; None at the end. Raises ProtocolError for anything else."""
        while True:
            if len(self._buffer) >= 4:
                size = int.from_bytes(self._buffer[:4], "little")
                if size > MAX_FRAME:
                    raise ProtocolError(f"a message of {size} bytes")
                if len(self._buffer) >= 4 + size:
                    return self._decode(size)
            try:
                more = self._connection.recv(_RECEIVE)
            except OSError:
                more = b""
            if not more:
                return None
            self._buffer += more

    def _decode(self, size: int) -> Any:
        with memoryview(self._buffer) as content:
            try:
                message = self._decoder.decode(content[4 : 4 + size])
            except (msgspec.DecodeError, ValueError, TypeError, NotImplementedError) as error:
                raise ProtocolError(str(error)[:200]) from error
        del self._buffer[: 4 + size]
        return message

    def close(self) -> None:
        """No more in either direction; whoever waits is woken. Idempotent."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
