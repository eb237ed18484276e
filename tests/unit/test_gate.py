"""Who gets a place in the engine, who waits, who is refused, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import random

import pytest

from mm_core.errors import DrainingError, OverloadedError
from mm_core.server.context import Call, Caller
from mm_core.server.gate import Gate


def call(name: str = "one") -> Call:
    return Call("/v1/chat/completions", Caller(name))


class Load:
    """Calls that hold their place until they are let go."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.order: list[str] = []
        self.release = asyncio.Event()

    async def hold(self, name: str) -> None:
        async with self.gate.enter(call(name)):
            self.order.append(name)
            await self.release.wait()

    async def pass_through(self, name: str) -> None:
        async with self.gate.enter(call(name)):
            self.order.append(name)
            await asyncio.sleep(0)

    def start(self, name: str, *, holding: bool = False) -> asyncio.Task[None]:
        return asyncio.ensure_future(self.hold(name) if holding else self.pass_through(name))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def assert_empty(gate: Gate) -> None:
    assert (gate.running, gate.waiting, gate.calls, gate.bytes_held) == (0, 0, 0, 0)
    assert not any((gate._queues, gate._entries, gate._due, gate._bytes))


def test_only_so_many_are_inside_and_the_rest_wait_their_turn():
    async def main() -> None:
        gate = Gate(max_running=2, max_waiting=10)
        load = Load(gate)
        tasks = [load.start("one", holding=True) for _ in range(5)]
        await settle()
        assert (gate.running, gate.waiting) == (2, 3)
        load.release.set()
        await asyncio.gather(*tasks)
        assert_empty(gate)

    asyncio.run(main())


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back():
    async def main() -> None:
        gate = Gate(max_running=1, max_waiting=2)
        load = Load(gate)
        tasks = [load.start("one", holding=True) for _ in range(3)]
        await settle()
        with pytest.raises(OverloadedError) as refused:
            async with gate.enter(call("one")):
                pass
        assert refused.value.status == 429
        assert int(refused.value.headers["Retry-After"]) >= 1
        assert gate.refused == 1
        load.release.set()
        await asyncio.gather(*tasks)
        assert_empty(gate)

    asyncio.run(main())


def test_one_caller_cannot_take_the_whole_queue():
    async def main() -> None:
        gate = Gate(max_running=1, max_waiting=10, max_waiting_per_caller=2)
        load = Load(gate)
        tasks = [load.start("greedy", holding=True) for _ in range(3)]
        await settle()
        with pytest.raises(OverloadedError, match="one key"):
            async with gate.enter(call("greedy")):
                pass
        tasks.append(load.start("modest"))
        await settle()
        assert gate.waiting == 3
        load.release.set()
        await asyncio.gather(*tasks)
        assert_empty(gate)

    asyncio.run(main())


def test_callers_take_turns():
    async def main() -> None:
        gate = Gate(max_running=1, max_waiting=2000)
        load = Load(gate)
        first = load.start("first", holding=True)
        await settle()
        tasks = [load.start("greedy") for _ in range(1000)]
        await settle()
        tasks += [load.start("modest"), load.start("other"), load.start("modest")]
        await settle()
        load.release.set()
        await asyncio.gather(first, *tasks)
        order = load.order[1:]
        # Each round serves everybody who waits once.
        assert order[:6] == ["greedy", "modest", "other", "greedy", "modest", "greedy"]
        assert len(order) == 1003
        assert_empty(gate)

    asyncio.run(main())


def test_whoever_leaves_the_queue_is_forgotten():
    async def main() -> None:
        gate = Gate(max_running=1, max_waiting=10)
        load = Load(gate)
        inside = load.start("one", holding=True)
        await settle()
        waiting = [load.start(name) for name in ("two", "two", "three")]
        await settle()
        for task in waiting[:2]:
            task.cancel()
        await settle()
        assert gate.waiting == 1
        load.release.set()
        await asyncio.gather(inside, waiting[2])
        assert load.order == ["one", "three"]
        assert_empty(gate)

    asyncio.run(main())


def test_a_place_that_comes_with_the_cancellation_goes_to_the_next():
    async def main() -> None:
        gate = Gate(max_running=1, max_waiting=10)
        load = Load(gate)
        inside = load.start("one", holding=True)
        await settle()
        given, following = load.start("two"), load.start("three")
        await settle()
        load.release.set()
        inside.cancel()  # its place goes to "two" in this round of the loop...
        await asyncio.sleep(0)
        given.cancel()  # ...who is cancelled before it wakes
        await asyncio.gather(inside, given, following, return_exceptions=True)
        assert given.cancelled()
        assert "three" in load.order
        assert_empty(gate)

    asyncio.run(main())


def test_random_life_leaks_nothing():
    async def main() -> None:
        chance = random.Random(7)
        gate = Gate(max_running=3, max_waiting=20, max_waiting_per_caller=8)
        most = 0

        async def one(name: str) -> None:
            nonlocal most
            async with gate.enter(call(name), chance.choice((1, 1, 2, 5))):
                most = max(most, gate.running)
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
                if chance.random() < 0.1:
                    raise ValueError("a call fails")

        tasks: list[asyncio.Task[None]] = []
        for _ in range(2000):
            tasks.append(asyncio.ensure_future(one(chance.choice("abc"))))
            if chance.random() < 0.4:
                chance.choice(tasks).cancel()
            if chance.random() < 0.6:
                await asyncio.sleep(0)
            assert 0 <= gate.running <= 3
            assert 0 <= gate.waiting <= 20
            assert gate.waiting == sum(map(len, gate._queues.values())) == len(gate._entries)
        await asyncio.gather(*tasks, return_exceptions=True)
        kinds = {type(task.exception()).__name__ for task in tasks if not task.cancelled()}
        assert kinds == {"NoneType", "ValueError", "OverloadedError"}
        assert most == 3
        assert_empty(gate)

    asyncio.run(main())


def test_a_wait_that_would_be_too_long_is_refused():
    async def main() -> None:
        gate = Gate(max_running=1, max_waiting=1000, max_queue_s=0.05)

        async def one() -> None:
            async with gate.enter(call()):
                await asyncio.sleep(0.01)

        tasks = [asyncio.ensure_future(one()) for _ in range(20)]  # nothing is known of the rate yet: all are let in
        await settle()
        assert gate.waiting == 19
        while gate.rate() is None:
            await asyncio.sleep(0.005)
        assert 20 < gate.rate() < 110
        with pytest.raises(OverloadedError, match=r"longer than 0\.05 s"):
            async with gate.enter(call()):
                pass
        async with gate.enter(call("other")):  # whose turn comes sooner
            pass
        await asyncio.gather(*tasks)
        assert gate.rate() is None  # nobody waits: what was measured says nothing any more
        assert_empty(gate)

    asyncio.run(main())


def test_the_drain_waits_for_those_inside_and_refuses_those_who_come():
    async def main() -> None:
        gate = Gate(max_running=1, max_waiting=10)
        first, second = call(), call("two")
        done = []

        async def one(own: Call) -> None:
            with gate.present(own):
                async with gate.enter(own):
                    await asyncio.sleep(0.01)
            done.append(own)

        tasks = [asyncio.ensure_future(one(own)) for own in (first, second)]
        await settle()
        gate.drain()
        assert gate.draining
        with pytest.raises(DrainingError) as refused, gate.present(call("three")):
            pass
        assert refused.value.status == 503
        assert "Retry-After" in refused.value.headers
        await gate.empty()
        assert done == [first, second]
        await asyncio.gather(*tasks)
        assert_empty(gate)

    asyncio.run(main())


def test_bodies_of_all_calls_together_are_bounded():
    async def main() -> None:
        gate = Gate(max_running=1, max_waiting=1, max_bytes=100, max_bytes_per_caller=100)
        first, second = call(), call()
        gate.hold(first, 60)
        with pytest.raises(OverloadedError):
            gate.hold(second, 60)
        gate.hold(second, 40)
        assert gate.bytes_held == 100
        gate.release(second)
        gate.release(second)
        assert gate.bytes_held == 60
        gate.hold(first, 40)
        gate.release(first)
        assert_empty(gate)

    asyncio.run(main())


def test_one_caller_holds_half_of_the_bytes():
    gate = Gate(max_running=1, max_waiting=1, max_bytes=100)
    first, second, other = call("greedy"), call("greedy"), call("other")
    gate.hold(first, 30)
    gate.hold(second, 20)
    with pytest.raises(OverloadedError, match="one key"):
        gate.hold(second, 1)
    gate.hold(other, 50)
    gate.release(first)
    gate.hold(second, 30)
    for each in (second, other):
        gate.release(each)
    assert_empty(gate)


def test_one_key_does_not_fill_the_waiting_room():
    """The newest calls of whoever has most make room, until two keys have as many."""

    async def main() -> None:
        gate = Gate(max_running=1, max_waiting=8)
        load = Load(gate)
        greedy = [load.start("greedy", holding=True) for _ in range(9)]
        await settle()
        others = [load.start("other") for _ in range(5)]
        await settle()
        assert gate.waiting == 8
        assert [task.done() for task in greedy] == [False] * 5 + [True] * 4
        assert [task.done() for task in others] == [False] * 4 + [True]
        load.release.set()
        found = await asyncio.gather(*greedy, *others, return_exceptions=True)
        assert sum(isinstance(each, OverloadedError) for each in found) == gate.refused == 5
        assert load.order == ["greedy"] + ["greedy", "other"] * 4
        assert_empty(gate)

    asyncio.run(main())


def test_prompts_of_one_call_take_a_place_each_and_are_one_call_that_waits():
    async def main() -> None:
        gate = Gate(max_running=4, max_waiting=2)
        order: list[str] = []
        leave = asyncio.Event()

        async def part(own: Call, places: int = 1) -> None:
            async with gate.enter(own, places):
                order.append(own.caller.name)
                await leave.wait()

        heavy, other = call("greedy"), call("other")
        tasks = [asyncio.ensure_future(part(heavy)) for _ in range(20)]
        await settle()
        assert (gate.running, gate.waiting) == (4, 1)
        tasks.append(asyncio.ensure_future(part(other)))
        await settle()
        assert (gate.running, gate.waiting) == (4, 2)
        with pytest.raises(OverloadedError):
            await part(call("third"))
        leave.set()
        await asyncio.gather(*tasks)
        assert "other" in order[4:6]
        assert len(order) == 21
        assert (heavy.places, other.places) == (0, 0)
        assert_empty(gate)

    asyncio.run(main())


def test_heavy_calls_have_their_turn_later_but_have_it():
    async def main() -> None:
        gate = Gate(max_running=4, max_waiting=100)
        order: list[str] = []
        busy = asyncio.Event()

        async def one(name: str, places: int) -> None:
            async with gate.enter(call(name), places):
                order.append(name)
                await busy.wait()

        tasks = [asyncio.ensure_future(one(*each)) for each in [("first", 4), *[("heavy", 9)] * 2, *[("light", 1)] * 8]]
        await settle()
        assert (gate.running, gate.waiting) == (4, 10)
        busy.set()
        await asyncio.gather(*tasks)
        # Nine places are the four that there are: as many as four light calls.
        assert order == ["first", "heavy", *["light"] * 4, "heavy", *["light"] * 4]
        assert_empty(gate)

    asyncio.run(main())


def test_the_engine_is_not_filled_with_what_it_cannot_begin():
    """Who waits in the engine has no turn any more: few do, so another caller's answer has few before it."""

    async def main() -> None:
        gate = Gate(max_running=50, max_waiting=100)
        started = 0
        gate.keep_ahead(lambda: started, 5)
        load = Load(gate)
        tasks = [load.start("greedy", holding=True) for _ in range(20)]
        await settle()
        assert (gate.running, gate.waiting) == (5, 15)
        tasks.append(load.start("modest", holding=True))
        started = 3
        while gate.running < 8:
            await asyncio.sleep(0.005)
        await settle()
        assert (gate.running, gate.waiting) == (8, 13)
        assert "modest" in load.order
        load.release.set()
        started = 0
        await asyncio.gather(*tasks)
        assert_empty(gate)

    asyncio.run(main())
