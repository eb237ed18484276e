"""The Donut-Swin encoder (Kim et al. 2022; Swin: Liu et al. 2021): pages of one size to rows.

Attention runs within windows of a page's patches, shifted by half a window in every other block; after
each stage but the last, four neighbouring patches become one of twice the width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_core.errors import CheckpointError
from mm_core.hookspecs import BuildContext, WeightMap
from mm_core.layers import CapturedPasses, LayerNorm, Linear, MergedLinear, Patchify, empty_parameter
from mm_core.media import Normalisation, PatchLayout
from mm_core.types import MediaFeature

MERGE_EPS = 1e-5  # of the norms beside the blocks, which config.json does not set
# Later regions of a shifted page are no neighbours; the reference adds this to their scores.
_APART = -100.0
_PACKS = (8, 4, 2, 1)  # pages a pass
_COST = 4  # a row, as towers with 2 × 2 merging count
_BLOCK = r"encoder\.encoder\.(layers\.\d+\.blocks\.\d+\.)"  # in names of tensors
_ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}


@dataclass(frozen=True)
class SwinConfig:
    """Sizes: image (height, width) in pixels; dim is the first stage's width; out the decoder's, where the
    rows are projected to it."""

    image: tuple[int, int]
    patch: int
    dim: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int
    mlp_ratio: float
    qkv_bias: bool
    eps: float
    activation: str
    out: int | None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """From a checkpoint's config.json; missing settings take transformers' defaults."""
        swin, decoder = config["encoder"], config["decoder"]
        if swin.get("model_type") != "donut-swin":
            raise CheckpointError(
                f"The checkpoint's encoder is {swin.get('model_type')!r}; this plugin reads 'donut-swin'."
            )
        size, depths, dim = (
            swin.get("image_size", 224),
            tuple(swin.get("depths", (2, 2, 6, 2))),
            swin.get("embed_dim", 96),
        )
        own, wanted = dim * 2 ** (len(depths) - 1), decoder.get("d_model", 1024)
        found = cls(
            image=tuple(size) if isinstance(size, list | tuple) else (size, size),
            patch=swin.get("patch_size", 4),
            dim=dim,
            depths=depths,
            heads=tuple(swin.get("num_heads", (3, 6, 12, 24))),
            window=swin.get("window_size", 7),
            mlp_ratio=swin.get("mlp_ratio", 4.0),
            qkv_bias=swin.get("qkv_bias", True),
            eps=swin.get("layer_norm_eps", 1e-5),
            activation=swin.get("hidden_act", "gelu"),
            out=None if own == wanted or decoder.get("cross_attention_hidden_size") is not None else wanted,
        )
        found._check(swin)
        return found

    def _check(self, swin: Mapping[str, Any]) -> None:
        wrong = None
        if any(side % self.patch for side in self.image):
            wrong = f"image_size={list(self.image)} is no multiple of patch_size={self.patch}"
        elif swin.get("use_absolute_embeddings", False):
            wrong = "use_absolute_embeddings is set"
        elif any(self.window > min(self.grid(stage)) for stage in range(len(self.depths))):
            wrong = f"a stage's grid is smaller than window_size={self.window}"
        elif self.activation not in _ACTIVATIONS:
            wrong = f"hidden_act={self.activation!r}"
        if wrong is not None:
            raise CheckpointError(f"config.json of the encoder: {wrong}, which this plugin does not run.")

    def grid(self, stage: int) -> tuple[int, int]:
        """Rows and columns of patches in a stage."""
        height, width = (side // self.patch for side in self.image)
        for _ in range(stage):
            height, width = -(-height // 2), -(-width // 2)
        return height, width

    @property
    def num_rows(self) -> int:
        """Rows of a page."""
        height, width = self.grid(len(self.depths) - 1)
        return height * width

    @property
    def width(self) -> int:
        """Width of the last stage."""
        return int(self.dim * 2 ** (len(self.depths) - 1))


def _relative_index(window: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """[n, n] of the n = window² places: which row of the bias table each pair reads."""
    y, x = (a.ravel() for a in np.mgrid[:window, :window])
    across = 2 * window - 1
    index: np.ndarray[Any, np.dtype[np.int64]] = (y[:, None] - y + window - 1) * across + (x[:, None] - x + window - 1)
    return index


def _apart(grid: tuple[int, int], window: int, shift: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[windows, n, n] float32: what is added to scores, as places of a shifted window may come from opposite
    borders of the page."""
    parts = []
    for side in grid:
        place = np.arange(-(-side // window) * window)
        end = len(place)
        parts.append((place >= end - window).astype(int) + (place >= end - shift).astype(int))
    regions = parts[0][:, None] * 3 + parts[1]
    rows, columns = (len(part) // window for part in parts)
    windows = regions.reshape(rows, window, columns, window).swapaxes(1, 2).reshape(rows * columns, -1)
    return np.where(windows[:, None] == windows[:, :, None], 0.0, _APART).astype(np.float32)


class SwinAttention(nn.Module):
    """Self-attention within windows, with a learned bias by relative place."""

    relative: Tensor
    apart: Tensor | None

    def __init__(self, config: SwinConfig, stage: int, shift: int, context: BuildContext) -> None:
        super().__init__()
        device, dtype = context.device, context.dtype
        dim, self.heads = config.dim * 2**stage, config.heads[stage]
        self.qkv = MergedLinear(dim, (dim, dim, dim), bias=config.qkv_bias, device=device, dtype=dtype)
        self.dense = Linear(dim, dim, device=device, dtype=dtype)
        self.table = empty_parameter(((2 * config.window - 1) ** 2, self.heads), device, dtype)
        self.register_buffer("relative", torch.from_numpy(_relative_index(config.window)).to(device), persistent=False)
        apart = torch.from_numpy(_apart(config.grid(stage), config.window, shift)).to(device, dtype) if shift else None
        self.register_buffer("apart", apart, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[pages, windows, n, dim] → the same shape."""
        pages, windows, n, dim = x.shape
        q, k, v = (
            self.qkv(x).view(pages, windows, n, 3, self.heads, -1).permute(3, 0, 1, 4, 2, 5).flatten(2, 3).unbind(0)
        )
        bias = self.table[self.relative].permute(2, 0, 1)  # [heads, n, n]
        bias = bias.expand(windows, -1, -1, -1) if self.apart is None else bias + self.apart[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.flatten(0, 1))
        rows: Tensor = self.dense(
            out.view(pages, windows, self.heads, n, -1).transpose(2, 3).reshape(pages, windows, n, dim)
        )
        return rows


class SwinBlock(nn.Module):
    """Pre-norm attention within (shifted) windows and a plain MLP."""

    def __init__(self, config: SwinConfig, stage: int, index: int, context: BuildContext) -> None:
        super().__init__()
        device, dtype = context.device, context.dtype
        dim, self.window = config.dim * 2**stage, config.window
        # A grid of one window has nothing to shift.
        self.shift = self.window // 2 if index % 2 and min(config.grid(stage)) > self.window else 0
        self.approximate = _ACTIVATIONS[config.activation]
        self.layernorm_before = LayerNorm(dim, config.eps, device=device, dtype=dtype)
        self.attention = SwinAttention(config, stage, self.shift, context)
        self.layernorm_after = LayerNorm(dim, config.eps, device=device, dtype=dtype)
        inner = int(config.mlp_ratio * dim)
        self.intermediate = Linear(dim, inner, device=device, dtype=dtype)
        self.output = Linear(inner, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[pages, height, width, dim] → the same shape."""
        height, width = x.shape[1:3]
        windows, padded = self._windows(self.layernorm_before(x))
        x = x + self._page(self.attention(windows), padded)[:, :height, :width]
        inner = F.gelu(self.intermediate(self.layernorm_after(x)), approximate=self.approximate)
        out: Tensor = x + self.output(inner)
        return out

    def _windows(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[pages, windows, n, dim], zero where a window goes beyond the page; and the page's size with that."""
        w = self.window
        x = F.pad(x, (0, 0, 0, -x.shape[2] % w, 0, -x.shape[1] % w))
        pages, height, width, dim = x.shape
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        x = x.view(pages, height // w, w, width // w, w, dim).transpose(2, 3)
        return x.reshape(pages, -1, w * w, dim), (height, width)

    def _page(self, windows: Tensor, padded: tuple[int, int]) -> Tensor:
        """The inverse of `_windows`, before its padding is cut off."""
        (height, width), w = padded, self.window
        x = windows.view(len(windows), height // w, width // w, w, w, -1).transpose(2, 3)
        x = x.reshape(len(windows), height, width, -1)
        return torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x


class PatchMerging(nn.Module):
    """2 × 2 neighbouring patches to one of twice the width."""

    def __init__(self, dim: int, context: BuildContext) -> None:
        super().__init__()
        device, dtype = context.device, context.dtype
        self.norm = LayerNorm(4 * dim, MERGE_EPS, device=device, dtype=dtype)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[pages, height, width, dim] → [pages, ⌈height / 2⌉, ⌈width / 2⌉, 2 · dim]."""
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        parts = [x[:, row::2, column::2] for column in range(2) for row in range(2)]
        merged: Tensor = self.reduction(self.norm(torch.cat(parts, dim=-1)))
        return merged


class SwinEncoder(nn.Module):
    """hookspecs.Encoder. A feature holds `pixels` uint8 [1, height, width, 3], of the size in config.json."""

    weight_map = WeightMap(
        rename=(
            (r"encoder\.embeddings\.patch_embeddings\.projection\.", "projection."),
            (r"encoder\.embeddings\.norm\.", "norm."),
            (rf"{_BLOCK}attention\.self\.relative_position_bias_table", r"\1attention.table"),
            (rf"{_BLOCK}attention\.self\.", r"\1attention."),
            (rf"{_BLOCK}attention\.output\.dense\.", r"\1attention.dense."),
            (rf"{_BLOCK}(intermediate|output)\.dense\.", r"\1\2."),
            (r"encoder\.encoder\.", ""),
            (r"enc_to_dec_proj\.", "enc_to_dec_proj."),
        ),
        fused=(("query", "qkv", 0), ("key", "qkv", 1), ("value", "qkv", 2)),
        ignore=(r".*relative_position_index$", r"encoder\.(?:pooler|layernorm)\..*"),
    )

    def __init__(self, config: SwinConfig, norm: Normalisation, context: BuildContext) -> None:
        super().__init__()
        device, dtype = context.device, context.dtype
        self.config = config
        self.hidden_size = config.out or config.width
        self._patchify = Patchify(PatchLayout(config.patch, 1, 1), norm, device, dtype)
        self._captured = CapturedPasses(len(_PACKS))
        self._device = device
        kernel = (config.dim, 3, config.patch, config.patch)
        self.projection = Linear(3 * config.patch**2, config.dim, device=device, dtype=dtype)
        self.projection.weight = empty_parameter(
            (config.dim, 3 * config.patch**2), device, dtype, checkpoint_shape=kernel
        )
        self.norm = LayerNorm(config.dim, MERGE_EPS, device=device, dtype=dtype)
        self.layers = nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            parts = nn.ModuleDict({"blocks": nn.ModuleList(SwinBlock(config, stage, i, context) for i in range(depth))})
            if stage < len(config.depths) - 1:
                parts["downsample"] = PatchMerging(config.dim * 2**stage, context)
            self.layers.append(parts)
        self.enc_to_dec_proj = Linear(config.width, config.out, device=device, dtype=dtype) if config.out else None

    def use_graphs(self) -> None:
        """From now on packs that repeat are captured."""
        self._captured.enabled = True

    def cost(self, feature: MediaFeature) -> int:
        """In proportion to the rows; all pages are of one size."""
        return _COST * feature.num_tokens

    def forward(self, features: Sequence[MediaFeature]) -> list[Tensor]:
        """[num_tokens, hidden_size] each, in order."""
        rows: list[Tensor] = []
        while len(rows) < len(features):
            count = next(pack for pack in _PACKS if pack <= len(features) - len(rows))
            rows += self._pass(features[len(rows) : len(rows) + count])
        return rows

    def _pass(self, features: Sequence[MediaFeature]) -> Sequence[Tensor]:
        pixels = [f.tensors["pixels"].to(self._device, non_blocking=True) for f in features]
        patches = self._patchify(pixels)
        if self._device.type == "cuda" and self._captured.repeats(len(features)):
            return self._captured.run(len(features), self._encode, patches).unbind(0)
        return self._encode(patches).unbind(0)

    def _encode(self, patches: Tensor) -> Tensor:
        """[pages · height · width, 3 · patch²] → [pages, rows, hidden_size]."""
        x: Tensor = self.norm(self.projection(patches)).view(-1, *self.config.grid(0), self.config.dim)
        for stage in self.layers:
            for block in stage["blocks"]:  # type: ignore[index]
                x = block(x)
            if "downsample" in stage:  # type: ignore[operator]
                x = stage["downsample"](x)  # type: ignore[index]
        rows = x.flatten(1, 2)
        return rows if self.enc_to_dec_proj is None else self.enc_to_dec_proj(rows)
