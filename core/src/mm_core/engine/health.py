"""What is loaded, and how the engine's loop does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from mm_core.types import Modality


@dataclass(frozen=True)
class ModelInfo:
    """What is loaded. name: as it was asked for. vocab_size: width of the logits. tasks: names for `task`. limits:
    items of a modality that one request may have, where the family has such a bound."""

    name: str
    family: str
    modalities: tuple[Modality, ...]
    max_model_len: int
    vocab_size: int
    tasks: tuple[str, ...] = ()
    limits: Mapping[Modality, int] = field(default_factory=dict)


EngineState = Literal["starting", "ready", "stuck", "dead", "closed"]


@dataclass(frozen=True)
class EngineHealth:
    """How the engine's loop does. idle_s: seconds since it last took a step, or had nothing to do; a loop with work
    that has not stepped for long, or a process that is silent, is "stuck", one whose process ended "dead" (while it is
    started again: "starting"). steps: taken since the start. restarts: how often its process was started again."""

    state: EngineState
    idle_s: float = 0.0
    steps: int = 0
    restarts: int = 0

    @property
    def ready(self) -> bool:
        """Whether a request would be served now."""
        return self.state == "ready"
