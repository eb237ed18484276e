"""What a plugin tells `mm bench` about its family: prompts, models of real sizes, arithmetic, workloads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mm_core.types import Modality


@dataclass(frozen=True)
class BenchPrompt:
    """Pieces of a benchmark's prompt, special tokens spelt out. head: what begins the user's turn;
    media: one item with its placeholder; tail: from the end of the turn to where the answer begins.
    complete: for families that are not asked questions, the whole prompt; the pieces are not used then."""

    head: str = ""
    media: str = ""
    tail: str = ""
    complete: str | None = None


@dataclass(frozen=True)
class BenchWorkload:
    """A workload with a name: how many requests of what media, text and output length.

    items: how many different ones the requests share (request i has item i mod items; 0: none), of
    `modality`: square images of `image_size` pixels a side, or clips of `seconds`. rows: encoder rows an
    item, where the workload fixes them; beside: tokens that stand around an item's rows in its expansion.
    shared: prompt tokens beside all these that all requests begin with, own: those of the request's question
    and after it (a complete prompt has neither).
    primed: as many requests with other questions on the same items run first, off the clock.
    one_by_one: requests follow each other instead of coming all at once.
    """

    name: str
    requests: int
    items: int
    output_tokens: int
    image_size: int = 448
    rows: int | None = 256
    shared: int = 16
    own: int = 22
    primed: bool = False
    one_by_one: bool = False
    beside: int = 0
    modality: Modality = "image"
    seconds: float = 30.0


@dataclass(frozen=True)
class BenchDecoder:
    """Sizes of a language model, for its arithmetic and traffic. mlp_matrices: 3 where the MLP is gated.
    cross: every layer also attends to a source."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    mlp_matrices: int = 3
    cross: bool = False


@dataclass(frozen=True)
class BenchModel:
    """A checkpoint without weights, of a real model's sizes. files: content by name (config.json,
    preprocessor_config.json, …). special_tokens: {text: id}; core writes a byte-level tokenizer
    with these and with ordinary words at every other id below the largest of them."""

    files: Mapping[str, Mapping[str, Any]]
    special_tokens: Mapping[str, int]


@dataclass(frozen=True)
class BenchFamily:
    """How a family is benchmarked. models: by the name that `mm bench --model` takes.
    encoder_flops(config, info): floating-point operations (a multiply-add is two) to encode an item
    whose `MediaFeature.info` is `info`, `config` being config.json. encoder_params(config): the
    encoder's weights that one pass reads. decoder(config): the language model's sizes, where its settings
    are not spelt as Llama's. workloads: the family's own, beside core's."""

    prompt: BenchPrompt
    models: Mapping[str, BenchModel]
    encoder_flops: Callable[[Mapping[str, Any], Mapping[str, Any]], float]
    encoder_params: Callable[[Mapping[str, Any]], int]
    decoder: Callable[[Mapping[str, Any]], BenchDecoder] | None = None
    workloads: tuple[BenchWorkload, ...] = ()
