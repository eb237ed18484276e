"""The device's measured ceilings, and the facts that belong beside every figure."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from mm_core import __version__
from mm_core.bench.work import Ceilings
from mm_core.errors import EngineError

_GPU_BYTES, _CPU_BYTES = 2**30, 2**27
_GPU_SIZE, _CPU_SIZE = 8192, 1024
_WARMUPS, _REPEATS = 3, 15
_TIMEOUT_S = 300


@dataclass(frozen=True)
class MeasuredCeilings:
    """Copying (bytes read and written a second), reading, and a square bf16 or fp32 matrix product."""

    copy_bandwidth: float
    read_bandwidth: float
    matmul_flops: float
    matmul: str

    @property
    def ceilings(self) -> Ceilings:
        """The better of copy and read, and the matrix product."""
        return Ceilings(self.matmul_flops, max(self.copy_bandwidth, self.read_bandwidth))


def measure_ceilings(device: str, dtype: str) -> MeasuredCeilings:
    """A second of work in a process of its own: the engine then starts on a device that nobody has
    used, and on a CPU torch's workers of the measuring thread are not in its way.

    Raises EngineError where the measuring fails.
    """
    command = [sys.executable, "-m", "mm_core.bench.device", device, dtype]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        lines = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        raise EngineError(
            f"Measuring the ceilings of device {device!r} failed ({lines[-1][:200] if lines else 'no details'}). See "
            "that nobody else uses its memory, or pick another --device."
        ) from error
    return MeasuredCeilings(**json.loads(done.stdout))


def _measure(device: str, dtype: str) -> MeasuredCeilings:
    import torch

    kind = _device(device)
    gpu = kind.type == "cuda"
    copy, read = _bandwidth(kind, (_GPU_BYTES if gpu else _CPU_BYTES) // 4)
    half = gpu or dtype == "bfloat16"
    n = _GPU_SIZE if gpu else _CPU_SIZE
    flops = _matmul(kind, n, torch.bfloat16 if half else torch.float32)
    if gpu:
        torch.cuda.empty_cache()
    return MeasuredCeilings(copy, read, flops, f"{n}³ {'bf16' if half else 'fp32'}")


def _bandwidth(device: Any, count: int) -> tuple[float, float]:
    """Bytes a second of copying and of summing `count` float32 numbers."""
    import torch

    source = torch.zeros(count, device=device)
    target = torch.empty_like(source)
    copy = 2 * 4 * count / _median(lambda: target.copy_(source), device)
    return copy, 4 * count / _median(source.sum, device)


def _matmul(device: Any, n: int, dtype: Any) -> float:
    """Operations a second of a product of two n × n matrices of normal numbers."""
    import torch

    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / _median(lambda: torch.mm(a, b), device)


def _device(name: str) -> Any:
    import torch

    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _median(work: Callable[[], Any], device: Any) -> float:
    """Seconds a call; by CUDA events on a GPU."""
    import torch

    for _ in range(_WARMUPS):
        work()
    times: list[float] = []
    for _ in range(_REPEATS):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            work()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def environment(device: str) -> dict[str, Any]:
    """Versions, device, driver and cores."""
    import torch

    gpu = _device(device).type == "cuda"
    facts: dict[str, Any] = {
        "mm_core": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "device": torch.cuda.get_device_name(_device(device)) if gpu else _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
    }
    if gpu:
        facts |= {"cuda": torch.version.cuda, "driver": _driver()}
    else:
        facts["threads"] = torch.get_num_threads()
    return facts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.split("\n")[0].strip() or None


if __name__ == "__main__":
    print(json.dumps(asdict(_measure(*sys.argv[1:]))))
