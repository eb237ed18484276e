"""Language models over flattened batches and paged caches, and core's default `mm_decoder` hook."""

from mm_core.decoders.llama import LlamaConfig, LlamaDecoder, llama_weight_map
from mm_core.decoders.opt import OPTConfig, OPTDecoder, opt_spec, opt_weight_map
from mm_core.decoders.seq2seq import Seq2SeqConfig, Seq2SeqDecoder, seq2seq_weight_map
from mm_core.decoders.t5 import T5Decoder, t5_spec, t5_weight_map
from mm_core.decoders.t5_layers import T5Config

__all__ = [
    "LlamaConfig",
    "LlamaDecoder",
    "OPTConfig",
    "OPTDecoder",
    "Seq2SeqConfig",
    "Seq2SeqDecoder",
    "T5Config",
    "T5Decoder",
    "llama_weight_map",
    "opt_spec",
    "opt_weight_map",
    "seq2seq_weight_map",
    "t5_spec",
    "t5_weight_map",
]
