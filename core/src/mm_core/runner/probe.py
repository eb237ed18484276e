"""How much memory a full step takes, measured by running one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from mm_core.config import EngineConfig
from mm_core.hookspecs import Encoder, Processor
from mm_core.layers.context import AttentionMetadata, ForwardContext
from mm_core.runner.encoders import EncoderRows
from mm_core.runner.fusing import Conditioner, Modules, made_up_items
from mm_core.runner.memory import KVCache, kv_dtype
from mm_core.runner.rehearsal import noise_feature
from mm_core.runner.sources import SourceWriter, made_up_sources
from mm_core.runner.spans import DeviceSpans
from mm_core.types import MediaFeature

T = TypeVar("T")
_PROBE_SIDE = 896  # pixels: a large photograph, not a worst case nobody asked for
_PROBE_LENGTH = 2048  # tokens of each sequence


@dataclass(frozen=True)
class Budgets:
    """Of one step: the encoder's, in its cost units, and rows of sources, source_len each. sequence_len: tokens
    of a sequence at most; a decoder has positions for no more."""

    encoder: int
    source: int = 0
    source_len: int = 0
    sequence_len: int = _PROBE_LENGTH


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
    modules: Modules, processor: Processor, config: EngineConfig, budgets: Budgets, device: torch.device
) -> StepMemory:
    """Memory of one step at its budgets, by running its parts (GPU only).

    The encoder runs large photographs, or half minutes of sound, up to its budget, not the worst case that a
    request may send: what is above must find room in what `free_gpu_memory_fraction` leaves free.
    """
    decoder, encoder = modules.decoder, modules.encoder
    feature = noise_feature(processor, _PROBE_SIDE)
    rows, encoder_peak = _peak(device, lambda: _run_encoder(encoder, feature, budgets.encoder))
    element = rows[0].element_size() if rows else 2
    del rows
    size = config.kv_cache_config.block_size
    dtype = decoder.embed(torch.zeros(1, dtype=torch.int64, device=device)).dtype
    stored = kv_dtype(config.kv_cache_config, dtype)
    kv = KVCache(decoder.kv_specs, -(-config.max_num_batched_tokens // size), size, stored, device)
    # The decoder's stream runs these one after another.
    peaks = [
        _peak(device, lambda: _run_decoder(modules, config, kv, budgets.sequence_len, device))[1],
        _peak(device, lambda: _run_condition(modules, feature, config, device, dtype))[1],
        _peak(device, lambda: _run_sources(modules, kv, budgets, device))[1],
    ]
    return StepMemory(encoder_peak, max(peaks), config.encoder_cache_tokens * encoder.hidden_size * element)


def _peak(device: torch.device, run: Callable[[], T]) -> tuple[T, int]:
    """What `run` gives, and the most bytes that were allocated above what was before."""
    torch.cuda.synchronize(device)
    base = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    torch.cuda.synchronize(device)
    return result, torch.cuda.max_memory_allocated(device) - base


def _run_encoder(encoder: Encoder, feature: MediaFeature | None, budget: int) -> list[Tensor]:
    if feature is None:
        return []
    count = max(budget // max(encoder.cost(feature), 1), 1)
    return encoder([replace(feature, key=bytes([i % 256])) for i in range(count)])


def _run_condition(
    modules: Modules, feature: MediaFeature | None, config: EngineConfig, device: torch.device, dtype: torch.dtype
) -> None:
    """As many items as a step may have."""
    if feature is None or not modules.conditions:
        return
    items = made_up_items(feature, modules.instruction, config.max_num_batched_tokens, config.encoder_cache_tokens)
    rows = min(len(items) * feature.num_tokens, config.encoder_cache_tokens)
    slab = torch.zeros((rows, modules.encoder.hidden_size), dtype=dtype, device=device)
    Conditioner(modules, slab).run(items)


def _run_sources(modules: Modules, kv: KVCache, budgets: Budgets, device: torch.device) -> None:
    if not modules.has_cross or not budgets.source:
        return
    spans = DeviceSpans(None, device)
    rows = EncoderRows(modules.encoder, modules.family, 1, device, spans)
    host = made_up_sources(budgets.source, min(budgets.source_len, budgets.source), modules.reads_text)
    SourceWriter(modules, rows, None, kv, spans).run(host)


def _run_decoder(modules: Modules, config: EngineConfig, kv: KVCache, longest: int, device: torch.device) -> None:
    decoder = modules.decoder
    tokens = config.max_num_batched_tokens
    embeds = decoder.embed(torch.zeros(tokens, dtype=torch.int64, device=device))
    length = min(tokens, _PROBE_LENGTH, longest)
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
    kinds = {"self": metadata}
    if modules.has_cross:
        kinds["cross"] = replace(metadata, slot_mapping=None, causal=False)
    context = ForwardContext(kinds, kv.caches)
    hidden = decoder(embeds, positions.expand(decoder.position_axes, -1).contiguous(), context)
    logits = decoder.logits(hidden[: config.max_num_seqs])
    # What sampling takes at most: float32 copies of the logits, edited ones, and log-probability tables.
    torch.empty((4, *logits.shape), dtype=torch.float32, device=device)
