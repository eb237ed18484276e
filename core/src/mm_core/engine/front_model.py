"""What prepares requests where the model is in another process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mm_core.checkpoint import LoadedCheckpoint
from mm_core.hookspecs import Fusion, Processor, Task


@dataclass(frozen=True)
class FrontModel:
    """What prepares requests and makes texts of tokens, where the modules are in another process. fusion: for
    positions and instructions alone; it has no weights. vocab_size: told by that process, 0 until then."""

    family: str
    checkpoint: LoadedCheckpoint
    processor: Processor
    fusion: Fusion
    tasks: Mapping[str, Task]
    vocab_size: int = 0
    pin_for: None = None
