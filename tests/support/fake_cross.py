"""A tiny decoder with cross-attention and a text encoder, its dense form, and the parts around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_core.config import SamplingParams
from mm_core.hookspecs import KVCacheSpec, WeightMap
from mm_core.kernels import varlen_attention
from mm_core.kernels.kv_write import kv_write
from mm_core.layers import ForwardContext, LayerNorm, Linear, PagedAttention
from mm_core.runner.fusing import Modules
from mm_core.runner.memory import KVCache
from mm_core.runner.runner import ModelRunner, RunnerLimits
from mm_core.scheduler.sequence import EncodeItem, ScheduledSequence
from mm_core.scheduler.sequence import Sequence as SequenceState
from mm_core.types import MediaFeature, PlaceholderRange, PreparedRequest, Source
from support.tiny import randomize_

CPU = torch.device("cpu")
VOCAB, HIDDEN, HEADS, LAYERS, LENGTH = 97, 64, 4, 2, 256
ENCODED = 24  # width of the encoder's rows
SIZE = HIDDEN // HEADS
BLOCK = 16


class CrossLayer(nn.Module):
    """Self-attention with a position bias, then cross-attention."""

    def __init__(self, layer: int, source_width: int) -> None:
        super().__init__()
        self.norm, self.cross_norm = (LayerNorm(HIDDEN, 1e-5) for _ in range(2))
        self.qkv = Linear(HIDDEN, 3 * HIDDEN)
        self.out, self.cross_q, self.cross_out = (Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.cross_kv = Linear(source_width, 2 * HIDDEN)
        self.attend = PagedAttention(layer, scale=SIZE**-0.5)
        self.attend_source = PagedAttention(layer, scale=SIZE**-0.5, table="cross")

    def forward(self, x: Tensor, bias: Tensor, context: ForwardContext) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).view(len(x), 3, HEADS, SIZE).unbind(1)
        x = x + self.out(self.attend(q, k, v, context, bias=bias).flatten(1))
        q = self.cross_q(self.cross_norm(x)).view(len(x), HEADS, SIZE)
        return x + self.cross_out(self.attend_source(q, None, None, context).flatten(1))

    def source(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.cross_kv(rows).view(len(rows), 2, HEADS, SIZE).unbind(1)
        return k, v

    def dense(self, x: Tensor, bias: Tensor, rows: Tensor) -> Tensor:
        """One sequence, its source's rows as they are."""
        q, k, v = (t.transpose(0, 1) for t in self.qkv(self.norm(x)).view(len(x), 3, HEADS, SIZE).unbind(1))
        future = torch.ones(len(x), len(x)).triu(1).bool()
        mask = bias[:, : len(x), : len(x)].masked_fill(future, float("-inf"))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1).flatten(1))
        q = self.cross_q(self.cross_norm(x)).view(len(x), HEADS, SIZE).transpose(0, 1)
        k, v = (t.transpose(0, 1) for t in self.source(rows))
        return x + self.cross_out(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))


class CrossDecoder(nn.Module):
    """hookspecs.Decoder. reads_text: with `encode_source`, a layer of attention over text and rows in place.

    broken: lengths of sources that cannot be written. written: rows of each call of `write_source`."""

    hidden_size, position_axes = HIDDEN, 1
    kv_specs = (KVCacheSpec("self", LAYERS, HEADS, SIZE), KVCacheSpec("cross", LAYERS, HEADS, SIZE))

    def __init__(self, *, reads_text: bool = False, vocab_size: int = VOCAB) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.embed_tokens = nn.Embedding(vocab_size, HIDDEN)
        self.layers = nn.ModuleList(CrossLayer(i, HIDDEN if reads_text else ENCODED) for i in range(LAYERS))
        self.reader = Linear(HIDDEN, 3 * HIDDEN) if reads_text else None
        self.bias = nn.Parameter(torch.empty(HEADS, LENGTH, LENGTH))
        self.broken: set[int] = set()
        self.written: list[int] = []

    def embed(self, token_ids: Tensor) -> Tensor:
        rows: Tensor = self.embed_tokens(token_ids)
        return rows

    def forward(self, inputs_embeds: Tensor, positions: Tensor, context: ForwardContext) -> Tensor:
        assert positions.shape == (1, len(inputs_embeds))
        x = inputs_embeds
        for layer in self.layers:
            x = layer(x, self.bias, context)
        return x if context.rows is None else x.index_select(0, context.rows)

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.embed_tokens.weight.T

    def encode_source(self, embeds: Tensor, bounds: Tensor, longest: int) -> Tensor:
        assert self.reader is not None
        q, k, v = self.reader(embeds).view(len(embeds), 3, HEADS, SIZE).unbind(1)
        return embeds + varlen_attention(q, k, v, bounds, max_seqlen=longest, scale=SIZE**-0.5).flatten(1)

    def write_source(self, rows: Tensor, context: ForwardContext) -> None:
        table = context.tables["cross"]
        assert not table.causal
        assert table.kv_lens.tolist() == table.cu_seqlens_q.diff().tolist()
        if self.broken & set(table.kv_lens.tolist()):
            raise ValueError("this source cannot be written")
        self.written.append(len(rows))
        assert table.slot_mapping is not None
        for layer, cache in zip(self.layers, context.caches["cross"], strict=False):
            kv_write(*layer.source(rows), cache.k, cache.v, table.slot_mapping, cache.scales)

    def dense(self, token_ids: Sequence[int], rows: Tensor) -> Tensor:
        """Hidden states of a whole sequence; rows: what `write_source` is given."""
        x = self.embed(torch.tensor(token_ids))
        for layer in self.layers:
            x = layer.dense(x, self.bias, rows)
        return x


class RowsEncoder(nn.Module):
    """Gives what the feature holds."""

    hidden_size = ENCODED
    weight_map = WeightMap(())

    def cost(self, feature: MediaFeature) -> int:
        return feature.num_tokens

    def forward(self, features: Sequence[MediaFeature]) -> list[Tensor]:
        for feature in features:
            if "broken" in feature.info:
                raise ValueError("cannot read this one")
        return [f.tensors["rows"] for f in features]


class Condition(nn.Module):
    """Two rows an item, that depend on its rows and on what is asked."""

    weight_map = WeightMap(())
    decoder_prompt = (1,)

    def __init__(self, kind: str = "embed") -> None:
        super().__init__()
        self.kind = kind
        self.proj = Linear(ENCODED, HIDDEN)
        self.calls = 0
        self.broken: tuple[int, ...] | None = None  # an instruction that fails

    def positions(self, token_ids: Any, ranges: Any) -> None:
        return None

    def condition(self, rows: Sequence[Tensor], instructions: Sequence[Sequence[int]]) -> list[Tensor]:
        self.calls += 1
        if self.broken in instructions:
            raise ValueError("no such question")
        return [
            self.proj(torch.stack([r.mean(0) + sum(asked), r.amax(0)]))
            for r, asked in zip(rows, instructions, strict=True)
        ]


class Plain:
    """A fusion without anything of its own."""

    decoder_prompt = (1,)

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def positions(self, token_ids: Any, ranges: Any) -> None:
        return None


def make_runner(fusion: Any, *, reads_text: bool = False, decoder: Any = None) -> ModelRunner:
    """A runner of random weights, its KV cache full of noise."""
    decoder = decoder or CrossDecoder(reads_text=reads_text)
    for seed, module in enumerate(m for m in (decoder, fusion) if isinstance(m, nn.Module)):
        randomize_(module, seed)
        module.requires_grad_(False)
    kv = KVCache(decoder.kv_specs, 64, BLOCK, torch.float32, CPU)
    torch.manual_seed(0)
    for k, v, _ in kv.caches["self"]:
        k.normal_()
        v.normal_()
    modules = Modules("fake", decoder, RowsEncoder(), fusion)
    return ModelRunner(modules, kv, CPU, RunnerLimits(8, LENGTH, 200, 256, source_budget=128))


def feature(name: str, rows: int, *, num_fused: int | None = None, **info: Any) -> MediaFeature:
    noise = torch.randn(rows, ENCODED, generator=torch.Generator().manual_seed(ord(name[0])))
    return MediaFeature("image", rows, {"rows": noise}, info, name.encode(), num_fused)


def media_source(*features: MediaFeature) -> Source:
    """What a decoder reads that attends to the encoder's rows."""
    key = b"".join(f.key for f in features)
    ranges = tuple(PlaceholderRange(0, 0, (), f) for f in features)
    return Source(key, sum(f.num_placed for f in features), (), ranges)


def text_source(ids: Sequence[int], *placed: tuple[int, MediaFeature]) -> Source:
    """Text with items in it, (offset, item) each."""
    ranges = tuple(PlaceholderRange(at, f.num_placed, (True,) * f.num_placed, f) for at, f in placed)
    return Source(repr((ids, placed)).encode(), len(ids), tuple(ids), ranges)


def scheduled(
    slot: int, start: int, length: int, known: int, source: Source | None, block: int = 0, **extra: Any
) -> ScheduledSequence:
    """A sequence of `known` ids of which tokens [start, start + length) run. block: the first one of its source."""
    ids = tuple((7 * slot + 3 * i) % 90 for i in range(known))
    seq = SequenceState(slot, PreparedRequest("r", ids, SamplingParams(max_tokens=9), source=source, **extra))
    seq.slot = slot
    blocks = -(-(start + length) // BLOCK)
    seq.tables = {"self": list(range(4 * slot, 4 * slot + blocks))}
    if source is not None:
        count = -(-source.num_tokens // BLOCK)
        seq.tables["cross"] = [63 - block - 2 * i for i in range(count)]  # neither in order nor neighbours
    return ScheduledSequence(seq, start, length, start + length >= known, seq.tables)


def encode(*features: MediaFeature) -> tuple[EncodeItem, ...]:
    return tuple(EncodeItem(f.key, f) for f in features)


def keys_at(runner: ModelRunner, table: Sequence[int], count: int) -> list[np.ndarray[Any, Any]]:
    """The first `count` keys of every layer behind a block table."""
    return [k[list(table)].flatten(0, 1)[:count].numpy().copy() for k, *_ in runner.kv.caches["cross"]]
