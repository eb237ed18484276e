"""Core's Llama decoder, with this family's defaults."""

from __future__ import annotations

from mm_core.hookspecs import Checkpoint, DecoderSpec, hookimpl


@hookimpl
def mm_decoder(family: str, checkpoint: Checkpoint) -> DecoderSpec:  # noqa: ARG001
    """For Llama, Vicuna, Mistral and Qwen2."""
    from functools import partial

    from mm_core.decoders import LlamaConfig, LlamaDecoder, llama_weight_map
    from mm_plugin_llava.config import LlavaConfig

    config = LlamaConfig.from_text_config(LlavaConfig.from_checkpoint(checkpoint).text)
    return DecoderSpec(
        build=partial(LlamaDecoder, config),
        weight_map=llama_weight_map(tied=config.tied),
        max_model_len=config.max_position_embeddings,
    )
