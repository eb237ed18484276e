"""A step that was launched and may still be running."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mm_core.scheduler.sequence import StepResult


@dataclass(frozen=True)
class LaunchedStep:
    """Work in flight. wait: blocks until it is done and gives what it brought; raises what the device
    reports only then. failed: something is known to have failed already, so the result should be
    taken in before anything more is scheduled."""

    wait: Callable[[], StepResult]
    failed: bool = False
