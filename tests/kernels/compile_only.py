"""Runs the kernels' tests with every launch replaced by a compilation for an H100, which needs no GPU.

The interpreter accepts what the compiler refuses: variables that change their type in a branch, tiles
too small for a matrix product. Results of the tests mean nothing here; only errors of the compiler count,
and programs that want more shared memory than there is.
Run as a program, with pytest's arguments; ends with 1 where a kernel did not compile.
"""

from __future__ import annotations

import collections
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from mm_core.kernels._triton import launch, linear_hopper

SHARED_MEMORY = 227 * 1024  # bytes that a program may have
PROCESSORS = 132

compiled: collections.Counter[str] = collections.Counter()
errors: dict[str, str] = {}


class _Driver:
    """Says that there is an H100."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: object = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


class _Plugin:
    """Lets tests run that skip without an interpreter, in all dtypes that a GPU runs."""

    def pytest_collection_finish(self) -> None:
        for module in list(sys.modules.values()):
            if hasattr(module, "can_interpret"):
                module.can_interpret = lambda: True  # type: ignore[attr-defined]
            if hasattr(module, "COMPILING"):
                module.COMPILING = True  # type: ignore[attr-defined]
            if hasattr(module, "assert_close"):  # else nothing behind it would be compiled
                module.assert_close = lambda *_: None  # type: ignore[attr-defined]
            if hasattr(module, "TRITON_DTYPES"):
                module.TRITON_DTYPES = [torch.float32, torch.bfloat16]  # type: ignore[attr-defined]


def _compile(run: Any) -> Any:
    def compile_only(self: Any, *args: Any, grid: Any = None, warmup: bool = False, **options: Any) -> Any:
        try:
            kernel = run(self, *args, grid=grid, warmup=True, **options)
        except Exception as error:
            cause = error
            while cause.__cause__ is not None:
                cause = cause.__cause__  # type: ignore[assignment]
            errors.setdefault(f"{self.__name__}: {type(cause).__name__}: {str(cause)[-400:]}", str(error)[:400])
            return None
        compiled[self.__name__] += 1
        if kernel.metadata.shared > SHARED_MEMORY:
            errors.setdefault(f"{self.__name__}: takes {kernel.metadata.shared} bytes of shared memory", str(options))
        return kernel

    return compile_only


def main() -> int:
    """Compile; print what was compiled, and the errors."""
    driver.set_active(_Driver())
    launch.can_start_early = lambda device: True
    linear_hopper.processors = lambda device: PROCESSORS
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.equal = lambda *_: True
    JITFunction.run = _compile(JITFunction.run)
    # What was to be computed is left as it lay in memory: a test that waits for some value may wait for ever.
    quiet = ["-q", "--tb=no", "--no-header", "--no-summary", "-p", "no:cacheprovider"]
    pytest.main([*quiet, "--timeout=180", "-m", "not slow", *sys.argv[1:]], plugins=[_Plugin()])
    print(f"Triton {triton.__version__}:", dict(compiled))
    for error, place in errors.items():
        print("DOES NOT COMPILE", error, place, sep="\n")
    return int(bool(errors) or not compiled)


if __name__ == "__main__":
    sys.exit(main())
