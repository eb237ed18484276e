"""The small vocabulary that decoders, towers and encoders are written in.

Modules create their parameters empty (the checkpoint loader fills them), and are given all that describes a batch.
"""

from mm_core.layers.attention import PagedAttention
from mm_core.layers.captured import CapturedPasses
from mm_core.layers.context import AttentionMetadata, ForwardContext, LayerCache
from mm_core.layers.embedding import Embedding
from mm_core.layers.linear import Linear, MergedLinear
from mm_core.layers.mlp import GatedMLP, project_activated, project_normed
from mm_core.layers.norm import LayerNorm, RMSNorm
from mm_core.layers.packing import PackedWeight, pack
from mm_core.layers.parameter import empty_parameter
from mm_core.layers.patches import Patchify
from mm_core.layers.rotary import MROPE_SLACK, RopeConfig, RotaryEmbedding, rope_inv_freq

__all__ = [
    "MROPE_SLACK",
    "AttentionMetadata",
    "CapturedPasses",
    "Embedding",
    "ForwardContext",
    "GatedMLP",
    "LayerCache",
    "LayerNorm",
    "Linear",
    "MergedLinear",
    "PackedWeight",
    "PagedAttention",
    "Patchify",
    "RMSNorm",
    "RopeConfig",
    "RotaryEmbedding",
    "empty_parameter",
    "pack",
    "project_activated",
    "project_normed",
    "rope_inv_freq",
]
