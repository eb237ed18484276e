"""Where there is no GPU, the Triton kernels run in Triton's interpreter.

Triton chooses when it is imported, so the variable must be set first. If another test of this process
imported it before, the kernels' tests skip here and `test_interpreter.py` runs them in their own process.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from kernels.cases import COMPILING, can_interpret
from kernels.interpreted_fp8 import repair


@pytest.fixture(autouse=True, scope="session")
def _fp8_of_the_interpreter():
    if not COMPILING and can_interpret():
        repair()
