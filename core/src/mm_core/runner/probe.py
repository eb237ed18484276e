"""How much memory a full step takes, measured by running one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from mm_core.config import EngineConfig
from mm_core.hookspecs import Decoder, Encoder, Processor
from mm_core.layers.context import AttentionMetadata, ForwardContext
from mm_core.runner.memory import KVCache
from mm_core.runner.rehearsal import noise_feature

T = TypeVar("T")
_PROBE_SIDE = 896  # pixels: a large photograph, not a worst case nobody asked for
_PROBE_LENGTH = 2048  # tokens of each sequence


@dataclass(frozen=True)
class StepMemory:
    """Bytes one full step takes above weights and KV cache. encoder and decoder run beside each other
    on a GPU, so both count in full; kept: rows of encoded items, held for reuse."""

    encoder: int
    decoder: int
    kept: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.encoder + self.decoder + self.kept


@torch.inference_mode()
def measure_step(
    decoder: Decoder,
    encoder: Encoder,
    processor: Processor,
    config: EngineConfig,
    encoder_budget: int,
    device: torch.device,
) -> StepMemory:
    """Memory of one step at its token and encoder budgets, by running its two halves (GPU only).

    The encoder runs large photographs up to its budget, not the worst case that a request may send:
    what is above must find room in what `free_gpu_memory_fraction` leaves free.
    """
    rows, encoder_peak = _peak(device, lambda: _run_encoder(encoder, processor, encoder_budget))
    element = rows[0].element_size() if rows else 2
    del rows
    blocks = -(-config.max_num_batched_tokens // config.kv_cache_config.block_size)
    dtype = decoder.embed(torch.zeros(1, dtype=torch.int64, device=device)).dtype
    kv = KVCache(decoder.kv_specs, blocks, config.kv_cache_config.block_size, dtype, device)
    _, decoder_peak = _peak(device, lambda: _run_decoder(decoder, config, kv, device))
    return StepMemory(encoder_peak, decoder_peak, config.encoder_cache_tokens * encoder.hidden_size * element)


def _peak(device: torch.device, run: Callable[[], T]) -> tuple[T, int]:
    """What `run` gives, and the most bytes that were allocated above what was before."""
    torch.cuda.synchronize(device)
    base = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    torch.cuda.synchronize(device)
    return result, torch.cuda.max_memory_allocated(device) - base


def _run_encoder(encoder: Encoder, processor: Processor, budget: int) -> list[Tensor]:
    feature = noise_feature(processor, _PROBE_SIDE)
    if feature is None:
        return []
    count = max(budget // max(encoder.cost(feature), 1), 1)
    return encoder([replace(feature, key=bytes([i % 256])) for i in range(count)])


def _run_decoder(decoder: Decoder, config: EngineConfig, kv: KVCache, device: torch.device) -> None:
    tokens = config.max_num_batched_tokens
    embeds = decoder.embed(torch.zeros(tokens, dtype=torch.int64, device=device))
    length = min(tokens, _PROBE_LENGTH)
    count = -(-tokens // length)
    bounds = torch.arange(count + 1, dtype=torch.int32, device=device).mul_(length).clamp_(max=tokens)
    width = -(-length // kv.block_size)
    tables = torch.arange(count * width, dtype=torch.int32, device=device).clamp_(max=kv.num_blocks - 1)
    positions = torch.arange(tokens, dtype=torch.int32, device=device).remainder_(length)
    metadata = AttentionMetadata(
        block_tables=tables.view(count, width),
        cu_seqlens_q=bounds,
        kv_lens=bounds.diff(),
        slot_mapping=torch.arange(tokens, dtype=torch.int64, device=device),
        max_q_len=length,
        max_kv_len=length,
    )
    context = ForwardContext({spec.name: metadata for spec in decoder.kv_specs}, kv.caches)
    hidden = decoder(embeds, positions.expand(decoder.position_axes, -1).contiguous(), context)
    logits = decoder.logits(hidden[: config.max_num_seqs])
    # What sampling takes at most: float32 copies of the logits, edited ones, and log-probability tables.
    torch.empty((4, *logits.shape), dtype=torch.float32, device=device)
