"""Every kernel compiles for an H100, without one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NO_KERNELS = ("test_compile.py", "test_interpreter.py", "test_cpu_attention.py")
FILES = sorted(p.name for p in HERE.glob("test_*.py") if p.name not in NO_KERNELS)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
@pytest.mark.parametrize("name", FILES)
def test_kernels_compile_for_an_h100(name: str) -> None:
    command = [sys.executable, str(HERE / "compile_only.py"), str(HERE / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "Triton" in done.stdout
