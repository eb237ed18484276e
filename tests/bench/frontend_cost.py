"""What preparing requests and handling their tokens costs, with a fake engine: no GPU, no model run.

    python tests/bench/frontend_cost.py [--requests 256] [--threads 1 4 8] [--tokens 32]

Three workloads, as in the benchmarks: image-reuse (16 noise images of 448×448), image-distinct, text. First
one thread, by stage. Then everything at once through the real Frontend: the fake engine's thread calls small
torch operators as a step's launch does, and sleeps as one does that waits for the device; how much longer
its launches take than alone is what frontend threads cost the engine by holding the interpreter's lock.
"""

from __future__ import annotations

import argparse
import queue
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.tiny import make_tiny_qwen2vl

from mm_core.config import EngineConfig, SamplingParams
from mm_core.engine import frontend as frontend_module
from mm_core.engine.frontend import Frontend
from mm_core.engine.loading import LoadedModel, build_pipeline, load_model
from mm_core.engine.messages import Submit, TokenOutput
from mm_core.engine.precedence import Precedence
from mm_core.inputs import InputPipeline
from mm_core.types import PreparedRequest, TextPrompt

SIDE = 448
LENGTH = 2048
STEP_S = 0.007
OPERATORS = 60
PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
TURN = "<|im_start|>user\n{}Describe this image in detail. Question number {}.<|im_end|>\n<|im_start|>assistant\n"


def workloads(count: int) -> dict[str, list[TextPrompt]]:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(count)]

    def asked(picture: Callable[[int], Image.Image]) -> list[TextPrompt]:
        return [
            TextPrompt(prompt=TURN.format(PICTURE, i), multi_modal_data={"image": picture(i)}) for i in range(count)
        ]

    return {
        "image-reuse": asked(lambda i: images[i % 16]),
        "image-distinct": asked(lambda i: images[i]),
        "text": [TextPrompt(prompt=TURN.format("", i)) for i in range(count)],
    }


# -- one thread, by stage --------------------------------------------------------------------------


class Stages:
    """Adds up the time spent in methods of some objects, which must not call each other."""

    def __init__(self, pipeline: InputPipeline) -> None:
        self.seconds: dict[str, float] = {}
        parts = {
            "render, tokenise": (pipeline._renderer, "render"),
            "pixels, digest": (pipeline._media.fetcher, "fetch"),
            "variant, key": (pipeline._media, "_key"),
            "expand": (pipeline._renderer, "expand"),
            "in the pool": (pipeline._media, "_fill"),
            "positions": (pipeline, "_positions"),
            "block keys": (pipeline, "_block_keys"),
        }
        for name, (owner, method) in parts.items():
            setattr(owner, method, self._timed(name, getattr(owner, method)))

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        self.seconds[name] = 0.0

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start

        return timed


def prepare_all(pipeline: InputPipeline, prompts: Sequence[TextPrompt], params: SamplingParams) -> float:
    start = time.perf_counter()
    for index, prompt in enumerate(prompts):
        pipeline.submit(f"r{index}", prompt, params).result()
    return time.perf_counter() - start


def by_stage(model: LoadedModel, name: str, prompts: Sequence[TextPrompt], params: SamplingParams) -> None:
    """Milliseconds a request, in this thread: in all without the stages' clocks, then by stage."""
    config = EngineConfig(device="cpu", preprocess_threads=1, show_progress=False)
    totals = []
    for _ in range(3):
        pipeline = build_pipeline(model, config, LENGTH)
        totals.append(prepare_all(pipeline, prompts, params))
        pipeline.close()
    pipeline = build_pipeline(model, config, LENGTH)
    stages = Stages(pipeline)
    clocked = prepare_all(pipeline, prompts, params)
    pipeline.close()
    each = {k: v / len(prompts) * 1e3 for k, v in stages.seconds.items() if v}
    each["other"] = clocked / len(prompts) * 1e3 - sum(each.values())
    parts = ", ".join(f"{k} {v:.3f}" for k, v in each.items())
    print(f"{name:15s} {min(totals) / len(prompts) * 1e3:.3f} ms: {parts}")


# -- through the Frontend --------------------------------------------------------------------------


class FakeCoreThread:
    """In place of `CoreThread`: every request gets `max_tokens` tokens, one a step."""

    def __init__(self, make: Callable[[], Any], listener: Callable[[Sequence[TokenOutput]], None]) -> None:
        self.precedence: Precedence = make()
        self.listener = listener
        self.launches: list[float] = []
        self.late: list[float] = []
        self.begun: list[float] = []
        self.submitted: list[float] = []
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._running: list[tuple[PreparedRequest, Iterator[int]]] = []
        self._operands = torch.ones(64), torch.ones(64)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def send(self, message: Any) -> None:
        self._inbox.put(message)

    def close(self) -> None:
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        while True:
            while not self._running or not self._inbox.empty():
                message = self._receive()
                if message is None:
                    return
                if isinstance(message, Submit):
                    self.submitted.append(time.perf_counter())
                    self._running.append((message.request, iter(range(message.request.params.max_tokens))))
            start = time.perf_counter()
            self.begun.append(start)
            launch(self._operands)
            outputs = self._tokens()
            self.launches.append(time.perf_counter() - start)
            end = start + max(STEP_S, self.launches[-1] + STEP_S / 2)
            with self.precedence.waiting():
                time.sleep(max(0.0, end - time.perf_counter()))
            self.late.append(time.perf_counter() - end)
            self.listener(outputs)

    def _receive(self) -> Any:
        if not self._inbox.empty():
            return self._inbox.get()
        with self.precedence.waiting():
            return self._inbox.get()

    def _tokens(self) -> list[TokenOutput]:
        outputs = []
        for request, places in self._running:
            place = next(places)
            end = "length" if place == request.params.max_tokens - 1 else None
            outputs.append(TokenOutput(request.request_id, 0, 5 + place % 200, finish_reason=end))
        self._running = [r for r, o in zip(self._running, outputs, strict=True) if o.finish_reason is None]
        return outputs


def launch(operands: tuple[torch.Tensor, torch.Tensor]) -> None:
    """What a step's launch is to the interpreter: operators that let go of its lock, Python between them."""
    left, right = operands
    for _ in range(OPERATORS):
        torch.add(left, right, out=left)
        for _ in range(100):
            pass


class FakeFrontend(Frontend):
    """The real one, around a model that is loaded already and a core that is none."""

    _thread: Any

    def __init__(self, model: LoadedModel, config: EngineConfig, first: bool = False) -> None:
        self.model, self.max_model_len, self._first = model, LENGTH, first
        self._core = _Released()  # type: ignore[assignment]
        super().__init__("", config, None)

    def _load(self, name: str, plugins: Sequence[Any] | None) -> Any:
        return self.precedence if self._first else Precedence()


class _Released:
    def release(self) -> None:
        pass


def together(
    model: LoadedModel, prompts: Sequence[TextPrompt], params: SamplingParams, threads: int, first: bool
) -> None:
    """All requests at once. first: the engine's thread has precedence."""
    config = EngineConfig(device="cpu", preprocess_threads=threads, show_progress=False)
    engine = FakeFrontend(model, config, first)
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    alone = statistics.median(timed(lambda: launch((torch.ones(64), torch.ones(64)))) for _ in range(50))
    start = time.perf_counter()
    for prompt in prompts:
        engine.add(prompt, params, done.put)
    added = time.perf_counter() - start
    outputs = [done.get() for _ in prompts]
    assert all(o.finished and len(o.token_ids) == params.max_tokens for o in outputs), "an answer is not whole"
    end = time.perf_counter()
    core = engine._thread
    ready = max(core.submitted) - start
    count = sum(begun < max(core.submitted) for begun in core.begun)
    busy, late = core.launches[:count], core.late[:count]
    print(
        f"  {threads:2d} threads{', precedence' if first else '            '}: "
        f"add() of all {added * 1e3:6.1f} ms, first ready {(core.submitted[0] - start) * 1e3:5.1f}, "
        f"all {ready * 1e3:6.1f} ({len(prompts) / ready:6.0f} req/s); "
        f"launch alone {alone * 1e3:.2f}, while preparing {statistics.mean(busy) * 1e3:5.2f} "
        f"(max {max(busy) * 1e3:5.1f}), woken late by {statistics.mean(late) * 1e3:5.2f} "
        f"(max {max(late) * 1e3:5.1f}) ms; in all {(end - start) * 1e3:.0f} ms"
    )
    engine.close()


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def token_cost(model: LoadedModel, prompts: Sequence[TextPrompt], params: SamplingParams) -> None:
    """Microseconds a token in the thread that handles outputs, with nothing else running."""
    engine = FakeFrontend(model, EngineConfig(device="cpu", show_progress=False))
    engine._thread.close()
    engine._thread.send = lambda message: None
    done: queue.SimpleQueue[Any] = queue.SimpleQueue()
    ids = [engine.add(prompt, params, done.put) for prompt in prompts]
    while any(engine._live[i].text is None for i in ids):
        time.sleep(0.01)
    step = [TokenOutput(i, 0, 77) for i in ids]
    middle = [timed(lambda: engine._on_outputs(0.0, step)) for _ in range(127)]
    last = timed(lambda: engine._on_outputs(0.0, [TokenOutput(i, 0, 77, finish_reason="length") for i in ids]))
    each = 1e6 / len(ids)
    print(f"tokens: {statistics.median(middle) * each:.2f} us each, the last of 128 {last * each:.1f} us")
    engine._thread = FakeCoreThread(Precedence, lambda outputs: None)
    engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--switch-interval", type=float, help="seconds, for sys.setswitchinterval; 0.005 if left out")
    args = parser.parse_args()
    if args.switch_interval is not None:
        sys.setswitchinterval(args.switch_interval)
    frontend_module.CoreThread = FakeCoreThread  # type: ignore[assignment, misc]
    torch.set_num_threads(1)
    params = SamplingParams(max_tokens=args.tokens, temperature=0.0, ignore_eos=True)
    with tempfile.TemporaryDirectory() as folder:
        path = make_tiny_qwen2vl(Path(folder), max_pixels=1280 * 28 * 28)
        model = load_model(str(path), EngineConfig(device="cpu", show_progress=False), None)
        assert model.checkpoint.identity  # read now, while there are files
    prompts = workloads(args.requests)
    for name, asked in prompts.items():
        by_stage(model, name, asked, params)
    token_cost(model, prompts["text"], params)
    for name, asked in prompts.items():
        print(name)
        for threads in args.threads:
            for first in (False, True) * args.repeat:
                together(model, asked, params, threads, first)


if __name__ == "__main__":
    main()
