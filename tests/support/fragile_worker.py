"""A decode worker whose decoder does what the bytes tell it to: break, hang, take memory, hold on to its result."""

from __future__ import annotations

import os
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from mm_core.errors import MediaDecodeError
from mm_core.media import audio, decode, worker_main
from mm_core.media.wire import Done, Failed

_held: list[Any] = []
_real = decode.decode_image
_real_audio = audio.decode_audio


def _framed(message: Any) -> bytes:
    body = msgspec.msgpack.encode(message)
    return len(body).to_bytes(4, "little") + body


def _escapes() -> list[str]:
    """What a worker that was taken over gets done."""
    parent, here = os.getppid(), "/tmp"
    ways: dict[str, Callable[[], Any]] = {
        "environ": Path(f"/proc/{parent}/environ").read_bytes,
        "memory": lambda: os.open(f"/proc/{parent}/mem", os.O_RDONLY),
        "descriptors": lambda: os.readlink(f"/proc/{parent}/fd/0"),
        "socket": socket.socket,
        "pair": socket.socketpair,
        "fork": lambda: os.fork() or os._exit(0),
        "thread": lambda: threading.Thread(target=int).start(),
        "execute": lambda: os.execv("/nowhere", ["x"]),
        "write": lambda: os.open(f"{here}/mm-core-escape", os.O_WRONLY | os.O_CREAT),
        "remove": lambda: os.unlink(f"{here}/mm-core-escape"),
        "rename": lambda: os.rename(f"{here}/mm-core-escape", f"{here}/mm-core-escaped"),
        "signal": lambda: os.kill(parent, 0),
        "limit": lambda: resource.prlimit(parent, resource.RLIMIT_NOFILE),
        "root": lambda: os.chroot("/"),
    }
    done = []
    for name, way in ways.items():
        try:
            way()
        except PermissionError:
            continue
        except RuntimeError:  # what a thread that cannot be started raises
            continue
        except OSError as error:
            done.append(f"{name}:{error.errno}")
        else:
            done.append(name)
    return done


def _audio(data: bytes, *more: Any) -> Any:
    return _image(data, more[1]) if data == b"rate" else _real_audio(data, *more)


def _image(data: bytes, limits: decode.MediaLimits) -> Any:
    match data:
        case b"abort":
            os.abort()
        case b"exit":
            os._exit(3)
        case b"spin":
            while True:
                pass
        case b"sleep":
            time.sleep(60)
        case b"raise":
            raise RuntimeError("0xdeadbeef in /some/path.py")
        case b"memory":
            np.ones(limits.max_image_pixels * 1000, np.uint8)
        case b"nonsense":
            os.write(int(sys.argv[1]), b"\x05\x00\x00\x00abcde")
        case b"hold":
            real = worker_main._Conversation.allocate

            def keep(self: Any, shape: Any, dtype: Any) -> Any:
                _held.append(real(self, shape, dtype))
                self.memory = None
                return _held[-1]

            worker_main._Conversation.allocate = keep  # type: ignore[method-assign]
            return decode.Image.new("RGB", (1000, 1000))
        case b"large":
            worker_main._Conversation.allocate = lambda self, shape, dtype: self.channel.send(  # type: ignore[method-assign]
                worker_main.Need(2**60)
            )
            return decode.Image.new("RGB", (4, 4))
        case b"greedy":
            asks = worker_main._Conversation.allocate

            def ask(self: Any, shape: Any, dtype: Any) -> Any:
                for _ in range(100):
                    asks(self, shape, dtype)
                return asks(self, shape, dtype)

            worker_main._Conversation.allocate = ask  # type: ignore[method-assign]
            return decode.Image.new("RGB", (1000, 1000))
        case b"code":
            os.write(int(sys.argv[1]), _framed(Failed("MediaDecodeError", "no_such_code", "")))
        case b"choose":
            os.write(int(sys.argv[1]), _framed(worker_main.Choose(1, 1.0)))
        case b"rate":
            os.write(int(sys.argv[1]), _framed(Done((4,), 0)))
        case b"escape":
            raise MediaDecodeError(" ".join(_escapes()))
        case b"limits":
            names = ("RLIMIT_FSIZE", "RLIMIT_CORE", "RLIMIT_NPROC", "RLIMIT_NOFILE")
            bounds = [resource.getrlimit(getattr(resource, name))[0] for name in names]
            raise MediaDecodeError(f"{bounds} {sorted(os.environ)}")
    return _real(data, limits)


decode.decode_image = _image
audio.decode_audio = _audio

if __name__ == "__main__":
    worker_main.main(sys.argv[1:])
