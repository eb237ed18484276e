"""KV memory: how many blocks fit, and the tensors that hold them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from mm_core.config import KvCacheConfig
from mm_core.errors import ConfigError, OutOfMemoryError, PluginError
from mm_core.hookspecs import KVCacheSpec
from mm_core.layers.context import LayerCache

GRAPH_BYTES = 512 * 2**20
"""Set aside for graphs, which are captured when the KV cache is there."""

_SIGNS = ("out of memory", "alloc_failed", "not enough memory")
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}
_FP8_CAPABILITY = (8, 9)  # the first GPUs that convert e4m3


def kv_dtype(config: KvCacheConfig, model_dtype: torch.dtype) -> torch.dtype:
    """`auto` is the model's dtype; `fp8` is float8_e4m3fn, with scales beside it. Raises ConfigError for another dtype
    than the model's: a step reads its own keys as they were computed, and later ones would read them rounded."""
    dtype = _DTYPES.get(config.dtype, model_dtype)
    if config.dtype != "fp8" and dtype != model_dtype:
        computes = str(model_dtype).removeprefix("torch.")
        raise ConfigError(
            f"KvCacheConfig(dtype={config.dtype!r}): the model computes in {computes}, and its KV cache is kept in the "
            "same dtype or in fp8. Use dtype='auto' or 'fp8', or load the model with "
            f"dtype={config.dtype!r}."
        )
    return dtype


def block_bytes(specs: Sequence[KVCacheSpec], block_size: int, dtype: torch.dtype) -> int:
    """Bytes one block takes over all layers, K and V, whichever table it is in."""
    spec = common_spec(specs)
    return spec.layers * block_size * _token_bytes(spec, dtype)


def _token_bytes(spec: KVCacheSpec, dtype: torch.dtype) -> int:
    """Of a token in one layer, K and V; in fp8 each head has its scale's byte beside it."""
    return 2 * spec.kv_heads * (spec.head_dim * dtype.itemsize + (dtype == torch.float8_e4m3fn))


def check_fp8(dtype: torch.dtype, device: torch.device) -> None:
    """Raise ConfigError for an fp8 cache on a GPU that cannot convert it."""
    if dtype != torch.float8_e4m3fn or device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        raise ConfigError(
            f"KvCacheConfig(dtype='fp8') needs a GPU of compute capability {'.'.join(map(str, _FP8_CAPABILITY))} or "
            f"later; {torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}. Use dtype='auto' "
            "(the model's dtype)."
        )


def common_spec(specs: Sequence[KVCacheSpec]) -> KVCacheSpec:
    """The shape that all tables have: their blocks come from one pool. Raises PluginError where they differ."""
    shapes = {(spec.layers, spec.kv_heads, spec.head_dim) for spec in specs}
    if len(shapes) != 1:
        described = ", ".join(f"{s.name!r} {s.layers} × {s.kv_heads} × {s.head_dim}" for s in specs) or "none"
        raise PluginError(
            f"The decoder's kv_specs (layers × heads × head size) are {described}: one pool of blocks serves all "
            "tables, which must have one shape. Report it to the plugin's author."
        )
    return specs[0]


class KVCache:
    """The memory of every block: `caches` has the same layers for each table's name, and a block belongs to one
    table at a time.

    stores: what lies in blocks: keys and values [layers, 2, num_blocks, block_size, heads, head_dim], and with dtype
    float8_e4m3fn also their scales' exponents, uint8 [layers, 2, num_blocks, heads, block_size]: a head's exponents
    are read together.

    They start as zeros: torch attention over gathered blocks multiplies masked rows by 0, and
    0 × garbage may be NaN.
    """

    def __init__(
        self,
        specs: Sequence[KVCacheSpec],
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        check_fp8(dtype, device)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.block_bytes = block_bytes(specs, block_size, dtype)
        self.bytes = num_blocks * self.block_bytes
        spec = common_spec(specs)
        self.token_bytes = _token_bytes(spec, dtype)  # in one layer
        shape = (spec.layers, 2, num_blocks, block_size, spec.kv_heads)
        self.stores: tuple[Tensor, ...] = (_zeros((*shape, spec.head_dim), dtype, device),)
        if dtype == torch.float8_e4m3fn:
            self.stores += (_zeros((*shape[:3], spec.kv_heads, block_size), torch.uint8, device),)
        layers = [_layer_cache(*parts) for parts in zip(*self.stores, strict=True)]
        self.caches: dict[str, list[LayerCache]] = {spec.name: layers for spec in specs}

    def release(self) -> None:
        """Let go of the memory."""
        self.caches.clear()
        self.stores = ()


def _layer_cache(store: Tensor, scales: Tensor | None = None) -> LayerCache:
    turned = None if scales is None else (scales[0].transpose(1, 2), scales[1].transpose(1, 2))
    return LayerCache(store[0], store[1], turned)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On a CPU numpy's zeros: memory that takes no room and no time until it is written."""
    if device.type != "cpu":
        # As bytes: few operations take an fp8 tensor.
        return torch.zeros((*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8, device=device).view(dtype)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


@contextmanager
def out_of_memory(while_doing: str, remedy: str) -> Iterator[None]:
    """Turn what torch, CUDA's libraries and Triton raise when memory runs out into an OutOfMemoryError that
    says what was going on and which setting to change."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(f"The device ran out of memory while {while_doing}. {remedy}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: not only torch's allocator takes some."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)


def is_lost(error: BaseException) -> bool:
    """Whether the device failed for good: every later call to it fails as well."""
    if is_out_of_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and "CUDA error" in str(error))


def count_blocks(config: KvCacheConfig, bytes_per_block: int, device: torch.device, measure: Callable[[], int]) -> int:
    """Blocks of the KV cache.

    On a GPU: the share `free_gpu_memory_fraction` of what is free beside the weights, less what one
    full step takes and graphs need (`measure`, in bytes). Free is what the driver says, so
    other processes' memory counts as taken; what they take later is at their own risk and ours,
    which is one use of the share that stays free. On a CPU: `cpu_cache_size`. `num_blocks`
    overrides both.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    if device.type != "cuda":
        return max(config.cpu_cache_size // bytes_per_block, 2)
    needed = measure()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    count = int((free - needed) * config.free_gpu_memory_fraction) // bytes_per_block
    if count < 2:
        # memory_reserved: of this process; the rest of what is taken may be other processes'.
        ours = torch.cuda.memory_reserved(device)
        raise OutOfMemoryError(
            f"{device} has {total / 2**30:.1f} GiB; {ours / 2**30:.1f} hold the weights, {free / 2**30:.1f} are free, "
            f"and a full step needs {needed / 2**30:.1f}: no room for the KV cache. Lower max_num_batched_tokens, "
            "encoder_budget, encoder_cache_tokens or max_num_seqs, raise "
            f"KvCacheConfig(free_gpu_memory_fraction={config.free_gpu_memory_fraction}), or end other programs on "
            "this GPU."
        )
    return count
