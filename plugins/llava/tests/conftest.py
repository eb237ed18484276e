"""Odd sizes climb all rungs in the slow run; in every run they climb the first."""

from __future__ import annotations

from pathlib import Path

import pytest

SIZES = ("1x1", "8192x1", "20x300", "201x77", "38x38", "400x390")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        odd = item.path.parent == Path(__file__).parent and item.name.endswith(tuple(f"-{size}]" for size in SIZES))
        if odd and not item.name.startswith("test_rung[parity"):
            item.add_marker(pytest.mark.slow)
