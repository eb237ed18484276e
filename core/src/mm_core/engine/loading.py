"""From a name to a model that is ready to run: plugin, weights, memory, pipeline."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from mm_core.cache.blocks import BlockPool
from mm_core.cache.encoder import EncoderCache
from mm_core.checkpoint import LoadedCheckpoint, init_dummy_weights, load_weights, open_checkpoint, resolve_dtype
from mm_core.config import EngineConfig
from mm_core.decoders import default as default_decoder
from mm_core.engine.core import EngineCore
from mm_core.engine.front_model import FrontModel
from mm_core.engine.startup import StartupTimes
from mm_core.engine.tiering import open_tier, plan_tiers, staging_bytes
from mm_core.engine.warming import SMALLER_STEP, EngineWarmUp
from mm_core.errors import CheckpointError, ConfigError, OutOfMemoryError, PluginError
from mm_core.hashing import get_hasher
from mm_core.hookspecs import BuildContext, Decoder, DecoderSpec, Encoder, Fusion, Processor, Task
from mm_core.inputs.coordinator import nobody
from mm_core.inputs.pipeline import InputPipeline, eos_token_ids
from mm_core.plugins import Owner, PluginRegistry
from mm_core.runner.fusing import Modules, check_modules
from mm_core.runner.memory import GRAPH_BYTES, KVCache, block_bytes, count_blocks, kv_dtype, out_of_memory
from mm_core.runner.probe import Budgets, measure_step
from mm_core.runner.rehearsal import noise_features
from mm_core.runner.runner import ModelRunner, RunnerLimits, resolve_device
from mm_core.scheduler.plan import COPY_TOKENS, GPU_COPY_TOKENS, SchedulerConfig
from mm_core.scheduler.policy import POLICIES
from mm_core.scheduler.scheduler import Scheduler
from mm_core.structured.grammars import Grammars
from mm_core.structured.library import TokenTable
from mm_core.structured.tokens import read_tokens
from mm_core.tracing import SpanRecorder
from mm_core.types import MediaFeature

logger = logging.getLogger(__name__)

# Four cost units (patches) a token: what families with 2×2 merging need for a step full of media.
_COST_PER_TOKEN = 4
_MIN_ENCODER_BUDGET = 16384
_SOURCE_ROWS_PER_TOKEN = 4
_EXAMPLE_SIDES = (224, 336, 448, 672, 896)  # pixels
_USUAL_SIDE = 448

_SMALLER_MODEL = "Use a smaller dtype or a smaller model, or end other programs on this GPU."
_SMALLER_CACHE = "Lower KvCacheConfig(free_gpu_memory_fraction=...) or num_blocks; for a CPU, cpu_cache_size."
_SMALLER_ROWS = "Lower encoder_cache_tokens or KvCacheConfig(free_gpu_memory_fraction=...)."
_SMALLER_GRAPHS = "Lower KvCacheConfig(free_gpu_memory_fraction=...) or max_num_seqs, or set cuda_graphs=False."


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint with everything its family's plugin built for it, weights loaded. make_processor: gives its
    processor, or makes it, where nobody needed it so far."""

    family: str
    checkpoint: LoadedCheckpoint
    make_processor: Callable[[], Processor]
    encoder: Encoder
    fusion: Fusion
    decoder: Decoder
    max_model_len: int
    device: torch.device
    dtype: torch.dtype
    startup: StartupTimes
    examples: tuple[MediaFeature, ...] = ()  # prepared items of several sizes, where there is a GPU
    tasks: Mapping[str, Task] = field(default_factory=dict)

    @property
    def modules(self) -> Modules:
        """What runs on the device."""
        return Modules(self.family, self.decoder, self.encoder, self.fusion)

    @cached_property
    def processor(self) -> Processor:
        """What prepares requests."""
        return self.make_processor()

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.decoder.vocab_size

    @cached_property
    def grammars(self) -> Grammars:
        """What compiles grammars; nothing happens before the first one."""
        # Not a method: whoever keeps the grammars would keep the model.
        return Grammars(partial(_token_table, self.make_processor, self.checkpoint, self.vocab_size))

    @property
    def pin_for(self) -> torch.device | None:
        """The GPU that copies prepared media by itself, where there is one."""
        return self.device if self.device.type == "cuda" else None


def _token_table(make_processor: Callable[[], Processor], checkpoint: LoadedCheckpoint, vocab_size: int) -> TokenTable:
    processor = make_processor()
    ends = eos_token_ids(checkpoint.generation_config, processor.tokenizer)
    ends |= frozenset(processor.default_sampling().stop_token_ids)
    return read_tokens(processor.tokenizer, vocab_size, ends)


def tasks_of(registry: PluginRegistry, owner: Owner, checkpoint: LoadedCheckpoint) -> Mapping[str, Task]:
    """The family's tasks by name, where it has any."""
    if not registry.implements("mm_tasks", owner):
        return {}
    tasks: Mapping[str, Task] = call(registry, "mm_tasks", owner, checkpoint)
    return tasks


def _made(processor: Processor) -> Callable[[], Processor]:
    return lambda: processor


def load_model(
    name: str,
    config: EngineConfig,
    plugins: Sequence[Any] | None,
    startup: StartupTimes | None = None,
    *,
    prepares: bool = True,
) -> LoadedModel:
    """Open a checkpoint, find its plugin, build its modules and load their weights.

    prepares: whether requests are prepared here, too; else there are no tasks, and a processor only where a GPU's
    warm-up needs one.
    """
    startup = startup or StartupTimes()
    with startup.part("device", "Starting the device"):
        device = _open_device(config)  # before anything is downloaded
    with startup.part("checkpoint", "Opening the checkpoint"):
        registry = PluginRegistry(plugins or ())
        checkpoint = open_checkpoint(name, revision=config.revision, show_progress=config.show_progress)
        owner = registry.resolve(checkpoint.architectures, model=name)
        make_processor: Callable[[], Processor] = partial(call, registry, "mm_processor", owner, checkpoint)
        if prepares or device.type == "cuda":
            load_tokenizer_beside(checkpoint, startup)
        dtype = resolve_dtype(config.dtype, checkpoint, device)
    with startup.part("modules", "Building the model"):
        spec: DecoderSpec = call(registry, "mm_decoder", owner, checkpoint)
        max_model_len = resolve_length(name, config, spec)
        context = BuildContext(device, dtype, max_model_len)
        with out_of_memory(f"building {name!r} in {dtype} on {device}", _SMALLER_MODEL):
            fusion: Fusion = call(registry, "mm_fusion", owner, checkpoint, context=context)
            encoder: Any = call(registry, "mm_encoder", owner, checkpoint, context=context)
            decoder: Any = spec.build(context)
        modules = Modules(owner.family.name, decoder, encoder, fusion)
        check_modules(modules)
    warm_up = None
    examples: tuple[MediaFeature, ...] = ()
    with ExitStack() as stack:
        if device.type == "cuda":
            warm_up = EngineWarmUp(config, modules, context)
            stack.callback(warm_up.close)
            warm_up.begin_text(startup)
        if prepares or device.type == "cuda":
            with startup.part("processor", "Loading the tokenizer"):
                make_processor = _made(make_processor())
                check_vocabulary(name, make_processor(), decoder.vocab_size)
        tasks = tasks_of(registry, owner, checkpoint) if prepares else {}
        if warm_up is not None:
            with startup.part("examples"):
                examples = noise_features(make_processor(), _EXAMPLE_SIDES)
            warm_up.begin_media(startup, examples)
        smaller = out_of_memory(f"loading the weights of {name!r}", _SMALLER_MODEL)
        with startup.part("weights", "Loading weights"), smaller:
            targets = [(encoder, encoder.weight_map), (decoder, spec.weight_map)]
            if modules.conditions:
                targets.append((fusion, fusion.weight_map))  # type: ignore[attr-defined]
            _fill(config, checkpoint, targets, device)
        if warm_up is not None:
            warm_up.finish(startup)
    parts = (owner.family.name, checkpoint, make_processor, encoder, fusion, decoder)
    return LoadedModel(*parts, max_model_len, device, dtype, startup, examples, tasks)


def _open_device(config: EngineConfig) -> torch.device:
    device = resolve_device(config)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # Triton launches on the thread's current device
        with out_of_memory(f"starting {device}", "End other programs on this GPU, or choose another: device='cuda:1'."):
            torch.zeros(1, device=device)  # makes the driver's context
    return device


def load_tokenizer_beside(checkpoint: LoadedCheckpoint, startup: StartupTimes) -> None:
    """Begin to load the tokenizer in a thread: transformers takes a second to import, and no torch calls.

    Whoever asks for it waits; where it failed, they try again and get the error.
    """

    def load() -> None:
        try:
            # Under the checkpoint's lock: two threads that import transformers' lazy names at once get an ImportError.
            with startup.part("background: tokenizer"):
                _ = checkpoint.tokenizer
        except BaseException:
            logger.debug("the tokenizer could not be loaded ahead", exc_info=True)

    threading.Thread(target=load, name="mm-core-tokenizer", daemon=True).start()


def call(registry: PluginRegistry, hook: str, owner: Owner, checkpoint: LoadedCheckpoint, **extra: Any) -> Any:
    """What a hook of the checkpoint's plugin gives."""
    default = default_decoder if hook == "mm_decoder" else None
    given = {"default": default, "family": owner.family.name, "checkpoint": checkpoint, **extra}
    try:
        return registry.call_owner(hook, owner, **given)
    except PluginError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        # It imported of transformers what the tokenizer's thread was importing just then: that one first.
        _ = checkpoint.tokenizer
        return registry.call_owner(hook, owner, **given)


def resolve_length(name: str, config: EngineConfig, spec: DecoderSpec) -> int:
    """The context length that is wanted. Raises ConfigError where the model was made for less."""
    wanted = config.max_model_len
    if wanted is None:
        return spec.max_model_len
    if wanted > spec.max_model_len:
        raise ConfigError(
            f"max_model_len={wanted} is more than the {spec.max_model_len} tokens that {name!r} was made for. "
            f"Use {spec.max_model_len} or less."
        )
    return wanted


def check_vocabulary(name: str, processor: Processor, vocab_size: int) -> None:
    """Raise CheckpointError unless every id the tokenizer gives has an embedding row."""
    known = len(processor.tokenizer)
    placeholders = [i for m in processor.modalities if (i := processor.placeholder_id(m)) is not None]
    if max([known - 1, *placeholders]) >= vocab_size:
        raise CheckpointError(
            f"The tokenizer of {name!r} has {known} tokens, its language model {vocab_size}: they belong to "
            "different checkpoints. Fetch tokenizer and weights from the same place."
        )


def _fill(
    config: EngineConfig, checkpoint: LoadedCheckpoint, targets: list[tuple[nn.Module, Any]], device: torch.device
) -> None:
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
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build_core(
    model: LoadedModel, config: EngineConfig, recorder: SpanRecorder | None = None
) -> tuple[EngineCore, int]:
    """Size the caches and put scheduler and runner together; also the context length that fits."""
    kv_config, startup = config.kv_cache_config, model.startup
    block_size, dtype = kv_config.block_size, kv_dtype(kv_config, model.dtype)
    with startup.part("memory probe", "Measuring a full step"), out_of_memory("running a full step", SMALLER_STEP):
        size = block_bytes(model.decoder.kv_specs, block_size, dtype)
        count = count_blocks(kv_config, size, model.device, lambda: _measure(model, config))
    length = min(model.max_model_len, count * block_size)
    if config.max_model_len is not None and length < config.max_model_len:
        raise OutOfMemoryError(
            f"The KV cache holds {count * block_size} tokens, max_model_len={config.max_model_len} wants more. "
            "Lower max_model_len, or give the cache more room: KvCacheConfig(num_blocks=...), cpu_cache_size or "
            "free_gpu_memory_fraction."
        )
    with startup.part("KV cache"), out_of_memory(f"making a KV cache of {count} blocks", _SMALLER_CACHE):
        kv = KVCache(model.decoder.kv_specs, count, block_size, dtype, model.device)
    logger.info("KV cache: %d tokens in %d blocks", count * block_size, count)
    limits = RunnerLimits(
        config.max_num_seqs,
        length,
        config.encoder_cache_tokens,
        config.max_num_batched_tokens,
        config.cuda_graphs,
        _source_budget(model, config),
    )
    with ExitStack() as undo:
        tier = open_tier(model, config, kv)
        if tier is not None:
            undo.callback(tier.close)
        with startup.part("runner"), out_of_memory("making the encoder's rows and the runner's tables", _SMALLER_ROWS):
            runner = ModelRunner(model.modules, kv, model.device, limits, recorder, tier)
        undo.callback(runner.transfers.close)
        _capture_graphs(model, config, runner)
        overlap = config.overlap if config.overlap is not None else model.device.type == "cuda"
        scheduler = _make_scheduler(model, config, count, length)
        core = EngineCore(scheduler, runner, config.seed, overlap)
        core.recorder = recorder
        core.grammars.source = model.grammars
        runner.follower.waiting = lambda: core.precedence.waiting()
        plan_tiers(core, config.show_progress)
        undo.pop_all()
    return core, length


def _capture_graphs(model: LoadedModel, config: EngineConfig, runner: ModelRunner) -> None:
    """Run the largest steps and capture what is replayed later, on a GPU."""
    if model.device.type != "cuda":
        return
    largest = out_of_memory("running the largest steps", SMALLER_STEP)
    with model.startup.part("largest steps", "Running the largest steps"), largest:
        runner.reserve(model.examples[-1:], _encoder_budget(config))
    with model.startup.part("graphs", "Capturing graphs"), out_of_memory("capturing graphs", _SMALLER_GRAPHS):
        free = torch.cuda.mem_get_info(model.device)[0]
        runner.capture_graphs([f for f in model.examples if int(f.key) <= _USUAL_SIDE][-1:])
        taken = free - torch.cuda.mem_get_info(model.device)[0]
    logger.info("graphs take %.0f MiB", taken / 2**20)


def _make_scheduler(model: LoadedModel, config: EngineConfig, num_blocks: int, max_model_len: int) -> Scheduler:
    return Scheduler(
        SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            encoder_budget=_encoder_budget(config),
            max_model_len=max_model_len,
            enable_block_reuse=config.kv_cache_config.enable_block_reuse,
            source_budget=_source_budget(model, config),
            copy_tokens=COPY_TOKENS if model.device.type == "cpu" else GPU_COPY_TOKENS,
        ),
        BlockPool(num_blocks, config.kv_cache_config.block_size),
        EncoderCache(config.encoder_cache_tokens),
        get_hasher(config.hash_algorithm),
        model.encoder.cost,
        POLICIES[config.scheduling_policy],
    )


def _encoder_budget(config: EngineConfig) -> int:
    """The encoder's budget of one step, in its cost units."""
    return config.encoder_budget or max(_COST_PER_TOKEN * config.max_num_batched_tokens, _MIN_ENCODER_BUDGET)


def _source_budget(model: LoadedModel, config: EngineConfig) -> int:
    """Rows of sources that one step may compute: they have no more layers to go through than a text encoder's."""
    return _SOURCE_ROWS_PER_TOKEN * config.max_num_batched_tokens if model.modules.has_cross else 0


def _measure(model: LoadedModel, config: EngineConfig) -> int:
    """Bytes to keep free beside weights and KV cache (GPU only)."""
    weights = torch.cuda.memory_allocated(model.device)
    sources = model.modules.source_len(model.max_model_len)
    budgets = Budgets(_encoder_budget(config), _source_budget(model, config), sources, model.max_model_len)
    step = measure_step(model.modules, model.processor, config, budgets, model.device)
    graphs = GRAPH_BYTES if config.cuda_graphs else 0
    mib = [x / 2**20 for x in (weights, step.decoder, step.encoder, step.kept, graphs)]
    logger.info("MiB: weights %.0f; a full step: decoder %.0f, encoder %.0f, its rows %.0f; graphs %.0f", *mib)
    needed = step.total + graphs
    return needed + staging_bytes(config.kv_cache_config, max(torch.cuda.mem_get_info(model.device)[0] - needed, 0))


def build_pipeline(
    model: LoadedModel | FrontModel,
    config: EngineConfig,
    max_model_len: int,
    recorder: SpanRecorder | None = None,
    give_way: Callable[[], None] = nobody,
) -> InputPipeline:
    """The threads that turn prompts and media into prepared requests."""
    return InputPipeline(
        processor=model.processor,
        fusion=model.fusion,
        family=model.family,
        checkpoint_identity=model.checkpoint.identity,
        config=config,
        vocab_size=model.vocab_size,
        max_model_len=max_model_len,
        stop_token_ids=eos_token_ids(model.checkpoint.generation_config, model.processor.tokenizer),
        pin_for=model.pin_for,
        recorder=recorder,
        give_way=give_way,
        grammars=model.grammars if isinstance(model, LoadedModel) else None,
    )
