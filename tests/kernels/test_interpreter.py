"""Runs this folder in a fresh process when this one imported Triton before it could be interpreted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernels.cases import CUDA, can_interpret


@pytest.mark.skipif(CUDA or can_interpret(), reason="the kernels' tests run in this process")
def test_the_kernels_pass_in_a_process_of_their_own():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton", str(Path(__file__).parent)]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
