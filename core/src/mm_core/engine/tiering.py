"""What lies behind the device: host memory, disk, and the planner that moves between them."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch

from mm_core.cache.disk import DiskTier
from mm_core.cache.disk_file import DiskIdentity
from mm_core.cache.host import HostTier
from mm_core.config import EngineConfig, KvCacheConfig
from mm_core.engine.keeping import DiskKeeper
from mm_core.errors import ConfigError
from mm_core.hashing import Field, encode_fields, get_hasher
from mm_core.runner.host_memory import HostMemory
from mm_core.runner.memory import KVCache, common_spec
from mm_core.runner.slots import SlotLayout
from mm_core.runner.transfers import TierOptions
from mm_core.scheduler.tier_types import TierConfig

if TYPE_CHECKING:
    from mm_core.checkpoint import LoadedCheckpoint
    from mm_core.engine.core import EngineCore
    from mm_core.engine.loading import LoadedModel

logger = logging.getLogger(__name__)

_LEAST_SLOTS = 8
# Of staging on a GPU. What one step evicts leaves together: as many blocks as a step has tokens for, and some for
# what is restored meanwhile. What comes back is copied piece by piece: a large picture at a time is enough.
_STORE_BYTES = 768 * 2**20
_RESTORE_BYTES = 256 * 2**20
_SHARE = 16  # staging takes at most this part of the KV cache's memory, each way


def staging_bytes(config: KvCacheConfig, free: int) -> int:
    """Most that staging takes of a GPU's memory, of which so much is free for the KV cache and it."""
    return min(_STORE_BYTES + _RESTORE_BYTES, 2 * free // _SHARE) if config.host_cache_size else 0


def _staging_slots(config: EngineConfig, slot_bytes: int, num_blocks: int) -> tuple[int, int]:
    """Of what leaves, and of what comes back."""
    step = -(-config.max_num_batched_tokens // config.kv_cache_config.block_size)
    share = max(num_blocks // _SHARE, 2)
    store = min(step + step // 2, _STORE_BYTES // slot_bytes, share)
    return max(store, 1), max(min(_RESTORE_BYTES // slot_bytes, share), 1)


def open_tier(model: LoadedModel, config: EngineConfig, kv: KVCache) -> TierOptions | None:
    """The memory and the file behind the device; None where none are asked for. Raises ConfigError where they are
    too small for anything or cannot be used, OutOfMemoryError where the host has less."""
    kv_config, startup = config.kv_cache_config, model.startup
    size, slot_bytes = kv_config.host_cache_size, SlotLayout(kv.stores).slot_bytes
    if not size:
        return None
    if size < _LEAST_SLOTS * slot_bytes:
        raise ConfigError(
            f"KvCacheConfig(host_cache_size={size}) is too small: a block of this model's KV cache takes {slot_bytes} "
            f"bytes. Use {_LEAST_SLOTS * slot_bytes} or more (gigabytes are usual), or 0 for none."
        )

    def told(ready: int) -> None:
        startup.say(f"Taking host memory, {ready / 2**30:.0f} of {size / 2**30:.0f} GiB")

    pinned = model.device.type == "cuda"
    with ExitStack() as undo:
        disk = None
        if kv_config.disk_cache_path is not None:
            with startup.part("disk cache", "Reading what the disk cache holds"):
                identity = _identity(model, config, kv)
                disk = DiskTier.open(kv_config.disk_cache_path, kv_config.disk_cache_size, identity, slot_bytes)
        if disk is not None:
            undo.callback(disk.close)
            logger.info("disk cache: %d of %d places hold something", len(disk), disk.num_places)
        with startup.part("host cache", "Taking host memory"):
            memory = HostMemory(size, slot_bytes, pinned=pinned, told=told)
        undo.pop_all()
    logger.info("host cache: %d slots of %d bytes", memory.num_slots, slot_bytes)
    sizes = _staging_slots(config, slot_bytes, kv.num_blocks)
    return TierOptions(memory, kv_config.host_cache_checksums, disk, *sizes)


def _identity(model: LoadedModel, config: EngineConfig, kv: KVCache) -> DiskIdentity:
    """What the keys and values of this engine's blocks depend on."""
    spec = common_spec(model.decoder.kv_specs)
    dummy = config.load_format == "dummy"
    on_gpu = model.device.type == "cuda"
    return DiskIdentity(
        model.family,
        _weights(model.checkpoint),
        model.checkpoint.revision,
        f"{config.load_format} {config.seed}" if dummy else config.load_format,
        str(model.dtype),
        " ".join(str(store.dtype) for store in kv.stores),
        kv.block_size,
        (spec.layers, spec.kv_heads, spec.head_dim),
        config.hash_algorithm,
        torch.cuda.get_device_name(model.device) if on_gpu else "cpu",
    )


def _weights(checkpoint: LoadedCheckpoint) -> str:
    """`Checkpoint.identity`, which reads samples of the weights, and when each of their files was written."""
    fields: list[Field] = [checkpoint.identity]
    for folder in (checkpoint.path, *checkpoint.parts.values()):
        for file in sorted(folder.glob("*.safetensors")):
            found = file.stat()
            fields += [file.name, found.st_size, found.st_mtime_ns]
    return get_hasher("sha256")(encode_fields(fields)).hex()


def plan_tiers(core: EngineCore, show_progress: bool) -> None:
    """Have the scheduler use what lies behind the device, and keep on disk, at the end, what the caches hold."""
    scheduler, tier = core.scheduler, core.runner.transfers.tier
    if tier is None:
        return
    sizes = TierConfig(tier.memory.slot_bytes, core.runner.rows.row_bytes)
    disk = tier.disk if isinstance(tier.disk, DiskTier) else None
    scheduler.add_tiers(HostTier(tier.memory.num_slots), sizes, disk)
    if disk is not None:
        keeper = DiskKeeper(scheduler, core.runner.transfers, disk)
        core.before_release = partial(keeper.keep, show_progress)
