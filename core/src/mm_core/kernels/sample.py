"""Choosing one token a row of scores: the best one, or a draw from their softmax."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_core.kernels.random import gumbel_noise
from mm_core.kernels.weights import weights

MAX_CHUNK_ELEMENTS = 2**24
"""So many scores at a time are worked on in float32, to bound temporaries."""


@dataclass(frozen=True)
class Filters:
    """Which tokens of n rows can be drawn at all; applied in this order, after the temperature.

    top_k: int64 [n], the k best and whatever equals the k-th (as transformers and vLLM do); V keeps all.
    largest_k: the largest below V of them, 0 where all keep all. top_p: float64 [n], the fewest best tokens
    whose probabilities sum to p or more, lower ids first among equals; 1 keeps all. log_min_p: float32 [n],
    tokens with at least min_p of the best one's probability; -inf keeps all. None where every row keeps all.
    """

    top_k: Tensor
    largest_k: int
    top_p: Tensor | None
    log_min_p: Tensor | None


@dataclass(frozen=True)
class Launch:
    """What is the same for all choices among R rows, and where the tokens go.

    slots: int64 [R], each row's place in last_ids. keys: int64 [R], each row's stream of noise.
    out: int64 [2, R], the ids, and 1 where the logits are usable; keys and out may lie in pinned host memory.
    last_ids: int64 [S]. state: int64 [R or more, 2] on a GPU, of `new_state`, for the kernel's own use.
    """

    slots: Tensor
    keys: Tensor
    out: Tensor
    last_ids: Tensor
    state: Tensor


def new_state(rows: int, device: torch.device) -> Tensor:
    """What launches of up to `rows` rows, one after another, leave as they found it: the best so far, none,
    and the pieces of the row that were looked at."""
    return torch.tensor([[-(2**63), 0]], dtype=torch.int64).repeat(rows, 1).to(device)


def choose_tokens(
    scores: Tensor,
    rows: Tensor,
    temperatures: Tensor,
    launch: Launch,
    filters: Filters | None = None,
    *,
    edited: bool = False,
    random: bool = True,
) -> None:
    """Chooses a token for some rows of a launch, and writes it to `out` and `last_ids`.

    rows: int64 [n], ascending. scores: [R, V] of any floating dtype, last dim contiguous; or the float32 [n, V]
    of just these rows, if they were edited. temperatures: float32 [R]; where 0, the best token is taken, else
    the best of scores / temperature with Gumbel noise, in float32: a draw from their softmax. The first of
    equals is chosen. Rows with NaN or +inf, or of nothing but -inf, are not usable: their token is any in
    range. Whether a row is usable is written too, except for edited scores. random: False promises that all
    these rows' temperatures are 0.
    """
    run = choose_tokens_triton if scores.device.type == "cuda" else _choose_tokens_cpu
    run(scores, rows, temperatures, launch, filters, edited=edited, random=random)


def choose_tokens_triton(
    scores: Tensor,
    rows: Tensor,
    temperatures: Tensor,
    launch: Launch,
    filters: Filters | None = None,
    *,
    edited: bool = False,
    random: bool = True,
) -> None:
    """`choose_tokens` by its Triton kernels, whatever the device."""
    from mm_core.kernels._triton import sample as impl

    impl.choose_tokens(scores, rows, temperatures, launch, filters, edited=edited, random=random)


def _choose_tokens_cpu(
    scores: Tensor,
    rows: Tensor,
    temperatures: Tensor,
    launch: Launch,
    filters: Filters | None = None,
    *,
    edited: bool = False,
    random: bool = True,
) -> None:
    own = scores if len(rows) == len(scores) else scores[rows]
    best, token_ids = own.max(dim=-1)  # NaN wins a max, the first of equals is taken
    if not edited:
        launch.out[1, rows] = best.isfinite().to(torch.int64)
    drawn = (temperatures[rows] > 0).nonzero()[:, 0] if random else rows[:0]
    size = max(1, MAX_CHUNK_ELEMENTS // scores.shape[1])
    for start in range(0, len(drawn), size):
        part = drawn[start : start + size]
        noisy = filtered_scores(own[part], temperatures[rows[part]], _part_of(filters, part))
        noisy.add_(gumbel_noise(launch.keys[rows[part]], scores.shape[1]))
        token_ids[part] = noisy.argmax(dim=-1)
    launch.out[0, rows] = token_ids
    launch.last_ids[launch.slots[rows]] = token_ids


def _part_of(filters: Filters | None, rows: Tensor) -> Filters | None:
    if filters is None:
        return None
    top_p = None if filters.top_p is None else filters.top_p[rows]
    log_min_p = None if filters.log_min_p is None else filters.log_min_p[rows]
    return Filters(filters.top_k[rows], filters.largest_k, top_p, log_min_p)


def filtered_scores(scores: Tensor, temperatures: Tensor, filters: Filters | None) -> Tensor:
    """scores [n, V] / temperatures [n] in a float32 tensor of its own, -inf where a token cannot be drawn."""
    divided = scores.to(torch.float32, copy=True).div_(temperatures[:, None])
    if filters is None:
        return divided
    if filters.largest_k:
        _on_rows(divided, filters.top_k < scores.shape[1], filters.top_k, _keep_top_k)
    if filters.top_p is not None:
        _on_rows(divided, filters.top_p < 1.0, filters.top_p, _keep_top_p)
    if filters.log_min_p is not None:
        _on_rows(divided, filters.log_min_p > -math.inf, filters.log_min_p, _keep_min_p)
    return divided


def _on_rows(scores: Tensor, chosen: Tensor, column: Tensor, change: Callable[[Tensor, Tensor], None]) -> None:
    """Let `change` work in place on the chosen rows [n] alone, with their numbers of a column [n]."""
    if bool(chosen.all()):
        change(scores, column)
    elif bool(chosen.any()):
        some = scores[chosen]
        change(some, column[chosen])
        scores[chosen] = some


def _keep_top_k(scores: Tensor, ks: Tensor) -> None:
    best = scores.topk(int(ks.max()), dim=-1).values
    scores.masked_fill_(scores < best.gather(1, ks[:, None] - 1), -math.inf)


def _keep_top_p(scores: Tensor, top_p: Tensor) -> None:
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    masses = weights(ordered, ordered[:, :1])
    before = masses.cumsum(dim=-1).sub_(masses)  # [R, V]: the mass of all better tokens
    drop = before >= masses.sum(dim=-1, keepdim=True) * top_p[:, None]  # never the best token: 0 lies before it
    scores.scatter_(1, order, ordered.masked_fill_(drop, -math.inf))


def _keep_min_p(scores: Tensor, log_min_p: Tensor) -> None:
    floor = scores.amax(dim=-1, keepdim=True) + log_min_p[:, None]  # a ratio needs no softmax
    scores.masked_fill_(scores < floor, -math.inf)
