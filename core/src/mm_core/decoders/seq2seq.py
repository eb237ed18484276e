"""Decoders that read an encoder's rows by cross-attention: Whisper (Radford et al. 2022), mBART (Liu et al. 2020).

Pre-norm blocks of self-attention, cross-attention and a plain MLP; positions are learned. Batches are
flattened as in `decoders.llama`; the source's keys and values are written once, by `write_source`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_core.decoders.head import TokenHead
from mm_core.errors import CheckpointError, ConfigError
from mm_core.hookspecs import BuildContext, KVCacheSpec, WeightMap
from mm_core.kernels.gelu import quick_gelu_
from mm_core.kernels.kv_write import kv_write
from mm_core.layers import (
    Embedding,
    ForwardContext,
    LayerNorm,
    Linear,
    MergedLinear,
    PagedAttention,
    project_normed,
)

NORM_EPS = 1e-5

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": quick_gelu_,
    "relu": F.relu,
    "silu": F.silu,
}

# Settings that config.json may leave out: transformers' defaults, and where each is found.
_WHISPER: Mapping[str, Any] = {
    "vocab_size": 51865,
    "d_model": 384,
    "decoder_layers": 4,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 1536,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "activation_function": "gelu",
    "scale_embedding": False,
    "tie_word_embeddings": True,
}
_MBART: Mapping[str, Any] = {
    "vocab_size": 50265,
    "d_model": 1024,
    "decoder_layers": 12,
    "decoder_attention_heads": 16,
    "decoder_ffn_dim": 4096,
    "max_position_embeddings": 1024,
    "activation_function": "gelu",
    "scale_embedding": False,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Seq2SeqConfig:
    """Sizes and settings. source_size: width of the encoder's rows. max_positions: the longest context;
    position_offset: rows of the position table before that of position 0 (mBART: 2). embedding_norm: a layer
    norm on the embedded tokens (mBART). k_bias: whether key projections have a bias (Whisper's have none).
    max_source_len: rows of the longest source, 0 where it is not known here."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_positions: int
    source_size: int
    activation: str = "gelu"
    position_offset: int = 0
    scale_embedding: bool = False
    embedding_norm: bool = False
    k_bias: bool = True
    tied: bool = True
    max_source_len: int = 0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read the settings of a Whisper model or of an mBART decoder, by `model_type`."""
        kind = config.get("model_type")
        if kind not in ("whisper", "mbart"):
            raise ConfigError(
                f"The checkpoint's decoder has model_type={kind!r}; this decoder serves 'whisper' and 'mbart'. "
                "Supply a decoder of your own through the hook mm_decoder."
            )
        whisper = kind == "whisper"
        values = {k: config.get(k, default) for k, default in (_WHISPER if whisper else _MBART).items()}
        return cls(
            vocab_size=values["vocab_size"],
            hidden_size=values["d_model"],
            intermediate_size=values["decoder_ffn_dim"],
            num_layers=values["decoder_layers"],
            num_heads=values["decoder_attention_heads"],
            max_positions=values["max_target_positions" if whisper else "max_position_embeddings"],
            source_size=values["d_model"],
            activation=values["activation_function"],
            position_offset=0 if whisper else 2,
            scale_embedding=bool(values["scale_embedding"]),
            embedding_norm=not whisper,
            k_bias=not whisper,
            tied=bool(values["tie_word_embeddings"]),
            max_source_len=values.get("max_source_positions", 0),
        )

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise CheckpointError(
                f"config.json has a width of {self.hidden_size} for {self.num_heads} attention heads; the former "
                "must be a multiple of the latter. Correct the checkpoint's config.json."
            )
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"The checkpoint's decoder has activation_function={self.activation!r}; this decoder has "
                f"{', '.join(ACTIVATIONS)}. Check config.json."
            )

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads


class PartlyBiasedLinear(MergedLinear):
    """Several projections of one input, each `size` rows, of which only some have a bias: `bias_0` is that of
    the first, and so on. They are parts of one vector, zero elsewhere, so that the sum is one product."""

    bias: Tensor  # type: ignore[assignment]

    def __init__(self, in_features: int, size: int, biased: Sequence[bool], context: BuildContext) -> None:
        device, dtype = context.device, context.dtype
        super().__init__(in_features, (size,) * len(biased), bias=False, device=device, dtype=dtype)
        del self.bias
        self.register_buffer("bias", torch.zeros(size * len(biased), device=device, dtype=dtype), persistent=False)
        for shard, has in enumerate(biased):
            if has:
                part = self.bias.narrow(0, shard * size, size)
                setattr(self, f"bias_{shard}", nn.Parameter(part, requires_grad=False))


class SelfAttention(nn.Module):
    """Causal self-attention over the paged cache, q, k and v fused."""

    def __init__(self, config: Seq2SeqConfig, layer: int, context: BuildContext) -> None:
        super().__init__()
        size = config.hidden_size
        self.shape = (3, config.num_heads, config.head_dim)
        self.qkv_proj = PartlyBiasedLinear(size, size, (True, config.k_bias, True), context)
        self.out_proj = Linear(size, size, device=context.device, dtype=context.dtype)
        self.attend = PagedAttention(layer, scale=config.head_dim**-0.5)

    def forward(self, projected: Tensor, context: ForwardContext) -> Tensor:
        """[T, 3 · hidden], of `qkv_proj` → [T, hidden]."""
        q, k, v = projected.view(projected.shape[0], *self.shape).unbind(1)
        rows: Tensor = self.out_proj(self.attend(q, k, v, context).flatten(1))
        return rows


class CrossAttention(nn.Module):
    """Attention to the source's keys and values, which lie in the cache of the table "cross"."""

    def __init__(self, config: Seq2SeqConfig, layer: int, context: BuildContext) -> None:
        super().__init__()
        device, dtype, size = context.device, context.dtype, config.hidden_size
        self.layer = layer
        self.shape = (config.num_heads, config.head_dim)
        self.q_proj = Linear(size, size, device=device, dtype=dtype)
        self.kv_proj = PartlyBiasedLinear(config.source_size, size, (config.k_bias, True), context)
        self.out_proj = Linear(size, size, device=device, dtype=dtype)
        self.attend = PagedAttention(layer, scale=config.head_dim**-0.5, table="cross")

    def forward(self, q: Tensor, context: ForwardContext, rows: Tensor | None = None) -> Tensor:
        """[T, hidden], of `q_proj` → [T, hidden], or [R, hidden] of the tokens `rows`, where that is given."""
        out = self.attend(q.view(q.shape[0], *self.shape), None, None, context).flatten(1)
        projected: Tensor = self.out_proj(out if rows is None else out.index_select(0, rows))
        return projected

    def write(self, rows: Tensor, context: ForwardContext) -> None:
        """Keys and values of source rows [N, source_size] into the cache."""
        slots = context.tables["cross"].slot_mapping
        assert slots is not None, "where a source is written, its slots are known"
        k, v = self.kv_proj(rows).view(rows.shape[0], 2, *self.shape).unbind(1)
        cache = context.caches["cross"][self.layer]
        kv_write(k, v, cache.k, cache.v, slots, cache.scales)


class Seq2SeqLayer(nn.Module):
    """Each norm first adds the preceding block's output to the residual."""

    def __init__(self, config: Seq2SeqConfig, layer: int, context: BuildContext) -> None:
        super().__init__()
        device, dtype, size = context.device, context.dtype, config.hidden_size
        self.act = ACTIVATIONS[config.activation]
        self.self_attn_layer_norm = LayerNorm(size, NORM_EPS, device=device, dtype=dtype)
        self.self_attn = SelfAttention(config, layer, context)
        self.encoder_attn_layer_norm = LayerNorm(size, NORM_EPS, device=device, dtype=dtype)
        self.encoder_attn = CrossAttention(config, layer, context)
        self.final_layer_norm = LayerNorm(size, NORM_EPS, device=device, dtype=dtype)
        self.fc1 = Linear(size, config.intermediate_size, device=device, dtype=dtype)
        self.fc2 = Linear(config.intermediate_size, size, device=device, dtype=dtype)

    def forward(
        self, x: Tensor | None, residual: Tensor, context: ForwardContext, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """x: the previous layer's output, not yet in the residual (None before the first layer). Returns
        this layer's, and the residual, which may be updated in place; where `rows` is given, both of these
        tokens alone."""
        norm, qkv = self.self_attn_layer_norm, self.self_attn.qkv_proj
        if x is None:
            projected = qkv(norm(residual))
        else:
            projected, residual = project_normed(norm, qkv, x, residual)
        x = self.self_attn(projected, context)
        q, residual = project_normed(self.encoder_attn_layer_norm, self.encoder_attn.q_proj, x, residual)
        x = self.encoder_attn(q, context, rows)
        if rows is not None:
            residual = residual.index_select(0, rows)
        exact = self.act is F.gelu
        hidden, residual = project_normed(self.final_layer_norm, self.fc1, x, residual, gelu=exact)
        out: Tensor = self.fc2(hidden if exact else self.act(hidden))
        return out, residual


class Seq2SeqDecoder(TokenHead):
    """hookspecs.Decoder with cross-attention. Parameter names: `embed_tokens`, `embed_positions`,
    `layernorm_embedding` (mBART), `layers.N.…`, `layer_norm`, and `lm_head` where it is not tied."""

    position_axes = 1

    def __init__(self, config: Seq2SeqConfig, context: BuildContext) -> None:
        super().__init__()
        device, dtype, size = context.device, context.dtype, config.hidden_size
        self.config = config
        self.hidden_size = size
        self.vocab_size = config.vocab_size
        self.max_source_len = config.max_source_len
        shape = (config.num_layers, config.num_heads, config.head_dim)
        self.kv_specs = (KVCacheSpec("self", *shape), KVCacheSpec("cross", *shape))
        self.embed_tokens = Embedding(config.vocab_size, size, device=device, dtype=dtype)
        positions = config.max_positions + config.position_offset
        self.embed_positions = Embedding(positions, size, device=device, dtype=dtype)
        self.layernorm_embedding: LayerNorm | None = None
        if config.embedding_norm:
            self.layernorm_embedding = LayerNorm(size, NORM_EPS, device=device, dtype=dtype)
        self.layers = nn.ModuleList(Seq2SeqLayer(config, i, context) for i in range(config.num_layers))
        self.layer_norm = LayerNorm(size, NORM_EPS, device=device, dtype=dtype)
        self.lm_head = None
        if not config.tied:
            self.lm_head = Linear(size, config.vocab_size, bias=False, device=device, dtype=dtype)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] int64 → [T, hidden], without positions."""
        rows: Tensor = self.embed_tokens(token_ids)
        return rows * math.sqrt(self.hidden_size) if self.config.scale_embedding else rows

    def write_source(self, rows: Tensor, context: ForwardContext) -> None:
        """Encoder rows [N, source_size] to every layer's keys and values, written where
        context.tables["cross"].slot_mapping [N] says."""
        for layer in self.layers:
            layer.encoder_attn.write(rows, context)  # type: ignore[operator, union-attr]

    def forward(self, inputs_embeds: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        """[T, hidden], [1, T] int32 → [T, hidden] after the final norm, or [R, hidden] of the tokens
        `context.rows`. The input is not changed."""
        residual = inputs_embeds + self.embed_positions(positions[0] + self.config.position_offset)
        if self.layernorm_embedding is not None:
            residual = self.layernorm_embedding(residual)
        x: Tensor | None = None
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            # Nothing reads the other tokens once the last layer's keys and values are written.
            x, residual = layer(x, residual, context, context.rows if index == last else None)
        assert x is not None, "a decoder has at least one layer"
        return self.layer_norm.add_(x, residual)


_FUSED = (
    ("self_attn.q_proj", "self_attn.qkv_proj", 0),
    ("self_attn.k_proj", "self_attn.qkv_proj", 1),
    ("self_attn.v_proj", "self_attn.qkv_proj", 2),
    ("encoder_attn.k_proj", "encoder_attn.kv_proj", 0),
    ("encoder_attn.v_proj", "encoder_attn.kv_proj", 1),
)


def seq2seq_weight_map(
    prefix: str = "model.decoder.", head: str = "proj_out.", *, tied: bool, ignore: tuple[str, ...] = ()
) -> WeightMap:
    """Names of Seq2SeqDecoder's tensors below `prefix`, and of its head (both end with a dot).

    Whisper's are the defaults; Nougat has "decoder.model.decoder." and "decoder.lm_head.". tied: the
    checkpoint's head, where it has one, repeats the embedding. ignore: as WeightMap's.
    """
    body = re.escape(prefix)
    biases = tuple(
        (f"{body}(layers\\.\\d+\\.){suffix}\\.bias$", f"\\1{fused}.bias_{shard}")
        for suffix, fused, shard in ((re.escape(s), f, n) for s, f, n in _FUSED)
    )
    return WeightMap(
        rename=(*biases, (body, ""), (re.escape(head), "lm_head.")),
        fused=_FUSED,
        ignore=ignore,
        tied={"lm_head.weight": "embed_tokens.weight"} if tied else {},
    )
