"""Kernels compiled before the first request needs them, several at a time.

Triton compiles a variant of a kernel where it is first launched, one after the other, about a
second each. Here a small runner goes through the kinds of steps that requests bring, twice. The
first time launches of variants that are not there yet are left out; then threads compile them (the
compiler gives up Python's lock for five sixths of its time). The second time everything runs,
which also makes libraries choose their algorithms.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mm_core.runner.memory import is_out_of_memory
from mm_core.runner.runner import ModelRunner
from mm_core.scheduler.sequence import ScheduledBatch

logger = logging.getLogger(__name__)

Steps = Sequence[Callable[[], object]]

_MAX_WORKERS = 16
_MAX_ROUNDS = 3
_TURN_S = 2e-4
_CONTAINERS = {nn.ModuleDict, nn.ModuleList, nn.Sequential}
_ALLOCATE = frozenset(
    getattr(torch.ops.aten, name) for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
)
# The hook and the interpreter's switch interval belong to the whole process: of two engines that start at
# once, one waits for the other here.
_ONE_AT_A_TIME = threading.Lock()
_LOADING = threading.Lock()


class KernelCompiler:
    """Compiles in threads what a recorded pass would have compiled on its way.

    It uses Triton's own hook for caches of its users (`knobs.runtime.jit_cache_hook`), which may
    say that a kernel is not to be compiled nor launched, and `JITFunction.preload`, which compiles
    a variant from the description that the hook was given.
    """

    def __init__(self, device: torch.device, workers: int | None = None) -> None:
        _load_one_at_a_time()
        self._device = device
        self._pool = ThreadPoolExecutor(workers or min(_MAX_WORKERS, os.cpu_count() or 1), "mm-core-compile")
        self._seen: set[tuple[int, str]] = set()
        self._found: list[tuple[Any, str]] = []
        self._jobs: list[Future[None]] = []
        self._recording: int | None = None  # id of the thread
        self._outer: Callable[..., Any] | None = None

    @property
    def count(self) -> int:
        """Variants that were found missing so far."""
        return len(self._seen)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, launches of this thread do nothing where their kernel is yet to be compiled.

        New memory is zeroed there: what such a kernel was to write may be used as an index. The threads
        start at the end: beside them, every torch call here would wait for its turn to go on.
        """
        runtime = _triton_runtime()
        with _ONE_AT_A_TIME:
            self._outer = runtime.jit_cache_hook
            self._recording = threading.get_ident()
            runtime.jit_cache_hook = self._on_missing
            try:
                with _ZeroedMemory(), _quick_turns():  # type: ignore[no-untyped-call]
                    yield
            finally:
                self._recording = None
                runtime.jit_cache_hook = self._outer
            self._jobs += [self._pool.submit(self._compile, *found) for found in self._found]
            self._found.clear()

    def wait(self) -> int:
        """Wait for the threads; how many variants could not be compiled.

        Those are left to their launch, which raises the error where somebody can tell what it is for.
        """
        errors = [error for job in self._jobs if (error := job.exception()) is not None]
        for error in errors:
            logger.debug("a kernel could not be compiled ahead of its launch", exc_info=error)
        return len(errors)

    def close(self) -> None:
        """End the threads. Idempotent."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _on_missing(self, **call: Any) -> Any:
        """Triton's hook: a truthy answer leaves the kernel uncompiled and unlaunched."""
        if threading.get_ident() != self._recording or call["is_manual_warmup"]:
            return None if self._outer is None else self._outer(**call)
        function = call["fn"].jit_function
        variant = (id(function), str(call["key"]))
        if variant not in self._seen:
            self._seen.add(variant)
            self._found.append((function, call["compile"]["specialization_data"]))
        return True

    def _compile(self, function: Any, description: str) -> None:
        torch.cuda.set_device(self._device)
        kernel = function.preload(description)
        _ = getattr(kernel, "run", None)  # builds the launcher and loads the code, else the first launch does


def _load_one_at_a_time() -> None:
    """Let threads build launchers side by side, but load them one after another.

    All are extension modules of one name. With many threads loading them from the disk at once, some kernels
    were given another one's launcher ("function takes exactly 69 arguments (25 given)").
    """
    try:
        from triton.runtime import build
    except ImportError:  # no Triton: nothing is compiled
        return
    load = getattr(build, "_load_module_from_path", None)
    if load is None or getattr(load, "one_at_a_time", False):
        return

    @functools.wraps(load)
    def load_alone(*args: Any, **kwargs: Any) -> Any:
        with _LOADING:
            return load(*args, **kwargs)

    load_alone.one_at_a_time = True  # type: ignore[attr-defined]
    build._load_module_from_path = load_alone


class _ZeroedMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In this thread, what torch allocates uninitialised is zero."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call as usual, then zero what an allocating function gave."""
        result = func(*args, **(kwargs or {}))
        return result.zero_() if func.overloadpacket in _ALLOCATE else result


@contextmanager
def _quick_turns() -> Iterator[None]:
    """Let threads take turns at Python's lock every 0.2 ms instead of 5.

    Most torch calls give the lock up, and get it back from a thread that imports modules (a tokenizer
    is loaded beside this) only when its turn is over.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(_TURN_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _triton_runtime() -> Any:
    import triton

    return triton.knobs.runtime


class WarmUp:
    """Goes through steps until they launch nothing new.

    A round is recorded: what it lacks is compiled then and seen by the next one, which may get
    further. So the last round, which lacks nothing, ran everything for real. Layers that repeat
    launch the same kernels: of each list of them in `modules` two take part, until the very last
    steps run the modules as they are.
    """

    def __init__(self, compiler: KernelCompiler, modules: Sequence[Any]) -> None:
        self._compiler = compiler
        self._modules = list(modules)
        self._steps: list[Callable[[], object]] = []

    def begin(self, steps: Steps) -> None:
        """A first round of these steps, which `finish` repeats. Weights need not be there yet: no result
        is looked at."""
        with shortened(self._modules):
            self._round(steps)
        self._steps += steps

    def finish(self, whole: Steps = ()) -> int:
        """Compile and repeat, lastly the steps of `whole` with all layers; then forget everything. How many
        kernels were compiled or loaded."""
        try:
            with shortened(self._modules):
                self._repeat(self._steps)
            self._repeat(whole)
        finally:
            self.close()
        return self._compiler.count

    def close(self) -> None:
        """Forget modules and steps, and end the compiler's threads. Idempotent."""
        self._modules.clear()
        self._steps.clear()
        self._compiler.close()

    def _repeat(self, steps: Steps) -> None:
        """Rounds until nothing is new. What cannot be recorded is run without: its kernels are
        compiled one by one."""
        for _ in range(_MAX_ROUNDS):
            self._compiler.wait()
            before = self._compiler.count
            failed = self._round(steps)
            if self._compiler.count == before:
                break
        self._compiler.wait()
        for step in failed:
            self._try(step)

    def _round(self, steps: Steps) -> Steps:
        """Record all steps; those that failed."""
        with self._compiler.recording():
            return [step for step in steps if not self._try(step)]

    def _try(self, step: Callable[[], object]) -> bool:
        try:
            step()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            # Something may need what a kernel did not write. The engine's own steps will tell.
            logger.debug("a step of the warm-up failed", exc_info=error)
            return False
        return True


@contextmanager
def shortened(modules: Sequence[Any], keep: int = 2) -> Iterator[None]:
    """Leave only the first layers in each list of layers of one kind, for a while. Lists of containers stay whole:
    stages of a pyramid have one type and different sizes."""
    cut: list[tuple[nn.ModuleList, list[nn.Module]]] = []
    for module in modules:
        for child in module.modules() if isinstance(module, nn.Module) else ():
            if not isinstance(child, nn.ModuleList) or len(child) <= keep:
                continue
            kinds = {type(layer) for layer in child}
            if len(kinds) == 1 and not kinds & _CONTAINERS:
                cut.append((child, list(child)[keep:]))
    try:
        for layers, _ in cut:
            del layers[keep:]
        yield
    finally:
        for layers, rest in cut:
            layers.extend(rest)


def rehearse(runner: ModelRunner, batches: Iterable[ScheduledBatch]) -> Steps:
    """A step of a warm-up for each batch."""
    return [functools.partial(_run, runner, batch) for batch in batches]


def _run(runner: ModelRunner, batch: ScheduledBatch) -> None:
    try:
        runner.execute(batch)
    finally:
        runner.rows.drop([item.key for item in batch.encode])
