"""The language model: core's Llama decoder, for tokenizers that know more tokens than it has embeddings."""

from __future__ import annotations

from functools import partial

from torch import Tensor
from torch.nn import functional as F

from mm_core.decoders import LlamaConfig, LlamaDecoder, llama_weight_map
from mm_core.decoders.default import LLAMA_TYPES
from mm_core.errors import ConfigError
from mm_core.hookspecs import BuildContext, Checkpoint, DecoderSpec
from mm_plugin_nvila.processor import with_media_tokens


class VilaDecoder(LlamaDecoder):
    """A decoder whose media tokens have no embedding: rows take their places, and no answer has them."""

    def __init__(self, config: LlamaConfig, vocab_size: int, context: BuildContext) -> None:
        super().__init__(config, context)
        self.vocab_size = max(vocab_size, config.vocab_size)

    def embed(self, token_ids: Tensor) -> Tensor:
        """[T] int64 → [T, hidden]."""
        known = self.config.vocab_size
        return super().embed(token_ids if self.vocab_size == known else token_ids.clamp(max=known - 1))

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, hidden] → [R, vocab], for the rows that are sampled from."""
        scores = super().logits(hidden)
        more = self.vocab_size - scores.shape[-1]
        return F.pad(scores, (0, more), value=float("-inf")) if more else scores


def decoder_spec(checkpoint: Checkpoint) -> DecoderSpec:
    """The decoder of a checkpoint in any layout. Whether embeddings are tied, the language model's own settings
    say."""
    text = checkpoint.text_config
    if text.get("model_type") not in LLAMA_TYPES:
        raise ConfigError(
            f"The checkpoint's language model is of type {text.get('model_type')!r}; this plugin runs Llama, Mistral "
            "and Qwen2 models. Check llm_cfg (or llm/config.json, or text_config)."
        )
    own = checkpoint.config.get("text_config") or checkpoint.config.get("llm_cfg") or {}
    config = LlamaConfig.from_text_config(text, tied=bool(own.get("tie_word_embeddings", False)))
    return DecoderSpec(
        build=partial(VilaDecoder, config, len(with_media_tokens(checkpoint.tokenizer))),
        weight_map=llama_weight_map(("llm.model.",), tied=config.tied),
        max_model_len=config.max_position_embeddings,
    )
