"""The sampler against transformers' warpers, numpy and statistics."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from support.sampling import DEVICES, VOCAB, draw, in_slots, random_logits, row, sample
from torch import Tensor

from mm_core.kernels import random
from mm_core.kernels import sample as sample_module
from mm_core.kernels.sample import filtered_scores
from mm_core.runner import draw as draw_module
from mm_core.runner import sampler
from mm_core.runner.columns import Columns
from mm_core.runner.history import TokenHistory
from mm_core.runner.logprobs import best_tokens
from mm_core.runner.sampler import SampledTokens, SamplingRow

WORD = 2**64 - 1


def frequencies(logits: Tensor, count: int, **params: Any) -> np.ndarray:
    """How often each token is drawn from one row of logits."""
    rows = [row(seed=i // 50, step=i % 50, **params) for i in range(count)]
    return np.bincount(draw(logits.expand(count, -1), rows), minlength=logits.shape[-1])


def kept(logits: Tensor, seen: SamplingRow) -> Tensor:
    """The scores that are compared, without their noise."""
    rows = in_slots([seen] * len(logits))
    history, columns = TokenHistory(logits.shape[1], logits.device), Columns()
    part = draw_module.DrawPart(list(range(len(rows))), rows, logits.shape[1], history, columns)
    columns.send(logits.device)
    if seen.params.penalised:
        history.refresh(rows, torch.zeros(len(rows), dtype=torch.int64))
    temperatures = torch.full((len(rows),), draw_module.temperature(seen.params))
    return filtered_scores(part.scores(logits), temperatures, part.filters)


# --- random numbers -------------------------------------------------------------------------------


def splitmix(state: int) -> int:
    z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def test_bits_equal_splitmix64() -> None:
    keys = torch.tensor([1234567, -5, random.stream_key(3, 4)])
    bits = random.random_bits(keys, 5)
    wanted = [[splitmix((k + i * 0x9E3779B97F4A7C15) & WORD) for i in range(1, 6)] for k in keys.tolist()]
    assert [[b & WORD for b in line] for line in bits.tolist()] == wanted
    assert bits[0, 0].item() & WORD == 6457827717110365317  # published first output for seed 1234567


def test_noise_is_finite_and_gumbel() -> None:
    keys = torch.tensor([random.stream_key(seed, step) for seed in range(4) for step in range(50)])
    noise = random.gumbel_noise(keys, 1000)
    assert noise.isfinite().all()
    assert stats.kstest(noise.double().flatten().numpy(), "gumbel_r").pvalue > 1e-3
    by_key, by_place = noise.mean(dim=1), noise.mean(dim=0)  # neither streams nor places are biased
    assert (by_key - 0.57722).abs().max() < 5 * 1.2825 / math.sqrt(1000)
    assert (by_place - 0.57722).abs().max() < 5 * 1.2825 / math.sqrt(200)
    correlations = np.corrcoef(noise[:50].numpy()) - np.eye(50)
    assert np.abs(correlations).max() < 5 / math.sqrt(1000)


def test_extreme_bits_give_finite_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    extreme = torch.tensor([[0, -1, 2**63 - 1, -(2**63)]])
    monkeypatch.setattr(random, "random_bits", lambda keys, count: extreme)
    assert random.gumbel_noise(torch.zeros(1), 4).isfinite().all()


def test_streams_differ_by_seed_and_step() -> None:
    keys = {random.stream_key(seed, step) for seed in (*range(50), 2**63 - 1) for step in range(50)}
    assert len(keys) == 51 * 50
    assert all(-(2**63) <= key < 2**63 for key in keys)


# --- the draw -------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -3.0, 1.5])
    counts = frequencies(logits, 20_000, temperature=temperature)
    wanted = torch.softmax(logits / temperature, -1).double().numpy()
    assert stats.chisquare(counts, wanted / wanted.sum() * counts.sum()).pvalue > 1e-3


def test_filtered_draws_follow_the_renormalised_softmax() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, -3.0, 1.5])
    counts = frequencies(logits, 10_000, top_k=4, top_p=0.8)
    wanted = torch.softmax(logits, -1).double().numpy()
    assert set(np.flatnonzero(counts)) == {0, 3, 6}
    wanted = wanted[[0, 3, 6]] / wanted[[0, 3, 6]].sum()
    assert stats.chisquare(counts[[0, 3, 6]], wanted * counts.sum()).pvalue > 1e-3


def test_low_temperatures_count_as_a_hundredth() -> None:
    logits = random_logits(1)
    assert torch.equal(kept(logits, row(temperature=1e-6)), logits / torch.tensor(1e-2))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_takes_the_first_of_the_best(dtype: torch.dtype, device: str) -> None:
    logits = torch.zeros(3, VOCAB, dtype=dtype, device=device)
    logits[0, [70, 30]] = 2
    logits[1, 5] = 1
    before = logits.clone()
    for extra in ({}, {"logit_bias": {100: -1.0}}, {"repetition_penalty": 1.5}):
        result = sample(logits, [row(temperature=0.0, **extra)] * 3)
        assert result.token_ids == [30, 5, 0]
    assert torch.equal(logits, before)


def test_plain_greedy_copies_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "DrawPart", lambda *_: pytest.fail("copied the logits"))
    rows = [row(temperature=0.0, min_tokens=2), row(temperature=0.0, top_k=3, top_p=0.5)]
    assert draw(random_logits(2), rows) == random_logits(2).argmax(-1).tolist()


def test_no_rows() -> None:
    assert sample(torch.empty(0, VOCAB), []) == SampledTokens([], [], [])


# --- every parameter against its definition -------------------------------------------------------

WARPERS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("TopKLogitsWarper", {"top_k": 7}, {"top_k": 7}),
    ("TopKLogitsWarper", {"top_k": 1}, {"top_k": 1}),
    ("TopPLogitsWarper", {"top_p": 0.6}, {"top_p": 0.6}),
    ("TopPLogitsWarper", {"top_p": 0.999}, {"top_p": 0.999}),
    ("TopPLogitsWarper", {"top_p": 1e-6}, {"top_p": 1e-6}),
    ("MinPLogitsWarper", {"min_p": 0.05}, {"min_p": 0.05}),
    ("MinPLogitsWarper", {"min_p": 1.0}, {"min_p": 1.0}),
]


@pytest.mark.parametrize(("name", "theirs", "ours"), WARPERS)
def test_filters_equal_transformers(name: str, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(64)
    assert torch.equal(kept(logits, row(**ours)), getattr(process, name)(**theirs)(None, logits.clone()))


def test_filters_compose_as_in_transformers() -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(64)
    wanted = process.TemperatureLogitsWarper(0.7)(None, logits)
    for warper in (
        process.TopKLogitsWarper(20),
        process.TopPLogitsWarper(0.9),
        process.MinPLogitsWarper(0.05),
    ):
        wanted = warper(None, wanted)
    assert torch.equal(kept(logits, row(temperature=0.7, top_k=20, top_p=0.9, min_p=0.05)), wanted)


def test_equal_tokens() -> None:
    """top-k keeps all that equal the k-th; top-p the fewest, lower ids first."""
    logits = torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0]])
    assert kept(logits, row(top_k=2)).isfinite().tolist() == [[True, True, True, True, False]]
    even = torch.zeros(1, 8)
    assert kept(even, row(top_p=0.5)).isfinite().tolist() == [[True] * 4 + [False] * 4]
    assert kept(even, row(top_p=0.51)).isfinite().tolist() == [[True] * 5 + [False] * 3]


@pytest.mark.parametrize("top_k", [0, -1, VOCAB, VOCAB + 1])
def test_settings_that_keep_all(top_k: int) -> None:
    logits = random_logits(4) * 30  # many probabilities underflow
    assert torch.equal(kept(logits, row(top_k=top_k, top_p=1.0, min_p=0.0)), logits)


@pytest.mark.parametrize("penalty", [0.5, 1.3])
def test_repetition_penalty_equals_transformers(penalty: float) -> None:
    process = pytest.importorskip("transformers.generation.logits_process")
    prompt, output = (1, 2, 2, 50), (3, 2, 99)
    logits = random_logits(8)
    seen = row(prompt=prompt, output=output, repetition_penalty=penalty)
    wanted = process.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output] * 8), logits.clone())
    assert torch.equal(kept(logits, seen), wanted)


def test_presence_and_frequency_penalties() -> None:
    output = (5, 7, 5, 5, 0)
    logits = random_logits(4)
    counts = np.bincount(output, minlength=VOCAB)
    wanted = logits.numpy() - 0.7 * counts - 0.3 * (counts > 0)
    seen = row(prompt=(9, 9), output=output, frequency_penalty=0.7, presence_penalty=0.3)
    np.testing.assert_allclose(kept(logits, seen).numpy(), wanted, rtol=1e-6, atol=1e-6)


def test_bias_precedes_penalties_and_temperature() -> None:
    logits = torch.zeros(1, VOCAB)
    seen = row(output=(4,), logit_bias={4: 3.0, 6: -2.0}, repetition_penalty=1.5, temperature=0.5)
    scores = kept(logits, seen)[0]
    assert scores[[4, 6, 8]].tolist() == [3.0 / 1.5 / 0.5, -4.0, 0.0]


def test_min_tokens_masks_stop_tokens() -> None:
    logits = torch.zeros(4, VOCAB)
    logits[:, 8], logits[:, 9] = 5, 4
    stops = frozenset({8, VOCAB + 3})
    rows = [row(step=step, min_tokens=2, stops=stops, temperature=0.0) for step in range(4)]
    assert draw(logits, rows) == [9, 9, 8, 8]
    forced = row(min_tokens=2, stops=stops, temperature=0.0, logit_bias={8: 100.0})
    assert draw(logits[:1], [forced]) == [9]


def test_token_ids_outside_the_vocabulary_have_no_effect() -> None:
    seen = row(prompt=(-1, VOCAB, 10**6), output=(VOCAB, 1), repetition_penalty=2.0, logit_bias={VOCAB: 5.0, 2: 1.0})
    logits = torch.ones(2, VOCAB)
    scores = kept(logits, seen)
    assert (scores != 1).nonzero().tolist() == [[0, 1], [0, 2], [1, 1], [1, 2]]


# --- independence ---------------------------------------------------------------------------------


def mixed_rows() -> list[SamplingRow]:
    options: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "logprobs": 3},
        {},
        {"temperature": 0.3, "top_p": 0.4, "logprobs": 0},
        {"top_k": 3},
        {"top_k": 40, "top_p": 0.7, "min_p": 0.01},
        {"min_p": 0.2, "logprobs": 5},
        {"temperature": 0.0, "repetition_penalty": 1.4, "output": (2, 3, 3)},
        {"presence_penalty": 1.0, "frequency_penalty": 0.5, "output": tuple(range(40)), "prompt": (1,)},
        {"logit_bias": {4: 20.0}, "seed": 9},
        {"min_tokens": 9, "stops": frozenset({3, 4}), "top_p": 0.9},
        {"temperature": 100.0, "seed": 2**63 - 1},
    ]
    return [row(step=i // 2, **{"seed": i, **options[i % len(options)]}) for i in range(36)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [2**24, VOCAB * 2, 1])
@pytest.mark.parametrize("device", DEVICES)
def test_a_row_gives_the_same_alone_and_in_any_batch(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int, device: str
) -> None:
    logits, rows = random_logits(36).to(device, dtype), mixed_rows()
    alone = [sample(logits[i : i + 1], [rows[i]]) for i in range(36)]
    monkeypatch.setattr(sample_module, "MAX_CHUNK_ELEMENTS", chunk)
    for order in (list(range(36)), list(np.random.default_rng(0).permutation(36))):
        together = sample(logits[order], [rows[i] for i in order])
        assert together.token_ids == [alone[i].token_ids[0] for i in order]
        assert together.logprobs == [alone[i].logprobs[0] for i in order]
        assert all(together.finite)


def test_noise_and_scores_are_bitwise_the_same_at_any_place() -> None:
    keys = torch.tensor([random.stream_key(i, i) for i in range(9)])
    together = random.gumbel_noise(keys, 5003)
    for i in range(9):
        assert torch.equal(together[i], random.gumbel_noise(keys[i : i + 1], 5003)[0])
    assert torch.equal(together[:, :77], random.gumbel_noise(keys, 77))  # the vocabulary's size is no input


def test_seed_repeats_and_steps_differ() -> None:
    logits = torch.zeros(1, VOCAB).expand(40, -1)
    rows = [row(seed=5, step=step) for step in range(40)]
    first = draw(logits, rows)
    assert draw(logits, rows) == first
    assert len(set(first)) > 20
    assert draw(logits, [row(seed=6, step=step) for step in range(40)]) != first


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, None])
def test_a_broken_row_fails_alone(bad: float | None, device: str) -> None:
    logits, rows = random_logits(36).to(device), mixed_rows()
    good = sample(logits, rows)
    broken = logits.clone()
    for i in range(0, 36, 3):
        if bad is None:
            broken[i] = -math.inf
        else:
            broken[i, i] = bad
    result = sample(broken, rows)
    assert result.finite == [i % 3 != 0 for i in range(36)]
    assert all(0 <= token < VOCAB for token in result.token_ids)
    for i in range(36):
        if i % 3:
            assert result.token_ids[i] == good.token_ids[i]
            assert result.logprobs[i] == good.logprobs[i]
        else:
            assert result.logprobs[i] is None


def test_masked_tokens_are_no_fault() -> None:
    logits = random_logits(2)
    logits[:, ::2] = -math.inf
    result = sample(logits, [row(), row(temperature=0.0)])
    assert all(result.finite)
    assert all(token % 2 for token in result.token_ids)


# --- log-probabilities ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_raw_logits(dtype: torch.dtype) -> None:
    logits = random_logits(30, 1009).to(dtype)
    rows = [row(seed=i, temperature=5.0, logit_bias={7: 50.0}, logprobs=(0, 1, 20)[i % 3]) for i in range(30)]
    result = sample(logits, rows)
    wanted = torch.log_softmax(logits.double(), dim=-1)
    for i, found in enumerate(result.logprobs):
        assert found is not None
        token, values = result.token_ids[i], wanted[i]
        order = torch.argsort(logits[i].float(), descending=True, stable=True)[: (0, 1, 20)[i % 3]].tolist()
        assert list(found) == list(dict.fromkeys([token, *order]))
        for key, entry in found.items():
            assert entry.logprob == pytest.approx(values[key].item(), abs=1e-5)
            assert entry.rank == int((logits[i] > logits[i, key]).sum()) + 1
            assert entry.decoded_token == ""


def test_logprobs_of_the_whole_vocabulary_sum_to_one() -> None:
    logits = random_logits(1, 7)
    (found,) = sample(logits, [row(logprobs=20)]).logprobs
    assert found is not None
    assert sum(math.exp(entry.logprob) for entry in found.values()) == pytest.approx(1.0)


def test_best_orders_equal_and_signed_values() -> None:
    scores = torch.tensor([[-0.0, 0.0, -1.5, 3.0, -math.inf, 3.0, -2.5, 0.0]])
    assert best_tokens(scores, 8).tolist() == [[3, 5, 0, 1, 7, 2, 6, 4]]


@pytest.mark.gpu
def test_the_same_tokens_on_cpu_and_cuda() -> None:
    logits, rows = random_logits(36, 1009), mixed_rows()
    keys = torch.tensor([random.stream_key(i, 0) for i in range(36)])
    assert torch.equal(random.random_bits(keys, 999), random.random_bits(keys.cuda(), 999).cpu())
    assert torch.equal(random.gumbel_noise(keys, 999), random.gumbel_noise(keys.cuda(), 999).cpu())
    here, there = sample(logits, rows), sample(logits.cuda(), rows)
    assert here.token_ids == there.token_ids
    assert here.finite == there.finite
