"""How the KV cache is sized, and what is said when memory runs out, at every stage of a start and in a step."""

from __future__ import annotations

import functools
import io
import logging
import time
import weakref
from types import SimpleNamespace

import pytest
import torch
from support import fake_cross
from support.tiny import make_tiny_qwen2vl

from mm_core import Engine, KvCacheConfig, SamplingParams
from mm_core.config import EngineConfig
from mm_core.engine import loading, warming
from mm_core.engine import startup as startup_module
from mm_core.engine.startup import StartupTimes
from mm_core.errors import ConfigError, OutOfMemoryError, PluginError
from mm_core.hookspecs import BuildContext, KVCacheSpec
from mm_core.runner import probe
from mm_core.runner.fusing import Modules
from mm_core.runner.memory import KVCache, block_bytes, count_blocks, is_out_of_memory, kv_dtype, out_of_memory

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture
def free(monkeypatch):
    """A GPU of 80 GiB with as many bytes free as the test says."""
    found = {"free": 0}
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (found["free"], 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 16 * 2**30)
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_tiny_qwen2vl(tmp_path_factory.mktemp("model"))


def test_block_bytes_count_keys_and_values_of_one_table():
    specs = (KVCacheSpec("self", 28, 4, 128), KVCacheSpec("cross", 28, 4, 128))
    assert block_bytes(specs, 16, torch.bfloat16) == 2 * 16 * (28 * 4 * 128) * 2
    assert block_bytes(specs[:1], 16, torch.bfloat16) == block_bytes(specs, 16, torch.bfloat16)


def test_tables_share_one_store_and_must_have_one_shape():
    specs = (KVCacheSpec("self", 2, 3, 8), KVCacheSpec("cross", 2, 3, 8))
    kv = KVCache(specs, 5, 16, torch.float32, torch.device("cpu"))
    assert kv.bytes == 2 * 2 * 5 * 16 * 3 * 8 * 4
    for (k, v, _), (cross_k, cross_v, _) in zip(kv.caches["self"], kv.caches["cross"], strict=True):
        assert (k.data_ptr(), v.data_ptr()) == (cross_k.data_ptr(), cross_v.data_ptr())
    with pytest.raises(PluginError, match=r"'cross' 2 × 4 × 8.*one shape"):
        KVCache((specs[0], KVCacheSpec("cross", 2, 4, 8)), 5, 16, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_fp8_has_nearly_twice_the_tokens_in_the_same_memory(head_dim, free):
    spec = KVCacheSpec("self", 28, 4, head_dim)
    sizes = [block_bytes((spec,), 16, dtype) for dtype in (torch.bfloat16, torch.float8_e4m3fn)]
    free["free"] = 60 * 2**30
    config = KvCacheConfig(dtype="fp8")
    half, fp8 = (count_blocks(config, size, GPU, lambda: 0) for size in sizes)
    assert fp8 >= 1.9 * half
    half, fp8 = (count_blocks(config, size, CPU, lambda: 0) for size in sizes)
    assert fp8 >= 1.9 * half


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_stores_hold_every_byte_of_a_block_and_begin_as_zeros(dtype):
    spec = KVCacheSpec("self", 2, 3, 8)
    kv = KVCache((spec,), 5, 16, dtype, CPU)
    assert [tuple(store.shape) for store in kv.stores] == [(2, 2, 5, 16, 3, 8), (2, 2, 5, 3, 16)][: len(kv.stores)]
    assert sum(store.nbytes for store in kv.stores) == kv.bytes == 5 * kv.block_bytes
    assert kv.token_bytes * 2 * 16 == kv.block_bytes
    assert all(not store.view(torch.uint8).any() for store in kv.stores)
    quantised = dtype == torch.float8_e4m3fn
    assert [store.dtype for store in kv.stores] == [dtype, torch.uint8][: 1 + quantised]
    for index, (k, v, scales) in enumerate(kv.caches["self"]):
        parts = (k, v) if scales is None else (k, v, *scales)
        assert (scales is not None) == quantised
        homes = [store[index, which] for store in kv.stores for which in (0, 1)]
        assert [part.data_ptr() for part in parts] == [home.data_ptr() for home in homes]
        assert parts[0].shape == (5, 16, 3, 8)
        assert all(part.shape == (5, 16, 3) for part in parts[2:])
    held = weakref.ref(kv.caches["self"][0].k)
    del k, v, scales, parts, homes
    kv.release()
    assert held() is None


def test_blocks_take_their_share_of_what_a_step_leaves(free):
    free["free"] = 60 * 2**30
    config = KvCacheConfig(free_gpu_memory_fraction=0.5)
    assert count_blocks(config, 2**20, GPU, lambda: 20 * 2**30) == 20 * 1024
    assert count_blocks(KvCacheConfig(num_blocks=7), 2**20, GPU, lambda: 1 / 0) == 7
    assert count_blocks(KvCacheConfig(cpu_cache_size=2**22), 2**20, torch.device("cpu"), lambda: 1 / 0) == 4


@pytest.mark.parametrize(("free_bytes", "needed"), [(4 * 2**30, 5 * 2**30), (2**20, 0), (0, 0)])
def test_no_room_for_two_blocks_names_the_settings(free, free_bytes, needed):
    free["free"] = free_bytes
    with pytest.raises(OutOfMemoryError) as caught:
        count_blocks(KvCacheConfig(), 2**20, GPU, lambda: needed)
    said = str(caught.value)
    assert "80.0 GiB" in said
    assert "16.0 hold the weights" in said
    for setting in ("max_num_batched_tokens", "encoder_budget", "max_num_seqs", "free_gpu_memory_fraction=0.9"):
        assert setting in said


def test_a_full_step_adds_encoder_and_decoder(monkeypatch, path):
    """They run beside each other; the KV cache of the measurement is not counted."""
    config = EngineConfig(device="cpu", max_num_batched_tokens=512, max_num_seqs=8, max_model_len=256)
    model = loading.load_model(str(path), config, None)
    allocated = {"now": 100, "peak": 0}

    def grow(amount: int, run):
        def wrapped(*args):
            allocated["peak"] = allocated["now"] + amount
            return run(*args)

        return wrapped

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocated["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: allocated.update(peak=allocated["now"]))
    monkeypatch.setattr(probe, "_run_encoder", grow(3000, probe._run_encoder))
    monkeypatch.setattr(probe, "_run_decoder", grow(500, probe._run_decoder))
    step = probe.measure_step(model.modules, model.processor, config, probe.Budgets(4096), model.device)
    rows = config.encoder_cache_tokens * model.encoder.hidden_size * 4
    assert (step.encoder, step.decoder, step.kept, step.total) == (3000, 500, rows, 3500 + rows)


def test_sources_and_conditioned_rows_are_measured_too(monkeypatch):
    """What runs on the decoder's stream runs one after another: the largest of it counts."""
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    peaks = iter([0, 700, 0, 20, 0, 30, 0, 5000])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(peaks))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: next(peaks))
    item = fake_cross.feature("a", 40, num_fused=2)
    monkeypatch.setattr(probe, "noise_feature", lambda *_: item)
    fusion = fake_cross.Condition("encoder_decoder")
    runner = fake_cross.make_runner(fusion, decoder=fake_cross.CrossDecoder(reads_text=True))
    config = EngineConfig(max_num_batched_tokens=64, max_num_seqs=4, encoder_cache_tokens=1000)
    step = probe.measure_step(runner._modules, None, config, probe.Budgets(100, 256, 50), torch.device("cpu"))
    assert (step.encoder, step.decoder, step.kept) == (700, 5000, 1000 * fake_cross.ENCODED * 4)
    assert runner._decoder.written == [256]
    assert fusion.calls == 1


@pytest.mark.parametrize(
    "error",
    [FULL, RuntimeError("CUDA error: out of memory"), RuntimeError("Triton Error [CUDA]: out of memory"),
     RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
     RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you tried to allocate 8")],
)  # fmt: skip
def test_every_kind_of_out_of_memory_is_known(error):
    assert is_out_of_memory(error)
    with pytest.raises(OutOfMemoryError, match=r"while testing. Lower something.") as caught, \
            out_of_memory("testing", "Lower something."):  # fmt: skip
        raise error
    assert caught.value.__cause__ is error


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="illegal memory access"), out_of_memory("testing", "Lower something."):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def _raise_full(*args, **kwargs):
    raise FULL


@pytest.mark.parametrize(
    ("where", "settings"),
    [
        ((loading, "call"), ("smaller dtype",)),
        ((loading, "_fill"), ("smaller dtype",)),
        ((loading, "count_blocks"), ("max_num_batched_tokens", "encoder_budget", "encoder_cache_tokens")),
        ((loading, "KVCache"), ("free_gpu_memory_fraction", "num_blocks", "cpu_cache_size")),
        ((loading, "ModelRunner"), ("encoder_cache_tokens",)),
    ],
)
def test_out_of_memory_names_the_setting_at_each_stage(monkeypatch, path, where, settings):
    owner, name = where
    if name == "call":  # the hook that builds the encoder; the others build nothing large
        real = loading.call
        full = functools.partial(_raise_full)
        monkeypatch.setattr(loading, name, lambda *a, **k: full() if a[1] == "mm_encoder" else real(*a, **k))
    else:
        monkeypatch.setattr(owner, name, _raise_full)
    with pytest.raises(OutOfMemoryError) as caught:
        Engine.from_pretrained(path, device="cpu")
    for setting in settings:
        assert setting in str(caught.value)


def test_out_of_memory_names_the_setting_at_each_stage_of_a_gpu(monkeypatch, free):
    full, config = SimpleNamespace(capture_graphs=_raise_full, reserve=lambda *_: None), EngineConfig()
    decoder = SimpleNamespace(position_axes=3, kv_specs=(), vocab_size=32)
    modules = Modules("family", decoder, SimpleNamespace())
    model = SimpleNamespace(
        device=GPU, dtype=torch.bfloat16, max_model_len=64, startup=StartupTimes(), decoder=decoder,
        examples=(),
    )  # fmt: skip
    with pytest.raises(OutOfMemoryError, match=r"capturing graphs.*free_gpu_memory_fraction.*cuda_graphs=False"):
        loading._capture_graphs(model, config, full)
    with pytest.raises(OutOfMemoryError, match=r"largest steps.*max_num_batched_tokens.*encoder_budget"):
        loading._capture_graphs(model, config, SimpleNamespace(reserve=_raise_full))
    monkeypatch.setattr(warming, "KVCache", _raise_full)
    context = BuildContext(GPU, torch.bfloat16, 64)
    with pytest.raises(OutOfMemoryError, match=r"warming up.*max_num_batched_tokens.*encoder_budget"):
        warming.EngineWarmUp(config, modules, context)
    monkeypatch.setattr(loading, "resolve_device", lambda config: GPU)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "zeros", _raise_full)
    with pytest.raises(OutOfMemoryError, match="End other programs on this GPU"):
        loading._open_device(config)


def test_out_of_memory_in_a_step_names_the_setting(monkeypatch, path):
    with Engine.from_pretrained(path, device="cpu") as engine:
        with monkeypatch.context() as patch:
            patch.setattr(type(engine._frontend.model.decoder), "forward", _raise_full)
            with pytest.raises(OutOfMemoryError, match="max_num_batched_tokens"):
                engine.generate("Hello", SamplingParams(max_tokens=2))
        assert engine.generate("Hello", SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids


# --- what a start took


def test_startup_is_told_by_part(path, caplog):
    with caplog.at_level(logging.INFO, logger="mm_core"), Engine.from_pretrained(path, device="cpu") as engine:
        parts = engine.stats()["startup"]
    assert {"device", "checkpoint", "modules", "processor", "weights", "memory probe", "KV cache"} <= set(parts)
    own = [seconds for name, seconds in parts.items() if name != "ready" and not name.startswith("background")]
    assert 0 < sum(own) <= parts["ready"]
    assert any("ready after" in record.message and "weights" in record.message for record in caplog.records)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_slow_start_says_what_is_happening_on_a_terminal(monkeypatch):
    monkeypatch.setattr(startup_module, "_SHOW_AFTER_S", 0.05)
    for stream, shows in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr("sys.stderr", stream)
        times = StartupTimes(show_progress=True)
        with times.part("a", "Doing the first thing"):
            time.sleep(0.3)
        with times.part("b", "Doing the second thing"):
            pass
        times.finish()
        assert ("Doing the first thing" in stream.getvalue()) is shows
        assert ("Doing the second thing" in stream.getvalue()) is shows


def test_a_quick_or_failed_start_shows_nothing(monkeypatch):
    monkeypatch.setattr(startup_module, "_SHOW_AFTER_S", 0.2)
    monkeypatch.setattr("sys.stderr", stream := Terminal())
    quick, quiet, failed = StartupTimes(show_progress=True), StartupTimes(), StartupTimes(show_progress=True)
    quick.finish()
    with pytest.raises(ZeroDivisionError), failed.part("a", "Failing"):
        _ = 1 / 0
    failed.close()
    time.sleep(0.4)
    quiet.finish()
    assert stream.getvalue() == ""


def test_keys_are_kept_in_the_models_dtype_or_in_eight_bits() -> None:
    assert kv_dtype(KvCacheConfig(), torch.bfloat16) == kv_dtype(KvCacheConfig(dtype="bfloat16"), torch.bfloat16)
    assert kv_dtype(KvCacheConfig(dtype="fp8"), torch.float32) == torch.float8_e4m3fn
    with pytest.raises(ConfigError, match=r"computes in float32.*dtype='auto' or 'fp8'"):
        kv_dtype(KvCacheConfig(dtype="bfloat16"), torch.float32)
