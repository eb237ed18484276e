"""Scheduling: pure Python, no torch."""

from mm_core.scheduler.policy import Candidate, longest_prefix_first
from mm_core.scheduler.scheduler import Scheduler, SchedulerConfig
from mm_core.scheduler.sequence import (
    EncodeItem,
    SampledToken,
    ScheduledBatch,
    ScheduledSequence,
    SchedulerStats,
    Sequence,
    Status,
    StepResult,
    TokenEvent,
)

__all__ = [
    "Candidate",
    "EncodeItem",
    "SampledToken",
    "ScheduledBatch",
    "ScheduledSequence",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
    "Sequence",
    "Status",
    "StepResult",
    "TokenEvent",
    "longest_prefix_first",
]
