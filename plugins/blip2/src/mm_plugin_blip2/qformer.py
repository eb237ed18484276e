"""The Q-Former of BLIP-2 (Li et al. 2023) and InstructBLIP (Dai et al. 2023): a BERT whose learned queries read a
picture by cross-attention, and in InstructBLIP the instruction by self-attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_core.hookspecs import BuildContext, WeightMap
from mm_core.kernels import varlen_attention
from mm_core.layers import Embedding, LayerNorm, Linear, MergedLinear, empty_parameter
from mm_core.towers import activation


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes of a Q-Former. queries: rows a picture becomes. image_width: of the tower's rows. out: the language
    model's width. vocab_size: of the instruction's tokenizer, 0 where none is read."""

    queries: int
    width: int
    layers: int
    heads: int
    intermediate: int
    image_width: int
    out: int
    cross_every: int
    act: str
    eps: float
    vocab_size: int = 0
    positions: int = 512

    @classmethod
    def from_config(cls, config: Mapping[str, Any], image_width: int, out: int) -> Self:
        """From a checkpoint's config.json; missing settings take transformers' defaults."""
        own = config.get("qformer_config") or {}
        reads_text = config.get("model_type") == "instructblip"
        return cls(
            queries=config.get("num_query_tokens", 32),
            width=own.get("hidden_size", 768),
            layers=own.get("num_hidden_layers", 12),
            heads=own.get("num_attention_heads", 12),
            intermediate=own.get("intermediate_size", 3072),
            image_width=image_width,
            out=out,
            cross_every=own.get("cross_attention_frequency", 2),
            act=own.get("hidden_act", "gelu"),
            eps=own.get("layer_norm_eps", 1e-12),
            vocab_size=own.get("vocab_size", 30522) if reads_text else 0,
            positions=own.get("max_position_embeddings", 512),
        )


class Layout(NamedTuple):
    """Who attends to whom: of rows, all queries first, then all instructions. bounds [S + 1] int32 and longest: of
    the pictures' segments, queries then instruction; order: rows as these lie, inverse: back; None where there is no
    instruction. ids, positions: of the instructions' tokens."""

    bounds: Tensor
    longest: int
    order: Tensor | None = None
    inverse: Tensor | None = None
    ids: Tensor | None = None
    positions: Tensor | None = None


def make_layout(queries: int, count: int, instructions: Sequence[Sequence[int]], device: torch.device) -> Layout:
    """The layout of `count` pictures, each with an instruction or none at all; one copy to the device."""
    lengths = [len(i) for i in instructions]
    if not sum(lengths):
        bounds = torch.arange(0, (count + 1) * queries, queries, dtype=torch.int32, device=device)
        return Layout(bounds, queries)
    begins = list(accumulate(lengths, initial=count * queries))
    rows = [
        part
        for item, (begin, length) in enumerate(zip(begins, lengths, strict=False))
        for part in (np.arange(item * queries, (item + 1) * queries), np.arange(begin, begin + length))
    ]
    order = np.concatenate(rows)
    parts = [
        order,
        np.argsort(order),
        np.concatenate([np.asarray(i, np.int64) for i in instructions]),
        np.concatenate([np.arange(n) for n in lengths]),
        np.cumsum([0, *(queries + n for n in lengths)]),
    ]
    packed = torch.from_numpy(np.concatenate(parts).astype(np.int64))
    packed = packed.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else packed
    order_, inverse, ids, positions, ends = torch.split(packed, [len(p) for p in parts])
    return Layout(ends.int(), queries + max(lengths), order_, inverse, ids, positions)


class QFormerBlock(nn.Module):
    """norm(project(what was attended to or made) + x), as BERT has it; dense: the projection before the sum."""

    def __init__(self, inner: int, config: QFormerConfig, context: BuildContext) -> None:
        super().__init__()
        self.dense = Linear(inner, config.width, device=context.device, dtype=context.dtype)
        self.norm = LayerNorm(config.width, config.eps, device=context.device, dtype=context.dtype)

    def forward(self, made: Tensor, x: Tensor) -> Tensor:
        """[T, inner], [T, width] → [T, width]; x is used up."""
        return self.norm.add_(self.dense(made), x)


class SelfAttention(nn.Module):
    """Within each picture's queries and instruction."""

    def __init__(self, config: QFormerConfig, context: BuildContext) -> None:
        super().__init__()
        self.heads = config.heads
        self.scale = (config.width // config.heads) ** -0.5
        self.qkv = MergedLinear(config.width, (config.width,) * 3, device=context.device, dtype=context.dtype)
        self.output = QFormerBlock(config.width, config, context)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """[T, width] → [T, width]; x is used up."""
        qkv = self.qkv(x)
        if layout.order is not None:
            qkv = qkv.index_select(0, layout.order)
        q, k, v = qkv.view(len(x), 3, self.heads, -1).unbind(1)
        out = varlen_attention(q, k, v, layout.bounds, max_seqlen=layout.longest, scale=self.scale).flatten(1)
        if layout.inverse is not None:
            out = out.index_select(0, layout.inverse)
        rows: Tensor = self.output(out, x)
        return rows


class CrossAttention(nn.Module):
    """Of queries to their picture."""

    def __init__(self, config: QFormerConfig, context: BuildContext) -> None:
        super().__init__()
        device, dtype = context.device, context.dtype
        self.heads = config.heads
        self.query = Linear(config.width, config.width, device=device, dtype=dtype)
        self.kv = MergedLinear(config.image_width, (config.width,) * 2, device=device, dtype=dtype)
        self.output = QFormerBlock(config.width, config, context)

    def forward(self, x: Tensor, images: Tensor) -> Tensor:
        """[S · queries, width], [S, rows, image_width] → [S · queries, width]; x is used up."""
        count, rows = images.shape[:2]
        q = self.query(x).view(count, -1, self.heads, x.shape[1] // self.heads).transpose(1, 2)
        kv = self.kv(images.flatten(0, 1)).view(count, rows, 2, self.heads, -1)
        k, v = (part.transpose(1, 2) for part in kv.unbind(2))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), -1)
        made: Tensor = self.output(out, x)
        return made


class FeedForward(nn.Module):
    """BERT's, with its norm."""

    def __init__(self, config: QFormerConfig, context: BuildContext) -> None:
        super().__init__()
        self.act = activation(config.act)
        self.up = Linear(config.width, config.intermediate, device=context.device, dtype=context.dtype)
        self.output = QFormerBlock(config.intermediate, config, context)

    def forward(self, x: Tensor) -> Tensor:
        """[T, width] → [T, width]; x is used up."""
        rows: Tensor = self.output(self.act(self.up(x)), x)
        return rows


class QFormerLayer(nn.Module):
    """Queries and instruction attend to each other; queries then, in some layers, to the picture. Each of the two has
    a feed-forward layer of its own."""

    def __init__(self, config: QFormerConfig, index: int, context: BuildContext) -> None:
        super().__init__()
        self.attention = SelfAttention(config, context)
        self.cross = CrossAttention(config, context) if index % config.cross_every == 0 else None
        self.query_mlp = FeedForward(config, context)
        self.text_mlp = FeedForward(config, context) if config.vocab_size else None

    def forward(self, x: Tensor, images: Tensor, queries: int, layout: Layout) -> Tensor:
        """[T, width], of which the first `queries` rows are those → [T, width]; x is used up."""
        x = self.attention(x, layout)
        first, text = x[:queries], x[queries:]
        if self.cross is not None:
            first = self.cross(first, images)
        out: Tensor = self.query_mlp(first)
        return out if self.text_mlp is None or not len(text) else torch.cat((out, self.text_mlp(text)))


class QFormer(nn.Module):
    """Pictures' rows to `queries` rows each of the language model's width."""

    def __init__(self, config: QFormerConfig, context: BuildContext) -> None:
        super().__init__()
        device, dtype, width = context.device, context.dtype, config.width
        self.config = config
        self.query_tokens = empty_parameter(
            (config.queries, width), device, dtype, checkpoint_shape=(1, config.queries, width)
        )
        if config.vocab_size:
            self.word_embeddings = Embedding(config.vocab_size, width, device=device, dtype=dtype)
            self.position_embeddings = Embedding(config.positions, width, device=device, dtype=dtype)
        self.norm = LayerNorm(width, config.eps, device=device, dtype=dtype)
        self.layers = nn.ModuleList(QFormerLayer(config, i, context) for i in range(config.layers))
        self.projection = Linear(width, config.out, device=device, dtype=dtype)

    def forward(self, images: Tensor, instructions: Sequence[Sequence[int]] = ()) -> Tensor:
        """[S, rows, image_width] and S instructions, or none → [S, queries, out]."""
        count, queries = len(images), self.config.queries
        layout = make_layout(queries, count, instructions, images.device)
        x = self.query_tokens.repeat(count, 1)
        if layout.ids is not None and layout.positions is not None:
            text = self.word_embeddings(layout.ids) + self.position_embeddings(layout.positions)
            x = torch.cat((x, text))
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, images, count * queries, layout)
        rows: Tensor = self.projection(x[: count * queries])
        return rows.view(count, queries, -1)


def qformer_weight_map(into: str = "") -> WeightMap:
    """Names of a QFormer that is the attribute `into` (with a dot, or empty) of the module that is loaded."""
    layer, to = r"(?:model\.)?qformer\.encoder\.layer\.(\d+)\.", rf"{into}layers.\1."
    blocks = {
        "attention": "attention",
        "crossattention": "cross",
        "output_query": "query_mlp",
        "output": "text_mlp",
    }
    return WeightMap(
        rename=(
            (r"(?:model\.)?query_tokens$", f"{into}query_tokens"),
            (r"(?:model\.)?language_projection\.", f"{into}projection."),
            (r"(?:model\.)?qformer\.(?:embeddings\.)?layernorm\.", f"{into}norm."),
            (r"(?:model\.)?qformer\.embeddings\.", into),
            (layer + r"intermediate_query\.dense\.", f"{to}query_mlp.up."),
            (layer + r"intermediate\.dense\.", f"{to}text_mlp.up."),
            *(
                rule
                for name, ours in blocks.items()
                for rule in (
                    (layer + rf"{name}\.(?:output\.)?LayerNorm\.", f"{to}{ours}.output.norm."),
                    (layer + rf"{name}\.(?:output\.)?dense\.", f"{to}{ours}.output.dense."),
                )
            ),
            (layer + r"attention\.attention\.", f"{to}attention."),
            (layer + r"crossattention\.attention\.", f"{to}cross."),
        ),
        fused=(
            *((f"attention.{name}", "attention.qkv", shard) for shard, name in enumerate(("query", "key", "value"))),
            *((f"cross.{name}", "cross.kv", shard) for shard, name in enumerate(("key", "value"))),
        ),
        ignore=(r"(?:model\.)?qformer\.embeddings\.position_ids$",),
    )
