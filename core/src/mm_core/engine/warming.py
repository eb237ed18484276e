"""Kernels of an engine compiled while its model is being loaded (GPU only)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from mm_core.config import EngineConfig
from mm_core.engine.startup import StartupTimes
from mm_core.hookspecs import BuildContext
from mm_core.runner.fusing import Modules
from mm_core.runner.memory import KVCache, kv_dtype, out_of_memory
from mm_core.runner.rehearsal import Rehearsal, Sizes
from mm_core.runner.runner import ModelRunner, RunnerLimits
from mm_core.runner.warmup import KernelCompiler, Steps, WarmUp, rehearse
from mm_core.types import MediaFeature

logger = logging.getLogger(__name__)

_BLOCKS = 256  # of the KV cache that the steps share
_PACKS = (1, 2, 4)  # items encoded together

SMALLER_STEP = "Lower max_num_batched_tokens, encoder_budget, encoder_cache_tokens or max_num_seqs."


class EngineWarmUp:
    """A small runner of the same modules goes through made-up steps.

    Text first, which needs no tokenizer; then media; at last everything runs with the weights.
    """

    def __init__(self, config: EngineConfig, modules: Modules, context: BuildContext) -> None:
        kv_config, device, length = config.kv_cache_config, context.device, context.max_model_len
        num_blocks = min(config.max_num_seqs, _BLOCKS) + 1
        tokens = config.max_num_batched_tokens
        decoder = modules.decoder
        sizes = Sizes(
            config.max_num_seqs,
            tokens,
            length,
            kv_config.block_size,
            num_blocks,
            decoder.position_axes,
            modules.source_len(length),
            modules.reads_text,
            modules.instruction,
        )
        self._rehearsal = Rehearsal(sizes)
        self._capacity = config.encoder_cache_tokens
        self._vocab_size = decoder.vocab_size
        self._media: Steps = ()
        self._warm_up = WarmUp(KernelCompiler(device), [modules.encoder, decoder, modules.fusion])
        with out_of_memory("warming up", SMALLER_STEP):
            kv = KVCache(decoder.kv_specs, num_blocks, kv_config.block_size, kv_dtype(kv_config, context.dtype), device)
            rows = config.encoder_cache_tokens
            limits = RunnerLimits(config.max_num_seqs, length, rows, tokens, cuda_graphs=False, min_saved_bytes=0)
            self._runner = ModelRunner(modules, kv, device, limits)

    def begin_text(self, startup: StartupTimes) -> None:
        """Begin to compile what the decoder and sampling need."""
        with startup.part("kernels: text", "Compiling kernels"), out_of_memory("warming up", SMALLER_STEP):
            masks = partial(self._runner.follower.rehearse, self._vocab_size)
            self._warm_up.begin([*rehearse(self._runner, self._rehearsal.text_steps()), masks])

    def begin_media(self, startup: StartupTimes, features: Sequence[MediaFeature]) -> None:
        """Begin to compile what the encoder needs for such items."""
        with startup.part("kernels: media", "Compiling kernels"), out_of_memory("warming up", SMALLER_STEP):
            batches = [batch for f in features for batch in self._rehearsal.media_steps(f, _PACKS, self._capacity)]
            self._media = rehearse(self._runner, batches)
            self._warm_up.begin(self._media)

    def finish(self, startup: StartupTimes) -> None:
        """Wait until the kernels are there, run all steps with the weights, and free what it took."""
        with startup.part("kernels: rest", "Compiling kernels"), out_of_memory("warming up", SMALLER_STEP):
            count = self._warm_up.finish(whole=self._media)
            self.close()
        logger.info("%d kernels compiled or loaded", count)

    def close(self) -> None:
        """End the compiler's threads and forget the runner. Idempotent."""
        self._warm_up.close()
        self._media = ()
        with suppress(AttributeError):
            del self._runner
