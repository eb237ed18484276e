"""Core's default `mm_decoder` hook: the decoders that core has, by the text model's type."""

from __future__ import annotations

from functools import partial

from mm_core.hookspecs import Checkpoint, DecoderSpec, hookimpl

LLAMA_TYPES = frozenset(
    {
        "llama",
        "llama_text",
        "mistral",
        "mistral_text",
        "qwen2",
        "qwen2_text",
        "qwen2_vl",
        "qwen2_vl_text",
        "qwen2_5_vl",
        "qwen2_5_vl_text",
    }
)


@hookimpl
def mm_decoder(family: str, checkpoint: Checkpoint) -> DecoderSpec | None:  # noqa: ARG001
    """The decoder that covers the text model's type; None leaves the checkpoint to nobody."""
    text_config = checkpoint.text_config
    kind = text_config.get("model_type")
    if kind in ("opt", "t5"):
        from mm_core.decoders import opt_spec, t5_spec

        return opt_spec(text_config) if kind == "opt" else t5_spec(text_config)
    if kind not in LLAMA_TYPES:
        return None
    from mm_core.decoders.llama import LlamaConfig, LlamaDecoder, llama_weight_map

    config = LlamaConfig.from_text_config(text_config)
    return DecoderSpec(
        build=partial(LlamaDecoder, config),
        weight_map=llama_weight_map(tied=config.tied),
        max_model_len=config.max_position_embeddings,
    )
