"""The ops that models are built from: Triton kernels on CUDA, lean torch code elsewhere.

Each op has one file, and a twin in `reference.py` that is slow, plain and obviously right.
Triton is imported only when a Triton path is taken, so this package works where it is not installed.
"""

from mm_core.kernels.activation import silu_and_mul
from mm_core.kernels.gelu import quick_gelu_
from mm_core.kernels.kv_write import kv_write
from mm_core.kernels.linear import AddNorm, gated_linear, gelu_linear, linear, norm_linear, quick_gelu_linear
from mm_core.kernels.norm import add_layer_norm_, add_rms_norm_, rms_norm
from mm_core.kernels.paged_attention import paged_attention
from mm_core.kernels.patchify import patchify
from mm_core.kernels.rope import build_rope_table, mrope_axis_of_freq, rope_, rope_kv_write_, rope_pair_
from mm_core.kernels.varlen_attention import varlen_attention

__all__ = [
    "AddNorm",
    "add_layer_norm_",
    "add_rms_norm_",
    "build_rope_table",
    "gated_linear",
    "gelu_linear",
    "kv_write",
    "linear",
    "mrope_axis_of_freq",
    "norm_linear",
    "paged_attention",
    "patchify",
    "quick_gelu_",
    "quick_gelu_linear",
    "rms_norm",
    "rope_",
    "rope_kv_write_",
    "rope_pair_",
    "silu_and_mul",
    "varlen_attention",
]
