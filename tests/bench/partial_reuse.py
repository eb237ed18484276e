"""What copying the beginning of a partly equal block saves, and what it costs.

    python tests/bench/partial_reuse.py [--device cpu] [--model small] [--blocks 16 128] [--rounds 5] [--json FILE]

Documents of 200 to 700 tokens with questions behind each that begin alike and differ in their last words, one token
answered. In "batch" all come at once, the documents being cached; in "alone" one after another, which tells of the
time to a first token. Without copies a question is computed from the last full block on that it shares with another;
with copies from the first token that differs. Runs with and without alternate in one engine; medians over the rounds.

model: "small", a random Qwen2-VL of 107 M parameters; "tiny"; or a name of `mm bench`'s, with dummy weights.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mm_core import Engine, KvCacheConfig, SamplingParams, TextPrompt
from mm_core.scheduler.plan import COPY_TOKENS

ONE = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
Prompts = tuple[list[TextPrompt], list[TextPrompt]]
FIRST_ID, LAST_ID = 20, 200  # ids of text in every vocabulary


def make_model(name: str, folder: Path) -> Path:
    if name not in ("tiny", "small"):
        from mm_core.bench.models import place_model
        from mm_core.plugins import PluginRegistry

        return Path(place_model(name, "dummy", PluginRegistry(), folder))
    from support.tiny import make_tiny_qwen2vl

    if name == "tiny":
        return make_tiny_qwen2vl(folder)
    return make_tiny_qwen2vl(
        folder, hidden_size=640, num_hidden_layers=16, num_attention_heads=10, num_key_value_heads=2,
        intermediate_size=1792, vocab_size=8192, max_window_layers=16,
        rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]},
    )  # fmt: skip


def make_prompts(documents: int, questions: int, seed: int) -> Prompts:
    """One question to each document, and the others."""
    draw = random.Random(seed)

    def words(count: int) -> list[int]:
        return [draw.randint(FIRST_ID, LAST_ID) for _ in range(count)]

    first, others = [], []
    for _ in range(documents):
        shared = words(draw.randint(200, 700))
        asked = [TextPrompt(prompt_token_ids=[*shared, *words(draw.randint(4, 12))]) for _ in range(questions + 1)]
        first.append(asked[0])
        others += asked[1:]
    draw.shuffle(others)
    return first, others


def measure(engine: Engine, prompts: Prompts, copy: int, how: str) -> dict[str, Any]:
    """One run with copies of at least so many tokens, or without (0)."""
    scheduler = engine._frontend._core.scheduler  # type: ignore[union-attr]
    first, others = prompts
    scheduler.reuse._copy_tokens = copy
    engine.clear_cache()
    engine.generate(first, ONE)
    engine.wait_idle()
    stats = scheduler.stats
    before = stats.computed_tokens, stats.copied_tokens
    begin = time.perf_counter()
    if how == "batch":
        outputs = engine.generate(others, ONE)
    else:
        outputs = [engine.generate(prompt, ONE)[0] for prompt in others[: len(first)]]
    seconds = time.perf_counter() - begin
    return {
        "tokens": stats.computed_tokens - before[0],
        "copied": stats.copied_tokens - before[1],
        "seconds": seconds,
        "asked": len(outputs),
        "ids": [o.token_ids for o in outputs],
    }


def compare(engine: Engine, prompts: Prompts, how: str, args: Any, least: int) -> dict[str, Any]:
    runs: dict[int, list[dict[str, Any]]] = {0: [], least: []}
    for number in range(args.rounds + 1):
        for copy in (0, least) if number % 2 else (least, 0):
            run = measure(engine, prompts, copy, how)
            if number:  # the first warms up
                runs[copy].append(run)
    without, copying = runs[0], runs[least]
    ms = [1e3 * statistics.median(r["seconds"] for r in side) / side[0]["asked"] for side in (without, copying)]
    return {
        "how": how,
        "least": least,
        "tokens": without[0]["tokens"] / without[0]["asked"],
        "tokens_copying": copying[0]["tokens"] / copying[0]["asked"],
        "copied": copying[0]["copied"] / copying[0]["asked"],
        "ms": ms[0],
        "ms_copying": ms[1],
        "same_tokens": without[0]["ids"] == copying[0]["ids"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--model", default="small")
    parser.add_argument("--blocks", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--least", type=int, nargs="*", default=[COPY_TOKENS], help="tokens a copy must save")
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args: Any = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = make_model(args.model, Path(folder))
        prompts = make_prompts(args.documents, args.questions, 0)
        heads = f"{'block':>5} {'least':>5} {'':>6} {'tokens':>15} {'copied':>7} {'ms a request':>17} {'gain':>6}"
        print(f"{heads}  same answers")
        for block in args.blocks:
            engine = Engine.from_pretrained(
                str(path), device=args.device, dtype=args.dtype, max_model_len=1024, show_progress=False,
                load_format="safetensors" if args.model in ("tiny", "small") else "dummy",
                kv_cache_config=KvCacheConfig(num_blocks=65536 // block, block_size=block),
            )  # fmt: skip
            with engine:
                for how in ("batch", "alone"):
                    for least in args.least:
                        row = compare(engine, prompts, how, args, least)
                        rows.append({"block": block, **row})
                        print(
                            f"{block:>5} {least:>5} {how:>6} {row['tokens']:>6.1f} → {row['tokens_copying']:>6.1f}"
                            f" {row['copied']:>7.1f} {row['ms']:>7.2f} → {row['ms_copying']:>7.2f}"
                            f" {row['ms'] / row['ms_copying']:>6.2f}  {row['same_tokens']}"
                        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
