"""mm-core beside transformers `generate` on this machine's CPU, in one run.

A random Qwen2-VL of 107 M parameters, one 448×448 noise picture a request, prompt of 289 tokens,
64 new tokens, two threads. Each side has a process of its own, as users would run it (in one process
their threads would get in each other's way); both preprocess their pictures inside the clock; runs
alternate, so that a machine that slows down slows both; each figure is the median over the rounds.

    python tests/bench/cpu_vs_transformers.py [--rounds 3] [--json FILE] [--write-docs]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support.reference import Reference  # noqa: E402
from support.tiny import make_tiny_qwen2vl  # noqa: E402

from mm_core import Engine, KvCacheConfig, SamplingParams, TextPrompt  # noqa: E402

NEW_TOKENS = 64
PROMPT_TOKENS = 289
THREADS = 2
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Case:
    """requests at once; shared: all show the same picture; goal: ours over theirs."""

    dtype: str
    requests: int
    shared: bool
    goal: float | None


@dataclass(frozen=True)
class Row:
    dtype: str
    requests: int
    pictures: str
    transformers_tok_s: float
    mm_core_tok_s: float
    ratio: float
    goal: float | None


CASES = (
    Case("fp32", 8, False, 1.15),
    Case("fp32", 8, True, 2.0),
    Case("fp32", 1, False, None),
    Case("bf16", 8, False, 1.6),
    Case("bf16", 1, False, 1.6),
)


def make_checkpoint(root: Path) -> Path:
    return make_tiny_qwen2vl(
        root, hidden_size=640, num_hidden_layers=16, num_attention_heads=10, num_key_value_heads=2,
        intermediate_size=1792, vocab_size=8192, max_window_layers=16,
        rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]}, vision_embed_dim=512, vision_depth=8,
        vision_num_heads=8, vision_mlp_ratio=4, max_pixels=1024 * 28 * 28,
    )  # fmt: skip


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (448, 448, 3), dtype=np.uint8))


def make_prompt(tokenizer: Any) -> str:
    """A prompt of 289 tokens with its picture: 256 rows and 33 others."""
    words = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
    fill = ""
    while len(tokenizer(words + fill)["input_ids"]) - 1 + 256 < PROMPT_TOKENS:
        fill += "a "
    return words + fill


class Transformers:
    """`generate` on one padded batch, greedy, sdpa attention."""

    def __init__(self, reference: Reference, prompt: str) -> None:
        self.reference = reference
        self.prompt = prompt

    @torch.inference_mode()
    def run(self, pictures: list[Image.Image]) -> int:
        each = [self.reference.inputs(self.prompt, [p]) for p in pictures]
        inputs = {k: torch.cat([e[k] for e in each]) for k in each[0]}
        inputs["pixel_values"] = inputs["pixel_values"].to(self.reference.model.dtype)
        out = self.reference.model.generate(
            **inputs, do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS
        )
        return int(out.shape[0] * (out.shape[1] - inputs["input_ids"].shape[1]))


class Ours:
    """`Engine.generate`: one call with all requests."""

    def __init__(self, engine: Engine, prompt: str) -> None:
        self.engine = engine
        self.prompt = prompt

    def run(self, pictures: list[Image.Image]) -> int:
        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True)
        prompts = [TextPrompt(prompt=self.prompt, multi_modal_data={"image": p}) for p in pictures]
        outputs = self.engine.generate(prompts, params)
        if {len(o.prompt_token_ids) for o in outputs} != {PROMPT_TOKENS}:
            raise SystemExit("the prompt does not have the workload's length")
        return sum(len(o.token_ids) for o in outputs)


class Worker:
    """One side in a process of its own, which answers timing requests and is idle in between."""

    def __init__(self, side: str, path: Path, dtype: str) -> None:
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(side, path, dtype, theirs), daemon=True)
        self.process.start()
        self.ready_s: float = self.pipe.recv()

    def timed(self, seeds: list[int]) -> float:
        """Output tokens a second."""
        self.pipe.send(seeds)
        result: float = self.pipe.recv()
        return result

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def serve(side: str, path: Path, dtype: str, pipe: Connection) -> None:
    """The worker process: load, then time one call for each list of picture seeds."""
    torch.set_num_threads(THREADS)
    start = time.perf_counter()
    tokenizer_side = Reference(path, DTYPES[dtype]) if side == "transformers" else None
    if tokenizer_side is not None:
        run: Transformers | Ours = Transformers(tokenizer_side, make_prompt(tokenizer_side.tokenizer))
    else:
        kv = KvCacheConfig(num_blocks=1024)
        engine = Engine.from_pretrained(path, dtype=NAMES[dtype], kv_cache_config=kv, show_progress=False)
        run = Ours(engine, make_prompt(engine._frontend.model.processor.tokenizer))
    pipe.send(time.perf_counter() - start)
    while (seeds := pipe.recv()) is not None:
        pictures = [noise(seed) for seed in seeds]
        start = time.perf_counter()
        tokens = run.run(pictures)
        pipe.send(tokens / (time.perf_counter() - start))


def measure(case: Case, theirs: Worker, ours: Worker, rounds: int, seed: int) -> Row:
    found: list[tuple[float, float]] = []
    for round_ in range(rounds + 1):
        first = seed + 1000 * round_  # new pictures every time: nothing is left from the round before
        seeds = [first] * case.requests if case.shared else list(range(first, first + case.requests))
        pair = theirs.timed(seeds), ours.timed(seeds)
        if round_:  # the first round warms up
            found.append(pair)
    theirs_s, ours_s = (statistics.median(side) for side in zip(*found, strict=True))
    ratio = statistics.median(b / a for a, b in found)
    pictures = "one for all" if case.shared else "all different"
    return Row(case.dtype, case.requests, pictures, round(theirs_s, 1), round(ours_s, 1), round(ratio, 2), case.goal)


def table(rows: list[Row]) -> str:
    lines = [
        "| dtype | requests | pictures | transformers, tok/s | mm-core, tok/s | ratio | goal |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        goal = f"≥ {r.goal:g}" if r.goal else "–"
        lines.append(
            f"| {r.dtype} | {r.requests} | {r.pictures} | {r.transformers_tok_s} | {r.mm_core_tok_s} "
            f"| {r.ratio} × | {goal} |"
        )
    return "\n".join(lines)


def run_dtype(path: Path, dtype: str, rounds: int) -> list[Row]:
    theirs, ours = Worker("transformers", path, dtype), Worker("mm-core", path, dtype)
    print(f"{dtype}: mm-core ready in {ours.ready_s:.1f} s", flush=True)
    rows = []
    for number, case in enumerate(CASES):
        if case.dtype == dtype:
            rows.append(measure(case, theirs, ours, rounds, number * 10**6))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    theirs.close()
    ours.close()
    return rows


def write_docs(rows: list[Row], facts: dict[str, str]) -> None:
    text = (
        f"{table(rows)}\n\nOutput tokens a second; {facts['cpu']}, {THREADS} threads, torch {facts['torch']}, "
        f"transformers {facts['transformers']}. Written by `tests/bench/cpu_vs_transformers.py --write-docs`."
    )
    for file in (ROOT / "README.md", ROOT / "docs" / "benchmarks" / "README.md"):
        if not file.exists():
            continue
        page = file.read_text(encoding="utf-8")
        begin, end = "<!-- cpu-bench:begin -->", "<!-- cpu-bench:end -->"
        if begin in page and end in page:
            head, rest = page.split(begin, 1)
            file.write_text(f"{head}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}", encoding="utf-8")


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--dtype", choices=sorted(DTYPES))
    parser.add_argument("--write-docs", action="store_true", help="put the table into README and docs/benchmarks")
    options = parser.parse_args()
    import transformers

    facts = {"cpu": cpu_name(), "torch": torch.__version__, "transformers": transformers.__version__}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(Path(folder))
        for dtype in [options.dtype] if options.dtype else ["fp32", "bf16"]:
            rows += run_dtype(path, dtype, options.rounds)
    print(f"\n{table(rows)}")
    if options.json:
        options.json.write_text(json.dumps({**facts, "rows": [asdict(r) for r in rows]}, indent=2) + "\n")
    if options.write_docs:
        write_docs(rows, facts)


if __name__ == "__main__":
    main()
