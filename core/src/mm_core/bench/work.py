"""Arithmetic and memory traffic of encode, prefill and decode, and the floor that they set.

A multiply-add is two operations. Traffic is what must be read at least: weights once a pass, and
each sequence's KV; activations are left out. No prefix is assumed to be read once for several.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

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
    """A Llama-like decoder: weights of all layers, of the output head, and bytes of KV a token."""

    layers: int
    heads: int
    head_dim: int
    layer_params: int
    head_params: int
    kv_bytes: int
    itemsize: int

    @classmethod
    def from_text_config(cls, text: Mapping[str, Any], itemsize: int, kv_itemsize: int | None = None) -> Self:
        """From a checkpoint's `text_config`. Attention: q, k, v, o; MLP: gate, up, down. kv_itemsize: bytes
        of a number in the KV cache (None: as the weights)."""
        hidden, layers, heads = text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"]
        kv_heads = text.get("num_key_value_heads") or heads
        head_dim = text.get("head_dim") or hidden // heads
        attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
        return cls(
            layers=layers,
            heads=heads,
            head_dim=head_dim,
            layer_params=layers * (attention + 3 * hidden * text["intermediate_size"]),
            head_params=hidden * text["vocab_size"],
            kv_bytes=2 * layers * kv_heads * head_dim * (itemsize if kv_itemsize is None else kv_itemsize),
            itemsize=itemsize,
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
    """What one request asks of the decoder: prompt tokens, those of them with KV from the cache, output tokens."""

    prompt: int
    cached: int
    output: int


def prefill_work(size: DecoderSize, requests: Sequence[RequestSize]) -> Work:
    """All prompts in one pass, causal. The KV of cached tokens is read, that of new ones is at hand."""
    total = Work(0.0, size.weight_bytes)
    for r in requests:
        new = r.prompt - r.cached
        part = size.tokens(new, 1, r.cached + (new + 1) / 2, r.cached)
        total += Work(part.flops, part.bytes - size.weight_bytes)
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
    kv = sum((r.output - 1) * r.prompt + (r.output - 1) * r.output // 2 for r in requests)
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
    sum, with this step's tokens). Tokens are taken as spread evenly over the sequences."""
    tokens, sequences = float(span.args.get("tokens", 0)), float(span.args.get("sequences", 0))
    kv_tokens = float(span.args.get("kv_tokens", 0))
    if not tokens or not sequences:
        return Work()
    context = kv_tokens / sequences - (tokens / sequences - 1) / 2
    return size.tokens(tokens, min(sequences, tokens), context, kv_tokens - (tokens if span.name == "prefill" else 0))
