"""What one step of the engine's loop costs in Python, without device and listener.

    python tests/bench/loop_cost.py [--overlap] [--steps 400] [--profile 256]

Prints, for batches of decoding sequences, the milliseconds a step takes in `EngineCore.step`
(schedule, update, outputs) with a runner that does nothing but name a token a sequence. What the
stand-in runner takes is measured apart and taken off. Times are of the thread's own work: what else
runs on the machine counts only by what it does to caches and clocks.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import pstats
import time
from types import SimpleNamespace
from typing import Any

from mm_core.cache import BlockPool, EncoderCache
from mm_core.config import SamplingParams
from mm_core.engine.core import EngineCore
from mm_core.engine.messages import Submit
from mm_core.hashing import encode_fields, get_hasher, prompt_block_keys
from mm_core.runner.step import LaunchedStep
from mm_core.scheduler import SampledToken, ScheduledBatch, Scheduler, SchedulerConfig, StepResult
from mm_core.types import MediaFeature, PlaceholderRange, PreparedRequest

BLOCK = 16
PROMPT = 294
ROWS = 256
BATCHES = (1, 32, 256)


class Stub:
    """A runner whose every token is the same; `seconds` is what it took itself."""

    def __init__(self) -> None:
        self.rows: set[bytes] = set()
        self.kv = SimpleNamespace(bytes=0)
        self.seconds = 0.0
        self._token = SampledToken(11)

    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        begin = time.thread_time()
        sampled = {s.seq.seq_id: self._token for s in batch.sequences if s.samples}
        result = StepResult(sampled)
        self.seconds += time.thread_time() - begin
        return LaunchedStep(lambda: result)


def make_core(batch: int, *, overlap: bool) -> tuple[EngineCore, Stub]:
    """An engine core with room for `batch` sequences of 2,048 tokens."""
    runner = Stub()
    config = SchedulerConfig(max_num_seqs=batch, max_num_batched_tokens=8192, encoder_budget=32768, max_model_len=4096)
    pool = BlockPool(batch * 2048 // BLOCK, BLOCK)
    scheduler = Scheduler(config, pool, EncoderCache(32768), get_hasher("xxh3_128"), lambda f: 4 * f.num_tokens)
    return EngineCore(scheduler, runner, 0, overlap), runner  # type: ignore[arg-type]


def make_request(number: int, tokens: int) -> PreparedRequest:
    """A prompt as of `image-distinct`: a picture of its own, 294 tokens."""
    feature = MediaFeature("image", ROWS, {}, {}, number.to_bytes(16, "little"))
    ids = (*range(15), *[7] * ROWS, *range(PROMPT - ROWS - 15))
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    ranges = (PlaceholderRange(15, ROWS, (True,) * ROWS, feature),)
    context = encode_fields((None, b""))
    keys = prompt_block_keys(get_hasher("xxh3_128"), BLOCK, ids, [(feature.key, 15, 15 + ROWS)], context)
    return PreparedRequest(str(number), ids, params, ranges, block_size=BLOCK, block_keys=keys)


def decode_cost(batch: int, steps: int, *, overlap: bool, waiting: int = 0) -> float:
    """Seconds a decode step takes, with `waiting` more requests in the queue."""
    core, runner = make_core(batch, overlap=overlap)
    for number in range(batch + waiting):
        core.handle(Submit(make_request(number, steps + 64)))
    while len(core.scheduler.running) < batch or core.scheduler.running[-1].num_output_tokens < 2:
        core.step()
    gc.collect()  # not what is left of another run
    runner.seconds = 0.0
    begin = time.thread_time()
    outputs = sum(len(core.step()) for _ in range(steps))
    seconds = time.thread_time() - begin - runner.seconds
    assert outputs == batch * steps, "not every sequence decoded in every step"
    return seconds / steps


def whole_run(requests: int, tokens: int, *, overlap: bool) -> dict[str, float]:
    """Steps and seconds of Python for a whole run, prompts and ends included."""
    core, runner = make_core(256, overlap=overlap)
    for number in range(requests):
        core.handle(Submit(make_request(number, tokens)))
    gc.collect()
    begin, longest, steps, given = time.thread_time(), 0.0, 0, 0
    while core.has_work:
        before, inside = time.thread_time(), runner.seconds
        given += len(core.step())
        longest = max(longest, time.thread_time() - before - (runner.seconds - inside))
        steps += 1
    seconds = time.thread_time() - begin - runner.seconds
    assert given == requests * tokens
    return {"steps": steps, "seconds": seconds, "longest_ms": 1e3 * longest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--overlap", action="store_true", help="take a step in after the next was launched")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--profile", type=int, metavar="BATCH", help="where the time of this batch size goes")
    args: Any = parser.parse_args()
    if args.profile:
        profile = cProfile.Profile()
        profile.runcall(decode_cost, args.profile, args.steps, overlap=args.overlap)
        pstats.Stats(profile).sort_stats("tottime").print_stats(18)
        return
    print(f"{'batch':>6} {'waiting':>8} {'ms a step':>10}")
    for batch in BATCHES:
        for waiting in (0, 512) if batch == BATCHES[-1] else (0,):
            best = min(decode_cost(batch, args.steps, overlap=args.overlap, waiting=waiting) for _ in range(3))
            print(f"{batch:>6} {waiting:>8} {1e3 * best:>10.3f}")
    run = whole_run(256, 128, overlap=args.overlap)
    print(f"256 requests of {PROMPT} + 128 tokens: {run['steps']} steps, {run['seconds']:.3f} s of Python, "
          f"longest step {run['longest_ms']:.1f} ms")  # fmt: skip


if __name__ == "__main__":
    main()
