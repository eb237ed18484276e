"""ModelRunner: runs scheduled batches on the device: encode, fuse, forward, sample."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mm_core.config import EngineConfig
from mm_core.errors import ConfigError, MMError, OutOfMemoryError
from mm_core.hookspecs import Decoder, Encoder
from mm_core.layers.context import ForwardContext
from mm_core.runner.batch import BatchInputs, build_inputs
from mm_core.runner.encoders import EncoderRows
from mm_core.runner.memory import KVCache
from mm_core.runner.sampler import SampledTokens, Sampler, SamplingRow
from mm_core.runner.step import LaunchedStep
from mm_core.scheduler.sequence import SampledToken, ScheduledBatch, ScheduledSequence, StepResult
from mm_core.scheduler.sequence import Sequence as SequenceState

_SEED_STRIDE = 0x9E3779B97F4A7C15  # spreads the seeds of a request's n answers (2^64 / golden ratio)


class ModelRunner:
    """Owns the device: modules, KV tensors and encoder rows."""

    def __init__(self, decoder: Decoder, encoder: Encoder, kv: KVCache, family: str, device: torch.device) -> None:
        self.device = device
        self.kv = kv
        self.rows = EncoderRows(encoder, family, device)
        self._decoder = decoder
        self._sampler = Sampler()

    def release(self) -> None:
        """Drop modules, KV tensors and encoder rows; nothing can run afterwards."""
        self.kv.caches.clear()
        self.rows.release()
        del self._decoder
        if self.device.type == "cuda":
            gc.collect()  # modules refer to each other in circles
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def execute(self, batch: ScheduledBatch) -> StepResult:
        """Run one step. Raises OutOfMemoryError; whatever concerns one item or request is in the result."""
        try:
            return self._execute(batch)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"The device ran out of memory in a step of {batch.num_tokens} tokens and {len(batch.encode)} "
                "media items. Lower max_num_batched_tokens, encoder_budget or "
                "KvCacheConfig(free_gpu_memory_fraction=...)."
            ) from error

    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        """Start one step without waiting for it. Raises as `execute` does."""
        result = self.execute(batch)
        return LaunchedStep(lambda: result, bool(result.failed or result.failed_media))

    def _execute(self, batch: ScheduledBatch) -> StepResult:
        self.rows.drop(batch.evicted_media)
        failed_media = self.rows.encode(batch.encode)
        if not batch.sequences:
            return StepResult({}, {}, frozenset(failed_media))
        inputs = build_inputs(batch, self._decoder.position_axes, self.kv.block_size, self.device)
        logits, failed = self._forward(inputs, failed_media)
        chosen = [s for s in batch.sequences if s.samples]
        sampled = self._sample(logits, chosen) if chosen else {}
        return StepResult(sampled, failed, frozenset(failed_media))

    def _forward(self, inputs: BatchInputs, failed_media: Mapping[bytes, MMError]) -> tuple[Tensor, dict[int, MMError]]:
        embeds = self._decoder.embed(inputs.token_ids)
        failed: dict[int, MMError] = {}
        for span in inputs.media:
            if span.key in failed_media:
                failed[span.seq_id] = failed_media[span.key]
            else:
                embeds[span.rows] = self.rows[span.key][span.first : span.last].to(embeds.dtype)
        hidden = self._decoder(embeds, inputs.positions, ForwardContext(inputs.tables, self.kv.caches))
        if inputs.sample_rows is not None:
            hidden = hidden[inputs.sample_rows]
        return self._decoder.logits(hidden) if len(hidden) else hidden, failed

    def _sample(self, logits: Tensor, chosen: Sequence[ScheduledSequence]) -> dict[int, SampledToken]:
        drawn = self._sampler(logits, [_sampling_row(s.seq) for s in chosen])
        return _by_sequence(drawn, chosen)


def _sampling_row(seq: SequenceState) -> SamplingRow:
    return SamplingRow(
        params=seq.params,
        seed=(seq.seed + _SEED_STRIDE * seq.index) % 2**63,
        step=seq.num_output_tokens,
        prompt_token_ids=seq.request.token_ids,
        output_token_ids=seq.output_token_ids if seq.params.penalised else (),  # a copy at every step
        stop_token_ids=seq.masked_stop_ids,
    )


def _by_sequence(drawn: SampledTokens, chosen: Sequence[ScheduledSequence]) -> dict[int, SampledToken]:
    tokens, finite = drawn.token_ids.tolist(), drawn.finite.tolist()
    return {
        s.seq.seq_id: SampledToken(token, logprobs, ok)
        for s, token, logprobs, ok in zip(chosen, tokens, drawn.logprobs, finite, strict=True)
    }


def resolve_device(config: EngineConfig) -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU. Raises ConfigError for what is not there."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={config.device!r} is not supported. Use 'auto', 'cpu', 'cuda' or 'cuda:N'.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={config.device!r}: torch sees {torch.cuda.device_count()} CUDA devices. Use device='cpu', or "
            "install a CUDA build of torch and a driver."
        )
    return device
