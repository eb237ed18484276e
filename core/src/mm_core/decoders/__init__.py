"""Language models over flattened batches and paged caches, and core's default `mm_decoder` hook."""

from mm_core.decoders.llama import LlamaConfig, LlamaDecoder, llama_weight_map

__all__ = ["LlamaConfig", "LlamaDecoder", "llama_weight_map"]
