"""From a name to a model that is ready to run: plugin, weights, memory, pipeline."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mm_core.cache.blocks import BlockPool
from mm_core.cache.encoder import EncoderCache
from mm_core.checkpoint import LoadedCheckpoint, init_dummy_weights, load_weights, open_checkpoint, resolve_dtype
from mm_core.config import EngineConfig
from mm_core.decoders import default as default_decoder
from mm_core.engine.core import EngineCore
from mm_core.errors import CheckpointError, ConfigError, NotBuiltError, OutOfMemoryError
from mm_core.hashing import get_hasher
from mm_core.hookspecs import BuildContext, Decoder, DecoderSpec, Encoder, Fusion, Processor
from mm_core.inputs.pipeline import InputPipeline, eos_token_ids
from mm_core.plugins import Owner, PluginRegistry
from mm_core.runner.memory import KVCache, block_bytes, count_blocks, kv_dtype
from mm_core.runner.probe import measure_peak
from mm_core.runner.runner import ModelRunner, resolve_device
from mm_core.scheduler.scheduler import Scheduler, SchedulerConfig

logger = logging.getLogger(__name__)

# Four cost units (patches) a token: what families with 2×2 merging need for a step full of media.
_COST_PER_TOKEN = 4
_MIN_ENCODER_BUDGET = 16384


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint with everything its family's plugin built for it, weights loaded."""

    family: str
    checkpoint: LoadedCheckpoint
    processor: Processor
    encoder: Encoder
    fusion: Fusion
    decoder: Decoder
    max_model_len: int
    device: torch.device
    dtype: torch.dtype


def load_model(name: str, config: EngineConfig, plugins: Sequence[Any] | None) -> LoadedModel:
    """Open a checkpoint, find its plugin, build its modules and load their weights."""
    device = resolve_device(config)  # before anything is downloaded
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the thread's current device
    registry = PluginRegistry(plugins or ())
    checkpoint = open_checkpoint(name, revision=config.revision, show_progress=config.show_progress)
    owner = registry.resolve(checkpoint.architectures, model=name)
    dtype = resolve_dtype(config.dtype, checkpoint, device)
    spec: DecoderSpec = _call(registry, "mm_decoder", owner, checkpoint)
    max_model_len = _resolve_length(name, config, spec)
    fusion: Fusion = _call(registry, "mm_fusion", owner, checkpoint)
    if fusion.kind != "embed":
        raise NotBuiltError(
            f"Family {owner.family.name!r} fuses by {fusion.kind!r}; this release runs families of kind 'embed'."
        )
    processor: Processor = _call(registry, "mm_processor", owner, checkpoint)
    context = BuildContext(device, dtype, max_model_len)
    try:
        encoder: Any = _call(registry, "mm_encoder", owner, checkpoint, context=context)
        decoder: Any = spec.build(context)
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"Model {name!r} does not fit {device} in {dtype}. Use a smaller dtype or a smaller model."
        ) from error
    _check_vocabulary(name, processor, decoder)
    _fill(config, checkpoint, [(encoder, encoder.weight_map), (decoder, spec.weight_map)])
    return LoadedModel(owner.family.name, checkpoint, processor, encoder, fusion, decoder, max_model_len, device, dtype)


def _call(registry: PluginRegistry, hook: str, owner: Owner, checkpoint: LoadedCheckpoint, **extra: Any) -> Any:
    default = default_decoder if hook == "mm_decoder" else None
    return registry.call_owner(hook, owner, default=default, family=owner.family.name, checkpoint=checkpoint, **extra)


def _resolve_length(name: str, config: EngineConfig, spec: DecoderSpec) -> int:
    wanted = config.max_model_len
    if wanted is None:
        return spec.max_model_len
    if wanted > spec.max_model_len:
        raise ConfigError(
            f"max_model_len={wanted} is more than the {spec.max_model_len} tokens that {name!r} was made for. "
            f"Use {spec.max_model_len} or less."
        )
    return wanted


def _check_vocabulary(name: str, processor: Processor, decoder: Decoder) -> None:
    """Every id the tokenizer gives must have an embedding row."""
    known = len(processor.tokenizer)
    placeholders = [processor.placeholder_id(m) for m in processor.modalities]
    if max([known - 1, *placeholders]) >= decoder.vocab_size:
        raise CheckpointError(
            f"The tokenizer of {name!r} has {known} tokens, its language model {decoder.vocab_size}: they belong to "
            "different checkpoints. Fetch tokenizer and weights from the same place."
        )


def _fill(config: EngineConfig, checkpoint: LoadedCheckpoint, targets: list[tuple[nn.Module, Any]]) -> None:
    if config.load_format == "dummy":
        for module, weight_map in targets:
            init_dummy_weights(module, config.seed, weight_map=weight_map)
    else:
        load_weights(checkpoint, targets, show_progress=config.show_progress)
    for module, _ in targets:
        module.requires_grad_(False).eval()
        for child in module.modules():
            # Layers that keep their weights in another layout for speed (packed for a CPU) do so now.
            finish = getattr(child, "finish_loading", None)
            if callable(finish):
                finish()


def build_core(model: LoadedModel, config: EngineConfig) -> tuple[EngineCore, int]:
    """Size the caches and put scheduler and runner together; also the context length that fits."""
    kv_config = config.kv_cache_config
    block_size, dtype = kv_config.block_size, kv_dtype(kv_config, model.dtype)
    encoder_budget = config.encoder_budget or max(_COST_PER_TOKEN * config.max_num_batched_tokens, _MIN_ENCODER_BUDGET)
    count = count_blocks(
        kv_config,
        block_bytes(model.decoder.kv_specs, block_size, dtype),
        model.device,
        lambda: measure_peak(model.decoder, model.encoder, model.processor, config, encoder_budget, model.device),
    )
    length = min(model.max_model_len, count * block_size)
    if config.max_model_len is not None and length < config.max_model_len:
        raise OutOfMemoryError(
            f"The KV cache holds {count * block_size} tokens, max_model_len={config.max_model_len} wants more. "
            "Lower max_model_len, or give the cache more room: KvCacheConfig(num_blocks=...), cpu_cache_size or "
            "free_gpu_memory_fraction."
        )
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            encoder_budget=encoder_budget,
            max_model_len=length,
            enable_block_reuse=kv_config.enable_block_reuse,
        ),
        BlockPool(count, block_size),
        EncoderCache(config.encoder_cache_tokens),
        get_hasher(config.hash_algorithm),
        model.encoder.cost,
    )
    kv = KVCache(model.decoder.kv_specs, count, block_size, dtype, model.device)
    logger.info("KV cache: %d tokens in %d blocks", count * block_size, count)
    runner = ModelRunner(model.decoder, model.encoder, kv, model.family, model.device)
    return EngineCore(scheduler, runner, config.seed), length


def build_pipeline(model: LoadedModel, config: EngineConfig, max_model_len: int) -> InputPipeline:
    """The threads that turn prompts and media into prepared requests."""
    return InputPipeline(
        processor=model.processor,
        fusion=model.fusion,
        family=model.family,
        checkpoint_identity=model.checkpoint.identity,
        config=config,
        vocab_size=model.decoder.vocab_size,
        max_model_len=max_model_len,
        stop_token_ids=eos_token_ids(model.checkpoint.generation_config, model.processor.tokenizer),
    )
