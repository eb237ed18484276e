"""The pool of the input pipeline: what was begun goes before what is new."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, CancelledError, Future
from typing import Any

import pytest

from mm_core.inputs.pool import Pool


@pytest.fixture
def pool() -> Iterator[Pool]:
    made = Pool(1, "test-pool", lambda: None)
    yield made
    made.shutdown()


def test_what_must_not_wait_goes_first(pool: Pool) -> None:
    gate, order = threading.Event(), list[str]()
    pool.submit(gate.wait)
    rest = [pool.submit(lambda n=n: order.append(f"new {n}")) for n in range(3)]
    first = [pool.submit(lambda n=n: order.append(f"begun {n}"), first=True) for n in range(3)]
    gate.set()
    for future in (*rest, *first):
        future.result(10)
    assert order == ["begun 0", "begun 1", "begun 2", "new 0", "new 1", "new 2"]


def test_results_errors_and_cancelled_work(pool: Pool) -> None:
    gate = threading.Event()
    held = pool.submit(gate.wait)
    dropped = pool.submit(lambda: pytest.fail("done"))
    assert dropped.cancel()
    failing: Future[Any] = pool.submit(lambda: 1 / 0)
    leaving: Future[Any] = pool.submit(lambda: (_ for _ in ()).throw(SystemExit(3)))
    gate.set()
    assert held.result(10) is True
    with pytest.raises(ZeroDivisionError):
        failing.result(10)
    with pytest.raises(SystemExit):
        leaving.result(10)
    assert pool.submit(lambda: 7).result(10) == 7  # the thread lives on


def test_as_many_threads_as_there_is_work_for() -> None:
    names = set[str]()
    together = threading.Barrier(4)
    pool = Pool(4, "test-pool", lambda: names.add(threading.current_thread().name))
    try:
        pool.submit(lambda: None).result(10)
        time.sleep(0.05)
        pool.submit(lambda: None).result(10)
        assert names == {"test-pool_0"}
        for future in [pool.submit(lambda: together.wait(10)) for _ in range(4)]:
            future.result(10)
        assert names == {f"test-pool_{n}" for n in range(4)}
    finally:
        pool.shutdown()


def test_the_end() -> None:
    pool, gate = Pool(1, "test-pool", lambda: None), threading.Event()
    running = pool.submit(gate.wait)
    time.sleep(0.05)
    waiting = [pool.submit(lambda: pytest.fail("done"), first=first) for first in (False, True)]
    threading.Timer(0.2, gate.set).start()
    pool.shutdown()
    assert running.result(0) is True
    for future in waiting:
        with pytest.raises(CancelledError):
            future.result(0)
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(lambda: None)
    pool.shutdown()
    assert not any(thread.name.startswith("test-pool") for thread in threading.enumerate())


def test_threads_that_cannot_begin() -> None:
    pool = Pool(2, "test-pool", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(BrokenExecutor):
        pool.submit(lambda: None).result(10)
    pool.shutdown()


def test_nothing_is_held_when_work_is_done(pool: Pool) -> None:
    class Thing:
        pass

    import weakref

    thing = Thing()
    known = weakref.ref(thing)
    assert pool.submit(lambda thing=thing: id(thing)).result(10)
    del thing
    deadline = time.monotonic() + 5
    while known() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert known() is None


def test_many_from_many_threads() -> None:
    pool, count = Pool(3, "test-pool", lambda: None), 300
    try:
        found: list[list[int]] = [[] for _ in range(4)]

        def ask(place: int) -> None:
            futures = [pool.submit(lambda n=n: n * n, first=bool(n % 2)) for n in range(count)]
            found[place] = [future.result(20) for future in futures]

        threads = [threading.Thread(target=ask, args=(place,)) for place in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert found == [[n * n for n in range(count)]] * 4
    finally:
        pool.shutdown()
