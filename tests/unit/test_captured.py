"""CapturedPasses: what is captured, and that replays compute the same."""

from __future__ import annotations

import pytest
import torch

from mm_core.layers import CapturedPasses


def made(limit: int) -> CapturedPasses:
    passes = CapturedPasses(limit)
    passes.enabled = True
    return passes


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_a_key_repeats_from_its_second_sighting() -> None:
    passes = made(limit=1)
    assert [passes.repeats("a"), passes.repeats("b"), passes.repeats("a")] == [False, False, True]


def test_a_key_that_pushes_another_out_must_come_often() -> None:
    passes = made(limit=0)
    assert [passes.repeats("a") for _ in range(17)] == [False] * 15 + [True] * 2


def test_nothing_repeats_before_captures_are_allowed() -> None:
    passes = CapturedPasses(limit=1)
    assert not any(passes.repeats("a") for _ in range(9))
    passes.enabled = True
    assert [passes.repeats("a") for _ in range(2)] == [False, True]


def test_old_sightings_are_forgotten() -> None:
    passes = made(limit=1)
    for key in range(1025):
        assert not passes.repeats(key)
    assert not passes.repeats(0)
    assert passes.repeats(1024)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("limit", [2, 3])
@pytest.mark.parametrize("own_stream", [False, True])
@torch.inference_mode()
def test_replays_equal_the_pass(own_stream: bool, limit: int) -> None:
    device = torch.device("cuda")
    stream = torch.cuda.Stream() if own_stream else torch.cuda.default_stream()
    passes, calls = made(limit), []

    def make(factor: torch.Tensor):  # type: ignore[no-untyped-def]
        def run(x: torch.Tensor) -> torch.Tensor:
            calls.append(len(x))
            return (x @ x.T) * factor

        return run

    with torch.cuda.stream(stream):
        for _ in range(4):
            for size in (3, 5, 8):
                x = torch.randn(size, 4, device=device)
                # Only the graph keeps this alive
                got = passes.run(size, make(torch.full((), size, device=device)), x)
                torch.testing.assert_close(got, (x @ x.T) * size)
            junk = [torch.full((), -1, device=device) for _ in range(100)]
            del junk
        stream.synchronize()
    assert len(passes._graphs) == limit
    # Where there is room for two, each shape pushes out the one that comes next; a capture calls twice.
    assert calls == [3, 3, 5, 5, 8, 8] * (1 if limit == 3 else 4)


@pytest.mark.gpu
@gpu
@torch.inference_mode()
def test_a_pass_that_cannot_be_captured_still_runs() -> None:
    passes = CapturedPasses(limit=2)
    x = torch.ones(3, device="cuda")
    for _ in range(2):
        assert passes.run("waits", lambda t: t * float(t.sum()), x).tolist() == [3.0] * 3
    assert not passes.repeats("anything")
    assert not passes.repeats("anything")
