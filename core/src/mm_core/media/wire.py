"""What is said between the process that wants media decoded and those that decode: msgpack of these types only, over
a socket. Encoded bytes and decoded content lie in memory that both see: a slab, or what is larger in memory of its
own, whose descriptor goes with a message.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import Any

import msgspec

from mm_core.media.decode import MediaLimits
from mm_core.types import Modality

MAX_MESSAGE = 2**24
SLAB = 2**21
"""Bytes of memory that both sides see all the time: what fits goes through it, and costs no page faults."""
_HEADER = 4


class Ready(msgspec.Struct, frozen=True, tag=True):
    """A worker has loaded its decoders and bound itself."""


class Job(msgspec.Struct, frozen=True, tag=True):
    """Decode what the slab's first nbytes hold (0: what the descriptor that comes along does), within `seconds`.
    sampling_rate: of sound."""

    modality: Modality
    limits: MediaLimits
    seconds: float
    sampling_rate: int | None = None
    nbytes: int = 0


class Choose(msgspec.Struct, frozen=True, tag=True):
    """A video has so many frames, so many a second: which are wanted?"""

    total: int
    fps: float


class Chosen(msgspec.Struct, frozen=True, tag=True):
    """These are."""

    indices: list[int]


class Need(msgspec.Struct, frozen=True, tag=True):
    """The result takes so many bytes, more than the slab has."""

    nbytes: int


class Memory(msgspec.Struct, frozen=True, tag=True):
    """The descriptor that comes along is for the result."""


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The job is over; no answer to a question comes."""


class Done(msgspec.Struct, frozen=True, tag=True):
    """The result lies in the memory given last, or in the slab. rate, cut_off: of sound."""

    shape: tuple[int, ...]
    rate: int = 0
    cut_off: bool = False


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The job ended in an error of class `kind`. detail: for the log. spent: the worker should be replaced."""

    kind: str
    code: str
    text: str
    param: str | None = None
    detail: str = ""
    spent: bool = False


ToWorker = Job | Chosen | Memory | Refused
FromWorker = Ready | Choose | Need | Done | Failed


@dataclass(eq=False)
class Channel:
    """One end of the socket. reads: the union of what comes in on it. with_descriptors: whether such are taken."""

    socket: socket.socket
    reads: Any
    with_descriptors: bool = False

    def __post_init__(self) -> None:
        self._decoder = msgspec.msgpack.Decoder(self.reads)
        self._encoder = msgspec.msgpack.Encoder()

    def send(self, message: ToWorker | FromWorker, descriptor: int | None = None) -> None:
        """Send a message. Raises OSError where nobody reads any more."""
        body = self._encoder.encode(message)
        header = len(body).to_bytes(_HEADER, "little")
        if descriptor is None:
            self.socket.sendall(header + body)
        else:
            socket.send_fds(self.socket, [header], [descriptor])
            self.socket.sendall(body)

    def receive(self, deadline: float | None = None) -> tuple[Any, int | None]:
        """The next message, and its descriptor. deadline: of `time.monotonic`.

        Raises TimeoutError, EOFError where the other side is gone, msgspec.DecodeError for nonsense.
        """
        header, descriptor = self._read_header(deadline)
        length = int.from_bytes(header, "little")
        if length > MAX_MESSAGE:
            raise msgspec.DecodeError(f"a message of {length} bytes")
        return self._decoder.decode(self._read(length, deadline)), descriptor

    def _read_header(self, deadline: float | None) -> tuple[bytes, int | None]:
        if not self.with_descriptors:  # the system closes what is sent nonetheless
            return self._read(_HEADER, deadline), None
        self._wait_until(deadline)
        flags = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
        data, descriptors, _, _ = socket.recv_fds(self.socket, _HEADER, 1, flags)
        if not data:
            raise EOFError
        return data + self._read(_HEADER - len(data), deadline), next(iter(descriptors), None)

    def _read(self, length: int, deadline: float | None) -> bytes:
        data = bytearray()
        while len(data) < length:
            self._wait_until(deadline)
            piece = self.socket.recv(length - len(data))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)

    def _wait_until(self, deadline: float | None) -> None:
        if deadline is None:
            self.socket.settimeout(None)
            return
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.socket.settimeout(left)
