"""The vision towers of Qwen2-VL (Wang et al. 2024) and Qwen2.5-VL (Bai et al. 2025).

Patches of all images and video frames are packed into one [patches, dim] tensor; attention runs
within each frame (2), or within windows of a frame except in some blocks (2.5). Four neighbouring
patches are merged into one row of the decoder's width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_core.errors import ConfigError
from mm_core.hookspecs import BuildContext, WeightMap
from mm_core.kernels import quick_gelu_, rope_pair_, varlen_attention
from mm_core.layers import (
    CapturedPasses,
    GatedMLP,
    LayerNorm,
    Linear,
    Patchify,
    RMSNorm,
    empty_parameter,
    project_activated,
)
from mm_core.types import MediaFeature, Modality
from mm_plugin_qwen2vl.layout import Array, Grid, packed_layout
from mm_plugin_qwen2vl.packing import equal_packs, mixed_packs
from mm_plugin_qwen2vl.processor import Settings

NORM_EPS = 1e-6
ROPE_THETA = 10000.0
_GRAPHS = 16  # kept captured; they share their memory
_KEPT_LAYOUTS = 32  # packs whose layout stays on the device: 12 bytes a patch

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"quick_gelu": quick_gelu_, "gelu": F.gelu, "silu": F.silu}


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


class DeviceLayout(NamedTuple):
    """A pack's `layout.PackedLayout` on the device; order and inverse are None without windows."""

    frames: Segments
    windows: Segments
    positions: Tensor
    order: Tensor | None
    inverse: Tensor | None


class PatchProjection(nn.Module):
    """The convolution over non-overlapping patches, as the matrix product it is."""

    def __init__(self, config: VisionConfig, context: BuildContext) -> None:
        super().__init__()
        p = config.patch_size
        kernel = (config.dim, config.channels, config.temporal_patch_size, p, p)
        flat = (config.dim, config.channels * config.temporal_patch_size * p * p)
        self.weight = empty_parameter(flat, context.device, context.dtype, checkpoint_shape=kernel)

    def forward(self, pixels: Tensor) -> Tensor:
        """[patches, channels · temporal · patch²] → [patches, dim]."""
        return F.linear(pixels, self.weight)


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
        rows: Tensor = self.fc2(project_activated(self.fc1, self.act, x))
        return rows


def _norm(config: VisionConfig, context: BuildContext) -> LayerNorm | RMSNorm:
    kind = RMSNorm if config.gated else LayerNorm
    return kind(config.dim, NORM_EPS, device=context.device, dtype=context.dtype)


class VisionBlock(nn.Module):
    """Pre-norm attention and MLP; each norm first adds the preceding block's output to the residual."""

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

    def forward(self, x: Tensor | None, residual: Tensor, segments: Segments, cos: Tensor, sin: Tensor) -> Tensor:
        """x: the previous block's output, not yet in the residual (None before the first block).
        Returns this block's; `residual` [patches, dim] is updated in place."""
        x = self.norm1(residual) if x is None else self.norm1.add_(x, residual)
        x = self.attn(x, segments, cos, sin)
        out: Tensor = self.mlp(self.norm2.add_(x, residual))
        return out


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

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """The last block's output and the residual, [patches, dim] both → [patches / merge², out]."""
        rows: Tensor = self.mlp(self.ln_q.add_(x, residual).view(-1, self.width))
        return rows


class Qwen2VLEncoder(nn.Module):
    """hookspecs.Encoder of both versions; its cost unit is the patch.

    A feature holds `pixels` uint8 [frames, height, width, 3] on the encoder's device and
    info["grid_thw"], its temporal slices, rows and columns of patches. settings: how the pixels of
    each modality are normalised.
    """

    weight_map = WeightMap(
        rename=((r"(?:model\.)?visual\.", ""),),
        fused=(("gate_proj", "gate_up_proj", 0), ("up_proj", "gate_up_proj", 1)),
        ignore=(r".*rotary_pos_emb\.inv_freq$",),
    )
    inv_freq: Tensor

    def __init__(self, config: VisionConfig, settings: Mapping[Modality, Settings], context: BuildContext) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = config.out
        # Modalities with equal settings share one, so that their items go through it together.
        kinds = {m: (s.layout, s.norm) for m, s in settings.items()}
        makers = {kind: Patchify(*kind, context.device, context.dtype) for kind in kinds.values()}
        self._patchify = {modality: makers[kind] for modality, kind in kinds.items()}
        self._captured = CapturedPasses(_GRAPHS)
        self._layouts: OrderedDict[tuple[int, tuple[Grid, ...]], DeviceLayout] = OrderedDict()
        self.patch_embed = nn.ModuleDict({"proj": PatchProjection(config, context)})  # as checkpoints name it
        self.blocks = nn.ModuleList(VisionBlock(config, context) for _ in range(config.depth))
        self.merger = VisionMerger(config, context)
        # Half of a head turns with the row, half with the column (2-D RoPE)
        half = config.dim // config.heads // 2
        inv_freq = 1.0 / (ROPE_THETA ** (torch.arange(0, half, 2, dtype=torch.float) / half))
        self.register_buffer("inv_freq", inv_freq.to(context.device), persistent=False)

    def use_graphs(self) -> None:
        """From now on packs that repeat are captured."""
        self._captured.enabled = True

    def cost(self, feature: MediaFeature) -> int:
        """Patches of the item."""
        t, h, w = feature.info["grid_thw"]
        return int(t * h * w)

    def forward(self, features: Sequence[MediaFeature]) -> list[Tensor]:
        """[num_tokens, hidden_size] each, in order. On a GPU, packs of equal items that came before run
        as CUDA graphs; all others together."""
        if not features:
            return []
        if self.inv_freq.device.type != "cuda":
            return list(self._pass(features, repeated=False))
        grids = [f.info["grid_thw"] for f in features]
        rows: dict[int, Tensor] = {}
        for pack in equal_packs(grids):
            if self._captured.repeats(tuple(grids[i] for i in pack)):
                rows.update(zip(pack, self._pass([features[i] for i in pack], repeated=True), strict=True))
        rest = [i for i in range(len(features)) if i not in rows]
        for pack in mixed_packs(rest, grids):
            rows.update(zip(pack, self._pass([features[i] for i in pack], repeated=False), strict=True))
        return [rows[i] for i in range(len(features))]

    def _pass(self, features: Sequence[MediaFeature], *, repeated: bool) -> Sequence[Tensor]:
        """Items through the tower together; repeated: as a CUDA graph."""
        grids = tuple(f.info["grid_thw"] for f in features)
        layout = self._layout(grids)
        patches = self._patches(features)

        def run(patches: Tensor) -> Tensor:
            return self._encode(self.patch_embed["proj"](patches), layout)

        rows = self._captured.run(grids, run, patches) if repeated else run(patches)
        return torch.split(rows, [f.num_tokens for f in features])

    def _patches(self, features: Sequence[MediaFeature]) -> Tensor:
        """Normalised patches of all items, in one launch where their settings agree."""
        device = self.inv_freq.device
        groups = groupby(features, lambda f: self._patchify[f.modality])
        parts = [make([f.tensors["pixels"].to(device, non_blocking=True) for f in group]) for make, group in groups]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _encode(self, residual: Tensor, layout: DeviceLayout) -> Tensor:
        """Embedded patches [patches, dim], which are used up → rows [patches / merge², out]."""
        config = self.config
        cos, sin = self._rotation(layout.positions)
        if layout.order is not None:
            residual = residual.view(-1, config.merge_size**2, config.dim)[layout.order].view(residual.shape)
        x: Tensor | None = None
        for index, block in enumerate(self.blocks):
            segments = layout.frames if index in config.full_blocks else layout.windows
            x = block(x, residual, segments, cos, sin)
        assert x is not None, "a tower has at least one block"
        rows: Tensor = self.merger(x, residual)
        return rows if layout.inverse is None else rows[layout.inverse]

    def _layout(self, grids: tuple[Grid, ...]) -> DeviceLayout:
        """The pack's layout on the device; those used last are kept, for the stream they were made on."""
        device = self.inv_freq.device
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        found = self._layouts.pop((stream, grids), None)
        if found is None:
            found = self._make_layout(grids)
            if len(self._layouts) >= _KEPT_LAYOUTS:
                self._layouts.popitem(last=False)
        self._layouts[stream, grids] = found
        return found

    def _make_layout(self, grids: tuple[Grid, ...]) -> DeviceLayout:
        config = self.config
        layout = packed_layout(grids, config.merge_size, config.window)
        frames = self._segments(layout.frames, layout.max_frame)
        positions = self._to_device(layout.positions)
        if not config.window:
            return DeviceLayout(frames, frames, positions, None, None)
        windows = self._segments(layout.windows, layout.max_window)
        return DeviceLayout(frames, windows, positions, self._to_device(layout.order), self._to_device(layout.inverse))

    def _segments(self, bounds: Array, longest: int) -> Segments:
        return Segments(self._to_device(bounds), longest)

    def _rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """[patches, 2] → cos and sin, each [patches, head_dim / 2] float32: rows' part, columns' part."""
        angles = (positions[..., None] * self.inv_freq).flatten(1)
        return angles.cos(), angles.sin()

    def _to_device(self, array: Array) -> Tensor:
        """Without waiting, which a copy from pageable memory would."""
        tensor, device = torch.from_numpy(array), self.inv_freq.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
