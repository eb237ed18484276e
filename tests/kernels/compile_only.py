"""Runs the kernels' tests with every launch replaced by a compilation for an H100, which needs no GPU.

The interpreter accepts what the compiler refuses: variables that change their type in a branch, tiles
too small for a matrix product. Results of the tests mean nothing here; only errors of the compiler count.
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
        return kernel

    return compile_only


def main() -> int:
    """Compile; print what was compiled, and the errors."""
    driver.set_active(_Driver())
    JITFunction.run = _compile(JITFunction.run)
    # What was to be computed is left as it lay in memory: a test that waits for some value may wait for ever.
    options = ["-q", "--tb=no", "--no-header", "-p", "no:cacheprovider", "--no-summary", "--timeout=60"]
    pytest.main([*options, *sys.argv[1:]], plugins=[_Plugin()])
    print(f"Triton {triton.__version__}:", dict(compiled))
    for error, place in errors.items():
        print("DOES NOT COMPILE", error, place, sep="\n")
    return int(bool(errors) or not compiled)


if __name__ == "__main__":
    sys.exit(main())
