"""Checkpoints: finding them, reading their settings, and loading their weights."""

from mm_core.checkpoint.config import LoadedCheckpoint, open_checkpoint, resolve_dtype
from mm_core.checkpoint.dummy import init_dummy_weights
from mm_core.checkpoint.weights import load_weights

__all__ = ["LoadedCheckpoint", "init_dummy_weights", "load_weights", "open_checkpoint", "resolve_dtype"]
