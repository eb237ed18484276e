"""Choosing tokens from scores, against `reference.py`."""

import dataclasses

import pytest
import torch
from kernels.cases import BACKENDS, CUDA, device_of, randn

from mm_core.kernels import random, reference
from mm_core.kernels.penalties import IN_PROMPT, penalise_, penalise_triton
from mm_core.kernels.sample import Filters, Launch, choose_tokens, choose_tokens_triton, new_state

# The interpreter computes with numpy, which warns where a GPU does not.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

NAN, INF = float("nan"), float("inf")
WIDTHS = [101, 152064] if CUDA else [1, 101, 2500]
DTYPES = [torch.float32, torch.bfloat16] if CUDA else [torch.float32, torch.float16, torch.bfloat16]
UNTOUCHED = -7


def launch_of(rows, device, slots=None):
    """Slots in reverse order, one spare; everything that is to be written poisoned."""
    slots = torch.arange(rows, 0, -1, device=device) if slots is None else slots
    keys = torch.from_numpy(random.stream_keys(range(rows), [5] * rows)).to(device)
    out = torch.full((2, rows), UNTOUCHED, device=device)
    return Launch(slots, keys, out, torch.full((rows + 1,), UNTOUCHED, device=device), new_state(rows + 2, device))


def choose(backend, scores, temperatures, rows=None, filters=None, launch=None, **kwargs):
    rows = torch.arange(len(scores), device=scores.device) if rows is None else rows
    launch = launch_of(len(temperatures), scores.device) if launch is None else launch
    run = choose_tokens_triton if backend == "triton" else choose_tokens
    run(scores, rows, temperatures, launch, filters, **kwargs)
    assert torch.equal(launch.state, new_state(len(launch.state), scores.device))
    return launch


def greedy(backend, logits):
    """[2, R]: ids and flags."""
    return choose(backend, logits, torch.zeros(len(logits), device=logits.device), random=False).out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [0, 1, 5] + ([256, 1100] if CUDA else []))
def test_the_best_token(backend, width, rows):
    device = device_of(backend)
    for dtype in DTYPES:
        whole = torch.full((rows, width + 16), NAN, dtype=dtype, device=device)  # beyond a row's end: nothing to read
        logits = whole[:, :width]
        logits.normal_(0, 3, generator=torch.Generator(device).manual_seed(1))
        expected = launch_of(rows, device)
        cold = torch.zeros(rows, device=device)
        reference.choose_tokens(logits, torch.arange(rows, device=device), cold, expected)
        launch = choose(backend, logits, cold, random=False)
        assert torch.equal(launch.out, expected.out)
        assert launch.last_ids.tolist() == [UNTOUCHED, *launch.out[0].flip(0).tolist()]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", WIDTHS[-2:])
def test_the_first_of_equals(backend, width):
    device = device_of(backend)
    logits = randn(6, width, seed=2, device=device, dtype=torch.float32).clamp_(-1, 0.5)
    logits[1] = -3.5
    logits[2] = 0.0
    logits[2, ::2] = -0.0  # equal to 0.0
    logits[3] = -INF
    logits[3, [width // 2, width - 1]] = -1e30
    logits[4, [width - 1, width - 3]] = 7.0
    logits[5].sub_(9)
    expected = launch_of(6, device)
    reference.choose_tokens(logits, torch.arange(6, device=device), torch.zeros(6, device=device), expected)
    out = greedy(backend, logits)
    assert torch.equal(out, expected.out)
    assert out[:, 1:5].tolist() == [[0, 0, width // 2, width - 3], [1] * 4]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_unusable_rows(backend, width, temperature):
    device = device_of(backend)
    for dtype in [torch.float32, torch.bfloat16]:
        logits = randn(8, width, seed=3, device=device, dtype=dtype)
        logits[0] = -INF
        logits[1] = NAN
        logits[2, width // 2] = NAN
        logits[3, width - 1] = -NAN
        logits[4, width // 3] = INF
        logits[5, 0], logits[5, width - 1] = INF, NAN
        logits[6] = torch.finfo(dtype).min
        logits[7, 0] = torch.finfo(dtype).max
        out = choose(backend, logits, torch.full((8,), temperature, device=device)).out
        assert out[1].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
        assert out[0, 7] == 0
        assert ((out[0] >= 0) & (out[0] < width)).all()


def filters_of(width, device, top_k=(), top_p=(), log_min_p=()):
    below = [k for k in top_k if k < width]
    return Filters(
        torch.tensor(top_k or [width] * 6, device=device),
        max(below, default=0),
        torch.tensor(top_p, dtype=torch.float64, device=device) if top_p else None,
        torch.tensor(log_min_p, dtype=torch.float32, device=device) if log_min_p else None,
    )


FILTERS = {
    "none": None,
    "top_k": {"top_k": (1, 3, 10**9, 20, 50, 7)},
    "top_p": {"top_p": (0.5, 0.9, 1.0, 1e-6, 0.999, 0.3)},
    "min_p": {"log_min_p": (-1.0, -INF, -3.0, 0.0, -0.1, -9.0)},
    "all": {
        "top_k": (40, 10**9, 30, 2, 10**9, 10**9),
        "top_p": (0.5, 0.9, 1.0, 0.8, 0.999, 0.97),
        "log_min_p": (-1.0, -2.0, -INF, -INF, -0.5, -5.0),
    },
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", WIDTHS[-2:])
@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("edited", [False, True])
def test_draws(backend, width, kind, edited):
    """Rows of two launches' worth, a greedy one among them; nothing else is written."""
    device = device_of(backend)
    dtypes = [torch.float32] if edited else [torch.float32, torch.bfloat16] if CUDA else [torch.bfloat16]
    for dtype in dtypes:
        logits = (randn(9, width, seed=4, device=torch.device("cpu"), dtype=torch.float32) * 2).to(dtype)
        logits[2, ::3] = -INF
        logits[4] = logits[4].round()  # many equals
        rows = torch.tensor([0, 2, 3, 4, 6, 8])
        temperatures = torch.tensor([0.7, 9.0, 1.0, 0.0, 1.3, 9.0, 2.0, 9.0, 0.4])
        given = FILTERS[kind] and filters_of(width, torch.device("cpu"), **FILTERS[kind])
        scores = logits[rows] if edited else logits
        expected = launch_of(9, torch.device("cpu"))
        reference.choose_tokens(scores, rows, temperatures, expected, given, edited=edited)
        there = FILTERS[kind] and filters_of(width, device, **FILTERS[kind])
        launch = launch_of(9, device)
        for turn in range(2 if CUDA or kind == "none" else 1):  # the second finds what the first left
            keys = random.stream_keys(range(9), [turn] * 9)
            launch = dataclasses.replace(launch, keys=torch.from_numpy(keys).to(device))
            expected = dataclasses.replace(expected, keys=torch.from_numpy(keys))
            reference.choose_tokens(scores, rows, temperatures, expected, given, edited=edited)
            choose(backend, scores.to(device), temperatures.to(device), rows.to(device), there, launch, edited=edited)
            assert launch.out.tolist() == expected.out.tolist()
            assert launch.last_ids.tolist() == expected.last_ids.tolist()
        assert (launch.out[1] == UNTOUCHED).sum() == (9 if edited else 3)


EDGES = {
    "all equal": lambda width: torch.zeros(width),
    "two values": lambda width: torch.arange(width) % 2 * 1.0,
    "one": lambda width: torch.where(torch.arange(width) == width // 2, 50.0, 0.0),
    "nearly equal": lambda width: 1.0 + torch.arange(width).flip(0) * 2**-23,
    "tiny": lambda width: torch.linspace(-1e-38, 1e-38, width),
    "wide": lambda width: torch.linspace(-3e38, 3e38, width),
    "masked": lambda width: torch.where(torch.arange(width) % 5 == 0, torch.linspace(0, 5, width), -INF),
    "descending": lambda width: torch.arange(width) * -0.01,
}


@pytest.mark.parametrize("backend", ["triton"])
@pytest.mark.parametrize("edge", EDGES)
def test_where_top_p_ends(backend, edge):
    """The very set of tokens that a sort gives, equals included."""
    device = device_of(backend)
    from mm_core.kernels._triton.filters import floors_of

    width = 1500
    top_p = (1e-9, 0.1, 0.5, 0.9, 0.999, 1 - 2**-53)
    scores = EDGES[edge](width).repeat(6, 1)
    temperatures = torch.tensor([1.0, 0.7, 3.0, 0.01, 1.0, 1.0])
    given = filters_of(width, torch.device("cpu"), top_p=top_p)
    kept = reference.filtered_scores(scores, temperatures, given).isfinite()
    launch = choose(backend, scores.to(device), torch.zeros(6, device=device))
    there = filters_of(width, device, top_p=top_p)
    rows = torch.arange(6, device=device)
    floors, lasts = floors_of(scores.to(device), rows, temperatures.to(device), launch, there, False)
    divided = scores / temperatures[:, None]
    floors, ids = floors.cpu()[:, None], torch.arange(width)
    ours = (divided > floors) | ((divided == floors) & (ids <= lasts.cpu()[:, None]))
    assert (ours & divided.isfinite()).tolist() == kept.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [1, 3], []], ids=len)
def test_penalties(backend, width, rows):
    device = device_of(backend)
    generator = torch.Generator().manual_seed(6)
    scores = torch.randn(4, width, generator=generator) * 5
    scores[1, ::4] = -INF
    counts = torch.randint(-3, 4, (7, width), generator=generator, dtype=torch.int32).clamp_(min=0)
    counts[torch.rand(7, width, generator=generator) < 0.3] += IN_PROMPT
    columns = torch.tensor([[1.3, 0.5, 1.0, 10.0], [0.7, -2.0, 0.1, 0.0], [-0.3, 2.0, 0.0, 1.1]], dtype=torch.float64)
    args = [torch.tensor(rows, dtype=torch.int64), counts, torch.tensor([6, 0, 3, 2])[: len(rows)]]
    args += columns[:, : len(rows)].contiguous()
    expected, there = scores.clone(), scores.to(device)
    reference.penalise_(expected, *args)
    (penalise_triton if backend == "triton" else penalise_)(there, *(x.to(device) for x in args))
    assert torch.equal(there.cpu(), expected)  # to the last bit, and other rows as they were


@pytest.mark.parametrize("backend", ["triton"])
def test_rough_noise_is_near_the_exact_one(backend):
    """What the choice of tokens relies on, at every magnitude of the distances from 0 and from 1."""
    device = device_of(backend)
    from kernels.noise import noise_kernel

    uniform = torch.rand(2**15, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    small = (uniform * 2.0 ** torch.arange(53).repeat(2**10)[: 2**15]).to(torch.int64).clamp_(max=2**52 - 1)
    bits = torch.cat([small, 2**52 - 1 - small, (uniform * 2**52).to(torch.int64), torch.arange(2**15) * 2**37])
    exact, rough = torch.empty(2, len(bits), device=device)
    block = 2**10 if CUDA else 2**14
    noise_kernel[(len(bits) // block,)](exact, rough, bits.to(device), BLOCK=block, enable_fp_fusion=True)
    expected = -torch.log(-torch.log((bits.double() + 0.5) * 2.0**-52))
    assert (exact.cpu() - expected).abs().max() < 1e-5
    assert (rough.cpu() - expected).abs().max() < 1e-4
    assert expected.max() > 36
    assert expected.min() < -3.5
