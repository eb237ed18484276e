"""What a checkpoint says of itself, in one form for all its layouts. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mm_core.errors import ConfigError
from mm_core.hookspecs import Checkpoint

MAX_TILES = 64
Aspect = Literal["dynamic_s2", "dynamic", "resize", "pad"]

# What checkpoints of these classes are by definition, and so leave out of their config.json. s2_tiles: the scales
# in tiles.
_OF_CLASS: Mapping[str, Mapping[str, Any]] = {
    "NVILAForConditionalGeneration": {
        "image_aspect_ratio": "dynamic_s2",
        "dynamic_s2": True,
        "s2_tiles": (1, 2, 3),
        "s2_resize_output_to_scale_idx": -1,
        "mm_projector_type": "mlp_downsample",
        "num_video_frames": 8,
    },
    "NVILALiteForConditionalGeneration": {
        "image_aspect_ratio": "dynamic",
        "mm_projector_type": "mlp_downsample_3x3_fix",
        "num_video_frames": 8,
    },
}
_UNSUPPORTED = ("ps3", "num_time_tokens", "mm_use_im_start_end")


@dataclass(frozen=True)
class Marks:
    """Texts whose tokens stand around the rows of an image or a frame; sep: behind a whole pyramid level."""

    start: str = ""
    end: str = "\n"
    sep: str = ""


@dataclass(frozen=True)
class Settings:
    """Settings of one checkpoint.

    aspect: how a request's only image is cut; several images, and frames, are one tile each. tile: pixels a side
    that the tower takes. scales: of S2, ascending, in pixels; empty without it. static: S2 resizes the normalised
    picture, of `picture` pixels a side (VILA-1.5), instead of cutting tiles. output: index of the scale whose map
    decides the size of the others. pools: (frames, rows, columns) that a video's rows are averaged over, once a
    level. projector: its type. vision: the tower's own settings.
    """

    aspect: Aspect
    scales: tuple[int, ...]
    static: bool
    output: int
    min_tiles: int
    max_tiles: int
    num_video_frames: int | None
    fps: float | None
    select_layer: int
    select_feature: str
    projector: str
    image_marks: Marks
    video_marks: Marks
    pools: tuple[tuple[int, int, int], ...]
    tile: int
    picture: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale: float
    resample: int
    vision: Mapping[str, Any]

    @property
    def tiles(self) -> tuple[int, ...]:
        """Tiles a side of each scale; (1,) without S2."""
        return tuple(-(-scale // self.tile) for scale in self.scales) or (1,)


def read_settings(checkpoint: Checkpoint) -> Settings:
    """Settings of a checkpoint in any layout; ConfigError names what this plugin does not have."""
    config = _with_class(checkpoint.config)
    _refuse(config)
    vision = _vision(config)
    processor = checkpoint.processor_config.get("image_processor", {})
    tile = int(vision.get("image_size", 224))
    aspect = _aspect(config, vision)
    dynamic = bool(config.get("dynamic_s2")) or aspect == "dynamic_s2"
    static = bool(config.get("s2")) and not dynamic
    scales = _scales(config, tile, static) if dynamic or static else ()
    low, high = _tiles(config)
    video = _target(config, "video_encoder")
    layer = config.get("mm_vision_select_layer")
    return Settings(
        aspect=aspect,
        scales=scales,
        static=static,
        output=_output(config, scales),
        min_tiles=low,
        max_tiles=high,
        num_video_frames=config.get("num_video_frames") or None,
        fps=config.get("fps") or None,
        select_layer=-2 if layer is None else int(layer),
        select_feature=str(config.get("mm_vision_select_feature") or "patch"),
        projector=_projector(config),
        image_marks=_marks(_target(config, "image_encoder")),
        video_marks=_marks(video),
        pools=_pools(video),
        tile=tile,
        picture=_picture(processor, scales[-1]) if static else tile,
        mean=tuple(processor.get("image_mean") or (0.5, 0.5, 0.5)),
        std=tuple(processor.get("image_std") or (0.5, 0.5, 0.5)),
        rescale=float(processor.get("rescale_factor", 1 / 255)),
        resample=int(processor.get("resample", 3)),
        vision=vision,
    )


def _with_class(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config, filled up with what its class means."""
    names = config.get("architectures") or [""]
    given = {key: value for key, value in config.items() if value is not None}
    return {**_OF_CLASS.get(names[0], {}), **given}


def _refuse(config: Mapping[str, Any]) -> None:
    found = next((key for key in _UNSUPPORTED if config.get(key)), None)
    if found is not None or int(config.get("video_max_tiles") or 1) > 1:
        key = found or "video_max_tiles"
        raise ConfigError(
            f"config.json has {key}={config[key]!r}, which this plugin does not have: its results would be others. "
            "Take a checkpoint without it."
        )


def _vision(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in ("vision_tower_cfg", "vision_config"):
        found = config.get(key)
        if isinstance(found, Mapping):
            nested = found.get("vision_config")
            return nested if isinstance(nested, Mapping) else found
    raise ConfigError(
        "config.json has neither vision_tower_cfg nor vision_config as an object, and there is no "
        "vision_tower/config.json. Fetch the checkpoint's vision_tower folder."
    )


def _projector(config: Mapping[str, Any]) -> str:
    found = config.get("mm_projector_cfg")
    kind = found.get("mm_projector_type") if isinstance(found, Mapping) else None
    kind = kind or config.get("mm_projector_type") or config.get("mm_projector")
    if not isinstance(kind, str):
        raise ConfigError(
            "config.json does not name the projector (mm_projector_cfg.mm_projector_type), and there is no "
            "mm_projector/config.json that does. Fetch the checkpoint's mm_projector folder."
        )
    return kind


def _aspect(config: Mapping[str, Any], vision: Mapping[str, Any]) -> Aspect:
    found: Any = config.get("image_aspect_ratio")
    if found is None and vision.get("model_type") == "siglip_vision_model":
        return "resize"  # what SigLIP's image processor does by itself
    if found not in ("dynamic_s2", "dynamic", "resize", "pad"):
        raise ConfigError(
            f"config.json has image_aspect_ratio={found!r}; this plugin has 'dynamic_s2', 'dynamic', 'resize' and "
            "'pad'. Set one of them."
        )
    known: Aspect = found
    return known


def _scales(config: Mapping[str, Any], tile: int, static: bool) -> tuple[int, ...]:
    """`s2_scales`, as "448,896,1344" or as a list: multiples of the tile, ascending."""
    given = config.get("s2_scales") or [tile * n for n in config.get("s2_tiles", ())]
    parts = re.split(r"[\s,]+", given.strip()) if isinstance(given, str) else given
    try:
        scales = tuple(sorted(int(p) for p in parts))
    except (TypeError, ValueError):
        scales = ()
    split = config.get("s2_max_split_size") or tile
    if not scales or any(s < 1 or s % tile for s in scales) or (static and split != tile):
        raise ConfigError(
            f"config.json uses S2 with s2_scales={given!r} and s2_max_split_size={split!r}; wanted are scales in "
            f"pixels, as in '448,896,1344', all multiples of the vision tower's image_size {tile}, split to that."
        )
    if not static and scales[0] != tile:
        raise ConfigError(f"The smallest of s2_scales={given!r} is not the vision tower's image_size {tile}.")
    return scales


def _tiles(config: Mapping[str, Any]) -> tuple[int, int]:
    low, high = config.get("min_tiles") or 1, config.get("max_tiles") or 12
    if type(low) is not int or type(high) is not int or not 1 <= low <= high <= MAX_TILES:
        raise ConfigError(
            f"config.json has min_tiles={low!r} and max_tiles={high!r}; wanted are whole numbers from 1 to {MAX_TILES}."
        )
    return low, high


def _picture(processor: Mapping[str, Any], largest: int) -> int:
    """The image processor's size, which the original sets to the largest scale where it saves one."""
    size = processor.get("crop_size") or processor.get("size") or {}
    side = size.get("height", largest) if isinstance(size, Mapping) else size
    if type(side) is not int or side < 1 or (isinstance(size, Mapping) and size.get("width", side) != side):
        raise ConfigError(
            f"The image processor's size is {size!r}; wanted is a square. Fetch preprocessor_config.json."
        )
    return side


def _output(config: Mapping[str, Any], scales: tuple[int, ...]) -> int:
    """`s2_resize_output_to_scale_idx`, counted from 0."""
    index, count = int(config.get("s2_resize_output_to_scale_idx") or 0), max(len(scales), 1)
    if not -count <= index < count:
        raise ConfigError(f"config.json has s2_resize_output_to_scale_idx={index} for s2_scales={scales}.")
    return index % count


def _target(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """`image_encoder` or `video_encoder`: an object, or JSON that holds one; its `_target_` names a class."""
    found = config.get(name)
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError:
            found = {"_target_": found}
    if found is None:
        return {}
    known = {"BasicImageEncoder", "BasicVideoEncoder", "TSPVideoEncoder"}
    kind = str(found.get("_target_", "")).rpartition(".")[2] if isinstance(found, Mapping) else None
    if not isinstance(found, Mapping) or kind not in known:
        raise ConfigError(f"config.json has {name}={found!r}; this plugin has {', '.join(sorted(known))}.")
    return found


def _marks(target: Mapping[str, Any]) -> Marks:
    def text(name: str, default: str) -> str:
        return str(target.get(name, default) or "")

    return Marks(text("start_tokens", ""), text("end_tokens", "\n"), text("sep_tokens", ""))


def _pools(target: Mapping[str, Any]) -> tuple[tuple[int, int, int], ...]:
    sizes = tuple(tuple(size) for size in target.get("pool_sizes") or ((1, 1, 1),))
    if not all(len(s) == 3 and all(type(n) is int and n > 0 for n in s) for s in sizes):
        raise ConfigError(f"video_encoder.pool_sizes is {sizes!r}; wanted are triples of whole numbers (t, h, w).")
    return sizes
