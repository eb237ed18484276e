"""Where there is no GPU, the Triton kernels run in Triton's interpreter.

Triton chooses when it is imported, so the variable must be set first. If another test of this process
imported it before, the kernels' tests skip here and `test_interpreter.py` runs them in their own process.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
