"""NVILA, NVILA-Lite and VILA-1.5 written down plainly: one request at a time, the towers and the language model
being transformers' own. Reads any layout of a checkpoint. Shares no code with the plugin."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from mm_core.testing import Answer

Frames = np.ndarray[Any, Any]
_CLASS = {
    "NVILAForConditionalGeneration": ("dynamic_s2", "mlp_downsample"),
    "NVILALiteForConditionalGeneration": ("dynamic", "mlp_downsample_3x3_fix"),
}


# ---- projectors


class DS(nn.Module):
    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        batch, n, c = x.shape
        f, k = int(n**0.5), self.k
        x = x.view(batch, f, f, c)
        if f % k:
            more = k - f % k
            x = torch.cat([x, x.new_zeros(batch, more, f, c)], dim=1)
            x = torch.cat([x, x.new_zeros(batch, f + more, more, c)], dim=2)
            f += more
        x = x.view(batch, f // k, k, f // k, k, c).permute(0, 1, 3, 2, 4, 5)
        return x.reshape(batch, (f // k) ** 2, k * k * c)


def projector(kind: str, c: int, h: int) -> nn.Module:
    """c: width of the vision features; h: of the language model."""
    if kind == "identity":
        return nn.Identity()
    if kind == "linear":
        return nn.Sequential(nn.Linear(c, h))
    if kind in ("mlp_downsample", "mlp_downsample_2x2_fix"):
        return nn.Sequential(DS(2), nn.LayerNorm(4 * c), nn.Linear(4 * c, h), nn.GELU(), nn.Linear(h, h))
    first = (DS(3), nn.LayerNorm(9 * c))
    if kind == "mlp_downsample_3x3_fix":
        return nn.Sequential(
            *first, nn.Linear(9 * c, 3 * c), nn.GELU(), nn.LayerNorm(3 * c), nn.Linear(3 * c, h), nn.GELU(),
            nn.Linear(h, h),
        )  # fmt: skip
    if kind == "mlp_downsample_3x3_s2":
        return nn.Sequential(
            *first, nn.Linear(9 * c, 3 * c), nn.GELU(), nn.LayerNorm(3 * c), nn.Linear(3 * c, c), nn.GELU(),
            nn.LayerNorm(c), nn.Linear(c, c // 3), nn.GELU(), nn.LayerNorm(c // 3), nn.Linear(c // 3, h), nn.GELU(),
            nn.Linear(h, h),
        )  # fmt: skip
    if kind == "mlp_downsample_3x3_s2_new":
        return nn.Sequential(
            *first, nn.Linear(9 * c, 4 * c), nn.GELU(), nn.LayerNorm(4 * c), nn.Linear(4 * c, 2 * c), nn.GELU(),
            nn.LayerNorm(2 * c), nn.Linear(2 * c, c), nn.GELU(), nn.LayerNorm(c), nn.Linear(c, c // 3), nn.GELU(),
            nn.LayerNorm(c // 3), nn.Linear(c // 3, h), nn.GELU(), nn.Linear(h, h),
        )  # fmt: skip
    found = re.fullmatch(r"mlp(\d+)x_gelu", kind)
    assert found is not None, kind
    layers: list[nn.Module] = [nn.Linear(c, h)]
    for _ in range(1, int(found[1])):
        layers += [nn.GELU(), nn.Linear(h, h)]
    return nn.Sequential(*layers)


# ---- pictures


def best_ratio(image: Image.Image, low: int, high: int, side: int) -> tuple[int, int]:
    """(columns, rows)."""
    ratios = {
        (i, j)
        for n in range(low, high + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if i * j <= high and i * j >= low
    }
    best, distance = (1, 1), float("inf")
    for ratio in sorted(ratios, key=lambda r: r[0] * r[1]):
        d = abs(image.width / image.height - ratio[0] / ratio[1])
        if d < distance:
            best, distance = ratio, d
        elif d == distance and image.width * image.height > 0.5 * side * side * ratio[0] * ratio[1]:
            best = ratio
    return best


def crops(image: Image.Image, columns: int, rows: int, side: int) -> list[Image.Image]:
    resized = image.resize((columns * side, rows * side))
    return [
        resized.crop((x * side, y * side, (x + 1) * side, (y + 1) * side)) for y in range(rows) for x in range(columns)
    ]


def stitch(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """[rows · columns, f², C] → [1, C, rows · f, columns · f]."""
    f = int(tiles.shape[1] ** 0.5)
    maps = [t.T.view(-1, f, f) for t in tiles]
    lines = [torch.cat(maps[r * columns : (r + 1) * columns], dim=2) for r in range(rows)]
    return torch.cat(lines, dim=1)[None]


def squares(x: Tensor, rows: int, columns: int) -> Tensor:
    """[1, C, H, W] → [rows · columns, n, C]."""
    h, w = x.shape[2] // rows, x.shape[3] // columns
    parts = [x[0, :, r * h : (r + 1) * h, c * w : (c + 1) * w] for r in range(rows) for c in range(columns)]
    return torch.stack([p.flatten(1).T for p in parts])


def same_size(maps: list[Tensor], index: int) -> Tensor:
    size = maps[index].shape[-2:]
    return torch.cat([F.interpolate(m.float(), size=size, mode="area") for m in maps], dim=1)


# ---- the model


class VilaReference:
    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.config = json.loads((self.path / "config.json").read_text())
        llm, vision = self._part("llm", "text_config"), self._part("vision_tower", "vision_config")
        tensors = self._tensors()
        self.llm = _transformers_model(llm, tensors, "llm.", causal=True)
        self.tower = _transformers_model(vision, tensors, "vision_tower.", causal=False)
        self.side = vision["image_size"]
        self.patches = vision["image_size"] // vision["patch_size"]
        self.aspect, kind = _CLASS.get(self.config["architectures"][0], (None, None))
        self.aspect = self.config.get("image_aspect_ratio") or self.aspect or "resize"
        self.dynamic_s2 = self.config.get("dynamic_s2") or self.aspect == "dynamic_s2"
        self.static_s2 = self.config.get("s2") and not self.dynamic_s2
        given = self.config.get("s2_scales")
        self.scales = [int(s) for s in given.split(",")] if isinstance(given, str) else given
        if self.dynamic_s2 and self.scales is None:
            self.scales = [self.side, 2 * self.side, 3 * self.side]
        default = -1 if self.config["architectures"][0] in _CLASS else 0
        self.index = self.config.get("s2_resize_output_to_scale_idx", default)
        width = vision["hidden_size"] * (len(self.scales) if self.dynamic_s2 or self.static_s2 else 1)
        self.projector = projector(
            self._part("mm_projector", "").get("mm_projector_type") or kind, width, self.llm.config.hidden_size
        )
        own = {n.removeprefix("mm_projector.layers."): t for n, t in tensors.items() if n.startswith("mm_projector.")}
        self.projector.load_state_dict({("0." + n if n in ("weight", "bias") else n): t for n, t in own.items()})
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(
            self.path / "llm" if (self.path / "llm" / "tokenizer_config.json").is_file() else self.path
        )
        self.tokenizer.add_tokens(["<image>", "<vila/video>"], special_tokens=True)
        self.media_ids = {m: self.tokenizer.convert_tokens_to_ids(m) for m in ("<image>", "<vila/video>")}
        self.norm = self._norm()

    def _part(self, name: str, other: str) -> dict[str, Any]:
        found = self.config.get(f"{name}_cfg") or self.config.get(other) or {}
        if isinstance(found, str):
            found = json.loads((self.path / name / "config.json").read_text())
        return dict(found)

    def _tensors(self) -> dict[str, Tensor]:
        found = {}
        for file in sorted(self.path.glob("*.safetensors")):
            found.update(load_file(file))
        for name in () if found else ("llm", "vision_tower", "mm_projector"):
            for file in sorted((self.path / name).glob("*.safetensors")):
                found.update({f"{name}.{n}": t for n, t in load_file(file).items()})
        return found

    def _norm(self) -> tuple[Any, Any]:
        for folder in (self.path, self.path / "vision_tower"):
            if (folder / "preprocessor_config.json").is_file():
                part = json.loads((folder / "preprocessor_config.json").read_text())
                self.picture = part["size"]["height"]
                return tuple(np.asarray(part[k], np.float32) for k in ("image_mean", "image_std"))  # type: ignore[return-value]
        raise AssertionError("no preprocessor_config.json")

    def pixels(self, image: Image.Image) -> Tensor:
        """[3, H, W], normalised."""
        values = (np.asarray(image).astype(np.float64) * (1 / 255)).astype(np.float32)
        return torch.from_numpy(((values - self.norm[0]) / self.norm[1]).transpose(2, 0, 1).copy())

    def vit(self, pixels: Tensor) -> Tensor:
        states = self.tower(pixels, output_hidden_states=True).hidden_states
        found = states[self.config.get("mm_vision_select_layer", -2)]
        if self.config.get("mm_vision_select_feature") == "patch":
            return found[:, 1:]
        return found

    def whole(self, image: Image.Image) -> Image.Image:
        """A picture that is not cut."""
        side = self.picture if self.static_s2 else self.side
        if self.aspect == "pad":
            size = max(image.size)
            square = Image.new("RGB", (size, size), tuple(int(m * 255) for m in self.norm[0]))
            square.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
            image = square
        return image.resize((side, side))

    def uncut(self, image: Image.Image) -> Tensor:
        """Rows of one picture that is not cut, [n, H]."""
        x = self.pixels(self.whole(image))[None]
        if self.static_s2:
            maps = []
            for scale in sorted(self.scales):
                resized = F.interpolate(x, size=(scale, scale), mode="bicubic", align_corners=False)
                n, s = scale // self.side, self.side
                tiles = [resized[0, :, r * s : r * s + s, c * s : c * s + s] for r in range(n) for c in range(n)]
                maps.append(stitch(self.vit(torch.stack(tiles)), n, n))
            return self.projector(squares(same_size(maps, self.index), 1, 1))[0]
        features = self.vit(x)
        if self.dynamic_s2:
            features = torch.cat([features] * len(self.scales), dim=-1)
        return self.projector(features)[0]

    def cut_for_s2(self, image: Image.Image, max_tiles: int) -> Tensor:
        """Rows of a request's only picture, [n, H]."""
        scales, s = sorted(self.scales), self.side
        grids = [(scale // scales[0], scale // scales[0]) for scale in scales[:-1]]
        columns, rows = best_ratio(image, (scales[-1] // scales[0]) ** 2, max_tiles, s)
        maps = []
        for r, c in [*grids, (rows, columns)]:
            tiles = torch.stack([self.pixels(t) for t in crops(image, c, r, s)])
            maps.append(stitch(self.vit(tiles), r, c))
        h, w = ([*grids, (rows, columns)])[self.index]
        projected = self.projector(squares(same_size(maps, self.index), h, w))
        return stitch(projected, h, w)[0].flatten(1).T

    def cut(self, image: Image.Image, max_tiles: int) -> list[Tensor]:
        """Rows of each tile of a request's only picture."""
        columns, rows = best_ratio(image, self.config.get("min_tiles", 1), max_tiles, self.side)
        tiles = crops(image, columns, rows, self.side)
        if len(tiles) > 1:
            tiles.append(image.resize((self.side, self.side)))
        return [self.projector(self.vit(self.pixels(t)[None]))[0] for t in tiles]

    def video(self, frames: Frames, count: int | None = None) -> list[Tensor]:
        """Rows between the newlines of a video."""
        count = count or self.config.get("num_video_frames") or 8
        wanted = [round(i) for i in np.linspace(0, len(frames) - 1, count).tolist()]
        rows = torch.stack([self.uncut(Image.fromarray(frames[i])) for i in wanted])
        encoder = self.config.get("video_encoder") or {}
        encoder = json.loads(encoder) if isinstance(encoder, str) else encoder
        out: list[Tensor] = []
        f = math.isqrt(rows.shape[1])
        for t, h, w in encoder.get("pool_sizes", [[1, 1, 1]]):
            x = rows.view(len(rows), f, f, -1)
            x = torch.stack([x[i : i + t].mean(0) for i in range(0, len(x), t)])
            x = torch.stack([x[:, i : i + h].mean(1) for i in range(0, f, h)], dim=1)
            x = torch.stack([x[:, :, i : i + w].mean(2) for i in range(0, f, w)], dim=2)
            out += list(x.flatten(1, 2))
        return out

    # ---- prompts

    @torch.inference_mode()
    def answer(
        self,
        prompt: str,
        images: Sequence[Image.Image] = (),
        videos: Sequence[Frames] = (),
        *,
        max_tokens: int = 12,
        max_tiles: int | None = None,
        num_frames: int | None = None,
        special: bool = True,
    ) -> Answer:
        """Greedy tokens of a complete prompt with a placeholder an item. special: tokens that the tokenizer adds."""
        most = max_tiles or self.config.get("max_tiles", 12)
        media: dict[str, list[list[Tensor]]] = {"<image>": [], "<vila/video>": []}
        if len(images) == 1 and self.aspect == "dynamic":
            media["<image>"] = [[rows] for rows in self.cut(images[0], most)]
            prompt = prompt.replace("<image>", "<image>\n" * len(media["<image>"]))
        elif len(images) == 1 and self.aspect == "dynamic_s2":
            media["<image>"] = [[self.cut_for_s2(images[0], most)]]
        else:
            media["<image>"] = [[self.uncut(image)] for image in images]
        media["<vila/video>"] = [self.video(frames, num_frames) for frames in videos]
        newline = self.tokenizer("\n", add_special_tokens=False)["input_ids"]
        embed = self.llm.get_input_embeddings()
        parts, ids = [], []
        for token in self.tokenizer(prompt, add_special_tokens=special)["input_ids"]:
            name = next((n for n, i in self.media_ids.items() if i == token), None)
            if name is None:
                parts.append(embed(torch.tensor([token])))
                ids.append(token)
                continue
            for rows in media[name].pop(0):
                parts += [rows, embed(torch.tensor(newline))]
                ids += [token] * len(rows) + newline
        assert not any(media.values()), "the test's prompt and media do not match"
        embeds = torch.cat(parts)[None]
        out = self.llm.generate(
            inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long), do_sample=False,
            max_new_tokens=max_tokens, return_dict_in_generate=True, output_logits=True,
            eos_token_id=self.stops(), pad_token_id=0,
        )  # fmt: skip
        return Answer(out.sequences[0].tolist(), torch.cat(out.logits), ids)

    def stops(self) -> list[int]:
        return [self.tokenizer.eos_token_id]


def _transformers_model(config: dict[str, Any], tensors: dict[str, Tensor], prefix: str, *, causal: bool) -> Any:
    made = transformers.AutoConfig.for_model(**{k: v for k, v in config.items() if k != "architectures"})
    names = {"siglip_vision_model": "SiglipVisionModel", "clip_vision_model": "CLIPVisionModel"}
    model = (
        transformers.AutoModelForCausalLM.from_config(made)
        if causal
        else getattr(transformers, names[config["model_type"]])(made)
    )
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    state = model.state_dict()
    if not causal and not any(n.startswith("vision_model.") for n in state):
        own = {n.removeprefix("vision_model."): t for n, t in own.items()}
    missing, unexpected = model.load_state_dict(own, strict=False)
    tied = {"lm_head.weight"} if causal and made.tie_word_embeddings else set()
    assert not set(missing) - tied - {n for n in missing if "position_ids" in n}, missing
    assert not unexpected, unexpected
    model.tie_weights()
    return model.float().eval()
