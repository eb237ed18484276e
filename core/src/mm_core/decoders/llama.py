"""The Llama decoder (Touvron et al. 2023), which Mistral, Qwen2 and the Qwen2-VL text models share.

Pre-norm blocks of rotary grouped-query attention and a gated MLP. Batches are flattened: T tokens
of all sequences in one [T, hidden] tensor; who belongs to whom is in the ForwardContext.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor, nn

from mm_core.decoders.head import TokenHead
from mm_core.errors import CheckpointError, ConfigError, NotBuiltError
from mm_core.hookspecs import BuildContext, KVCacheSpec, WeightMap
from mm_core.layers import (
    Embedding,
    ForwardContext,
    GatedMLP,
    Linear,
    MergedLinear,
    PagedAttention,
    RMSNorm,
    RopeConfig,
    RotaryEmbedding,
)

PREFIXES = ("model.language_model.", "language_model.model.", "model.")
"""Where checkpoints keep the decoder: transformers ≥ 4.52, older wrappers, text-only models."""

_FUSED = (
    ("q_proj", "qkv_proj", 0),
    ("k_proj", "qkv_proj", 1),
    ("v_proj", "qkv_proj", 2),
    ("gate_proj", "gate_up_proj", 0),
    ("up_proj", "gate_up_proj", 1),
)

# Settings that config.json may leave out: transformers' defaults of LlamaConfig, then of the others.
_LLAMA: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "sliding_window": None,
    "attention_bias": False,
    "mlp_bias": False,
}
_MISTRAL = {
    **_LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
_QWEN2 = {
    **_LLAMA,
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}
_QWEN2_VL = {**_QWEN2, "vocab_size": 152064, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0}


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and settings of a Llama-like decoder.

    qkv_bias, o_bias, mlp_bias: which projections have one. sliding_window: tokens a layer sees, or
    None; only its bound on the context is checked. max_position_embeddings: the context the
    checkpoint was made for.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None

    @classmethod
    def from_text_config(cls, text_config: Mapping[str, Any], *, tied: bool | None = None) -> Self:
        """Read a language model's settings, flat spelling. tied overrides `tie_word_embeddings`."""
        kind = str(text_config.get("model_type", "llama")).removesuffix("_text")
        qwen2 = kind.startswith("qwen2")
        defaults = {"mistral": _MISTRAL, "qwen2": _QWEN2}.get(kind, _QWEN2_VL if qwen2 else _LLAMA)
        values = {**defaults, **{k: v for k, v in text_config.items() if k in defaults}}
        if text_config.get("hidden_act", "silu") != "silu":
            raise ConfigError(
                f"The checkpoint's text model has hidden_act={text_config['hidden_act']!r}; "
                "this decoder has 'silu' only. Supply a decoder of your own through the hook mm_decoder."
            )
        heads = values["num_attention_heads"]
        bias = bool(values["attention_bias"]) and not qwen2
        return cls(
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=values["num_key_value_heads"] or heads,
            head_dim=text_config.get("head_dim") or values["hidden_size"] // heads,
            rms_norm_eps=values["rms_norm_eps"],
            rope=RopeConfig.from_text_config(text_config, defaults["rope_theta"]),
            max_position_embeddings=values["max_position_embeddings"],
            tied=bool(text_config.get("tie_word_embeddings", False)) if tied is None else tied,
            qkv_bias=qwen2 or bias,
            o_bias=bias,
            mlp_bias=bool(values["mlp_bias"]) and not qwen2,
            sliding_window=_window(text_config, values, qwen2),
        )

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"config.json has {self.num_heads} attention heads over {self.num_kv_heads} key/value heads; "
                "the former must be a multiple of the latter. Correct the checkpoint's config.json."
            )


def _window(text_config: Mapping[str, Any], values: Mapping[str, Any], qwen2: bool) -> int | None:
    """The sliding window where a layer uses it: Qwen2 names one even where it is off."""
    layers = text_config.get("layer_types")
    first = text_config.get("max_window_layers") or 0  # Qwen2: layers below it see everything
    if qwen2 and (not text_config.get("use_sliding_window", False) or first >= values["num_hidden_layers"]):
        return None
    if layers is not None and "sliding_attention" not in layers:
        return None
    window: int | None = values["sliding_window"]
    return window


Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of the batch's positions, each [T, head_dim / 2] float32."""


class LlamaAttention(nn.Module):
    """Rotary grouped-query self-attention with fused q, k and v."""

    def __init__(self, config: LlamaConfig, layer: int, context: BuildContext) -> None:
        super().__init__()
        device, dtype, d = context.device, context.dtype, config.head_dim
        self.head_dim = d
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        shards = tuple(n * d for n in self.heads)
        self.qkv_proj = MergedLinear(config.hidden_size, shards, bias=config.qkv_bias, device=device, dtype=dtype)
        self.o_proj = Linear(shards[0], config.hidden_size, bias=config.o_bias, device=device, dtype=dtype)
        self.attend = PagedAttention(layer, scale=d**-0.5)

    def forward(self, x: Tensor, rotation: Rotation, context: ForwardContext, rows: Tensor | None = None) -> Tensor:
        """[T, hidden] → [T, hidden], or [R, hidden] of the tokens `rows`, where that is given."""
        qkv = self.qkv_proj(x).view(x.shape[0], -1, self.head_dim)
        q, k, v = qkv.split(self.heads, dim=1)
        out = self.attend(q, k, v, context, rotation=rotation).flatten(1)
        projected: Tensor = self.o_proj(out if rows is None else out.index_select(0, rows))
        return projected


class LlamaLayer(nn.Module):
    """Attention and MLP; each norm first adds the preceding block's output to the residual."""

    def __init__(self, config: LlamaConfig, layer: int, context: BuildContext) -> None:
        super().__init__()
        device, dtype = context.device, context.dtype
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps, device=device, dtype=dtype)
        self.self_attn = LlamaAttention(config, layer, context)
        self.post_attention_layernorm = RMSNorm(size, eps, device=device, dtype=dtype)
        self.mlp = GatedMLP(size, config.intermediate_size, bias=config.mlp_bias, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor | None,
        residual: Tensor,
        rotation: Rotation,
        context: ForwardContext,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x: the previous layer's output, not yet in the residual (None before the first layer).
        Returns this layer's, and the residual, which is updated in place; where `rows` is given,
        both of these tokens alone."""
        norm = self.input_layernorm
        x = norm(residual) if x is None else norm.add_(x, residual)
        x = self.self_attn(x, rotation, context, rows)
        if rows is not None:
            residual = residual.index_select(0, rows)
        out: Tensor = self.mlp(self.post_attention_layernorm.add_(x, residual))
        return out, residual


class LlamaDecoder(TokenHead):
    """hookspecs.Decoder for Llama-like models. Parameter names: `embed_tokens`, `layers.N.…`,
    `norm`, and `lm_head` where it is not tied to `embed_tokens`."""

    def __init__(self, config: LlamaConfig, context: BuildContext) -> None:
        super().__init__()
        _check_window(config, context.max_model_len)
        device, dtype = context.device, context.dtype
        self.config = config
        self.hidden_size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.position_axes = config.rope.axes
        self.kv_specs = (KVCacheSpec("self", config.num_layers, config.num_kv_heads, config.head_dim),)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        self.layers = nn.ModuleList(LlamaLayer(config, i, context) for i in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device=device, dtype=dtype)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim, context.max_model_len, device)
        self.lm_head = None
        if not config.tied:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False, device=device, dtype=dtype)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] int64 → [T, hidden]."""
        rows: Tensor = self.embed_tokens(token_ids)
        return rows

    def forward(self, inputs_embeds: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """[T, hidden], [axes, T] int32 → [T, hidden] after the final norm, or [R, hidden] of the
        tokens `context.rows`. The input is not changed."""
        rotation = self.rotary(positions)
        residual = inputs_embeds.clone()
        x: Tensor | None = None
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            # Nothing reads the other tokens once the last layer's keys and values are written.
            x, residual = layer(x, residual, rotation, context, context.rows if index == last else None)
        assert x is not None, "a decoder has at least one layer"
        return self.norm.add_(x, residual)


def _check_window(config: LlamaConfig, max_model_len: int) -> None:
    window = config.sliding_window
    if window is not None and max_model_len > window:
        raise NotBuiltError(
            f"The checkpoint uses a sliding window of {window} tokens and max_model_len is {max_model_len}: "
            f"sliding-window attention is not built yet. Pass max_model_len={window} or less; within the "
            "window the results are exact."
        )


def llama_weight_map(prefixes: tuple[str, ...] = PREFIXES, *, tied: bool = False) -> WeightMap:
    """Names of LlamaDecoder's tensors below any of `prefixes` (each ends with a dot).

    `lm_head.` is looked for beside the decoder: at the top and beside a last `model.` segment.
    tied: the checkpoint's `lm_head.weight`, where it has one, repeats the embedding.
    """
    body = "|".join(re.escape(p) for p in prefixes)
    heads = {"lm_head.", *(p.removesuffix("model.") + "lm_head." for p in prefixes if p.endswith(".model."))}
    head = "|".join(re.escape(h) for h in sorted(heads))
    return WeightMap(
        rename=((f"(?:{body})(?=(?:embed_tokens|layers|norm)\\.)", ""), (f"(?:{head})", "lm_head.")),
        fused=_FUSED,
        ignore=(r".*rotary_emb\.inv_freq$",),
        tied={"lm_head.weight": "embed_tokens.weight"} if tied else {},
    )
