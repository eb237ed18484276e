"""What the border between the engine's process and its parent costs.

    python tests/bench/process_cost.py                        # microseconds a step of Python, each side
    python tests/bench/process_cost.py --model zoo/qwen2vl-nano   # tokens/s and seconds to start, with and without

The first prints, for batches of decoding sequences, what a step's outputs take to encode and send, and to receive and
decode, in time of the thread itself.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import threading
import time
from typing import Any

import numpy as np
from PIL import Image

from mm_core import Engine, SamplingParams, TextPrompt
from mm_core.engine.messages import TokenOutput
from mm_core.engine.process.wire import Channel, Outputs

BATCHES = (1, 32, 256)
STEPS = 400


def border(batch: int) -> tuple[float, float]:
    """Microseconds of a step, in the engine's thread and in the parent's."""
    one, other = socket.socketpair()
    sent: list[float] = []
    received: list[float] = []

    def receive() -> None:
        channel = Channel(other, engine=False)
        begin = time.thread_time()
        for _ in range(STEPS):
            channel.receive()
        received.append((time.thread_time() - begin) / STEPS)

    reader = threading.Thread(target=receive)
    reader.start()
    channel = Channel(one, engine=True)
    for _ in range(STEPS):
        outputs = [TokenOutput(f"req-{i}", 0, 1000 + i, None, None, None, 288, 256, None, 1.5) for i in range(batch)]
        made = time.thread_time()
        channel.send(Outputs(time.perf_counter(), outputs))
        sent.append(time.thread_time() - made)
    reader.join()
    with one, other:
        return statistics.median(sent) * 1e6, received[0] * 1e6


def picture(seed: int) -> Image.Image:
    """A picture of 448×448."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (448, 448, 3), dtype=np.uint8))


def serve(model: str, device: str, rounds: int, **options: Any) -> tuple[float, float]:
    """Seconds to start, and the median of tokens/s of eight requests at once, each with a picture of its own."""
    begin = time.perf_counter()
    with Engine.from_pretrained(model, device=device, show_progress=False, **options) as engine:
        ready = time.perf_counter() - begin
        params = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
        found = []
        for number in range(rounds + 1):
            pictures = [picture(100 * number + i) for i in range(8)]
            prompts = [TextPrompt(prompt="What is it?", multi_modal_data={"image": image}) for image in pictures]
            begin = time.perf_counter()
            outputs = engine.generate(prompts, params)
            found.append(sum(len(o.token_ids) for o in outputs) / (time.perf_counter() - begin))
        return ready, statistics.median(found[1:])


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    if arguments.model is None:
        for batch in BATCHES:
            sent, received = border(batch)
            print(f"batch {batch:4}: {sent:6.1f} µs to encode and send, {received:6.1f} µs to receive and decode")
        return
    for engine_process in (False, True):
        options = {"engine_process": engine_process}
        ready, rate = serve(arguments.model, arguments.device, arguments.rounds, **options)
        print(f"engine_process={engine_process}: ready after {ready:.1f} s, {rate:.0f} tokens/s")


if __name__ == "__main__":
    main()
