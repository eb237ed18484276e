"""A decode worker whose decoder does what the bytes tell it to: break, hang, take memory, hold on to its result."""

from __future__ import annotations

import os
import resource
import sys
import time
from typing import Any

import numpy as np

from mm_core.errors import MediaDecodeError
from mm_core.media import decode, worker_main

_held: list[Any] = []
_real = decode.decode_image


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
        case b"limits":
            names = ("RLIMIT_FSIZE", "RLIMIT_CORE", "RLIMIT_NPROC", "RLIMIT_NOFILE")
            bounds = [resource.getrlimit(getattr(resource, name))[0] for name in names]
            raise MediaDecodeError(f"{bounds} {sorted(os.environ)}")
    return _real(data, limits)


decode.decode_image = _image

if __name__ == "__main__":
    worker_main.main(sys.argv[1:])
