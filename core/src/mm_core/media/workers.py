"""Decoding in processes of their own, each bound in memory and time: a file that breaks or stalls a decoder takes
nothing with it but its own request.

A worker is started by `subprocess`, talks msgpack over a socket pair (`wire`), and is given memory for what it
decodes; that is sealed before anybody here reads it, so that no worker can change it later.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import math
import mmap
import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np
from PIL import Image

from mm_core import errors
from mm_core.confinement import child_environment
from mm_core.errors import ConfigError, EngineClosedError, EngineError, MediaDecodeError, MMError
from mm_core.media.audio import Audio
from mm_core.media.decode import MediaLimits
from mm_core.media.video import Video, VideoSampling, sample_indices
from mm_core.media.wire import (
    SLAB,
    Channel,
    Choose,
    Chosen,
    Done,
    Failed,
    FromWorker,
    Job,
    Memory,
    Need,
    Ready,
    Refused,
)
from mm_core.types import Modality

logger = logging.getLogger(__name__)

COMMAND = ("-P", "-m", "mm_core.media.worker_main")
_START_S = 60.0
_MAX_JOBS = 4096  # then a worker is replaced: what its libraries leak stays small
_KINDS = frozenset(
    ("MediaError", "MediaDecodeError", "MediaTooLargeError", "UnsupportedMediaError", "MissingExtraError")
)
_CODES = frozenset((
    "audio_too_long", "empty_audio", "image_aspect", "image_too_large", "invalid_audio", "invalid_image",
    "invalid_media", "invalid_video", "media_too_large", "missing_extra", "no_audio_stream", "nonfinite_audio",
    "unsupported_media",
))  # fmt: skip
_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**26)}  # keep what comes again
_MAX_RATE = 2**24  # Hz
_MAX_TEXT, _MAX_PARAM = 1000, 100  # characters of what a worker tells
_ITEM_BYTES = {"image": 1, "video": 1, "audio": 4}
_AXES = {"image": 3, "video": 4, "audio": 1}


@dataclass(frozen=True)
class WorkerSettings:
    """How many workers, bytes of memory each may take beside its libraries, and seconds for one item.
    command: what is run, behind the interpreter."""

    count: int
    memory_bytes: int = 2 * 2**30
    timeout_s: float = 20.0
    command: Sequence[str] = COMMAND


@dataclass
class _Result:
    """What came of a job: its content, a copy or sealed, and what was chosen of a video."""

    done: Done
    content: bytes | mmap.mmap
    total: int = 0
    fps: float = 0.0
    indices: Sequence[int] = ()

    def array(self, dtype: Any) -> np.ndarray[Any, Any]:
        """The content as an array that may be written to."""
        content = bytearray(self.content) if isinstance(self.content, bytes) else self.content
        return np.frombuffer(content, dtype).reshape(self.done.shape)


class DecodeWorkers:
    """A `media.decoder.Decoder` whose work is done by workers. Thread-safe; waits for a worker that is free.

    Raises what the decoders raise; MediaDecodeError where a worker died or was ended for taking too long.
    """

    def __init__(self, settings: WorkerSettings, limits: MediaLimits) -> None:
        if not hasattr(os, "memfd_create"):
            raise ConfigError("decode_workers needs Linux. Leave it at 0 to decode in threads.")
        self._settings, self._limits = settings, limits
        self._free: queue.Queue[_Worker] = queue.Queue()
        self._closed = threading.Event()
        self._workers = [_Worker(settings) for _ in range(settings.count)]
        for worker in self._workers:
            self._free.put(worker)

    def image(self, data: bytes) -> tuple[Image.Image, Any]:
        """An RGB picture, and the bytes of its pixels."""
        result = self._run("image", data)
        height, width, _ = result.done.shape
        return Image.frombytes("RGB", (width, height), result.content), memoryview(result.content)

    def video(self, data: bytes, sampling: VideoSampling) -> Video:
        """The frames of a video that `sampling` keeps."""
        result = self._run("video", data, lambda total, fps: sample_indices(total, fps, sampling))
        frames = result.array(np.uint8)
        fps, indices = result.fps, result.indices
        return Video(frames, fps, len(indices) / result.total * fps, tuple(i / fps for i in indices))

    def audio(self, data: bytes, sampling_rate: int | None) -> Audio:
        """A sound, mono, at `sampling_rate` Hz where that is given."""
        result = self._run("audio", data, sampling_rate=sampling_rate)
        return Audio(result.array(np.float32), result.done.rate, result.done.cut_off)

    def close(self) -> None:
        """End all workers; who uses or waits for one gets EngineClosedError. Idempotent."""
        self._closed.set()
        for worker in self._workers:
            worker.kill()
        idle = []
        with contextlib.suppress(queue.Empty):
            while True:
                idle.append(self._free.get_nowait())
        for worker in idle:
            worker.end()
            self._free.put(worker)

    def _run(
        self,
        modality: Modality,
        data: bytes,
        choose: Callable[[int, float], Sequence[int]] | None = None,
        sampling_rate: int | None = None,
    ) -> _Result:
        job = Job(modality, self._limits, self._settings.timeout_s, sampling_rate)
        worker = self._free.get()
        try:
            if self._closed.is_set():
                raise EngineClosedError("The engine was closed before the media were decoded.")
            return worker.run(job, data, choose)
        except _BrokenError as error:
            if self._closed.is_set():
                raise EngineClosedError("The engine was closed before the media were decoded.") from None
            logger.warning("a decode worker was replaced: %s", error)
            why = "takes too long to decode" if error.late else "breaks the decoder"
            raise MediaDecodeError(
                f"The {modality} {why}. Export it again in a common format, smaller if it is large, and resend it.",
                code=f"invalid_{modality}",
            ) from error
        finally:
            if self._closed.is_set():
                worker.end()
            self._free.put(worker)


class _BrokenError(Exception):
    """A worker died, talked nonsense, or (late) took too long."""

    def __init__(self, text: str, *, late: bool = False) -> None:
        super().__init__(text)
        self.late = late


@dataclass(eq=False)
class _Worker:
    """One process, or the next one in its place. Used by one thread at a time; `kill` by any."""

    settings: WorkerSettings
    _process: subprocess.Popen[bytes] | None = None
    _channel: Channel | None = None
    _slab: mmap.mmap | None = None
    _ready: bool = False
    _jobs: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._start()

    def run(self, job: Job, data: bytes, choose: Callable[[int, float], Sequence[int]] | None) -> _Result:
        """Have a job done. Raises MMError, and _BrokenError, after which another process takes the next job."""
        channel = self._open()
        deadline = time.monotonic() + job.seconds
        try:
            self._send(channel, job, data)
            return self._talk(channel, job, choose, deadline)
        except TimeoutError:
            self._restart()
            raise _BrokenError(f"{job.modality} of {len(data)} bytes: not done in time", late=True) from None
        except (EOFError, OSError, msgspec.MsgspecError) as error:
            status = self._restart()
            raise _BrokenError(f"{job.modality} of {len(data)} bytes: status {status}, {error!r}") from error
        except MMError:
            raise
        except BaseException:  # it may be anywhere in the conversation
            self._restart()
            raise
        finally:
            self._jobs += 1
            if self._jobs >= _MAX_JOBS:
                self._restart()

    def _send(self, channel: Channel, job: Job, data: bytes) -> None:
        if self._slab is not None and 0 < len(data) <= SLAB:
            self._slab[: len(data)] = data
            channel.send(msgspec.structs.replace(job, nbytes=len(data)))
            return
        with _shared(len(data)) as descriptor:
            _write(descriptor, data)
            channel.send(job, descriptor)

    def _talk(
        self, channel: Channel, job: Job, choose: Callable[[int, float], Sequence[int]] | None, deadline: float
    ) -> _Result:
        """Answer a worker's questions, each kind once, until it has a result."""
        video: tuple[int, float, Sequence[int]] | None = None
        with contextlib.ExitStack() as held:
            memory: tuple[int, int] | None = None
            while True:
                message, _ = channel.receive(deadline)
                if isinstance(message, Choose) and choose is not None and video is None:
                    video = (message.total, message.fps, self._choose(channel, message, choose, deadline))
                    channel.send(Chosen(list(video[2])))
                elif isinstance(message, Need) and memory is None and SLAB < message.nbytes <= _most_bytes(job):
                    memory = (held.enter_context(_shared(message.nbytes)), message.nbytes)
                    channel.send(Memory(), memory[0])
                elif isinstance(message, Done):
                    nbytes = _checked_size(message, job, len(video[2]) if video else 0)
                    return _Result(message, self._content(nbytes, memory), *(video or ()))
                elif isinstance(message, Failed):
                    raise self._fault(message)
                else:
                    raise _BrokenError(f"unexpected {message}")

    def _content(self, nbytes: int, memory: tuple[int, int] | None) -> bytes | mmap.mmap:
        """The result: small ones are copied out of the slab, large ones sealed where they are."""
        if nbytes <= SLAB and self._slab is not None:
            return self._slab[:nbytes]
        if memory is None or memory[1] != nbytes:
            raise _BrokenError(f"a result of {nbytes} bytes, elsewhere")
        return _sealed(*memory)

    def _choose(
        self, channel: Channel, asked: Choose, choose: Callable[[int, float], Sequence[int]], deadline: float
    ) -> Sequence[int]:
        try:
            if not (asked.total > 0 and math.isfinite(asked.fps) and asked.fps > 0):
                raise _BrokenError(f"unexpected {asked}")
            return choose(asked.total, asked.fps)
        except MMError:
            channel.send(Refused())
            channel.receive(deadline)  # that the job is over
            raise

    def _fault(self, message: Failed) -> MMError | _BrokenError:
        """The error that a worker tells of."""
        if message.spent:
            self._restart()
        if message.kind not in _KINDS or message.code not in _CODES:
            return _BrokenError(message.detail[:_MAX_TEXT])
        fault: MMError = getattr(errors, message.kind)(message.text[:_MAX_TEXT])
        fault.code = message.code
        if isinstance(fault, errors.RequestError):
            fault.param = None if message.param is None else message.param[:_MAX_PARAM]
        fault.__cause__ = RuntimeError(message.detail[:_MAX_TEXT])
        return fault

    # -- the process -----------------------------------------------------------------------

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        try:
            with theirs, _shared(SLAB) as slab:
                self._slab = mmap.mmap(slab, SLAB)
                passed = (theirs.fileno(), slab)
                arguments = [str(each) for each in (*passed, self.settings.memory_bytes)]
                self._process = subprocess.Popen(
                    [sys.executable, *self.settings.command, *arguments], pass_fds=passed, env=child_environment(_HEAP),
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
        except BaseException:
            ours.close()
            raise
        self._channel, self._ready, self._jobs = Channel(ours, FromWorker), False, 0

    def _open(self) -> Channel:
        """The channel to a process that has loaded what it needs."""
        with self._lock:
            if self._channel is None:
                self._start()
            channel = self._channel
        if channel is None:
            raise EngineError("A decode worker could not be started.")
        if not self._ready:
            try:
                self._ready = isinstance(channel.receive(time.monotonic() + _START_S)[0], Ready)
            except (EOFError, OSError, msgspec.MsgspecError) as error:
                status = self.end()
                raise EngineError(
                    f"A decode worker does not start (status {status}). Try `{sys.executable} -m "
                    f"{self.settings.command[-1]} 0 0`, or set decode_workers=0."
                ) from error
        return channel

    def _restart(self) -> int | None:
        status = self.end()
        with self._lock:
            self._start()
        return status

    def kill(self) -> None:
        """Kill the process; whoever waits for it notices."""
        with self._lock:
            if self._process is not None:
                self._process.kill()

    def end(self) -> int | None:
        """Kill the process and forget it; its exit status."""
        with self._lock:
            process, channel, slab = self._process, self._channel, self._slab
            self._process = self._channel = self._slab = None
        if channel is not None:
            channel.socket.close()
        if slab is not None:
            slab.close()
        if process is None:
            return None
        process.kill()
        return process.wait()


def _most_bytes(job: Job) -> int:
    """How large a result can be at most."""
    limits = job.limits
    items = {
        "image": 3 * limits.max_image_pixels, "video": 3 * limits.max_video_pixels, "audio": limits.max_audio_samples,
    }  # fmt: skip
    return items[job.modality] * _ITEM_BYTES[job.modality]


def _checked_size(done: Done, job: Job, frames: int) -> int:
    """Bytes of a result whose shape, and rate, is one that the job can have."""
    fits = len(done.shape) == _AXES[job.modality] and min(done.shape) > 0
    fits = fits and (job.modality == "audio" or done.shape[-1] == 3)
    if not fits or (job.modality == "video" and done.shape[0] != frames):
        raise _BrokenError(f"a result of shape {done.shape}")
    if job.modality == "audio" and not (0 < done.rate <= _MAX_RATE and job.sampling_rate in (None, done.rate)):
        raise _BrokenError(f"a sound of {done.rate} Hz")
    return math.prod(done.shape) * _ITEM_BYTES[job.modality]


# -- shared memory -----------------------------------------------------------------------------


@contextlib.contextmanager
def _shared(nbytes: int) -> Iterator[int]:
    """The descriptor of so much memory."""
    descriptor = os.memfd_create("mm-media", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.truncate(descriptor, nbytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
        yield descriptor
    finally:
        os.close(descriptor)


def _write(descriptor: int, data: bytes) -> None:
    view, at = memoryview(data), 0
    while at < len(view):
        at += os.pwrite(descriptor, view[at:], at)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)


def _sealed(descriptor: int, nbytes: int) -> mmap.mmap:
    """The memory, private: from here on nobody else can write to it. A worker that still could is a broken one."""
    try:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
    except OSError as error:
        raise _BrokenError("a worker holds on to its result") from error
    return mmap.mmap(descriptor, nbytes, access=mmap.ACCESS_COPY)
