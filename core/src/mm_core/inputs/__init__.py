"""From what users hand over to prepared requests: prompts, media values, the preprocessing pipeline."""

from __future__ import annotations

from mm_core.inputs.messages import ChatPrompt
from mm_core.inputs.pipeline import InputPipeline, eos_token_ids

__all__ = ["ChatPrompt", "InputPipeline", "eos_token_ids"]
