"""What CLIP's and SigLIP's vision towers have in common: a Vision Transformer (Dosovitskiy et al. 2021) over
tiles of one size, pre-norm, positions learned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_core.errors import ConfigError
from mm_core.hookspecs import BuildContext, WeightMap
from mm_core.kernels import quick_gelu_, varlen_attention
from mm_core.layers import Embedding, LayerNorm, Linear, MergedLinear, empty_parameter, project_activated

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu_,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """An activation by the name that transformers gives it; it may overwrite its argument. Raises ConfigError."""
    if name not in _ACTIVATIONS:
        raise ConfigError(
            f"The checkpoint's config.json names the activation {name!r}; towers and projectors have "
            f"{', '.join(_ACTIVATIONS)}. Check vision_config.hidden_act and projector_hidden_act."
        )
    return _ACTIVATIONS[name]


@dataclass(frozen=True)
class TowerConfig:
    """Sizes of a tower. width: channels inside; image_size, patch_size: pixels a side of a tile and a patch.

    `defaults`: what a config may leave out, by its names there. class_tokens: rows before a tile's patches.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    hidden_act: str
    layer_norm_eps: float

    defaults: ClassVar[Mapping[str, Any]]
    class_tokens: ClassVar[int] = 0

    @classmethod
    def from_config(cls, vision_config: Mapping[str, Any]) -> Self:
        """From the `vision_config` of config.json; missing settings take transformers' defaults."""
        values = {name: vision_config.get(name, default) for name, default in cls.defaults.items()}
        if vision_config.get("num_channels", 3) != 3:
            raise ConfigError(f"The vision tower wants {vision_config['num_channels']} channels; pictures have 3.")
        return cls(**values)

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_attention_heads", "image_size", "patch_size"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"vision_config.{name} is {value!r}; this tower needs one whole number above 0.")
        if self.hidden_size % self.num_attention_heads or self.patch_size > self.image_size:
            raise ConfigError(f"The sizes of vision_config do not go together: {self}. Fetch config.json again.")

    @property
    def side(self) -> int:
        """Patches a side of a tile."""
        return self.image_size // self.patch_size

    @property
    def pixels(self) -> int:
        """Pixels a side that patches cover: `image_size`, or less by what the last patch leaves over."""
        return self.side * self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a tile."""
        return self.side**2

    @property
    def num_tokens(self) -> int:
        """Rows of a tile: its patches, after the class token where there is one."""
        return self.num_patches + self.class_tokens

    def layer_indexes(self, layers: int | Sequence[int]) -> tuple[int, ...]:
        """`layers` as non-negative indexes of `hidden_states`, 0 being the embedded patches."""
        wanted = (layers,) if isinstance(layers, int) else tuple(layers)
        count = self.num_hidden_layers + 1
        if not wanted or not all(type(i) is int and -count <= i < count for i in wanted):
            raise ConfigError(
                f"vision_feature_layer={layers!r} names a layer that the vision tower of {count - 1} layers does "
                "not have. Correct it in the checkpoint's config.json."
            )
        return tuple(i % count for i in wanted)


class PatchEmbedding(nn.Module):
    """The convolution over non-overlapping patches, as the matrix product it is."""

    def __init__(self, config: TowerConfig, context: BuildContext, *, bias: bool) -> None:
        super().__init__()
        p, width = config.patch_size, config.hidden_size
        shape = (width, 3, p, p)
        self.weight = empty_parameter((width, 3 * p * p), context.device, context.dtype, checkpoint_shape=shape)
        self.bias = empty_parameter((width,), context.device, context.dtype) if bias else None

    def forward(self, patches: Tensor) -> Tensor:
        """[patches, 3 · patch²] → [patches, width]."""
        return F.linear(patches, self.weight, self.bias)


class TowerAttention(nn.Module):
    """Self-attention within each tile."""

    def __init__(self, config: TowerConfig, context: BuildContext) -> None:
        super().__init__()
        device, dtype, width = context.device, context.dtype, config.hidden_size
        self.heads = config.num_attention_heads
        self.scale = (width // self.heads) ** -0.5
        self.qkv_proj = MergedLinear(width, (width,) * 3, device=device, dtype=dtype)
        self.out_proj = Linear(width, width, device=device, dtype=dtype)

    def forward(self, x: Tensor, bounds: Tensor, longest: int) -> Tensor:
        """[rows, width] → [rows, width]."""
        q, k, v = self.qkv_proj(x).view(x.shape[0], 3, self.heads, -1).unbind(1)
        rows: Tensor = self.out_proj(varlen_attention(q, k, v, bounds, max_seqlen=longest, scale=self.scale).flatten(1))
        return rows


class TowerMLP(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(self, config: TowerConfig, context: BuildContext) -> None:
        super().__init__()
        device, dtype = context.device, context.dtype
        self.act = activation(config.hidden_act)
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, device=device, dtype=dtype)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[rows, width] → [rows, width]."""
        rows: Tensor = self.fc2(project_activated(self.fc1, self.act, x))
        return rows


class TowerLayer(nn.Module):
    """Pre-norm attention and MLP; each norm first adds the preceding layer's output to the residual."""

    def __init__(self, config: TowerConfig, context: BuildContext) -> None:
        super().__init__()
        self.layer_norm1 = tower_norm(config, context)
        self.self_attn = TowerAttention(config, context)
        self.layer_norm2 = tower_norm(config, context)
        self.mlp = TowerMLP(config, context)

    def forward(self, x: Tensor | None, residual: Tensor, bounds: Tensor, longest: int) -> Tensor:
        """x: the previous layer's output, not yet in the residual (None before the first). Returns this
        layer's; `residual` [rows, width] is updated in place."""
        norm = self.layer_norm1
        x = self.self_attn(norm(residual) if x is None else norm.add_(x, residual), bounds, longest)
        rows: Tensor = self.mlp(self.layer_norm2.add_(x, residual))
        return rows


class VisionTower(nn.Module):
    """Patches of many tiles to hidden states. A subclass embeds them.

    layers: which of `hidden_states` are wanted, as transformers counts them; those above are neither built
    nor loaded, and there is no norm behind the last one. out_size: the width of what comes out. Parameter
    names are the checkpoint's below `vision_model.`, without `embeddings.` and `encoder.`.
    """

    def __init__(self, config: TowerConfig, context: BuildContext, *, layers: int | Sequence[int], bias: bool) -> None:
        super().__init__()
        self.config = config
        self.wanted = config.layer_indexes(layers)
        self.out_size = config.hidden_size * len(self.wanted)
        width = config.hidden_size
        self.patch_embedding = PatchEmbedding(config, context, bias=bias)
        self.position_embedding = Embedding(config.num_tokens, width, device=context.device, dtype=context.dtype)
        self.layers = nn.ModuleList(TowerLayer(config, context) for _ in range(max(self.wanted)))

    def embed(self, patches: Tensor) -> Tensor:
        """[tiles, patches of a tile, width], without positions → [tiles, tokens, width], a new tensor."""
        raise NotImplementedError

    def forward(self, patches: Tensor) -> Tensor:
        """[tiles · patches of a tile, 3 · patch²], normalised → [tiles, tokens of a tile, out_size]."""
        config = self.config
        embedded = self.embed(self.patch_embedding(patches).view(-1, config.num_patches, config.hidden_size))
        tiles, tokens, width = embedded.shape
        bounds = torch.arange(0, (tiles + 1) * tokens, tokens, dtype=torch.int32, device=patches.device)
        residual, x = embedded.view(-1, width), None
        # While kernels are compiled ahead there are fewer layers: the last one stands for those above it.
        wanted = [min(index, len(self.layers)) for index in self.wanted]
        states = {0: residual.clone()} if 0 in wanted else {}
        for index, layer in enumerate(self.layers, 1):
            x = layer(x, residual, bounds, tokens)
            if index in wanted:
                states[index] = residual + x
        parts = [states[index].view(tiles, tokens, width) for index in wanted]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def tower_norm(config: TowerConfig, context: BuildContext) -> LayerNorm:
    """A norm over the tower's width."""
    return LayerNorm(config.hidden_size, config.layer_norm_eps, device=context.device, dtype=context.dtype)


def tower_weight_map(tower: VisionTower, prefix: str, into: str, also: WeightMap | None = None) -> WeightMap:
    """Names of a tower whose tensors lie below `prefix` (a regex that ends with a dot) and which is the
    attribute `into` (with a dot, or empty) of the module that is loaded. Checkpoints put `vision_model.` between
    or not. also: the names of what else the module has; they are looked at after the tower's.
    """
    below = rf"{prefix}(?:vision_model\.)?"
    built = "|".join(str(i) for i in range(len(tower.layers))) or "-"
    own = WeightMap(
        rename=((rf"{below}(?:embeddings\.|encoder\.)?", into),),
        fused=tuple((f"{name}_proj", "qkv_proj", shard) for shard, name in enumerate("qkv")),
        ignore=(
            rf"{below}encoder\.layers\.(?!(?:{built})\.)",
            rf"{below}(?:post_layernorm|head)\.",
            rf"{below}embeddings\.position_ids$",
        ),
    )
    if also is None:
        return own
    merged = {name: getattr(own, name) + getattr(also, name) for name in ("rename", "fused", "ignore")}
    return replace(own, **merged, tied=also.tied)
