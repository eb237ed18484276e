"""Tiles to rows of the decoder's width: tower, projector, and the rows of each item put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_core.hookspecs import BuildContext, Checkpoint, WeightMap
from mm_core.layers import Linear, empty_parameter
from mm_core.media import Normalisation
from mm_core.towers import TilePasses, activation, make_tower, tower_weight_map
from mm_core.types import MediaFeature, Modality, PlaceholderRange
from mm_plugin_llava.config import LlavaConfig
from mm_plugin_llava.layout import Layout
from mm_plugin_llava.processor import read_settings

_NAMES = WeightMap(
    rename=((r"(?:model\.)?multi_modal_projector\.", "projector."), (r"(?:model\.)?image_newline$", "image_newline"))
)


class Projector(nn.Module):
    """linear_2(act(linear_1(x)))."""

    def __init__(self, config: LlavaConfig, in_size: int, out_size: int, context: BuildContext) -> None:
        super().__init__()
        kind: Mapping[str, Any] = {"bias": config.bias, "device": context.device, "dtype": context.dtype}
        self.act = activation(config.act)
        self.linear_1 = Linear(in_size, out_size, **kind)
        self.linear_2 = Linear(out_size, out_size, **kind)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_size] → [..., out_size]."""
        rows: Tensor = self.linear_2(self.act(self.linear_1(x)))
        return rows


class LlavaEncoder(nn.Module):
    """hookspecs.Encoder of all three; its cost unit is the patch.

    A feature holds `pixels` uint8 [tiles, S, S, 3] and in info its `Layout`. norms: how the pixels of each
    modality are normalised. hidden_size: the decoder's width.
    """

    def __init__(
        self, config: LlavaConfig, hidden_size: int, norms: Mapping[Modality, Normalisation], context: BuildContext
    ) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        # Modalities with equal settings share one, so that their tiles go through it together.
        made = {norm: TilePasses(config.tower, norm, context) for norm in norms.values()}
        self._passes = {modality: made[norm] for modality, norm in norms.items()}
        self.tower = make_tower(config.vision, context, layers=config.layers)
        self.projector = Projector(config, self.tower.out_size, hidden_size, context)
        if config.tiled:
            self.image_newline = empty_parameter((hidden_size,), context.device, context.dtype)
        self.weight_map = tower_weight_map(self.tower, r"(?:model\.)?vision_tower\.", "tower.", also=_NAMES)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, context: BuildContext) -> Self:
        """From a checkpoint's settings."""
        config = LlavaConfig.from_checkpoint(checkpoint)
        norms = {modality: s.norm for modality, s in read_settings(checkpoint, config).items()}
        return cls(config, config.text_width, norms, context)

    def use_graphs(self) -> None:
        """From now on packs of tiles that repeat are captured."""
        for passes in self._passes.values():
            passes.use_graphs()

    def cost(self, feature: MediaFeature) -> int:
        """Patches of the item's tiles."""
        return int(feature.info["tiles"]) * self.config.tower.num_patches

    def forward(self, features: Sequence[MediaFeature]) -> list[Tensor]:
        """[num_tokens, hidden_size] each, in order."""
        rows: dict[int, Tensor] = {}
        for passes in dict.fromkeys(self._passes.values()):
            mine = [i for i, f in enumerate(features) if self._passes[f.modality] is passes]
            if mine:
                tiles = passes([features[i].tensors["pixels"] for i in mine], self._encode)
                rows.update(zip(mine, torch.split(tiles, [features[i].info["tiles"] for i in mine]), strict=True))
        return [self._assemble(rows[i], Layout(**feature.info)) for i, feature in enumerate(features)]

    def _encode(self, patches: Tensor) -> Tensor:
        """Patches of n tiles → [n, rows of a tile, hidden_size]."""
        rows: Tensor = self.projector(self.tower(patches)[:, self.config.skip :].contiguous())
        return rows

    def _assemble(self, tiles: Tensor, layout: Layout) -> Tensor:
        """[tiles, rows of a tile, hidden_size] of one item → its rows."""
        if layout.kind == "tile":
            return tiles[0]
        newline, width, side = self.image_newline[None], self.hidden_size, self.config.tower.side
        if layout.kind == "base":
            return torch.cat((tiles[0], newline))
        if layout.kind == "frames":
            pooled = _resize(tiles.view(-1, side, side, width), layout.size)
            return torch.cat((pooled.reshape(-1, width), newline))
        # [down, across, line, column] of rows → lines and columns of the whole map
        lines = tiles[1:].view(*layout.grid, side, side, width).transpose(1, 2)
        grid = lines.reshape(layout.grid[0] * side, layout.grid[1] * side, width)
        (top, left), (height, across) = layout.trim, layout.trimmed(side)
        grid = grid[top : top + height, left : left + across]
        if layout.size is not None:
            grid = _resize(grid[None], layout.size)[0]
        ends = newline.expand(len(grid), 1, width)
        return torch.cat((tiles[0], torch.cat((grid, ends), dim=1).view(-1, width)))


def _resize(maps: Tensor, size: tuple[int, int] | None) -> Tensor:
    """[n, lines, columns, width] → [n, *size, width], bilinear."""
    resized = F.interpolate(maps.permute(0, 3, 1, 2), size=size, mode="bilinear")
    return resized.permute(0, 2, 3, 1)


class LlavaFusion:
    """hookspecs.Fusion: rows in place of placeholders, positions one by one."""

    kind: Literal["embed", "cross_attention", "encoder_decoder"] = "embed"

    def positions(self, token_ids: Sequence[int], ranges: Sequence[PlaceholderRange]) -> None:  # noqa: ARG002
        """None: 0…n-1."""
        return
