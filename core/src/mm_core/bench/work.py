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
    def from_text_config(cls, text: Mapping[str, Any], itemsize: int) -> Self:
        """From a checkpoint's `text_config`. Attention: q, k, v, o; MLP: gate, up, down."""
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
            kv_bytes=2 * layers * kv_heads * head_dim * itemsize,
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


def decode_steps(size: DecoderSize, requests: Sequence[RequestSize], max_num_seqs: int) -> list[Work]:
    """One entry a step: the requests run together, at most max_num_seqs at a time, longest answers
    first in a wave of their own. The first output token belongs to prefill."""
    steps = []
    ordered = sorted(requests, key=lambda r: -r.output)
    for start in range(0, len(ordered), max_num_seqs):
        wave = ordered[start : start + max_num_seqs]
        for step in range(1, wave[0].output):
            running = [r for r in wave if r.output > step]
            kv = sum(r.prompt + step for r in running)
            steps.append(size.tokens(len(running), len(running), kv / len(running), kv))
    return steps


def floor_seconds(
    ceilings: Ceilings, encode: Work, size: DecoderSize, requests: Sequence[RequestSize], max_num_seqs: int
) -> dict[str, float]:
    """Seconds by phase that no engine can go under which runs the phases one after another."""
    steps = decode_steps(size, requests, max_num_seqs)
    return {
        "encode": encode.seconds(ceilings) if encode.flops else 0.0,
        "prefill": prefill_work(size, requests).seconds(ceilings),
        "decode": math.fsum(step.seconds(ceilings) for step in steps),
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
