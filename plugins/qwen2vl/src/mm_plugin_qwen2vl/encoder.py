"""The vision towers of Qwen2-VL (Wang et al. 2024) and Qwen2.5-VL (Bai et al. 2025).

Patches of all images and video frames are packed into one [patches, dim] tensor; attention runs
within each frame (2), or within windows of a frame except in some blocks (2.5). Four neighbouring
patches are merged into one row of the decoder's width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_core.errors import ConfigError
from mm_core.hookspecs import BuildContext, WeightMap
from mm_core.kernels import rope_pair_, varlen_attention
from mm_core.layers import GatedMLP, LayerNorm, Linear, RMSNorm, empty_parameter
from mm_core.types import MediaFeature
from mm_plugin_qwen2vl.layout import Array, packed_layout

NORM_EPS = 1e-6
ROPE_THETA = 10000.0


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), as CLIP has it, written as silu(1.702 x) / 1.702: one pass less. Uses x up."""
    return F.silu(x.mul_(1.702), inplace=True).mul_(1 / 1.702)


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu, "gelu": F.gelu, "silu": F.silu}


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a tower. dim: width inside; out: the decoder's width. gated: RMSNorm and SwiGLU
    (2.5) instead of LayerNorm and a plain MLP (2). window: side of a window in merge groups, 0 for
    none; full_blocks: blocks that attend within whole frames all the same."""

    depth: int
    dim: int
    heads: int
    intermediate: int
    out: int
    gated: bool
    activation: str
    channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    window: int = 0
    full_blocks: frozenset[int] = frozenset()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From a checkpoint's config.json; missing settings take transformers' defaults."""
        vision = config["vision_config"]
        merge, patch = vision.get("spatial_merge_size", 2), vision.get("patch_size", 14)
        shared = {
            "depth": vision.get("depth", 32),
            "heads": vision.get("num_heads", 16),
            "channels": vision.get("in_channels", vision.get("in_chans", 3)),
            "patch_size": patch,
            "temporal_patch_size": vision.get("temporal_patch_size", 2),
            "merge_size": merge,
        }
        if config["model_type"] == "qwen2_5_vl":
            return cls(
                **shared,
                dim=vision.get("hidden_size", 3584),
                intermediate=vision.get("intermediate_size", 3420),
                out=vision.get("out_hidden_size", 3584),
                gated=True,
                activation=vision.get("hidden_act", "silu"),
                window=vision.get("window_size", 112) // merge // patch,
                full_blocks=frozenset(vision.get("fullatt_block_indexes", (7, 15, 23, 31))),
            )
        dim = vision.get("embed_dim", 1280)
        return cls(
            **shared,
            dim=dim,
            intermediate=int(dim * vision.get("mlp_ratio", 4)),
            out=vision.get("hidden_size", 3584),
            gated=False,
            activation=vision.get("hidden_act", "quick_gelu"),
        )

    def __post_init__(self) -> None:
        known = ("silu",) if self.gated else tuple(_ACTIVATIONS)
        if self.activation not in known:
            raise ConfigError(
                f"The checkpoint's vision tower has hidden_act={self.activation!r}; this plugin has "
                f"{', '.join(known)}. Check vision_config in config.json."
            )


class Segments(NamedTuple):
    """Which rows attend to each other: bounds [S + 1] int32, and the longest segment."""

    bounds: Tensor
    longest: int


class PatchProjection(nn.Module):
    """The convolution over non-overlapping patches, as the matrix product it is."""

    def __init__(self, config: VisionConfig, context: BuildContext) -> None:
        super().__init__()
        p = config.patch_size
        kernel = (config.dim, config.channels, config.temporal_patch_size, p, p)
        flat = (config.dim, config.channels * config.temporal_patch_size * p * p)
        self.weight = empty_parameter(flat, context.device, context.dtype, checkpoint_shape=kernel)

    def forward(self, pixels: Tensor) -> Tensor:
        """[patches, channels · temporal · patch²] → [patches, dim], in the weight's dtype and place."""
        pixels = pixels.to(self.weight.device, non_blocking=True)
        return F.linear(pixels.to(self.weight.dtype), self.weight)


class VisionAttention(nn.Module):
    """Self-attention within segments, positions by rotation."""

    def __init__(self, config: VisionConfig, context: BuildContext) -> None:
        super().__init__()
        device, dtype, dim = context.device, context.dtype, config.dim
        self.heads = config.heads
        self.scale = (dim // config.heads) ** -0.5
        self.qkv = Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.proj = Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, segments: Segments, cos: Tensor, sin: Tensor) -> Tensor:
        """[patches, dim] → [patches, dim]; cos and sin [patches, head_dim / 2]."""
        q, k, v = self.qkv(x).view(x.shape[0], 3, self.heads, -1).unbind(1)
        rope_pair_(q, k, cos, sin)
        out = varlen_attention(q, k, v, segments.bounds, max_seqlen=segments.longest, scale=self.scale)
        rows: Tensor = self.proj(out.flatten(1))
        return rows


class VisionMLP(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, config: VisionConfig, context: BuildContext) -> None:
        super().__init__()
        device, dtype = context.device, context.dtype
        self.act = _ACTIVATIONS[config.activation]
        self.fc1 = Linear(config.dim, config.intermediate, device=device, dtype=dtype)
        self.fc2 = Linear(config.intermediate, config.dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[patches, dim] → [patches, dim]."""
        rows: Tensor = self.fc2(self.act(self.fc1(x)))
        return rows


def _norm(config: VisionConfig, context: BuildContext) -> LayerNorm | RMSNorm:
    kind = RMSNorm if config.gated else LayerNorm
    return kind(config.dim, NORM_EPS, device=context.device, dtype=context.dtype)


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: VisionConfig, context: BuildContext) -> None:
        super().__init__()
        self.norm1 = _norm(config, context)
        self.attn = VisionAttention(config, context)
        self.norm2 = _norm(config, context)
        self.mlp: nn.Module
        if config.gated:
            device, dtype = context.device, context.dtype
            self.mlp = GatedMLP(config.dim, config.intermediate, bias=True, device=device, dtype=dtype)
        else:
            self.mlp = VisionMLP(config, context)

    def forward(self, x: Tensor, segments: Segments, cos: Tensor, sin: Tensor) -> Tensor:
        """[patches, dim] → [patches, dim], in place."""
        x += self.attn(self.norm1(x), segments, cos, sin)
        x += self.mlp(self.norm2(x))
        return x


class VisionMerger(nn.Module):
    """merge² neighbouring patches to one row of the decoder's width."""

    def __init__(self, config: VisionConfig, context: BuildContext) -> None:
        super().__init__()
        device, dtype = context.device, context.dtype
        self.width = config.dim * config.merge_size**2
        self.ln_q = _norm(config, context)
        self.mlp = nn.Sequential(
            Linear(self.width, self.width, device=device, dtype=dtype),
            nn.GELU(),
            Linear(self.width, config.out, device=device, dtype=dtype),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[patches, dim] → [patches / merge², out]."""
        rows: Tensor = self.mlp(self.ln_q(x).view(-1, self.width))
        return rows


class Qwen2VLEncoder(nn.Module):
    """hookspecs.Encoder of both versions; its cost unit is the patch.

    A feature holds `pixel_values` [patches, channels · temporal · patch²] in merge-group order and
    info["grid_thw"], its temporal slices, rows and columns of patches.
    """

    weight_map = WeightMap(
        rename=((r"(?:model\.)?visual\.", ""),),
        fused=(("gate_proj", "gate_up_proj", 0), ("up_proj", "gate_up_proj", 1)),
        ignore=(r".*rotary_pos_emb\.inv_freq$",),
    )
    inv_freq: Tensor

    def __init__(self, config: VisionConfig, context: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = config.out
        self.patch_embed = nn.ModuleDict({"proj": PatchProjection(config, context)})  # as checkpoints name it
        self.blocks = nn.ModuleList(VisionBlock(config, context) for _ in range(config.depth))
        self.merger = VisionMerger(config, context)
        # Half of a head turns with the row, half with the column (2-D RoPE)
        half = config.dim // config.heads // 2
        inv_freq = 1.0 / (ROPE_THETA ** (torch.arange(0, half, 2, dtype=torch.float) / half))
        self.register_buffer("inv_freq", inv_freq.to(context.device), persistent=False)

    def cost(self, feature: MediaFeature) -> int:
        """Patches of the item."""
        t, h, w = feature.info["grid_thw"]
        return int(t * h * w)

    def forward(self, features: Sequence[MediaFeature]) -> list[Tensor]:
        """All items in one pass: [num_tokens, hidden_size] each, in order."""
        if not features:
            return []
        x = self.patch_embed["proj"](torch.cat([f.tensors["pixel_values"] for f in features]))
        rows = self._encode(x, [f.info["grid_thw"] for f in features])
        return list(torch.split(rows, [f.num_tokens for f in features]))

    def _encode(self, x: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        """Embedded patches [patches, dim] → rows [patches / merge², out]."""
        config = self.config
        layout = packed_layout(grids, config.merge_size, config.window)
        frames = Segments(self._to_device(layout.frames), layout.max_frame)
        windows = Segments(self._to_device(layout.windows), layout.max_window) if config.window else frames
        cos, sin = self._rotation(self._to_device(layout.positions))
        if config.window:
            x = x.view(-1, config.merge_size**2, config.dim)[self._to_device(layout.order)].view(x.shape)
        for index, block in enumerate(self.blocks):
            x = block(x, frames if index in config.full_blocks else windows, cos, sin)
        rows: Tensor = self.merger(x)
        return rows[self._to_device(layout.inverse)] if config.window else rows

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[patches, 2] → cos and sin, each [patches, head_dim / 2] float32: rows' part, columns' part."""
        angles = (positions[..., None] * self.inv_freq).flatten(1)
        return angles.cos(), angles.sin()

    def _to_device(self, array: Array) -> Tensor:
        return torch.from_numpy(array).to(self.inv_freq.device, non_blocking=True)
