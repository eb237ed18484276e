"""The shared vision towers: hidden states of transformers' CLIP and SigLIP, from uint8 tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.loading import load_renamed
from support.tiny import randomize_
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from mm_core.errors import ConfigError
from mm_core.hookspecs import BuildContext, WeightMap
from mm_core.media import Normalisation, normalise
from mm_core.towers import (
    ClipConfig,
    SiglipConfig,
    TilePasses,
    activation,
    make_tower,
    tower_config,
    tower_weight_map,
)
from mm_core.towers import tiles as tiles_module
from mm_core.towers.tiles import packs

CONTEXT = BuildContext(torch.device("cpu"), torch.float32, 64)
NORM = Normalisation((0.4, 0.5, 0.6), (0.3, 0.2, 0.25))
# 30 pixels of which patches of 7 cover 28.
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2,
         "image_size": 30, "patch_size": 7}  # fmt: skip
KINDS: dict[str, tuple[Any, Any]] = {
    "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
    "siglip_vision_model": (SiglipVisionConfig, SiglipVisionModel),
}


def reference(kind: str, **more: Any) -> Any:
    config, model = KINDS[kind]
    made = model(config(**SIZES, **more)).eval()
    randomize_(made, 3)
    return made


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 30, 30, 3), dtype=np.uint8)


def built(model: Any, layers: Any, prefix: str = "vision_tower.vision_model.", **settings: Any) -> Any:
    tower = make_tower(settings or model.config.to_dict(), CONTEXT, layers=layers)
    names = {prefix + name.removeprefix("vision_model."): value for name, value in model.state_dict().items()}
    names = {n: v for n, v in names.items() if not n.startswith(prefix + "head.") and "position_ids" not in n}
    weight_map = tower_weight_map(tower, r"(?:model\.)?vision_tower\.", "")
    left = load_renamed(tower, {n: v for n, v in names.items() if not ignored(n, weight_map)}, weight_map)
    assert not left
    return tower


def ignored(name: str, weight_map: WeightMap) -> bool:
    import re

    return any(re.match(pattern, name) for pattern in weight_map.ignore)


@torch.inference_mode()
def states(model: Any, tiles: np.ndarray) -> list[torch.Tensor]:
    values = torch.from_numpy(normalise(tiles, NORM)).permute(0, 3, 1, 2)
    return list(model(values, output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [-1, -2, 0, 2, [1, -1], [-4, 3, 2]])
@torch.inference_mode()
def test_hidden_states(kind: str, layers: Any) -> None:
    model = reference(kind)
    tower = built(model, layers)
    tiles = pixels(3)
    wanted = states(model, tiles)
    wanted = torch.cat([wanted[i] for i in ([layers] if isinstance(layers, int) else layers)], -1)
    cut = torch.from_numpy(tiles[:, :28, :28].copy())
    rows = TilePasses(tower.config, NORM, CONTEXT)([cut[:1], cut[1:]], tower)
    assert rows.shape == wanted.shape == (3, tower.config.num_tokens, tower.out_size)
    torch.testing.assert_close(rows, wanted, atol=2e-5, rtol=2e-5)
    assert len(tower.layers) == max(tower.wanted)


@pytest.mark.parametrize("prefix", ["vision_tower.vision_model.", "model.vision_tower.", "vision_tower."])
def test_names_of_every_layout(prefix: str) -> None:
    tower = built(reference("siglip_vision_model"), -2, prefix)
    assert all(torch.isfinite(p).all() for p in tower.parameters())


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_other_activation_and_eps(kind: str) -> None:
    model = reference(kind, hidden_act="gelu", layer_norm_eps=0.1)
    tower = built(model, -1)
    tile = pixels(1)
    rows = TilePasses(tower.config, NORM, CONTEXT)([torch.from_numpy(tile[:, :28, :28].copy())], tower)
    torch.testing.assert_close(rows, states(model, tile)[-1], atol=2e-5, rtol=2e-5)


@torch.inference_mode()
def test_packs_do_not_change_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = reference("clip_vision_model")
    tower = built(model, -1)
    tiles = torch.from_numpy(pixels(5)[:, :28, :28].copy())
    calls: list[int] = []

    def encode(patches: torch.Tensor) -> torch.Tensor:
        calls.append(len(patches) // tower.config.num_patches)
        return tower(patches)

    together = TilePasses(tower.config, NORM, CONTEXT)([tiles], encode)
    monkeypatch.setattr(tiles_module, "LARGEST", 2)
    apart = TilePasses(tower.config, NORM, CONTEXT)([tiles], encode)
    assert calls == [5, 2, 2, 1]
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-6)


def test_pack_sizes() -> None:
    assert [packs(n) for n in (0, 1, 5, 37, 64, 71)] == [[], [1], [4, 1], [32, 4, 1], [32, 32], [32, 32, 4, 2, 1]]


@pytest.mark.parametrize("kind", KINDS)
def test_missing_settings_take_transformers_defaults(kind: str) -> None:
    theirs = KINDS[kind][0]()
    ours = tower_config({"model_type": kind})
    assert {name: getattr(theirs, name) for name in ours.defaults} == {n: getattr(ours, n) for n in ours.defaults}


def test_settings_that_make_no_sense() -> None:
    with pytest.raises(ConfigError, match="pixtral"):
        tower_config({"model_type": "pixtral"})
    with pytest.raises(ConfigError, match="4 channels"):
        ClipConfig.from_config({"num_channels": 4})
    with pytest.raises(ConfigError, match="image_size"):
        SiglipConfig.from_config({"image_size": [224, 448]})
    with pytest.raises(ConfigError, match="do not go together"):
        ClipConfig.from_config({"num_attention_heads": 7})
    with pytest.raises(ConfigError, match="vision_feature_layer=13"):
        ClipConfig.from_config({}).layer_indexes(13)
    with pytest.raises(ConfigError, match="vision_feature_layer"):
        ClipConfig.from_config({}).layer_indexes([])
    with pytest.raises(ConfigError, match="swish"):
        activation("swish")
