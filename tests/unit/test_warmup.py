"""Compiling ahead: what is recorded, who compiles it, and what happens to failures. And the made-up steps."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support import fake_cross
from support.tiny import make_tiny_qwen2vl

from mm_core.config import EngineConfig
from mm_core.engine.loading import load_model
from mm_core.engine.startup import StartupTimes
from mm_core.engine.warming import EngineWarmUp
from mm_core.hookspecs import BuildContext
from mm_core.runner import warmup
from mm_core.runner.memory import KVCache
from mm_core.runner.rehearsal import Rehearsal, Sizes, noise_feature, noise_features
from mm_core.runner.runner import ModelRunner, RunnerLimits
from mm_core.runner.warmup import KernelCompiler, WarmUp, rehearse
from mm_core.types import MediaFeature


class Kernel:
    """Behaves as a Triton kernel does at a launch: looks in its cache, asks the hook, compiles."""

    def __init__(self, runtime: SimpleNamespace) -> None:
        self.runtime = runtime
        self.compiled: dict[str, str] = {}  # variant: thread that compiled it
        self.launched: list[str] = []
        self.fails: set[str] = set()

    def launch(self, variant: str) -> None:
        if variant not in self.compiled and self._compile(variant, manual=False) is None:
            return
        self.launched.append(variant)

    def preload(self, description: str) -> SimpleNamespace | None:
        return self._compile(description, manual=True)

    def _compile(self, variant: str, manual: bool) -> SimpleNamespace | None:
        hook = self.runtime.jit_cache_hook
        call = {"key": variant, "fn": SimpleNamespace(jit_function=self), "is_manual_warmup": manual}
        if hook is not None and hook(**call, compile={"specialization_data": variant}):
            return None
        if variant in self.fails:
            raise ValueError("does not compile")
        self.compiled[variant] = threading.current_thread().name
        return SimpleNamespace(run=None)


@pytest.fixture
def runtime(monkeypatch):
    made = SimpleNamespace(jit_cache_hook=None)
    monkeypatch.setattr(warmup, "_triton_runtime", lambda: made)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return made


@pytest.fixture
def compiler(runtime):
    made = KernelCompiler(torch.device("cuda", 0), workers=2)
    yield made
    made.close()


def test_recorded_kernels_are_compiled_in_threads_and_not_launched(runtime, compiler):
    kernel = Kernel(runtime)
    turn = sys.getswitchinterval()
    with compiler.recording():
        for variant in ("a", "b", "a"):
            kernel.launch(variant)
        assert kernel.compiled == {}
        assert sys.getswitchinterval() < turn
    assert sys.getswitchinterval() == turn
    assert compiler.wait() == 0
    assert kernel.launched == []
    assert set(kernel.compiled) == {"a", "b"}
    assert all(name.startswith("mm-core-compile") for name in kernel.compiled.values())
    assert compiler.count == 2
    kernel.launch("a")
    assert kernel.launched == ["a"]


def test_other_threads_and_other_hooks_are_left_alone(runtime, compiler):
    kernel, asked = Kernel(runtime), []
    runtime.jit_cache_hook = outer = lambda **call: asked.append(call["key"])
    with compiler.recording():
        other = threading.Thread(target=kernel.launch, args=("theirs",))
        other.start()
        other.join()
        kernel.launch("mine")
    compiler.wait()
    assert kernel.launched == ["theirs"]
    assert asked == ["theirs", "mine"]  # the second one when it was compiled
    assert runtime.jit_cache_hook is outer


def test_memory_that_nobody_wrote_is_zero_while_recording(compiler):
    like = torch.ones(3)
    with compiler.recording(), torch.inference_mode():
        made = [torch.empty(1000), torch.empty_like(like), like.new_empty(50), torch.empty_strided((5, 5), (1, 5))]
        assert float(torch.ones(4).sum()) == 4.0
    assert [float(x.abs().max()) for x in made] == [0.0] * 4


def test_rounds_go_on_until_nothing_is_new(runtime, compiler):
    kernel = Kernel(runtime)

    def step() -> None:
        kernel.launch("first")
        if kernel.launched:  # what the first one's results lead to
            kernel.launch("second")

    warm = WarmUp(compiler, [])
    warm.begin([step])
    assert warm.finish() == 2
    assert kernel.launched[-2:] == ["first", "second"]
    assert {name[:7] for name in kernel.compiled.values()} == {"mm-core"}


def test_a_kernel_that_does_not_compile_is_left_to_its_launch(runtime, compiler):
    kernel = Kernel(runtime)
    kernel.fails.add("bad")
    warm = WarmUp(compiler, [])
    warm.begin([lambda: kernel.launch("bad"), lambda: kernel.launch("good")])
    warm.finish()
    assert compiler.wait() == 1
    assert kernel.launched == ["good"]
    with pytest.raises(ValueError, match="does not compile"):
        kernel.launch("bad")


def test_repeated_layers_take_part_until_the_last_steps(runtime, compiler):
    layers = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(5))
    mixed = torch.nn.ModuleList([torch.nn.Linear(1, 1), torch.nn.GELU(), torch.nn.GELU()])
    module, seen = torch.nn.ModuleDict({"layers": layers, "mixed": mixed}), []
    before = list(layers)
    names = [name for name, _ in module.named_parameters()]
    warm = WarmUp(compiler, [module, object()])
    warm.begin([lambda: seen.append(len(layers))])
    assert len(layers) == 5
    warm.finish([lambda: seen.append(-len(layers))])
    assert seen == [2, 2, -5]
    assert list(layers) == before
    assert len(mixed) == 3
    assert [name for name, _ in module.named_parameters()] == names


def test_stages_of_a_pyramid_all_take_part():
    blocks = [torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(5)) for _ in range(4)]
    stages = torch.nn.ModuleList(torch.nn.ModuleDict({"blocks": each}) for each in blocks)
    with warmup.shortened([stages]):
        assert [len(each["blocks"]) for each in stages] == [2] * 4
    assert [len(each["blocks"]) for each in stages] == [5] * 4


def test_what_cannot_be_recorded_runs_without(runtime, compiler):
    ran = []

    def step() -> None:
        if runtime.jit_cache_hook is not None:
            raise TypeError("Object of type JITFunction is not JSON serializable")
        ran.append(True)

    warm = WarmUp(compiler, [])
    warm.begin([step])
    assert not ran
    warm.finish()
    assert ran == [True]


def test_a_failing_step_stops_nobody_but_a_full_device_does(runtime, compiler):
    kernel, full = Kernel(runtime), []

    def odd() -> None:
        raise IndexError("garbage was read")

    def hungry() -> None:
        if full:
            raise torch.OutOfMemoryError("CUDA out of memory")

    warm = WarmUp(compiler, [])
    warm.begin([odd, lambda: kernel.launch("a"), hungry])
    full.append(True)
    with pytest.raises(torch.OutOfMemoryError):
        warm.finish()
    assert runtime.jit_cache_hook is None
    with pytest.raises(RuntimeError, match="shutdown"):
        compiler._pool.submit(print)


def test_made_up_steps_run(tmp_path):
    """Every kind of step, through a real runner (without a GPU, so without Triton)."""
    config = EngineConfig(device="cpu", max_model_len=1024, max_num_batched_tokens=700, max_num_seqs=16)
    model = load_model(str(make_tiny_qwen2vl(tmp_path)), config, None)
    sizes = Sizes(16, 700, 1024, 16, 17, model.decoder.position_axes)
    kv = KVCache(model.decoder.kv_specs, 17, 16, torch.float32, model.device)
    limits = RunnerLimits(16, 1024, 2048, 700)
    runner = ModelRunner(model.modules, kv, model.device, limits)
    features = [noise_feature(model.processor, side) for side in (140, 90)]
    rehearsal = Rehearsal(sizes)
    media = rehearse(runner, [step for feature in features for step in rehearsal.media_steps(feature, (1, 3), 10_000)])
    text = rehearse(runner, rehearsal.text_steps())
    for step in [*media, *text] * 2:  # each round finds the encoder's rows empty
        step()
    assert runner.rows.calls == 2 * 2 * 2
    assert all(float(k.abs().sum()) > 0 for k, *_ in kv.caches["self"])


def test_an_engine_warms_up_and_lets_go(tmp_path, runtime):
    """The whole course, without kernels to compile: nothing of it stays, and the model is as it was."""
    config = EngineConfig(device="cpu", max_model_len=512, max_num_batched_tokens=512, max_num_seqs=4)
    model = load_model(str(make_tiny_qwen2vl(tmp_path)), config, None)
    layers, context = len(model.decoder.layers), BuildContext(model.device, model.dtype, model.max_model_len)
    startup = StartupTimes()
    warm = EngineWarmUp(config, model.modules, context)
    kv = weakref.ref(warm._runner.kv)
    warm.begin_text(startup)
    warm.begin_media(startup, [noise_feature(model.processor, 90)])
    assert kv() is not None
    warm.finish(startup)
    assert kv() is None
    assert len(model.decoder.layers) == layers
    assert {"kernels: text", "kernels: media", "kernels: rest"} <= set(startup.seconds)


FAMILIES = {
    "cross_attention": (fake_cross.Plain("cross_attention"), False, fake_cross.feature("a", 40)),
    "encoder_decoder": (fake_cross.Condition("encoder_decoder"), True, fake_cross.feature("a", 40, num_fused=2)),
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_made_up_steps_with_sources_run(kind):
    fusion, text, item = FAMILIES[kind]
    runner = fake_cross.make_runner(fusion, decoder=fake_cross.CrossDecoder(reads_text=text))
    if not text:
        runner._decoder.max_source_len = 50
    modules = runner._modules
    assert modules.source_len(256) == (256 if text else 50)
    sizes = Sizes(8, 256, 256, 16, 64, 1, modules.source_len(256), modules.reads_text)
    rehearsal = Rehearsal(sizes)
    batches = [*rehearsal.text_steps(), *rehearsal.media_steps(item, (1, 4, 30), 200)]
    with_sources = [batch for batch in batches if batch.sources]
    assert [len(batch.encode) for batch in with_sources] == [*([0] * 3 if text else []), 1, 4]
    for step in rehearse(runner, batches) * 2:
        step()
    assert runner.sources.calls == 2 * len(with_sources)
    if text:
        assert fusion.calls == 4


def test_steps_that_a_source_makes_too_large_are_cut(tmp_path):
    rehearsal = Rehearsal(Sizes(2, 3, 64, 16, 5, 1, 40))
    batches = list(rehearsal.media_steps(fake_cross.feature("a", 40), (4,), 1000))
    assert [(len(b.sequences), b.num_tokens, len(b.encode)) for b in batches] == [(2, 2, 4)]


def test_examples_have_different_shapes():
    class Processor:
        modalities = ("image",)

        def variant(self, item, request):
            return b""

        def prepare(self, item, variant):
            side = min(item.info["width"], 336)
            return MediaFeature("image", side // 14, {"pixels": torch.zeros(side, side)})

    assert [f.key for f in noise_features(Processor(), (224, 336, 448, 672))] == [b"224", b"336"]


def test_a_family_that_only_hears_is_given_sound():
    heard = []

    class Processor:
        modalities = ("audio",)
        sampling_rate = 800

        def variant(self, item, request):
            return b""

        def prepare(self, item, variant):
            heard.append(item)
            return MediaFeature("audio", 3, {})

    (feature,) = noise_features(Processor(), (224, 336))
    assert feature.num_tokens == 3
    assert len(heard[0].data) == 30 * 800 == heard[0].info["samples"]
    assert heard[0].data.dtype == np.float32
    Processor.modalities = ("video",)
    assert noise_features(Processor(), (224,)) == ()


@pytest.mark.parametrize("source_len", [0, 1500])
@pytest.mark.parametrize("limits", [(256, 8192, 32768), (1, 16, 16), (4, 2048, 2), (3, 1, 64)])
def test_made_up_steps_keep_the_limits(limits, source_len):
    seqs, tokens, length = limits
    blocks = min(seqs, 256) + 1
    batches = list(Rehearsal(Sizes(seqs, tokens, length, 16, blocks, 3, source_len, True)).text_steps())
    assert batches
    ids = [s.seq.seq_id for batch in batches for s in batch.sequences]
    assert len(set(ids)) == len(ids)
    for batch in batches:
        assert batch.num_tokens <= tokens
        assert len(batch.sequences) <= seqs
        for slot, s in enumerate(batch.sequences):
            assert s.seq.slot == slot
            assert s.start + s.length <= length
            table = np.asarray(s.tables["self"])
            assert len(table) == -(-(s.start + s.length) // 16)
            assert 0 <= table.min() <= table.max() < blocks
            if source_len:
                cross = np.asarray(s.tables["cross"])
                assert len(cross) == -(-s.seq.request.source.num_tokens // 16)
                assert 0 <= cross.min() <= cross.max() < blocks


_REAL_TRITON = """
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:  # says that there is a GPU; nothing is launched on it
        get_current_target = lambda self: GPUTarget("cuda", 90, 32)
        get_current_device = lambda self: 0
        get_current_stream = lambda self, device: 0

    driver.set_active(Driver())
    torch.cuda.set_device = lambda device: None
    from mm_core.kernels._triton.activation import silu_and_mul, silu_and_mul_kernel
    from mm_core.runner.warmup import KernelCompiler

    compiler = KernelCompiler(torch.device("cpu"), 2)
    with compiler.recording():
        for width in (512, 1040, 520):  # of these the last is another variant: 520 is no multiple of 16
            silu_and_mul(torch.zeros(4, 2 * width, dtype=torch.bfloat16))
    assert compiler.wait() == 0
    ((cache, *_),) = silu_and_mul_kernel.device_caches.values()
    print("compiled", compiler.count, [len(kernel.asm["cubin"]) > 0 for kernel in cache.values()])
"""


@pytest.mark.slow
def test_the_installed_triton_has_the_hook(tmp_path):
    """Records and compiles a kernel for a GPU that is not there."""
    pytest.importorskip("triton")
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    import os

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_REAL_TRITON)],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "compiled 2 [True, True]" in done.stdout, done.stderr


def test_launchers_are_loaded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many threads ask."""
    build = pytest.importorskip("triton.runtime.build")
    inside, most = [], []

    def load(name: str, path: str) -> str:
        inside.append(name)
        most.append(len(inside))
        time.sleep(0.002)
        inside.remove(name)
        return path

    monkeypatch.setattr(build, "_load_module_from_path", load)
    for _ in range(2):  # the second time it is so already
        KernelCompiler(torch.device("cpu")).close()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: build._load_module_from_path(str(i), f"path {i}"), range(24)))
    assert found == [f"path {i}" for i in range(24)]
    assert max(most) == 1
    assert build._load_module_from_path.__wrapped__ is load
