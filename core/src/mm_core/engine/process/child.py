"""The engine's process: `python -m mm_core.engine.process.child SOCKET ARENA PARENT`, started by `launch.spawn`."""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import socket
import sys
import time

from mm_core.confinement import hide
from mm_core.engine.process.wire import Channel, Log, Start

_PR_SET_PDEATHSIG = 1
_MAX_LOG = 16384  # characters of one line
_LOST = 3  # exit status: the parent is gone


def main() -> None:
    """Serve one parent until it says Close, or is gone."""
    connection, arena, parent = map(int, sys.argv[1:4])
    for number in (signal.SIGINT, signal.SIGTERM):  # ends come from the parent, which ends what runs first
        signal.signal(number, signal.SIG_IGN)
    _die_with(parent)
    hide()
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    os.set_inheritable(connection, False)
    os.set_inheritable(arena, False)
    channel = Channel(socket.socket(fileno=connection), engine=True)
    start = channel.receive()
    if not isinstance(start, Start):
        os._exit(_LOST)
    logging.basicConfig(level=start.log_level, handlers=[_ToParent(channel)], force=True)
    begun = time.perf_counter()
    from mm_core.engine.process.worker import Worker

    Worker(channel, arena, start, time.perf_counter() - begun).run()


def _die_with(parent: int) -> None:
    """On Linux the system ends this process with the thread that started it, whatever this process is doing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before
        os._exit(_LOST)


class _ToParent(logging.Handler):
    """Log lines go to the parent's log."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Send a line; where that fails there is nowhere to say so."""
        try:
            text = self.format(record)[:_MAX_LOG].encode("utf-8", "replace").decode()
            self._channel.send(Log(record.name, record.levelno, text, record.created))
        except Exception:
            return


if __name__ == "__main__":
    main()
