"""The OPT decoder (Zhang et al. 2022), which BLIP-2 reads pictures with.

Blocks of multi-head attention and a plain feed-forward layer, learned positions, layer norms before
each block or (350M) after it. Batches are flattened as in `llama.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_core.decoders.head import TokenHead
from mm_core.errors import CheckpointError, ConfigError
from mm_core.hookspecs import BuildContext, DecoderSpec, KVCacheSpec, WeightMap
from mm_core.layers import (
    Embedding,
    ForwardContext,
    LayerNorm,
    Linear,
    MergedLinear,
    PagedAttention,
)

OPT_PREFIXES = ("language_model.model.decoder.", "model.language_model.decoder.", "model.decoder.", "decoder.")
"""Where checkpoints keep the decoder: wrapped ones, then text-only models, new and old."""

NORM_EPS = 1e-5  # torch's default, which OPT's layer norms keep
OFFSET = 2  # rows of the table of positions that stand for padding

_FUSED = (("q_proj", "qkv_proj", 0), ("k_proj", "qkv_proj", 1), ("v_proj", "qkv_proj", 2))
_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu_,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
}
# Settings that config.json may leave out: transformers' defaults of OPTConfig.
_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 50272,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "ffn_dim": 3072,
    "num_attention_heads": 12,
    "max_position_embeddings": 2048,
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "word_embed_proj_dim": None,
    "activation_function": "relu",
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class OPTConfig:
    """Sizes and settings of an OPT decoder.

    width: of the blocks. embed_width: of embeddings and of what the head reads; where the two differ,
    projections lie between. norm_first: norms before the blocks rather than after. final_norm: one more after
    the last block. affine: whether norms have weights.
    """

    vocab_size: int
    width: int
    embed_width: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_position_embeddings: int
    activation: str = "relu"
    norm_first: bool = True
    final_norm: bool = True
    bias: bool = True
    affine: bool = True
    tied: bool = True

    @classmethod
    def from_text_config(cls, text_config: Mapping[str, Any]) -> Self:
        """Read a language model's settings."""
        values = {**_DEFAULTS, **{k: v for k, v in text_config.items() if k in _DEFAULTS}}
        return cls(
            vocab_size=values["vocab_size"],
            width=values["hidden_size"],
            embed_width=values["word_embed_proj_dim"] or values["hidden_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=values["num_attention_heads"],
            intermediate_size=values["ffn_dim"],
            max_position_embeddings=values["max_position_embeddings"],
            activation=values["activation_function"],
            norm_first=bool(values["do_layer_norm_before"]),
            final_norm=bool(values["do_layer_norm_before"]) and not values["_remove_final_layer_norm"],
            bias=bool(values["enable_bias"]),
            affine=bool(values["layer_norm_elementwise_affine"]),
            tied=bool(values["tie_word_embeddings"]),
        )

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise CheckpointError(
                f"config.json has hidden_size {self.width} for {self.num_heads} attention heads; the former must be a "
                "multiple of the latter. Correct the checkpoint's config.json."
            )
        if self.activation not in _ACTIVATIONS:
            raise ConfigError(
                f"The checkpoint's text model has activation_function={self.activation!r}; this decoder has "
                f"{', '.join(_ACTIVATIONS)}. Supply a decoder of your own through the hook mm_decoder."
            )


def _norm(config: OPTConfig, context: BuildContext) -> LayerNorm:
    norm = LayerNorm(config.width, NORM_EPS, device=context.device, dtype=context.dtype)
    if not config.affine:  # the same arithmetic, and nothing to load
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            delattr(norm, name)
            filled = torch.full((config.width,), value, device=context.device, dtype=context.dtype)
            norm.register_buffer(name, filled, persistent=False)
    return norm


class OPTAttention(nn.Module):
    """Multi-head self-attention with fused q, k and v."""

    def __init__(self, config: OPTConfig, layer: int, context: BuildContext) -> None:
        super().__init__()
        device, dtype, width = context.device, context.dtype, config.width
        self.heads = config.num_heads
        self.qkv_proj = MergedLinear(width, (width,) * 3, bias=config.bias, device=device, dtype=dtype)
        self.out_proj = Linear(width, width, bias=config.bias, device=device, dtype=dtype)
        self.attend = PagedAttention(layer, scale=(width // config.num_heads) ** -0.5)

    def forward(self, x: Tensor, context: ForwardContext, rows: Tensor | None = None) -> Tensor:
        """[T, width] → [T, width], or [R, width] of the tokens `rows`, where that is given."""
        q, k, v = self.qkv_proj(x).view(x.shape[0], 3, self.heads, -1).unbind(1)
        out = self.attend(q, k, v, context).flatten(1)
        projected: Tensor = self.out_proj(out if rows is None else out.index_select(0, rows))
        return projected


class OPTLayer(nn.Module):
    """Attention and a feed-forward layer, each with its norm before or after."""

    def __init__(self, config: OPTConfig, layer: int, context: BuildContext) -> None:
        super().__init__()
        device, dtype = context.device, context.dtype
        self.norm_first = config.norm_first
        self.act = _ACTIVATIONS[config.activation]
        self.self_attn = OPTAttention(config, layer, context)
        self.self_attn_layer_norm = _norm(config, context)
        self.fc1 = Linear(config.width, config.intermediate_size, bias=config.bias, device=device, dtype=dtype)
        self.fc2 = Linear(config.intermediate_size, config.width, bias=config.bias, device=device, dtype=dtype)
        self.final_layer_norm = _norm(config, context)

    def forward(
        self, x: Tensor | None, residual: Tensor, context: ForwardContext, rows: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """x: the previous layer's output, not yet in the residual (None before the first layer, and with norms
        after the blocks). Returns this layer's, and the residual, which is updated in place; where `rows` is
        given, both of these tokens alone."""
        norm, norm2 = self.self_attn_layer_norm, self.final_layer_norm
        if not self.norm_first:
            x = self.self_attn(residual, context, rows)
            residual = norm.add_(x, residual if rows is None else residual.index_select(0, rows))
            return None, norm2.add_(self._feed_forward(residual), residual)
        x = norm(residual) if x is None else norm.add_(x, residual)
        x = self.self_attn(x, context, rows)
        if rows is not None:
            residual = residual.index_select(0, rows)
        return self._feed_forward(norm2.add_(x, residual)), residual

    def _feed_forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class OPTDecoder(TokenHead):
    """hookspecs.Decoder for OPT. Parameter names: `embed_tokens`, `embed_positions`, `layers.N.…`, and where the
    settings ask for them `project_in`, `project_out`, `final_layer_norm`, `lm_head`."""

    def __init__(self, config: OPTConfig, context: BuildContext) -> None:
        super().__init__()
        placed: dict[str, Any] = {"device": context.device, "dtype": context.dtype}
        width, embed_width = config.width, config.embed_width
        self.config = config
        self.hidden_size = embed_width
        self.vocab_size = config.vocab_size
        self.position_axes = 1
        self.kv_specs = (KVCacheSpec("self", config.num_layers, config.num_heads, width // config.num_heads),)
        self.embed_tokens = Embedding(config.vocab_size, embed_width, **placed)
        self.embed_positions = Embedding(config.max_position_embeddings + OFFSET, width, **placed)
        self.layers = nn.ModuleList(OPTLayer(config, i, context) for i in range(config.num_layers))
        self.project_in: Linear | None = None
        self.project_out: Linear | None = None
        if embed_width != width:
            self.project_in = Linear(embed_width, width, bias=False, **placed)
            self.project_out = Linear(width, embed_width, bias=False, **placed)
        self.final_layer_norm = _norm(config, context) if config.final_norm else None
        self.lm_head = None if config.tied else Linear(embed_width, config.vocab_size, bias=False, **placed)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] int64 → [T, hidden]."""
        rows: Tensor = self.embed_tokens(token_ids)
        return rows

    def forward(self, inputs_embeds: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """[T, hidden], [1, T] int32 → [T, hidden] after the final norm, or [R, hidden] of the tokens
        `context.rows`. The input is not changed."""
        wide = inputs_embeds if self.project_in is None else self.project_in(inputs_embeds)
        residual = wide + F.embedding(positions[0], self.embed_positions.weight[OFFSET:])
        x: Tensor | None = None
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            # Nothing reads the other tokens once the last layer's keys and values are written.
            x, residual = layer(x, residual, context, context.rows if index == last else None)
        if x is None:
            out = residual
        else:
            out = residual.add_(x) if self.final_layer_norm is None else self.final_layer_norm.add_(x, residual)
        return out if self.project_out is None else self.project_out(out)


def opt_weight_map(prefixes: tuple[str, ...] = OPT_PREFIXES, *, tied: bool = True) -> WeightMap:
    """Names of OPTDecoder's tensors below any of `prefixes` (each ends with a dot).

    tied: the checkpoint's `lm_head.weight`, where it has one, repeats the embedding.
    """
    body = "|".join(re.escape(p) for p in prefixes)
    own = "embed_tokens|embed_positions|layers|project_in|project_out|final_layer_norm"
    return WeightMap(
        rename=((f"(?:{body})(?=(?:{own})\\.)", ""), (r"(?:language_model\.|model\.)?lm_head\.", "lm_head.")),
        fused=_FUSED,
        tied={"lm_head.weight": "embed_tokens.weight"} if tied else {},
    )


def opt_spec(text_config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder for a language model's settings."""
    config = OPTConfig.from_text_config(text_config)
    return DecoderSpec(
        build=partial(OPTDecoder, config),
        weight_map=opt_weight_map(tied=config.tied),
        max_model_len=config.max_position_embeddings,
    )
