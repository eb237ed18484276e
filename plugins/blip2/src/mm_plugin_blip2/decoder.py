"""Which of core's decoders a checkpoint's language model is."""

from __future__ import annotations

from functools import partial

from mm_core.hookspecs import Checkpoint, DecoderSpec, hookimpl


@hookimpl
def mm_decoder(family: str, checkpoint: Checkpoint) -> DecoderSpec | None:  # noqa: ARG001
    """OPT, T5 or Llama; None for others. Whether embeddings are tied is told by the language model's own settings,
    not by the wrapper's, which core's default goes by."""
    from mm_core.decoders import LlamaConfig, LlamaDecoder, llama_weight_map, opt_spec, t5_spec

    own = checkpoint.config.get("text_config") or {}
    text = {**checkpoint.text_config, "tie_word_embeddings": own.get("tie_word_embeddings")}
    text = {key: value for key, value in text.items() if value is not None}
    kind = own.get("model_type", "opt")
    if kind in ("opt", "t5"):
        return opt_spec(text) if kind == "opt" else t5_spec(text)
    if kind != "llama":
        return None
    config = LlamaConfig.from_text_config(text)
    names = llama_weight_map(tied=config.tied)
    return DecoderSpec(partial(LlamaDecoder, config), names, config.max_position_embeddings)
