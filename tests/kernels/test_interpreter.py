"""What the interpreter does not see: launch sizes that a GPU refuses, and Triton imported too early.

Runs this folder in a fresh process when this one imported Triton before it could be interpreted.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels.cases import CUDA, can_interpret

if not CUDA and not can_interpret():

    def test_the_kernels_pass_in_a_process_of_their_own():
        pytest.importorskip("triton")
        command = [sys.executable, "-m", "pytest", "-q", "-k", "triton", str(Path(__file__).parent)]
        env = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_size", [40, 64, 72, 80, 96, 128, 160, 256])
@pytest.mark.parametrize("group", [1, 2, 5, 7, 8, 28, 71])
def test_launch_sizes_are_powers_of_two(dtype, head_size, group):
    """And tiles are at least 16 wide, as tl.dot needs, with room for a whole group of heads."""
    pytest.importorskip("triton")
    from mm_core.kernels._triton.attention_decode import decode_tiles
    from mm_core.kernels._triton.attention_prefill import prefill_tiles
    from mm_core.kernels._triton.attention_shared import shared_tiles
    from mm_core.kernels._triton.rope import rope_launch

    sizes = [*rope_launch(group, head_size // 2)]
    for memory in (99 * 1024, 227 * 1024):
        for rows in (1, 64, 8192):
            tiles = prefill_tiles(dtype, head_size, rows * group, group, shared_memory=memory)
            assert tiles.rows >= max(16, group)
            assert tiles.keys >= 16
            sizes += [tiles.rows, tiles.keys, tiles.warps]
    shared = shared_tiles(dtype, head_size, group)
    assert shared.rows >= 16
    sizes += [shared.rows, shared.keys, shared.warps]
    steps = decode_tiles(dtype, head_size)
    assert steps.keys >= 16
    sizes += [steps.keys, steps.warps]
    assert all(size & (size - 1) == 0 for size in sizes)
