"""From logits to tokens, for all rows of a step at once.

A row's tokens depend on nothing but its own logits, parameters, seed and step, to the last bit.
Hence no floating-point sum over the vocabulary: how a device orders such a sum may change with
the number of rows or with a row's alignment in memory. Sums are taken over integers instead
(`_weights`), which no order can change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm_core.runner.random import gumbel_noise, stream_key
from mm_core.types import Logprob

if TYPE_CHECKING:
    from mm_core.config import SamplingParams

MIN_TEMPERATURE = 1e-2
MAX_CHUNK_ELEMENTS = 2**24
"""Rows that need more than an argmax are processed so many elements at a time, to bound temporaries."""

_WEIGHT_BITS = 40  # the best token weighs 2^40; a vocabulary of 2^22 tokens still sums within int64


@dataclass(frozen=True)
class SamplingRow:
    """One row of a step: which token is drawn, and by what rules.

    step: 0-based index of the output token to be drawn. prompt_token_ids, output_token_ids: what
    came before it; read only where `params.penalised`, and may be empty elsewhere.
    stop_token_ids: eos and stop ids, masked while the output is shorter than `min_tokens`.
    Token ids outside the vocabulary of the logits have no effect.
    """

    params: SamplingParams
    seed: int
    step: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    stop_token_ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class SampledTokens:
    """What a step drew.

    token_ids: int64 [R] on the logits' device. logprobs: for each row that asked, the chosen token
    first, then the best ones in order; None for rows that did not ask or whose logits are broken.
    finite: bool [R] on the device; False where the logits hold NaN or +inf or are all -inf: the
    row's token is then in range but means nothing, and its request has to fail.
    """

    token_ids: Tensor
    logprobs: list[dict[int, Logprob] | None]
    finite: Tensor


class Sampler:
    """Draws one token a row.

    Order: log-probabilities of the raw logits; logit bias; min_tokens mask; repetition, frequency
    and presence penalties; temperature; top-k; top-p; min-p; draw. Ties go to the lowest token id.
    """

    @torch.no_grad()
    def __call__(self, logits: Tensor, rows: Sequence[SamplingRow]) -> SampledTokens:
        """Draw from `logits` [R, V], of any floating dtype, which stay as they are."""
        assert logits.shape[0] == len(rows), "one SamplingRow a row of logits"
        best, token_ids = logits.max(dim=-1)  # NaN wins a max, the first of equals is taken
        finite = best.isfinite()
        rest = [i for i, row in enumerate(rows) if not _plain_greedy(row)]
        for part in _chunks(rest, logits.shape[1]):
            token_ids[_index(part, logits)] = _draw(_take(logits, part), [rows[i] for i in part])
        return SampledTokens(token_ids, _logprobs(logits, rows, token_ids, finite), finite)


def _plain_greedy(row: SamplingRow) -> bool:
    """Whether the argmax of the raw logits is the answer."""
    return row.params.greedy and not (row.params.logit_bias or _masks_stops(row) or row.params.penalised)


def _masks_stops(row: SamplingRow) -> bool:
    return row.step < row.params.min_tokens and bool(row.stop_token_ids)


def _draw(scores: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Token ids int64 [R] from float32 scores [R, V], which are overwritten."""
    _add_logit_bias(scores, rows)
    _mask_stop_tokens(scores, rows)
    _on_rows(scores, rows, lambda row: row.params.penalised, _penalise)
    _on_rows(scores, rows, lambda row: not row.params.greedy, _warp_and_perturb)
    return scores.argmax(dim=-1)


def _add_logit_bias(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    entries = [
        (i, token, bias)
        for i, row in enumerate(rows)
        for token, bias in row.params.logit_bias.items()
        if 0 <= token < scores.shape[1]
    ]
    if entries:
        at, tokens, biases = zip(*entries, strict=True)
        where = _index(at, scores), _index(tokens, scores)
        scores[where] += torch.tensor(biases, dtype=scores.dtype, device=scores.device)


def _mask_stop_tokens(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    entries = [
        (i, token)
        for i, row in enumerate(rows)
        if _masks_stops(row)
        for token in row.stop_token_ids
        if 0 <= token < scores.shape[1]
    ]
    if entries:
        at, tokens = zip(*entries, strict=True)
        scores[_index(at, scores), _index(tokens, scores)] = -math.inf


def _penalise(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Repetition as in transformers (Keskar et al. 2019), over prompt and output; then frequency and
    presence as OpenAI defines them, over the output."""
    settings = _columns(
        scores, [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in _params(rows)]
    )
    repetition, frequency, presence = settings.to(scores.dtype).unbind()
    output = _counts(scores, [row.output_token_ids for row in rows])
    seen = (_counts(scores, [row.prompt_token_ids for row in rows]) > 0).logical_or_(output > 0)
    repeated = torch.where(scores < 0, scores * repetition, scores / repetition)
    scores.copy_(torch.where(seen, repeated, scores))
    scores.sub_(frequency * output).sub_(presence * (output > 0))


def _counts(scores: Tensor, token_ids: Sequence[Sequence[int]]) -> Tensor:
    """How often each token occurs: int32 [R, V]."""
    vocab = scores.shape[1]
    flat = torch.tensor([token for ids in token_ids for token in ids], dtype=torch.int64)
    at = torch.arange(len(token_ids)).repeat_interleave(torch.tensor([len(ids) for ids in token_ids]))
    places = (at * vocab + flat)[(flat >= 0) & (flat < vocab)].to(scores.device)
    counts = torch.zeros(scores.numel(), dtype=torch.int32, device=scores.device)
    counts.scatter_add_(0, places, torch.ones_like(places, dtype=torch.int32))
    return counts.view_as(scores)


def _warp_and_perturb(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Temperature, filters and Gumbel noise: the argmax of the result is a draw from the softmax."""
    (temperature,) = _columns(scores, [(max(p.temperature, MIN_TEMPERATURE),) for p in _params(rows)])
    scores.div_(temperature.to(scores.dtype))
    vocab = scores.shape[1]
    _on_rows(scores, rows, lambda row: 0 < row.params.top_k < vocab, _keep_top_k)
    _on_rows(scores, rows, lambda row: row.params.top_p < 1.0, _keep_top_p)
    _on_rows(scores, rows, lambda row: row.params.min_p > 0.0, _keep_min_p)
    keys = _index([stream_key(row.seed, row.step) for row in rows], scores)
    scores.add_(gumbel_noise(keys, vocab))


def _keep_top_k(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Keep the k best, and whatever equals the k-th (as transformers and vLLM do)."""
    ks = [p.top_k for p in _params(rows)]
    best = scores.topk(max(ks), dim=-1).values
    kth = best.gather(1, _index(ks, scores)[:, None] - 1)
    scores.masked_fill_(scores < kth, -math.inf)


def _keep_top_p(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Keep the fewest best tokens whose probabilities sum to p or more; lower ids first among equals."""
    (top_p,) = _columns(scores, [(p.top_p,) for p in _params(rows)])
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    weights = _weights(ordered, ordered[:, :1])
    before = weights.cumsum(dim=-1).sub_(weights)  # [R, V]: the mass of all better tokens
    drop = before >= weights.sum(dim=-1, keepdim=True) * top_p  # never the best token: 0 lies before it
    scores.scatter_(1, order, ordered.masked_fill_(drop, -math.inf))


def _keep_min_p(scores: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Keep tokens with at least min_p of the best token's probability; a ratio needs no softmax."""
    (log_min_p,) = _columns(scores, [(math.log(p.min_p),) for p in _params(rows)])
    floor = scores.amax(dim=-1, keepdim=True) + log_min_p.to(scores.dtype)
    scores.masked_fill_(scores < floor, -math.inf)


def _logprobs(
    logits: Tensor, rows: Sequence[SamplingRow], token_ids: Tensor, finite: Tensor
) -> list[dict[int, Logprob] | None]:
    found: list[dict[int, Logprob] | None] = [None] * len(rows)
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    for part in _chunks(asked, logits.shape[1]):
        index = _index(part, logits)
        counts = [rows[i].params.logprobs or 0 for i in part]
        tables = _logprob_tables(_take(logits, part), token_ids[index], counts)
        for i, usable, table in zip(part, finite[index].tolist(), tables, strict=True):
            found[i] = table if usable else None
    return found


def _logprob_tables(scores: Tensor, chosen: Tensor, counts: Sequence[int]) -> list[dict[int, Logprob]]:
    """For each row of float32 scores [R, V] the chosen token and its count of best ones."""
    peak = scores.amax(dim=-1, keepdim=True)
    total = _weights(scores, peak).sum(dim=-1, keepdim=True)
    log_total = total.to(torch.float64).mul_(2.0**-_WEIGHT_BITS).log_()
    best = _best(scores, min(max(counts), scores.shape[1]))
    ids = torch.cat([chosen[:, None], best], dim=1)  # [R, 1 + n]
    values = scores.gather(1, ids)
    logprobs = (values.to(torch.float64) - peak - log_total).tolist()
    ranks = (scores > values[:, :1]).sum(dim=-1).add_(1).tolist()
    tables = []
    for row, (tokens, logs) in enumerate(zip(ids.tolist(), logprobs, strict=True)):
        table = {tokens[0]: Logprob(logs[0], ranks[row])}
        rank = 0
        for place in range(1, min(counts[row], len(tokens) - 1) + 1):
            if place == 1 or logs[place] < logs[place - 1]:
                rank = place  # equal tokens share a rank, as for the chosen one
            table.setdefault(tokens[place], Logprob(logs[place], rank))
        tables.append(table)
    return tables


def _best(scores: Tensor, count: int) -> Tensor:
    """Ids of the best tokens of each row, int64 [R, count]; lower ids first among equals.

    `topk` alone may return any of several equal tokens. So it sees unique integers: the float's
    bits, made monotone, above the complement of the token's id.
    """
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 turns -0.0 into 0.0
    monotone = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(scores.shape[1], device=scores.device)
    keys = monotone * 2**32 + (2**32 - 1 - ids)
    return 2**32 - 1 - (keys.topk(count, dim=-1).values & (2**32 - 1))


def _weights(scores: Tensor, peak: Tensor) -> Tensor:
    """exp(scores - peak) as fixed-point int64: sums of it are exact, whatever their order."""
    return scores.sub(peak).to(torch.float64).exp_().mul_(2.0**_WEIGHT_BITS).round_().to(torch.int64)


def _on_rows(
    scores: Tensor,
    rows: Sequence[SamplingRow],
    chosen: Callable[[SamplingRow], bool],
    change: Callable[[Tensor, Sequence[SamplingRow]], None],
) -> None:
    """Let `change` work in place on the chosen rows, and on those alone."""
    part = [i for i, row in enumerate(rows) if chosen(row)]
    if len(part) == len(rows):
        change(scores, rows)
    elif part:
        index = _index(part, scores)
        some = scores[index]
        change(some, [rows[i] for i in part])
        scores[index] = some


def _chunks(indices: list[int], vocab: int) -> Iterator[list[int]]:
    size = max(1, MAX_CHUNK_ELEMENTS // vocab)
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def _take(logits: Tensor, rows: list[int]) -> Tensor:
    """A float32 copy of some rows."""
    return logits[_index(rows, logits)].to(torch.float32)


def _index(values: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(like.device, non_blocking=True)


def _columns(like: Tensor, settings: Sequence[tuple[float, ...]]) -> Tensor:
    """One float64 column [R, 1] a setting, stacked: [settings, R, 1]."""
    return torch.tensor(settings, dtype=torch.float64).T[:, :, None].to(like.device, non_blocking=True)


def _params(rows: Sequence[SamplingRow]) -> list[SamplingParams]:
    return [row.params for row in rows]
