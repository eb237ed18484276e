"""Loading, beside the engine's process, what it does not need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mm_core.checkpoint import open_checkpoint
from mm_core.config import EngineConfig
from mm_core.engine.front_model import FrontModel
from mm_core.engine.loading import call, load_tokenizer_beside, resolve_length, tasks_of
from mm_core.engine.startup import StartupTimes
from mm_core.hookspecs import BuildContext, DecoderSpec, Fusion, Processor
from mm_core.plugins import PluginRegistry


def load_front(name: str, config: EngineConfig, plugins: Sequence[Any] | None, startup: StartupTimes) -> FrontModel:
    """Open a checkpoint and build what needs no weights and no device, beside a process that does the rest."""
    with startup.part("background: checkpoint"):
        registry = PluginRegistry(plugins or ())
        checkpoint = open_checkpoint(name, revision=config.revision, show_progress=config.show_progress)
        owner = registry.resolve(checkpoint.architectures, model=name)
        load_tokenizer_beside(checkpoint, startup)
        spec: DecoderSpec = call(registry, "mm_decoder", owner, checkpoint)
        nowhere = BuildContext(torch.device("meta"), torch.float32, resolve_length(name, config, spec))
        fusion: Fusion = call(registry, "mm_fusion", owner, checkpoint, context=nowhere)
    with startup.part("background: processor"):
        processor: Processor = call(registry, "mm_processor", owner, checkpoint)
        tasks = tasks_of(registry, owner, checkpoint)
    return FrontModel(owner.family.name, checkpoint, processor, fusion, tasks)
