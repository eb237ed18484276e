"""A real server process for tests: started, waited for, asked, and ended."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

ROOT = Path(__file__).resolve().parents[2]
ADMIN_KEY = "admin-key-of-the-tests"
_STARTED_WITHIN_S = 120.0


class Server:
    """A running `mm serve`. url: without a path. lines: of its stderr so far."""

    def __init__(self, process: subprocess.Popen[str], keys: Sequence[str] = (), admin_key: str | None = None) -> None:
        self.process = process
        self.keys = tuple(keys)
        self.admin_key = admin_key
        self.url = ""
        self.lines: list[str] = []
        self._told: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        for stream, take in ((process.stdout, self._told.put), (process.stderr, self.lines.append)):
            threading.Thread(target=self._read, args=(stream, take), daemon=True).start()

    def _read(self, stream: Any, take: Any) -> None:
        for line in stream:
            take(line.rstrip("\n"))
        if stream is self.process.stdout:
            self._told.put(None)

    def wait_ready(self, timeout_s: float = _STARTED_WITHIN_S) -> None:
        """Until it says where it listens, and /health/ready agrees."""
        deadline = time.monotonic() + timeout_s
        while not self.url:
            line = self._told.get(timeout=max(deadline - time.monotonic(), 0.1))
            if line is None:
                raise AssertionError("the server ended: " + "\n".join(self.lines[-30:]))
            if found := re.fullmatch(r"listening on (http://\S+)", line):
                self.url = found[1]
        while httpx.get(f"{self.url}/health/ready").status_code != 200:
            assert time.monotonic() < deadline, "not ready in time: " + "\n".join(self.lines[-30:])
            time.sleep(0.05)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.url)
        return str(parts.hostname), int(parts.port or 0)

    def headers(self, key: str | None = None) -> dict[str, str]:
        """Of a call under that key (None: the first of the server's, if it has any)."""
        key = key or (self.keys[0] if self.keys else None)
        return {} if key is None else {"Authorization": f"Bearer {key}"}

    def http(self, key: str | None = None, **options: Any) -> httpx.Client:
        """A plain HTTP client, whose environment's proxies are left out."""
        return httpx.Client(base_url=self.url, headers=self.headers(key), timeout=60.0, trust_env=False, **options)

    def client(self, key: str | None = None, **options: Any) -> Any:
        """The official client, unmodified; retries are off unless asked for."""
        import openai

        key = key or (self.keys[0] if self.keys else "no-key")
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **{"max_retries": 0, "timeout": 60.0, **options})

    def stats(self) -> dict[str, Any]:
        """The server's inside, by the admin route: engine, gate, process."""
        assert self.admin_key is not None, "start the server with an admin key"
        with self.http(self.admin_key) as client:
            reply = client.get("/admin/stats")
        assert reply.status_code == 200, reply.text
        found: dict[str, Any] = reply.json()
        return found

    def wait_for_lines(self, text: str, timeout_s: float = 10.0) -> list[str]:
        """The lines of stderr so far, once one holds that text: the log of a call comes behind its reply."""
        deadline = time.monotonic() + timeout_s
        while not any(text in line for line in self.lines):
            assert time.monotonic() < deadline, f"no line with {text!r}: " + "\n".join(self.lines[-30:])
            time.sleep(0.02)
        return list(self.lines)

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = 30.0) -> int:
        """Its exit code."""
        return self.process.wait(timeout_s)

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


@contextmanager
def started_server(
    model: str | Path | None = None,
    *arguments: str,
    keys: Sequence[str] = (),
    admin_key: str | None = ADMIN_KEY,
    env: Mapping[str, str] | None = None,
    **options: Any,
) -> Iterator[Server]:
    """`mm serve` on a free port, not yet waited for. options: of the command, max_waiting=3 is `--max-waiting 3`,
    True a flag, a list several."""
    command = [sys.executable, "-m", "mm_core.cli", "serve", *([] if model is None else [str(model)]), "--port", "0"]
    for key in keys:
        command += ["--api-key", key]
    if admin_key is not None:
        command += ["--admin-key", admin_key]
    for name, value in options.items():
        for each in value if isinstance(value, (list, tuple)) else [value]:
            command += [f"--{name.replace('_', '-')}", *([] if each is True else [str(each)])]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
    # No proxies, no keys of whoever runs the tests: what the server does depends on its command alone.
    kept = {n: v for n, v in os.environ.items() if not n.lower().endswith("_proxy") and not n.startswith("MM_")}
    process = subprocess.Popen(
        [*command, *arguments], cwd=ROOT, env={**kept, **own, **(env or {})}, text=True, errors="replace", **pipes
    )
    server = Server(process, keys, admin_key)
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def running_server(model: str | Path | None = None, *arguments: str, **options: Any) -> Iterator[Server]:
    """A server that answers; it is killed at the end. Parameters as `started_server`; the zoo's small model, where
    none is named. Options that a test does not give: few threads, few KV blocks."""
    options = {"num_kv_blocks": 512, **options}
    with started_server(model, *arguments, **options) as server:
        server.wait_ready()
        yield server
