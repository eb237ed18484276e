"""How much memory a full step takes, measured by running one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mm_core.config import EngineConfig
from mm_core.hookspecs import Decoder, Encoder, MediaRequest, Processor
from mm_core.layers.context import AttentionMetadata, ForwardContext
from mm_core.runner.memory import KVCache
from mm_core.types import MediaFeature, MediaItem

_PROBE_SIDE = 896  # pixels: a large photograph, not a worst case nobody asked for


@torch.inference_mode()
def measure_peak(
    decoder: Decoder,
    encoder: Encoder,
    processor: Processor,
    config: EngineConfig,
    encoder_budget: int,
    device: torch.device,
) -> int:
    """Peak bytes above the weights of one step at its token and encoder budgets (GPU only)."""
    torch.cuda.synchronize(device)
    base = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    rows = _run_encoder(encoder, processor, encoder_budget)
    logits = _run_decoder(decoder, config, device)
    # The sampler's worst case sorts a float32 copy: values, indices and probabilities.
    work = torch.empty((4, *logits.shape), dtype=torch.float32, device=device)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - base
    kept = config.encoder_cache_tokens * encoder.hidden_size * (rows[0].element_size() if rows else 2)
    del work, rows
    return peak + kept


def _run_encoder(encoder: Encoder, processor: Processor, budget: int) -> list[Tensor]:
    if "image" not in processor.modalities:
        return []
    noise = np.random.default_rng(0).integers(0, 256, (_PROBE_SIDE, _PROBE_SIDE, 3), dtype=np.uint8)
    item = MediaItem("image", b"probe", Image.fromarray(noise), {"width": _PROBE_SIDE, "height": _PROBE_SIDE})
    feature: MediaFeature = processor.prepare(item, processor.variant(item, MediaRequest({"image": 1})))
    count = max(budget // max(encoder.cost(feature), 1), 1)
    return encoder([replace(feature, key=bytes([i % 256])) for i in range(count)])


def _run_decoder(decoder: Decoder, config: EngineConfig, device: torch.device) -> Tensor:
    tokens, block_size = config.max_num_batched_tokens, config.kv_cache_config.block_size
    embeds = decoder.embed(torch.zeros(tokens, dtype=torch.int64, device=device))
    blocks = -(-tokens // block_size)
    kv = KVCache(decoder.kv_specs, blocks, block_size, embeds.dtype, device)
    length = min(tokens, 2048)
    count = -(-tokens // length)
    bounds = torch.arange(count + 1, dtype=torch.int32, device=device).mul_(length).clamp_(max=tokens)
    width = -(-length // block_size)
    tables = torch.arange(count * width, dtype=torch.int32, device=device).clamp_(max=blocks - 1)
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
    return decoder.logits(hidden[: config.max_num_seqs])
