"""T5 (Raffel et al. 2020) and Flan-T5: a text encoder, and a decoder that attends to what it gives.

Attention is not scaled; where tokens lie is told by a bias on the scores alone, one a head and distance,
which all layers share. The encoder works on padded sources, the decoder on flattened batches and paged
caches as in `llama.py`.

Memory of the decoder's bias: heads · max_model_len² values, 17 MB for Flan-T5-XL (32 heads, 512 tokens, 16 bits).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_core.decoders.relative import RelativeBias
from mm_core.decoders.t5_layers import T5Config, T5CrossAttention, T5Layer, t5_norm, wide
from mm_core.hookspecs import BuildContext, DecoderSpec, KVCacheSpec, WeightMap
from mm_core.kernels.linear import linear
from mm_core.layers import Embedding, ForwardContext, Linear, PackedWeight, PagedAttention, pack

T5_PREFIXES = ("language_model.", "model.language_model.", "")
"""Where checkpoints keep the model: wrapped ones, text-only models."""

SCORES = 2**26  # of the encoder at a time, heads included: 128 MB in 16 bits


class T5Encoder(nn.Module):
    """The text encoder: bidirectional, on padded sources."""

    def __init__(self, config: T5Config, context: BuildContext) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.bias = RelativeBias(config.buckets, config.num_heads, config.far, context, bidirectional=True)
        self.layers = nn.ModuleList(T5Layer(config, i, context, cross=False) for i in range(config.encoder_layers))
        self.norm = t5_norm(config, context)

    def forward(self, embeds: Tensor, bounds: Tensor, longest: int) -> Tensor:
        """[N, width] of the sources bounds [S + 1] int32 → [N, width]. Does not wait for the device."""
        rows = torch.arange(len(embeds), device=embeds.device, dtype=bounds.dtype)
        owner = torch.searchsorted(bounds[1:], rows, right=True).clamp(max=len(bounds) - 2)
        places = owner * longest + (rows - bounds[owner])  # of each row among the padded ones
        bias = self.bias(longest, longest)
        together = max(SCORES // (self.heads * longest * longest), 1)
        parts = [
            self._encode(embeds, bounds[first : first + together + 1], longest, bias)
            for first in range(0, len(bounds) - 1, together)
        ]
        padded = parts[0] if len(parts) == 1 else torch.cat(parts)
        return padded.index_select(0, places)

    def _encode(self, embeds: Tensor, bounds: Tensor, longest: int, bias: Tensor) -> Tensor:
        """[N, width] of all sources, bounds [S + 1] of some → [S · longest, width] of these."""
        lengths = bounds.diff()[:, None].clamp(min=1)
        index = torch.arange(longest, device=embeds.device, dtype=bounds.dtype)
        # Rows past a source's end repeat its last one, so that whatever is computed of them is finite.
        picked = bounds[:-1, None] + torch.minimum(index, lengths - 1)
        residual = embeds[picked.clamp(max=len(embeds) - 1)].to(wide(embeds.dtype)).flatten(0, 1)
        hidden = (index >= lengths)[:, None, None, :]
        mask = bias.masked_fill(hidden, float("-inf"))  # [S, heads, longest, longest]

        def attend(*qkv: Tensor) -> Tensor:
            q, k, v = (part.view(-1, longest, *part.shape[1:]).transpose(1, 2) for part in qkv)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0).transpose(1, 2).flatten(0, 1)

        x: Tensor | None = None
        for layer in self.layers:
            x, residual = layer(x, residual, attend)
        assert x is not None, "an encoder has at least one layer"
        return self.norm.add_(x, residual)


class T5AnswerStack(nn.Module):
    """The decoder's layers. `scores`: the bias of every query and key, [heads, max_model_len, max_model_len]."""

    scores: Tensor

    def __init__(self, config: T5Config, context: BuildContext) -> None:
        super().__init__()
        self.bias = RelativeBias(config.buckets, config.num_heads, config.far, context, bidirectional=False)
        self.layers = nn.ModuleList(T5Layer(config, i, context, cross=True) for i in range(config.decoder_layers))
        self.attend = nn.ModuleList(PagedAttention(i, scale=1.0) for i in range(config.decoder_layers))
        self.norm = t5_norm(config, context)
        n = context.max_model_len
        scores = torch.zeros((config.num_heads, n, n), device=context.device, dtype=context.dtype)
        self.register_buffer("scores", scores, persistent=False)

    def forward(self, embeds: Tensor, context: ForwardContext) -> Tensor:
        """[T, width] → [T, width], or [R, width] of the tokens `context.rows`."""
        residual = embeds.to(wide(embeds.dtype), copy=True)
        x: Tensor | None = None
        last = len(self.layers) - 1
        for index, (layer, attend) in enumerate(zip(self.layers, self.attend, strict=True)):
            biased = partial(attend, context=context, bias=self.scores)
            x, residual = layer(x, residual, biased, context, context.rows if index == last else None)
        assert x is not None, "a decoder has at least one layer"
        return self.norm.add_(x, residual)

    def finish_loading(self) -> None:
        """Spread the loaded biases."""
        self.scores.copy_(self.bias(*self.scores.shape[1:]))


class T5Decoder(nn.Module):
    """hookspecs.Decoder for T5, with its text encoder. Parameter names: `shared`, `encoder.…`, `decoder.…`, and
    `lm_head` where it is not tied to `shared`."""

    def __init__(self, config: T5Config, context: BuildContext) -> None:
        super().__init__()
        placed: dict[str, Any] = {"device": context.device, "dtype": context.dtype}
        layers, heads, size = config.decoder_layers, config.num_heads, config.head_dim
        self.config = config
        self.hidden_size = config.width
        self.vocab_size = config.vocab_size
        self.position_axes = 1
        self.kv_specs = tuple(KVCacheSpec(name, layers, heads, size) for name in ("self", "cross"))
        self.shared = Embedding(config.vocab_size, config.width, **placed)
        self.encoder = T5Encoder(config, context)
        self.decoder = T5AnswerStack(config, context)
        self.packed_head: PackedWeight | None = None  # of a tied head, beside the embedding
        self.lm_head = None if config.tied else Linear(config.width, config.vocab_size, bias=False, **placed)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] int64 → [T, hidden]."""
        rows: Tensor = self.shared(token_ids)
        return rows

    def encode_source(self, embeds: Tensor, bounds: Tensor, longest: int) -> Tensor:
        """[N, hidden] of the sources bounds [S + 1] int32, the longest of `longest` rows → [N, hidden]."""
        rows: Tensor = self.encoder(embeds, bounds, longest)
        return rows

    def write_source(self, rows: Tensor, context: ForwardContext) -> None:
        """[N, hidden] of encoded sources to every layer's keys and values."""
        for module in self.modules():
            if isinstance(module, T5CrossAttention):
                module.write(rows, context)

    def forward(self, inputs_embeds: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:  # noqa: ARG002
        """[T, hidden] → [T, hidden] after the final norm, or [R, hidden] of the tokens `context.rows`; positions
        follow from the tables. The input is not changed."""
        out: Tensor = self.decoder(inputs_embeds, context)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] → [R, vocab], for the rows that are sampled from."""
        if self.lm_head is not None:
            scores: Tensor = self.lm_head(hidden)
            return scores
        scaled = hidden * self.config.width**-0.5
        if self.packed_head is not None:
            return self.packed_head.linear(scaled, None)
        return linear(scaled, self.shared.weight, None)

    def finish_loading(self) -> None:
        """Pack a tied head for the CPU: a copy, because the embedding needs the plain rows."""
        if self.lm_head is None:
            self.packed_head = pack(self.shared.weight)


def t5_weight_map(prefixes: tuple[str, ...] = T5_PREFIXES, *, tied: bool = True) -> WeightMap:
    """Names of T5Decoder's tensors below any of `prefixes` (each is empty or ends with a dot).

    tied: the checkpoint's `lm_head.weight`, where it has one, repeats the embedding.
    """
    body = f"(?:{'|'.join(re.escape(p) for p in prefixes)})"
    layer = rf"{body}(encoder|decoder)\.block\.(\d+)\.layer\.\d+\."
    attention = (("q", 0), ("k", 1), ("v", 2))
    copies = {f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")}
    return WeightMap(
        rename=(
            (rf"{body}(shared|lm_head)\.", r"\1."),
            (rf"{body}(encoder|decoder)\.embed_tokens\.", r"\1.embed_tokens."),
            (rf"{body}(encoder|decoder)\.final_layer_norm\.", r"\1.norm."),
            (layer + r"SelfAttention\.relative_attention_bias\.", r"\1.bias."),
            (layer + r"SelfAttention\.", r"\1.layers.\2.attn."),
            (layer + r"EncDecAttention\.", r"\1.layers.\2.cross."),
            (layer + r"DenseReluDense\.", r"\1.layers.\2.mlp."),
            (layer.removesuffix(r"\d+\.") + r"0\.layer_norm\.", r"\1.layers.\2.attn_norm."),
            (rf"{body}decoder\.block\.(\d+)\.layer\.1\.layer_norm\.", r"decoder.layers.\1.cross_norm."),
            (layer + r"layer_norm\.", r"\1.layers.\2.mlp_norm."),
        ),
        fused=(
            *((f"attn.{name}", "attn.qkv", shard) for name, shard in attention),
            *((f"cross.{name}", "cross.kv", shard - 1) for name, shard in attention[1:]),
            *((f"mlp.wi_{shard}", "mlp.wi", shard) for shard in (0, 1)),
        ),
        ignore=(r".*EncDecAttention\.relative_attention_bias\.weight$",),
        tied={**copies, **({"lm_head.weight": "shared.weight"} if tied else {})},
    )


def t5_spec(text_config: Mapping[str, Any]) -> DecoderSpec:
    """The decoder for a language model's settings."""
    config = T5Config.from_text_config(text_config)
    return DecoderSpec(
        build=partial(T5Decoder, config), weight_map=t5_weight_map(tied=config.tied), max_model_len=config.max_length
    )
