"""Vision tower, S2 (Shi et al. 2024: features of several scales side by side) and projector.

Tiles of all items go through the tower together. Maps are [items, rows, columns, channels] throughout.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_core.decoders import LlamaConfig
from mm_core.errors import ConfigError
from mm_core.hookspecs import BuildContext, Checkpoint, WeightMap
from mm_core.media import Normalisation, normalise
from mm_core.towers import TilePasses, make_tower, tower_weight_map
from mm_core.types import MediaFeature
from mm_plugin_nvila.layout import Layout
from mm_plugin_nvila.projector import make_projector
from mm_plugin_nvila.settings import read_settings

_PROJECTOR = WeightMap(
    rename=(
        (r"mm_projector\.layers\.(?=\d+\.)", "projector."),
        (r"mm_projector\.layers\.(?=weight$|bias$)", "projector.0."),  # `linear`, which the original keeps bare
    )
)
_STATIC_TILES = 32  # that the tower takes at a time


class VilaEncoder(nn.Module):
    """hookspecs.Encoder; its cost unit is the patch.

    A feature holds `pixels` uint8 [tiles, side, side, 3] and info as `VilaProcessor.prepare` says.
    """

    levels: Tensor

    def __init__(self, checkpoint: Checkpoint, context: BuildContext) -> None:
        super().__init__()
        self.settings = settings = read_settings(checkpoint)
        self.hidden_size = LlamaConfig.from_text_config(checkpoint.text_config).hidden_size
        self.tower = make_tower(settings.vision, context, layers=settings.select_layer)
        if self.tower.config.class_tokens and settings.select_feature == "cls_patch":
            raise ConfigError(
                "config.json keeps the class token of a CLIP tower (mm_vision_select_feature='cls_patch'): its rows "
                "are no square. Set 'patch'."
            )
        self.layout = Layout(settings, self.tower.config.side)
        width = self.tower.out_size * max(len(settings.scales), 1)
        self.projector = make_projector(settings.projector, width, self.hidden_size, context)
        self.weight_map = tower_weight_map(self.tower, r"vision_tower\.(?:vision_tower\.)?", "tower.", also=_PROJECTOR)
        norm = Normalisation(settings.mean, settings.std, settings.rescale)
        self._passes = TilePasses(self.tower.config, norm, context)
        grey = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
        self.register_buffer("levels", torch.from_numpy(normalise(grey, norm)).to(context.device), persistent=False)

    def use_graphs(self) -> None:
        """From now on packs of tiles that repeat are captured."""
        self._passes.use_graphs()

    def cost(self, feature: MediaFeature) -> int:
        """Patches of the item, those of all scales."""
        scales = sum(n * n for n in self.settings.tiles) if self.settings.static else 1
        return int(feature.info["tiles"]) * scales * self.tower.config.num_patches

    def forward(self, features: Sequence[MediaFeature]) -> list[Tensor]:
        """[num_tokens, hidden_size] each, in order."""
        if not features:
            return []
        pixels = [feature.tensors["pixels"] for feature in features]
        counts = [len(p) for p in pixels]
        rows: Sequence[Tensor]
        if not self.settings.scales:
            rows = torch.split(self._passes(pixels, lambda patches: self.projector(self._features(patches))), counts)
        elif self.settings.static:
            rows = torch.split(self.projector(self._static(pixels)), counts)
        else:
            rows = self._merged(features, torch.split(self._passes(pixels, self._features), counts))
        return [self._arranged(feature, part) for feature, part in zip(features, rows, strict=True)]

    def _features(self, patches: Tensor) -> Tensor:
        """Patches of whole tiles → [tiles, patches of a tile, width]."""
        states: Tensor = self.tower(patches)
        return states[:, self.tower.config.class_tokens :]

    def _arranged(self, feature: MediaFeature, rows: Tensor) -> Tensor:
        """Rows of an item's tiles, [tiles, n, hidden], one after another; of a video averaged, level by level."""
        if feature.modality != "video":
            return rows.flatten(0, -2)
        side, parts = self.layout.square, []
        for t, h, w in self.settings.pools:
            shape = (len(rows) // t, t, side // h, h, side // w, w, self.hidden_size)
            parts.append(rows.view(shape).mean((1, 3, 5)).flatten(0, -2) if t * h * w > 1 else rows.flatten(0, -2))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _merged(self, features: Sequence[MediaFeature], states: Sequence[Tensor]) -> list[Tensor]:
        """Each item's tiles of all scales, [tiles, patches, width], to rows; items of one shape together."""
        groups: dict[tuple[int, int] | None, list[int]] = {}
        for index, feature in enumerate(features):
            groups.setdefault(feature.info["block"], []).append(index)
        rows: dict[int, Tensor] = {}
        for block, members in groups.items():
            if block is None:  # one scale stands for all
                tiles = torch.cat([states[i] for i in members]).repeat(1, 1, len(self.settings.scales))
                parts = torch.split(self.projector(tiles), [len(states[i]) for i in members])
            else:
                parts = self._merge(torch.stack([states[i] for i in members]), block)
            rows.update(zip(members, parts, strict=True))
        return [rows[index] for index in range(len(features))]

    def _merge(self, states: Tensor, block: tuple[int, int]) -> tuple[Tensor, ...]:
        """[items, tiles, patches, width] of items whose last scale has `block` rows and columns of tiles."""
        grids = [*((n, n) for n in self.settings.tiles[:-1]), block]
        tiles = torch.split(states, [rows * columns for rows, columns in grids], dim=1)
        maps = [_stitch(part, *grid) for part, grid in zip(tiles, grids, strict=True)]
        merged = _joined(maps, self.settings.output)
        (rows, columns), side = self.layout.block(block), self.tower.config.side
        items, width = merged.shape[0], merged.shape[-1]
        squares = merged.view(items, rows, side, columns, side, width).transpose(2, 3)
        out = self.projector(squares.reshape(items * rows * columns, side * side, width))
        return _stitch(out.view(items, rows * columns, -1, self.hidden_size), rows, columns).flatten(1, 2).unbind()

    def _static(self, pixels: Sequence[Tensor]) -> Tensor:
        """uint8 [k, side, side, 3] each → [pictures, patches of the map, width]."""
        settings, config = self.settings, self.tower.config
        device, dtype = self.levels.device, self.tower.patch_embedding.weight.dtype
        whole = torch.cat([p.to(device, non_blocking=True) for p in pixels])
        channels = whole.permute(3, 0, 1, 2).long()
        values = torch.stack([self.levels[:, c][channels[c]] for c in range(3)], dim=1)  # [k, 3, side, side]
        maps = []
        for scale, n in zip(settings.scales, settings.tiles, strict=True):
            resized = values
            if scale != values.shape[-1]:
                resized = F.interpolate(values, (scale, scale), mode="bicubic")
            parts = torch.split(self._cut(resized.to(dtype), n), _STATIC_TILES * config.num_patches)
            states = torch.cat([self._features(part) for part in parts])
            maps.append(_stitch(states.view(-1, n * n, *states.shape[1:]), n, n))
        return _joined(maps, settings.output).flatten(1, 2)

    def _cut(self, pictures: Tensor, n: int) -> Tensor:
        """[k, 3, side, side] of n × n tiles each → patches of all tiles, [k · n² · patches of a tile, 3 · patch²]."""
        config = self.tower.config
        size, pixels, (side, patch) = config.image_size, config.pixels, (config.side, config.patch_size)
        tiles = pictures.view(-1, 3, n, size, n, size)[:, :, :, :pixels, :, :pixels]
        grid = tiles.reshape(-1, 3, n, side, patch, n, side, patch)
        return grid.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, 3 * patch**2)


def _stitch(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """[items, rows · columns, side², width], row by row → [items, rows · side, columns · side, width]."""
    items, _, patches, width = tiles.shape
    side = round(patches**0.5)
    grid = tiles.reshape(items, rows, columns, side, side, width).transpose(2, 3)
    return grid.reshape(items, rows * side, columns * side, width)


def _joined(maps: Sequence[Tensor], output: int) -> Tensor:
    """Maps averaged to the size of `maps[output]`, in float32, and their channels joined."""
    size = maps[output].shape[1:3]
    return torch.cat([m if m.shape[1:3] == size else _area(m, size) for m in maps], dim=-1)


def _area(x: Tensor, size: torch.Size) -> Tensor:
    pooled = F.interpolate(x.permute(0, 3, 1, 2).float(), tuple(size), mode="area")
    return pooled.permute(0, 2, 3, 1).to(x.dtype)
