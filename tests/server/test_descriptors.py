"""Connections of anybody, idle, against the limit of open files."""

from __future__ import annotations

import resource
import socket
from contextlib import ExitStack

import httpx
import pytest
from support.serving import started_server

FILES = 300


@pytest.mark.slow
def test_idle_connections_leave_room_for_health() -> None:
    """--max-connections is 4096 by default: the bound has to be what the process may open, less what else it needs."""
    with ExitStack() as stack:
        server = stack.enter_context(started_server(num_kv_blocks=512, in_process=True, decode_workers=0))
        resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (FILES, FILES))
        server.wait_ready()
        assert any("only 300 files may be open" in line for line in server.lines)
        for _ in range(FILES + 20):
            stack.enter_context(socket.create_connection(server.address, timeout=5.0))
        reply = httpx.get(f"{server.url}/health", timeout=5.0, trust_env=False)
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "overloaded")
