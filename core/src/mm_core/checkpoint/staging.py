"""Weights to a GPU: several threads read pieces of the files into pinned memory and copy from there.

One thread that reads through a memory map and copies from pageable memory reaches a fraction of
what disk cache and bus can do, because reading and copying take turns. Here each thread has two
buffers: while one is copied, the other is read into. Bytes are cast on the GPU.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_core.checkpoint.files import ITEM_BYTES, TensorInfo, damaged
from mm_core.checkpoint.names import Placement
from mm_core.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PIECE_BYTES = 16 * 2**20
_MAX_THREADS = 8


@dataclass(frozen=True)
class Piece:
    """Values [first, first + count) of a tensor, at byte `offset` of its file."""

    tensor: TensorInfo
    offset: int
    first: int
    count: int

    @property
    def nbytes(self) -> int:
        """Its bytes in the file."""
        return self.count * self.tensor.itemsize


def stageable(info: TensorInfo, placements: Sequence[Placement]) -> bool:
    """Whether a tensor's values lie in its parameter as they do in its file, on a GPU."""
    views = [placement.view() for placement in placements]
    if info.dtype not in ITEM_BYTES or info.nbytes != math.prod(info.shape) * info.itemsize:
        return False
    return all(view.is_cuda and view.is_contiguous() for view in views)


def pieces(tensors: Iterable[TensorInfo], limit: int) -> Iterator[Piece]:
    """Cut tensors into pieces of at most `limit` bytes, in the order of the files."""
    for info in sorted(tensors, key=lambda t: (str(t.file), t.offset)):
        total, most = info.nbytes // info.itemsize, max(limit // info.itemsize, 1)
        for first in range(0, total, most):
            yield Piece(info, info.offset + first * info.itemsize, first, min(most, total - first))


def copy_staged(
    tensors: Iterable[TensorInfo],
    placements: Mapping[str, Sequence[Placement]],
    device: torch.device,
    progress: Callable[[int], object],
) -> None:
    """Fill the placements of `stageable` tensors. progress is told bytes, from one thread at a time.

    Raises CheckpointError where a file is shorter than its header says or cannot be read.
    """
    work = _Work(pieces(tensors, PIECE_BYTES), progress)
    count = min(_MAX_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(count, "mm-core-weights") as pool:
        jobs = [pool.submit(_copy, work, placements, device) for _ in range(count)]
    for job in jobs:
        job.result()


class _Work:
    """Hands out pieces to threads, until one of them fails."""

    def __init__(self, todo: Iterator[Piece], progress: Callable[[int], object]) -> None:
        self._todo = todo
        self._progress = progress
        self._lock = threading.Lock()

    def next(self, done: int) -> Piece | None:
        """Count `done` bytes; the next piece, or None."""
        with self._lock:
            if done:
                self._progress(done)
            return next(self._todo, None)

    def stop(self) -> None:
        """Nothing is handed out any more."""
        with self._lock:
            self._todo = iter(())


def _copy(work: _Work, placements: Mapping[str, Sequence[Placement]], device: torch.device) -> None:
    """One thread's share."""
    reader = _Reader(device)
    done = 0
    try:
        while (piece := work.next(done)) is not None:
            reader.copy(piece, [p.view() for p in placements[piece.tensor.name]])
            done = piece.nbytes
    except BaseException:
        work.stop()
        raise
    finally:
        reader.close()


class _Reader:
    """A thread's two buffers, its stream and open files. Without a GPU (in tests) it copies at once."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            torch.cuda.set_device(device)
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._copied = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._buffers = [torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(2)]
        self._turn = 0
        self._files: dict[Path, FileIO] = {}

    def copy(self, piece: Piece, views: Sequence[Tensor]) -> None:
        """Read a piece and start its copies."""
        import torch

        turn, self._turn = self._turn, 1 - self._turn
        if self._on_gpu:
            self._copied[turn].synchronize()
        raw = self._buffers[turn][: piece.nbytes]
        into: Any = raw.numpy()
        self._read(piece, memoryview(into))
        values = raw.view(_torch_dtype(piece.tensor.dtype))
        with torch.no_grad():
            if not self._on_gpu:
                _put(values, piece.first, views)
                return
            with torch.cuda.stream(self._stream):
                _put(values, piece.first, views)
                self._copied[turn].record(self._stream)

    def _read(self, piece: Piece, into: memoryview) -> None:
        file = piece.tensor.file
        try:
            if file not in self._files:
                self._files[file] = FileIO(file)
            descriptor, done = self._files[file].fileno(), 0
            while done < len(into):
                got = os.preadv(descriptor, [into[done:]], piece.offset + done)
                if not got:
                    raise damaged(file, f"it ends within tensor '{piece.tensor.name}'")
                done += got
        except OSError as error:
            raise CheckpointError(f"'{file}' cannot be read ({error.strerror}). Check its permissions.") from error

    def close(self) -> None:
        """Wait for the copies, close the files."""
        if self._on_gpu:
            self._stream.synchronize()
        for file in self._files.values():
            file.close()


def _put(values: Tensor, first: int, views: Sequence[Tensor]) -> None:
    """Copy a piece to its places. Where the dtype differs, its bytes are cast where they arrive."""
    for view in views:
        place = view.view(-1)[first : first + len(values)]
        arrived = values if values.dtype == place.dtype else values.to(place.device, non_blocking=True)
        place.copy_(arrived, non_blocking=True)


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    return {
        "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "BOOL": torch.bool,
    }[name]  # fmt: skip
