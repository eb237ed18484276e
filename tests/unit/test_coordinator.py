"""Who runs Python when: one thread for all requests, precedence of the engine's, outputs in their own."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from typing import Any

import pytest
import torch

from mm_core.engine.delivery import OutputThread
from mm_core.engine.messages import TokenOutput
from mm_core.engine.precedence import PATIENCE_S, SLICE_S, Precedence
from mm_core.inputs.coordinator import Coordinator, Steps
from mm_core.inputs.pinning import Pinner
from mm_core.types import MediaFeature


def done_soon(value: int, delay: float = 0.02) -> Future[int]:
    future: Future[int] = Future()
    threading.Timer(delay, lambda: future.set_result(value)).start()
    return future


@pytest.fixture
def coordinator() -> Iterator[Coordinator]:
    made = Coordinator("test")
    yield made
    made.close()


def test_tasks_share_one_thread_and_their_waits_overlap(coordinator: Coordinator) -> None:
    threads: set[str] = set()

    def steps(value: int) -> Steps[int]:
        threads.add(threading.current_thread().name)
        waiting = done_soon(value, 0.1)
        yield waiting
        threads.add(threading.current_thread().name)
        return waiting.result() + 1

    started = time.perf_counter()
    futures = [coordinator.submit(steps(i)) for i in range(8)]
    assert [f.result(5) for f in futures] == list(range(1, 9))
    assert threads == {"test"}
    assert time.perf_counter() - started < 0.6


def test_a_task_that_can_go_on_goes_before_new_ones(coordinator: Coordinator) -> None:
    order: list[str] = []
    gate: Future[int] = Future()

    def first() -> Steps[None]:
        order.append("begun")
        yield gate
        order.append("resumed")

    def other(name: str) -> Steps[None]:
        order.append(name)
        if name == "a":
            gate.set_result(0)
            time.sleep(0.02)  # b and c are queued by now
        yield from ()

    futures = [coordinator.submit(first()), *(coordinator.submit(other(n)) for n in "abc")]
    for future in futures:
        future.result(5)
    assert order == ["begun", "a", "resumed", "b", "c"]


@pytest.mark.parametrize("error", [ZeroDivisionError(), SystemExit(), KeyboardInterrupt()])
def test_a_task_that_fails_fails_alone(coordinator: Coordinator, error: BaseException) -> None:
    def steps() -> Steps[int]:
        yield done_soon(1)
        raise error

    with pytest.raises(type(error)):
        coordinator.submit(steps()).result(5)

    def fine() -> Steps[int]:
        yield from ()
        return 3

    assert coordinator.submit(fine()).result(5) == 3


def test_closing_ends_every_task() -> None:
    coordinator, gate, closed = Coordinator("test"), threading.Event(), []

    def waits() -> Steps[int]:
        try:
            yield Future()  # of work that never comes to its end
        finally:
            closed.append(1)
        return 1

    def holds() -> Steps[int]:
        gate.wait(5)
        yield from ()
        return 2

    waiting, running = coordinator.submit(waits()), coordinator.submit(holds())
    queued = coordinator.submit(waits())
    cancelled = coordinator.submit(holds())
    assert cancelled.cancel()
    while not running.running():
        time.sleep(0.001)
    closer = threading.Thread(target=coordinator.close)
    closer.start()
    time.sleep(0.02)
    gate.set()
    closer.join(5)
    assert not closer.is_alive()
    assert running.result(0) == 2
    for future in (waiting, queued, cancelled):
        with pytest.raises(CancelledError):
            future.result(0)
    assert closed == [1], "what a begun task holds is given back"
    with pytest.raises(RuntimeError):
        coordinator.submit(waits())
    coordinator.close()


def test_a_begun_task_that_nobody_wants_is_dropped_at_its_next_turn(coordinator: Coordinator) -> None:
    gate: Future[int] = Future()
    seen: list[str] = []

    def steps() -> Steps[None]:
        try:
            seen.append("begun")
            yield gate
            seen.append("resumed")
        finally:
            seen.append("closed")

    future = coordinator.submit(steps())
    while not seen:
        time.sleep(0.001)
    assert not future.cancel()
    assert not future.done(), "it holds what it holds until then"
    gate.set_result(0)
    with pytest.raises(CancelledError):
        future.result(5)
    assert seen == ["begun", "closed"]


def test_nobody_waits_for_an_engine_that_waits() -> None:
    precedence = Precedence()
    started = time.perf_counter()
    for _ in range(50):
        precedence.give_way()
    assert time.perf_counter() - started < 50 * PATIENCE_S / 2


def test_a_thread_that_never_waits_lets_the_engine_in() -> None:
    """Without breaths the engine would get the interpreter's lock after the switch interval only."""
    precedence, woken = Precedence(), threading.Event()
    precedence.release()

    def engine() -> None:
        time.sleep(0.05)  # as long as a step takes; then it wants the lock that the loop below holds
        precedence.claim()
        woken.set()
        time.sleep(0.01)
        precedence.release()

    before, switch = time.perf_counter(), sys.getswitchinterval()
    sys.setswitchinterval(5.0)
    try:
        thread = threading.Thread(target=engine)
        thread.start()
        while not woken.is_set() and time.perf_counter() - before < 4.0:
            precedence.give_way()
    finally:
        sys.setswitchinterval(switch)
    thread.join()
    assert time.perf_counter() - before < 2.0


def test_others_stand_back_while_the_engine_works_but_not_for_ever() -> None:
    precedence = Precedence()
    with precedence.waiting():
        pass
    started = time.perf_counter()
    precedence.give_way()
    assert time.perf_counter() - started >= PATIENCE_S * 0.9
    free = 0
    for _ in range(20):  # the rest of the time by turns
        precedence.give_way()
        started = time.perf_counter()
        precedence.give_way()
        free += time.perf_counter() - started < PATIENCE_S / 2
        time.sleep(SLICE_S)
    assert free > 10
    waited = threading.Event()

    def other() -> None:
        precedence.give_way()
        waited.set()

    thread = threading.Thread(target=other)
    thread.start()
    precedence.release()
    thread.join(5)
    assert waited.is_set()


def tokens(*ids: int) -> list[TokenOutput]:
    return [TokenOutput("r", 0, i) for i in ids]


def test_outputs_come_in_order_with_the_time_of_their_put() -> None:
    seen: list[tuple[float, list[int | None]]] = []

    def handle(when: float, outputs: Sequence[TokenOutput]) -> None:
        time.sleep(0.01)
        seen.append((when, [o.token_id for o in outputs]))

    thread = OutputThread(handle)
    before = time.perf_counter()
    thread.put(tokens(1, 2))  # before start: waits
    thread.start()
    for i in (3, 4, 5):
        thread.put(tokens(i))
    after = time.perf_counter()
    thread.close()
    assert [ids for _, ids in seen] == [[1, 2], [3], [4], [5]]
    times = [when for when, _ in seen]
    assert times == sorted(times)
    assert before <= times[0] <= times[-1] <= after, "a put does not wait for the handler"


def test_the_output_thread_may_close_itself() -> None:
    closed = threading.Event()

    def handle(when: float, outputs: Sequence[TokenOutput]) -> None:
        thread.close()
        closed.set()

    thread = OutputThread(handle)
    thread.start()
    thread.put(tokens(1))
    assert closed.wait(5)
    thread.close()


# -- pinned memory -----------------------------------------------------------------------------


def feature(size: int = 8) -> MediaFeature:
    return MediaFeature("image", 1, {"pixels": torch.zeros(size, dtype=torch.uint8)})


class Pinned:
    """A tensor's `pin_memory` as a machine with a GPU has it, or as one whose limits refuse."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, pin: Callable[[torch.Tensor], Any]) -> None:
        self.calls = 0

        def counted(tensor: torch.Tensor) -> Any:
            self.calls += 1
            return pin(tensor)

        monkeypatch.setattr(torch.Tensor, "pin_memory", counted)


GPU = torch.device("cuda", 0)


def test_features_are_pinned_for_a_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Pinned(monkeypatch, torch.Tensor.clone)
    given = feature()
    assert Pinner(None, 100).pinned(given) is given
    assert fake.calls == 0
    pinned = Pinner(GPU, 100).pinned(given)
    assert fake.calls == 1
    assert pinned.tensors["pixels"] is not given.tensors["pixels"]
    assert torch.equal(pinned.tensors["pixels"], given.tensors["pixels"])
    assert replace(pinned, tensors={}) == replace(given, tensors={})


def test_pinned_memory_is_bounded_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fake, pinner = Pinned(monkeypatch, torch.Tensor.clone), Pinner(GPU, 20)
    held = [pinner.pinned(feature(8)) for _ in range(2)]
    third = feature(8)
    assert pinner.pinned(third) is third
    del held[0]
    assert pinner.pinned(third) is not third
    assert fake.calls == 3


def test_a_refusal_is_logged_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(tensor: torch.Tensor) -> Any:
        raise RuntimeError("CUDA error: out of memory\nmore lines")

    fake, pinner = Pinned(monkeypatch, refuse), Pinner(GPU, 100)
    for _ in range(3):
        given = feature()
        assert pinner.pinned(given) is given
    assert fake.calls == 1
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "pageable" in caplog.text


def test_what_a_dropped_task_waits_for_alone_is_cancelled(coordinator: Coordinator) -> None:
    class Alone(Future[int]):
        alone = True

    gate, closed = Alone(), threading.Event()

    def steps() -> Steps[None]:
        try:
            yield gate
        finally:
            closed.set()

    future = coordinator.submit(steps())
    while not future.running():
        time.sleep(0.001)
    assert not future.cancel()
    assert closed.wait(5)
    assert gate.cancelled()
    with pytest.raises(CancelledError):
        future.result(5)
