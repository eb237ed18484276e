"""Which tests run one after another in one process, where pytest-xdist runs them in several.

Those of a file do, so that what its fixtures start is started once, and those of files that share a server. Marks of
pytest-xdist would say so too, but its 3.8 writes them where pytest 9.2 no longer looks, and says nothing.
"""

from __future__ import annotations

from typing import Any

from xdist.scheduler import LoadScopeScheduling

# Files of tests/server whose tests use the session's servers of its conftest.
SHARED = {
    "server": (
        "admin", "auth", "bench_serve", "chat", "completions", "confinement", "grammar_queue", "http", "media_rows",
        "models", "openai_client", "overload", "urls",
    ),
    "whisper": ("audio", "audio_rows"),
}  # fmt: skip
_GROUPS = {f"tests/server/test_{name}.py": group for group, names in SHARED.items() for name in names}
# What takes longest begins first: the processes end at about the same time.
LONGEST = (
    "tests/server/test_contract.py",
    "server",
    "whisper",
    "tests/server/test_playground.py",
    "tests/server/test_engine_death.py",
    "plugins/whisper/tests/test_transcribe.py",
)


def group_of(test: str) -> str:
    """What runs together, by a test's id: a file, or the name of several."""
    file = test.partition("::")[0]
    return _GROUPS.get(file, file)


class Together(LoadScopeScheduling):
    """Hands out such groups as whole, the longest first."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)

    def _assign_work_unit(self, node: Any) -> None:
        first = next((group for group in LONGEST if group in self.workqueue), None)
        if first is not None:
            self.workqueue.move_to_end(first, last=False)
        super()._assign_work_unit(node)
