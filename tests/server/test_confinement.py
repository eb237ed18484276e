"""What the server's processes give up: of its memory and environment nothing can be read, of its children least."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.serving import ADMIN_KEY, Server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have none of it")

_HIDDEN = """
import ctypes
from mm_core.confinement import hide
before = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
hide()
print(before, ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
"""
_READER = """
import sys
from mm_core.confinement import drop_privileges
drop_privileges()
for pid in sys.argv[1:]:
    for name in ("environ", "mem", "maps"):
        try:
            open(f"/proc/{pid}/{name}", "rb").read(10)
        except PermissionError:
            print("refused")
"""


def _run(code: str, *arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.split()


def _children(server: Server, name: str) -> list[psutil.Process]:
    return [each for each in psutil.Process(server.pid).children(recursive=True) if name in " ".join(each.cmdline())]


def _status(process: psutil.Process) -> dict[str, str]:
    lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def test_a_process_hides_itself() -> None:
    assert _run(_HIDDEN) == ["1", "0"]


def test_nothing_of_the_server_is_read_by_its_own_user(server: Server) -> None:
    (engine,) = _children(server, "process.child")
    assert _run(_READER, str(server.pid), str(engine.pid)) == ["refused"] * 6


def test_children_are_not_told_the_keys(server: Server) -> None:
    """Whose environment root may read."""
    found = [each for name in ("process.child", "worker_main", "check_main") for each in _children(server, name)]
    assert len(found) >= 3
    for each in found:
        try:
            told = each.environ()
        except psutil.AccessDenied:  # the engine's, by another user than root
            continue
        assert ADMIN_KEY not in told.values()
        assert not any("key-of-env" in value for value in told.values())


def test_decode_workers_have_no_rights(server: Server) -> None:
    found = _children(server, "worker_main")
    assert found
    for each in found:
        deadline = time.monotonic() + 60
        while (status := _status(each))["Seccomp"] == "0" and time.monotonic() < deadline:
            time.sleep(0.05)  # it still loads its decoders
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert int(status["CapEff"], 16) == int(status["CapPrm"], 16) == 0
