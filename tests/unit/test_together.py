"""Tests of a file run in one process, and files that share a server in one, the longest first."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from support.serving import ROOT
from support.together import LONGEST, SHARED, Together, group_of


class Node:
    """A process of tests: what it was sent."""

    shutting_down = False

    def __init__(self, tests: list[str]) -> None:
        self.gateway = SimpleNamespace(id="gw")
        self.sent: list[str] = []
        self._tests = tests

    def send_runtest_some(self, indices: list[int]) -> None:
        self.sent += [self._tests[index] for index in indices]

    def shutdown(self) -> None:
        self.shutting_down = True


def test_files_stay_whole_and_the_longest_begin() -> None:
    files = ["tests/unit/test_a.py", "tests/server/test_auth.py", "tests/unit/test_b.py", "tests/server/test_chat.py"]
    tests = [f"{file}::test_{i}[a@b::c]" for i in range(3) for file in files]
    option: Any = SimpleNamespace(loadscopereorder=False)
    config: Any = SimpleNamespace(option=option, getvalue=lambda name: ["popen", "popen"])
    scheduler = Together(config, None)
    nodes: list[Any] = [Node(tests), Node(tests)]
    for node in nodes:
        scheduler.add_node(node)
        scheduler.add_node_collection(node, tests)
    scheduler.schedule()
    first, second = nodes
    assert first.sent == [test for test in tests if group_of(test) == "server"]
    assert second.sent == [test for test in tests if test.startswith(files[0])]
    for index in range(2):
        scheduler.mark_test_complete(second, tests.index(second.sent[index]))
    assert second.sent[3:] == [test for test in tests if test.startswith(files[2])]


def test_the_files_that_are_named_are_there() -> None:
    named = [f"tests/server/test_{name}.py" for names in SHARED.values() for name in names]
    named += [group for group in LONGEST if group not in SHARED]
    assert [file for file in named if not (ROOT / file).is_file()] == []
    assert len(set(named)) == len(named)


def test_they_are_handed_out_so(request: Any) -> None:
    """Marks for pytest-xdist once stopped doing anything with a newer pytest, and nobody was told."""
    hook = request.config.pluginmanager.getplugin(str(ROOT / "conftest.py")).pytest_xdist_make_scheduler
    config: Any = SimpleNamespace(getvalue=lambda name: ["popen"])
    assert isinstance(hook(config, None), Together)
