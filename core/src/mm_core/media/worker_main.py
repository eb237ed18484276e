"""A process that decodes media for another one, bound in memory, time and everything else it does not need.

`python -m mm_core.media.worker_main SOCKET SLAB MEMORY`: two descriptors, and bytes of address space beside what is
taken after the start. It ends when the other side of the socket does, or in the middle of a job that takes too long.
"""

from __future__ import annotations

import contextlib
import importlib
import mmap
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mm_core import confinement
from mm_core.errors import MMError
from mm_core.media import audio, decode, video
from mm_core.media.wire import SLAB, Channel, Choose, Chosen, Done, Failed, Job, Memory, Need, Ready, ToWorker

_GRACE_S = 2.0  # the other side ends a job that takes too long; this is for when it is gone itself
_OPEN_FILES = 64
_TOO_LARGE = {"image": "image_too_large", "video": "media_too_large", "audio": "audio_too_long"}
_PRELOADED = (
    "PIL.BmpImagePlugin", "PIL.GifImagePlugin", "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "PIL.WebPImagePlugin",
    "av", "soundfile", "soxr",
)  # fmt: skip


class _RefusedError(Exception):
    """The other side gave up the job."""


@dataclass(eq=False)
class _Conversation:
    """One job's questions to the other side."""

    channel: Channel
    slab: mmap.mmap
    memory: mmap.mmap | None = None

    def allocate(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
        """An array in memory that the other side sees."""
        count = int(np.prod(shape, dtype=np.int64))
        nbytes = count * np.dtype(dtype).itemsize
        if nbytes <= len(self.slab):
            self.memory = None
            return np.frombuffer(self.slab, dtype, count).reshape(shape)
        self.channel.send(Need(nbytes))
        message, descriptor = self.channel.receive()
        if not isinstance(message, Memory) or descriptor is None:
            raise _RefusedError
        try:
            self.memory = mmap.mmap(descriptor, nbytes)
        finally:
            os.close(descriptor)
        return np.frombuffer(self.memory, dtype, count).reshape(shape)

    def choose(self, total: int, fps: float) -> Sequence[int]:
        """Indices of the frames that are wanted."""
        self.channel.send(Choose(total, fps))
        message, _ = self.channel.receive()
        if not isinstance(message, Chosen):
            raise _RefusedError
        return message.indices


def _decode(job: Job, data: bytes, talk: _Conversation) -> Done:
    limits = replace(job.limits, decoder_threads=1)
    if job.modality == "image":
        image = decode.decode_image(data, limits)
        shape = (image.height, image.width, 3)
        talk.allocate(shape, np.uint8)[...] = np.asarray(image)
        return Done(shape)
    if job.modality == "video":
        return Done(video.decode_chosen(data, talk.choose, limits, talk.allocate).frames.shape)
    sound = audio.decode_audio(data, job.sampling_rate, limits, talk.allocate)
    return Done(sound.samples.shape, sound.rate, sound.cut_off)


def serve(channel: Channel, slab: mmap.mmap) -> None:
    """Do jobs until the other side is gone."""
    while True:
        try:
            job, descriptor = channel.receive()
        except (EOFError, OSError):
            return
        if isinstance(job, Job):
            channel.send(_do(job, descriptor, _Conversation(channel, slab)))


def _do(job: Job, descriptor: int | None, talk: _Conversation) -> Done | Failed:
    """Decode within the job's time; the result's memory is let go of, or the other side could not seal it."""
    signal.setitimer(signal.ITIMER_REAL, job.seconds + _GRACE_S)
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime + job.seconds + _GRACE_S) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    try:
        if descriptor is None:
            data = talk.slab[: job.nbytes]
        else:
            with os.fdopen(descriptor, "rb") as file:
                data = file.read()
        done: Done | Failed = _decode(job, data, talk)
        if talk.memory is not None:
            talk.memory.close()
        return done
    except MMError as error:
        spent = isinstance(error.__cause__, MemoryError)
        return Failed(
            type(error).__name__, error.code, str(error), getattr(error, "param", None), _detail(error.__cause__), spent
        )
    except MemoryError as error:
        fault = decode.out_of_memory(_TOO_LARGE[job.modality])
        return Failed(type(fault).__name__, fault.code, str(fault), None, _detail(error), spent=True)
    except Exception as error:
        return Failed("", "", "", None, _detail(error), spent=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _detail(error: BaseException | None) -> str:
    return "" if error is None else f"{type(error).__name__}: {error}"[:500]


def preload() -> None:
    """Load the decoders that are installed; what is missing is named by the job that needs it."""
    for name in _PRELOADED:
        with contextlib.suppress(ImportError, OSError):
            importlib.import_module(name)


def bind(memory: int) -> None:
    """From here on: no new processes, no written files, no connections, no core dumps, no rights of root's, and so much
    more address space."""
    with open("/proc/self/statm", "rb") as file:
        base = int(file.read().split()[0]) * resource.getpagesize()
    confinement.limit(AS=base + memory, NOFILE=_OPEN_FILES, NPROC=0, FSIZE=0, CORE=0)
    confinement.drop_privileges()
    confinement.refuse_calls()


def main(arguments: Sequence[str]) -> None:
    """Load decoders, bind the process, and serve."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all of a group; the other side says when it is over
        signal.signal(number, signal.SIG_IGN)
    preload()
    bind(int(arguments[2]))
    slab = mmap.mmap(int(arguments[1]), SLAB)
    os.close(int(arguments[1]))
    with socket.socket(fileno=int(arguments[0])) as end:
        channel = Channel(end, ToWorker, with_descriptors=True)
        channel.send(Ready())
        serve(channel, slab)


if __name__ == "__main__":
    main(sys.argv[1:])
