"""What a simulated device takes for a step and for a copy, in seconds; presets fitted to measured runs.

A step takes

    hypot(step, token × prompt tokens) + attention × pairs + decode × answers + kv × context + encoder,

where pairs are a prompt token and a token that it attends to, context the tokens whose KV the answers read, and an
item of c units takes encoder × c + encoder_square × c². The root of the sum of squares stands for the larger of both:
a small step is as long as its weights take to read, a large one as long as its arithmetic. Copies run beside the
steps, one after another in each direction: latency + bytes / bandwidth.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from mm_core.errors import ConfigError
from mm_core.scheduler.sequence import ScheduledBatch


@dataclass(frozen=True)
class SimCosts:
    """Seconds, bytes, and bytes a second. kv_bytes: of a token in all layers; row_bytes: of an encoder row.
    store_bandwidth: device to host, restore_bandwidth: back. staging_bytes: the most that is on its way to the host."""

    step_seconds: float
    token_seconds: float
    attention_seconds: float
    decode_seconds: float
    kv_seconds: float
    encoder_seconds: float
    encoder_square_seconds: float
    kv_bytes: int
    row_bytes: int
    store_bandwidth: float
    restore_bandwidth: float
    copy_latency: float
    disk_read_bandwidth: float
    disk_write_bandwidth: float
    disk_latency: float
    staging_bytes: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not math.isfinite(value) or value < 0 or (value == 0 and name.endswith(("bytes", "bandwidth"))):
                raise ConfigError(f"A simulated device with {name}={value!r}: want a finite number, bytes above 0.")

    def step(self, batch: ScheduledBatch) -> float:
        """Seconds of a step without what it encodes."""
        prompt, pairs, answers, context = 0, 0.0, 0, 0
        for seq, start, length, *_ in batch.sequences:
            if length == 1 and start >= seq.prompt_len:
                answers += 1
                context += start + 1
            else:
                prompt += length
                pairs += length * (start + (length + 1) / 2)
        rows = sum(seq.source.num_tokens for seq in batch.sources if seq.source is not None)
        seconds = math.hypot(self.step_seconds, self.token_seconds * (prompt + rows))
        if not batch.sequences:
            seconds = 0.0  # it only encodes
        return seconds + self.attention_seconds * pairs + self.decode_seconds * answers + self.kv_seconds * context

    def encode(self, cost: int) -> float:
        """Seconds to encode an item."""
        return self.encoder_seconds * cost + self.encoder_square_seconds * cost * cost

    def copies(self, nbytes: Iterable[int], bandwidth: float, latency: float) -> list[float]:
        """When each copy of those started at once ends, seconds from the start."""
        ends, total = [], latency
        for count in nbytes:
            total += count / bandwidth
            ends.append(total)
        return ends


_QWEN2_VL_7B = SimCosts(
    # Of docs/benchmarks/mm-bench-h100.json: decode steps of 1, 32 and 256 sequences take 5.16, 7.2 and 9.3 ms with
    # 358, 2,374 and 358 tokens of KV each; a step of 8,192 prompt tokens 165 ms, one of 294 8.4 ms.
    step_seconds=5.15e-3,
    token_seconds=20.1e-6,
    decode_seconds=7.8e-6,
    kv_seconds=24.2e-9,  # 57,344 bytes at 0.8 × 2.97 TB/s
    # 28 layers × 3,584 × 4 operations a pair at 338 TFLOP/s, what flash attention reaches at 8,192 tokens.
    attention_seconds=1.19e-9,
    # The same file: an image of 1,024 patches takes 3.6 ms of image-distinct, one of 9,216 61 ms of image-large, where
    # what is left of the run is the decoder's.
    encoder_seconds=3.16e-6,
    encoder_square_seconds=3.75e-10,
    kv_bytes=57_344,
    row_bytes=7_168,
    # tests/bench/restore.py on the same kind of machine: 512 blocks leave in 10.6 ms and come back in 11.2; 144 come
    # back in 3.4 ms; its disk writes 1.16 and reads 2.22 GB/s.
    store_bandwidth=44.5e9,
    restore_bandwidth=42e9,
    copy_latency=0.25e-3,
    disk_read_bandwidth=2.22e9,
    disk_write_bandwidth=1.16e9,
    disk_latency=0.25e-3,
    staging_bytes=768 * 2**20,
)

PRESETS: Mapping[str, SimCosts] = {
    "h100-qwen2-vl-7b": _QWEN2_VL_7B,
    # Of docs/benchmarks/mm-bench-llava-h100.json: mixed steps at 547 TFLOP/s, 16 images of 576 patches in 20 ms.
    # A token's KV is 9 times as large: 32 layers of 32 key heads. 13.5 GB of weights at 2.7 TB/s.
    "h100-llava-1.5-7b": SimCosts(
        **{
            **asdict(_QWEN2_VL_7B),
            "step_seconds": 5.0e-3,
            "token_seconds": 23.5e-6,
            "kv_seconds": 221e-9,
            "attention_seconds": 1.55e-9,
            "encoder_seconds": 2.2e-6,
            "encoder_square_seconds": 0.0,
            "kv_bytes": 524_288,
            "row_bytes": 8_192,
        }
    ),
}
DEFAULT_COSTS = "h100-qwen2-vl-7b"


def costs_of(name: str) -> SimCosts:
    """A preset, or a JSON file of an object with fields of SimCosts beside `"preset"`, from which the others come.

    Raises ConfigError, which names what is wrong.
    """
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"--costs {name}: no such file, and no preset. There are: {', '.join(PRESETS)}.")
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--costs {name} is no JSON file ({type(error).__name__}).") from None
    known = {field.name: field.type for field in fields(SimCosts)}
    if not isinstance(entry, dict) or (unknown := sorted(set(entry) - {*known, "preset"})):
        wrong = unknown[0] if isinstance(entry, dict) else "what it holds"
        raise ConfigError(f"--costs {name}: {wrong!r} is not known. Want an object of: preset, {', '.join(known)}.")
    preset = entry.pop("preset", DEFAULT_COSTS)
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ConfigError(f"--costs {name}: there is no preset {preset!r}. There are: {', '.join(PRESETS)}.")
    for key, value in entry.items():
        if type(value) is not int and (type(value) is not float or known[key] == "int"):
            raise ConfigError(f"--costs {name}: `{key}` is a{' whole' if known[key] == 'int' else ''} number.")
    return SimCosts(**{**asdict(PRESETS[preset]), **entry})
