"""Arithmetic and memory traffic of encode, prefill and decode, and the floor that they set.

A multiply-add is two operations. Traffic is what must be read at least: weights once a pass, and
each sequence's KV; activations are left out. No prefix is assumed to be read once for several.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from mm_core.benchspecs import BenchDecoder
from mm_core.tracing import Span

PHASES = ("encode", "prefill", "decode")


@dataclass(frozen=True)
class Work:
    """Floating-point operations and bytes."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def seconds(self, ceilings: Ceilings) -> float:
        """The larger of arithmetic and traffic, each at its ceiling."""
        return max(self.flops / ceilings.flops, self.bytes / ceilings.bandwidth)


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches: operations a second in a large matrix product, bytes a second in a copy or read."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class DecoderSize:
    """A decoder: weights of all layers, of the output head, and bytes of KV a token. source_params: those that
    make keys and values of a source's rows, which are as large as a token's."""

    layers: int
    heads: int
    head_dim: int
    layer_params: int
    head_params: int
    kv_bytes: int
    itemsize: int
    source_params: int = 0

    @classmethod
    def from_text_config(cls, text: Mapping[str, Any], itemsize: int, kv_itemsize: int | None = None) -> Self:
        """From a checkpoint's `text_config`, as Llama spells it."""
        hidden, heads = text["hidden_size"], text["num_attention_heads"]
        sizes = BenchDecoder(
            layers=text["num_hidden_layers"],
            hidden=hidden,
            heads=heads,
            kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=text.get("head_dim") or hidden // heads,
            intermediate=text["intermediate_size"],
            vocab=text["vocab_size"],
        )
        return cls.of(sizes, itemsize, kv_itemsize)

    @classmethod
    def of(cls, sizes: BenchDecoder, itemsize: int, kv_itemsize: int | None = None) -> Self:
        """Attention: q, k, v, o, with cross-attention q and o again; kv_itemsize: bytes of a number in the KV
        cache (None: as the weights)."""
        hidden, layers, dim = sizes.hidden, sizes.layers, sizes.head_dim
        attention = hidden * dim * (2 * sizes.heads + 2 * sizes.kv_heads + (2 * sizes.heads if sizes.cross else 0))
        return cls(
            layers=layers,
            heads=sizes.heads,
            head_dim=dim,
            layer_params=layers * (attention + sizes.mlp_matrices * hidden * sizes.intermediate),
            head_params=hidden * sizes.vocab,
            kv_bytes=2 * layers * sizes.kv_heads * dim * (itemsize if kv_itemsize is None else kv_itemsize),
            itemsize=itemsize,
            source_params=2 * layers * hidden * sizes.kv_heads * dim if sizes.cross else 0,
        )

    @property
    def weight_bytes(self) -> int:
        """What one pass reads of the layers and the head."""
        return (self.layer_params + self.head_params) * self.itemsize

    def tokens(self, count: float, samples: float, context: float, kv_read: float) -> Work:
        """One pass over `count` tokens of which `samples` get logits; each token attends to `context`
        tokens on average; kv_read: tokens of KV that the pass reads."""
        attention = 4 * self.layers * self.heads * self.head_dim * count * context
        flops = 2 * count * self.layer_params + 2 * samples * self.head_params + attention
        return Work(flops, self.weight_bytes + kv_read * self.kv_bytes)


@dataclass(frozen=True)
class RequestSize:
    """What one request asks of the decoder: prompt tokens, those of them with KV from the cache, output tokens;
    rows that cross-attention reads, those of them that are to be projected."""

    prompt: int
    cached: int
    output: int
    source: int = 0
    projected: int = 0


def prefill_work(size: DecoderSize, requests: Sequence[RequestSize]) -> Work:
    """All prompts in one pass, causal. The KV of cached tokens is read, that of new ones is at hand."""
    total = Work(0.0, size.weight_bytes)
    for r in requests:
        new = r.prompt - r.cached
        part = size.tokens(new, 1, r.source + r.cached + (new + 1) / 2, r.source + r.cached)
        total += Work(part.flops + 2 * r.projected * size.source_params, part.bytes - size.weight_bytes)
    return total


def decode_passes(requests: Sequence[RequestSize], max_num_seqs: int) -> int:
    """The fewest passes that make every output token after the first (prefill's): a sequence gets one
    a pass, and a pass has at most max_num_seqs."""
    after = [r.output - 1 for r in requests]
    return max(max(after, default=0), math.ceil(sum(after) / max_num_seqs))


def decode_work(size: DecoderSize, requests: Sequence[RequestSize], max_num_seqs: int) -> Work:
    """All decoding, in the fewest passes: the weights once a pass, each token's KV once for each sequence."""
    count = sum(r.output - 1 for r in requests)
    if not count:
        return Work()
    kv = sum((r.output - 1) * (r.source + r.prompt) + (r.output - 1) * r.output // 2 for r in requests)
    once = size.tokens(count, count, kv / count, kv)
    return once + Work(0.0, (decode_passes(requests, max_num_seqs) - 1) * size.weight_bytes)


def floor_seconds(
    ceilings: Ceilings, encode: Work, size: DecoderSize, requests: Sequence[RequestSize], max_num_seqs: int
) -> dict[str, float]:
    """Seconds by phase, at least, of an engine that runs the phases one after another and reads each
    sequence's KV by itself. An engine that reads a shared prefix once for several sequences, or decodes
    in the passes of prefill, can go under it.
    """
    return {
        "encode": encode.seconds(ceilings) if encode.flops else 0.0,
        "prefill": prefill_work(size, requests).seconds(ceilings),
        "decode": decode_work(size, requests, max_num_seqs).seconds(ceilings),
    }


def encoder_work(flops: Iterable[float], params: int, itemsize: int, passes: int = 1) -> Work:
    """Items of the given arithmetic, the encoder's weights read once a pass; nothing for no items."""
    total = math.fsum(flops)
    return Work(total, float(params * itemsize * passes)) if total else Work()


def span_work(size: DecoderSize, span: Span) -> Work:
    """What a decoder span did, from its args: tokens, sequences, kv_tokens (the context lengths'
    sum, with this step's tokens), source_tokens (the sources' sum, where there are some), projected (rows of
    sources made keys and values of). Tokens are taken as spread evenly over the sequences."""
    tokens, sequences = float(span.args.get("tokens", 0)), float(span.args.get("sequences", 0))
    kv_tokens, source = float(span.args.get("kv_tokens", 0)), float(span.args.get("source_tokens", 0))
    projecting = Work(2 * float(span.args.get("projected", 0)) * size.source_params)
    if not tokens or not sequences:
        return projecting
    context = (kv_tokens + source) / sequences - (tokens / sequences - 1) / 2
    read = kv_tokens + source - (tokens if span.name == "prefill" else 0)
    return size.tokens(tokens, min(sequences, tokens), context, read) + projecting
