"""A process beside the one that the user started: sends a share of a load, or asks for a server's health.

`python -m mm_core.bench.serve_worker`: a line of JSON on stdin says what to do; "ready" is answered, then a line with
the start's time is waited for; the result is a line of JSON. Ends when stdin does.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from mm_core.bench.serve_http import Target, exchange
from mm_core.bench.serve_loads import Load
from mm_core.bench.serve_run import Outcome, Part, Progress, Report, Setup
from mm_core.errors import EngineError

_HEAD_START_S = 0.3
_HEALTH_EVERY_S = 0.1
_HEALTH_TIMEOUT_S = 10.0


def run_load(setup: Setup, load: Load, processes: int, health: str | None, report: Report) -> Outcome:
    """Send a load from this process, or from several; ask for the health meanwhile from one of its own."""
    with ExitStack() as ends:
        common = {"url": _url(setup.target), "key": setup.target.key}
        watch = None if health is None else ends.enter_context(_Worker({**common, "health": health}))
        senders: list[_Worker] = []
        part = Part(setup, load) if processes == 1 else None
        if part is None:
            job = {**common, "model": setup.model, "timeout_s": setup.timeout_s, "load": load.to_dict(),
                   "max_concurrency": setup.max_concurrency, "parts": processes}  # fmt: skip
            senders = [ends.enter_context(_Worker({**job, "part": number})) for number in range(processes)]
        for worker in [*senders, *([] if watch is None else [watch])]:
            worker.wait_ready()
        begin = time.perf_counter() + _HEAD_START_S
        if watch is not None:
            watch.start(begin)
        outcome = _gather(senders, begin, report) if part is None else asyncio.run(part.run(begin, report))
        if watch is not None:
            outcome.health = watch.stop()
        return outcome


def _url(target: Target) -> str:
    host = f"[{target.host}]" if ":" in target.host else target.host
    return f"{'https' if target.tls else 'http'}://{host}:{target.port}{target.base}"


def _gather(workers: Sequence[_Worker], begin: float, report: Report) -> Outcome:
    """Start all senders, and wait for their results."""
    counts: dict[int, Mapping[str, int]] = {}
    lock = threading.Lock()

    def told(number: int, count: Mapping[str, int]) -> None:
        with lock:
            counts[number] = count
            names = ("total", "sent", "done", "failed")
            if number == 0:
                report(Progress(*(sum(each[name] for each in counts.values()) for name in names)))

    results: list[dict[str, Any] | None] = [None] * len(workers)

    def follow(number: int, worker: _Worker) -> None:
        results[number] = worker.result(lambda count: told(number, count))

    threads = [threading.Thread(target=follow, args=pair, daemon=True) for pair in enumerate(workers)]
    for worker in workers:
        worker.start(begin)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [result for result in results if result is not None]
    if len(found) < len(workers):
        raise EngineError("A client process ended before its share was sent. What it said is above; try --processes 1.")
    return Outcome.merged(found)


class _Worker:
    """The other end of a process's pipes. As a context it ends the process."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        command = [sys.executable, "-m", "mm_core.bench.serve_worker"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._write(json.dumps(job))

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise EngineError("A client process ended at once. What it said is above.") from None

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def wait_ready(self) -> None:
        if self._read() != "ready":
            raise EngineError("A client process could not prepare its requests. What it said is above.")

    def start(self, begin: float) -> None:
        """perf_counter is the same clock in all processes of a machine."""
        self._write(json.dumps(begin))

    def result(self, told: Any) -> dict[str, Any] | None:
        while (found := self._read()) is not None:
            if "records" in found:
                return dict(found)
            told(found)
        return None

    def stop(self) -> dict[str, Any] | None:
        """End the asking for health; what was found."""
        self._write("null")
        found = self._read()
        return None if found is None else dict(found)


# -- inside the process ------------------------------------------------------------------------


def main() -> int:
    """Do what the line on stdin says."""
    job = json.loads(sys.stdin.readline())
    target = Target.of(job["url"], job["key"])
    if "health" in job:
        return _watch_health(target, job["health"])
    setup = Setup(target, job["model"], job["timeout_s"], job["max_concurrency"])
    part = Part(setup, Load.from_dict(job["load"]), job["part"], job["parts"])
    begin = _ready()
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def report(progress: Progress) -> None:
        _tell({name: getattr(progress, name) for name in ("total", "sent", "done", "failed")})

    outcome = asyncio.run(part.run(begin, report))
    _tell(outcome.to_dict())
    return 0


def _ready() -> float:
    _tell("ready")
    line = sys.stdin.readline()
    if not line:
        os._exit(1)
    return float(line)


def _tell(found: Any) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    if not sys.stdin.readline():
        os._exit(1)


def _set_after_line(stop: threading.Event) -> None:
    sys.stdin.readline()
    stop.set()


def _watch_health(target: Target, path: str) -> int:
    """Ask every _HEALTH_EVERY_S until told to stop: how long each answer took, in ms, and what it was."""
    begin = _ready()
    stop = threading.Event()
    threading.Thread(target=_set_after_line, args=(stop,), daemon=True).start()
    call = [target.head("GET", target.root + path, 0)]
    found: list[float] = []
    statuses: dict[str, int] = {}

    async def watch() -> None:
        due = begin
        while not stop.is_set():
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            reply = await exchange(target, call, _HEALTH_TIMEOUT_S)
            found.append((reply.ended - reply.started) * 1e3)
            status = reply.error or str(reply.status)
            statuses[status] = statuses.get(status, 0) + 1
            due = max(due + _HEALTH_EVERY_S, time.perf_counter())

    asyncio.run(watch())
    _tell({"ms": found, "statuses": statuses, "path": path})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
