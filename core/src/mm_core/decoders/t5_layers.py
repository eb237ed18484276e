"""Settings and layers of T5, which its two stacks are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_core.errors import ConfigError
from mm_core.hookspecs import BuildContext
from mm_core.kernels.kv_write import kv_write
from mm_core.layers import ForwardContext, Linear, MergedLinear, PagedAttention, RMSNorm

MAX_LENGTH = 512
"""Tokens of a source and of an answer where config.json has no `n_positions`: what T5 was trained with. Its
positions have no end of their own."""

_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
# Settings that config.json may leave out: transformers' defaults of T5Config.
_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_decoder_layers": None,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "n_positions": None,
}


@dataclass(frozen=True)
class T5Config:
    """Sizes and settings of a T5 model. gated: act(wi_0 x) · wi_1 x rather than act(wi x). buckets, far: distances
    share that many biases, and from `far` tokens on the last one. tied: the head is the embedding, and what it
    reads is scaled; Flan-T5 has a head of its own."""

    vocab_size: int
    width: int
    head_dim: int
    intermediate_size: int
    encoder_layers: int
    decoder_layers: int
    num_heads: int
    buckets: int
    far: int
    eps: float
    activation: str
    gated: bool
    tied: bool
    max_length: int = MAX_LENGTH

    @classmethod
    def from_text_config(cls, text_config: Mapping[str, Any]) -> Self:
        """Read a language model's settings.

        `tie_word_embeddings` set to False says that the head is its own; transformers 5 writes True in any
        case, and what was meant to `scale_decoder_outputs`.
        """
        values = {**_DEFAULTS, **{k: v for k, v in text_config.items() if k in _DEFAULTS}}
        gate, _, act = str(values["feed_forward_proj"]).rpartition("-")
        tied = text_config.get("tie_word_embeddings") is not False
        config = cls(
            vocab_size=values["vocab_size"],
            width=values["d_model"],
            head_dim=values["d_kv"],
            intermediate_size=values["d_ff"],
            encoder_layers=values["num_layers"],
            decoder_layers=values["num_decoder_layers"] or values["num_layers"],
            num_heads=values["num_heads"],
            buckets=values["relative_attention_num_buckets"],
            far=values["relative_attention_max_distance"],
            eps=values["layer_norm_epsilon"],
            activation="gelu_new" if (gate, act) == ("gated", "gelu") else act,
            gated=gate == "gated",
            tied=bool(text_config.get("scale_decoder_outputs", tied)),
            max_length=values["n_positions"] or MAX_LENGTH,
        )
        if config.activation not in _ACTIVATIONS or gate not in ("", "gated"):
            raise ConfigError(
                f"The checkpoint's text model has feed_forward_proj={values['feed_forward_proj']!r}; this decoder has "
                f"{', '.join(_ACTIVATIONS)}, alone or after 'gated-'. Supply a decoder of your own through mm_decoder."
            )
        return config


def wide(dtype: torch.dtype) -> torch.dtype:
    """What residuals are summed in: T5's outgrow float16."""
    return torch.float32 if dtype == torch.float16 else dtype


class T5Norm(RMSNorm):
    """RMS norm whose residual may be wider than what it gives."""

    def add_(self, x: Tensor, residual: Tensor) -> Tensor:
        """Add x to `residual` in place, then normalise the sum, rounded to the weights' dtype."""
        if residual.dtype == self.weight.dtype:
            return super().add_(x, residual)
        return self.forward(residual.add_(x))

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] → [..., size] of the weights' dtype."""
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        return F.rms_norm(x, self.weight.shape, None, self.eps).to(self.weight.dtype).mul_(self.weight)


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k and v, each [T, heads, head_dim] → [T, heads, head_dim]."""


class T5SelfAttention(nn.Module):
    """Projections of self-attention; the attention itself is the stack's."""

    def __init__(self, config: T5Config, context: BuildContext) -> None:
        super().__init__()
        device, dtype, inner = context.device, context.dtype, config.num_heads * config.head_dim
        self.heads = config.num_heads
        self.qkv = MergedLinear(config.width, (inner,) * 3, bias=False, device=device, dtype=dtype)
        self.o = Linear(inner, config.width, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor, attend: Attend) -> Tensor:
        """[T, width] → [T, width]."""
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, -1).unbind(1)
        out: Tensor = self.o(attend(q, k, v).flatten(1))
        return out


class T5CrossAttention(nn.Module):
    """Attention of answers to sources, whose keys and values lie in the table "cross"."""

    def __init__(self, config: T5Config, layer: int, context: BuildContext) -> None:
        super().__init__()
        device, dtype, inner = context.device, context.dtype, config.num_heads * config.head_dim
        self.heads = config.num_heads
        self.layer = layer
        self.q = Linear(config.width, inner, bias=False, device=device, dtype=dtype)
        self.kv = MergedLinear(config.width, (inner, inner), bias=False, device=device, dtype=dtype)
        self.o = Linear(inner, config.width, bias=False, device=device, dtype=dtype)
        self.attend = PagedAttention(layer, scale=1.0, table="cross")

    def forward(self, x: Tensor, context: ForwardContext) -> Tensor:
        """[T, width] → [T, width]."""
        q = self.q(x).view(len(x), self.heads, -1)
        out: Tensor = self.o(self.attend(q, None, None, context).flatten(1))
        return out

    def write(self, rows: Tensor, context: ForwardContext) -> None:
        """Project source rows [N, width] and write them where the table's slots say."""
        k, v = self.kv(rows).view(len(rows), 2, self.heads, -1).unbind(1)
        slots = context.tables["cross"].slot_mapping
        assert slots is not None, "a source is written somewhere"
        cache = context.caches["cross"][self.layer]
        kv_write(k, v, cache.k, cache.v, slots, cache.scales)


class T5MLP(nn.Module):
    """wo(act(wi x)), or wo(act(wi_0 x) · wi_1 x) with wi_0 and wi_1 fused. In float16 the product and `wo` are
    computed in float32, as transformers does: they outgrow it."""

    def __init__(self, config: T5Config, context: BuildContext) -> None:
        super().__init__()
        device, dtype, inner = context.device, context.dtype, config.intermediate_size
        self.act = _ACTIVATIONS[config.activation]
        self.gated = config.gated
        self.wi = MergedLinear(config.width, (inner,) * (1 + config.gated), bias=False, device=device, dtype=dtype)
        self.wo = Linear(inner, config.width, bias=False, device=device, dtype=wide(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] → [..., width], in float32 where x is float16."""
        x = self.wi(x).to(wide(x.dtype))
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            x = self.act(gate) * up
        else:
            x = self.act(x)
        out: Tensor = self.wo(x)
        return out


class T5Layer(nn.Module):
    """Self-attention, in the decoder cross-attention, and a feed-forward layer, each after its norm, which first adds
    the preceding block's output to the residual. context: of the module's making; cross: in the decoder."""

    def __init__(self, config: T5Config, layer: int, context: BuildContext, *, cross: bool) -> None:
        super().__init__()
        self.attn_norm = t5_norm(config, context)
        self.attn = T5SelfAttention(config, context)
        self.cross_norm = t5_norm(config, context) if cross else None
        self.cross = T5CrossAttention(config, layer, context) if cross else None
        self.mlp_norm = t5_norm(config, context)
        self.mlp = T5MLP(config, context)

    def forward(
        self,
        x: Tensor | None,
        residual: Tensor,
        attend: Attend,
        context: ForwardContext | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As LlamaLayer.forward; context: in the decoder."""
        norm = self.attn_norm
        x = self.attn(norm(residual) if x is None else norm.add_(x, residual), attend)
        if self.cross is not None and self.cross_norm is not None:
            x = self.cross(self.cross_norm.add_(x, residual), context)
        if rows is not None:
            x, residual = x.index_select(0, rows), residual.index_select(0, rows)
        out: Tensor = self.mlp(self.mlp_norm.add_(x, residual))
        return out, residual


def t5_norm(config: T5Config, context: BuildContext) -> T5Norm:
    """A norm over the model's width."""
    return T5Norm(config.width, config.eps, device=context.device, dtype=context.dtype)
