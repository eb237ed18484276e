"""What an fp8 KV cache costs in accuracy, on this machine's CPU.

The zoo checkpoint answers its held-out questions in float32 with keys and values kept in float32 and in fp8: how
many answers are right. Then both give the log-probabilities of the same answers' tokens, those of the float32
engine: how far they are apart, also for a tiny Qwen2-VL with random weights, whose distributions are flat. bfloat16
throughout, and bfloat16 with fp8 keys and values, are there to compare with.

    python tests/bench/fp8_accuracy.py [--per-kind 200] [--json docs/benchmarks/fp8-accuracy.json]
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "zoo" / "recipes")]

from support.forced import log_probabilities  # noqa: E402
from support.pictures import picture  # noqa: E402
from support.tiny import make_tiny_qwen2vl  # noqa: E402

from mm_core import Engine, KvCacheConfig, SamplingParams, TextPrompt  # noqa: E402
from qwen2vl_nano.backends import MAX_TOKENS, mm_backend  # noqa: E402
from qwen2vl_nano.evaluate import mean, score  # noqa: E402
from qwen2vl_nano.heldout import KINDS, Question, load, questions  # noqa: E402

ZOO = ROOT / "zoo" / "qwen2vl-nano"
VARIANTS = {
    "fp8 KV": ("float32", "fp8"),
    "bfloat16": ("bfloat16", "auto"),
    "bfloat16, fp8 KV": ("bfloat16", "fp8"),
}


@contextmanager
def engine(path: Path, dtype: str, kv_dtype: str) -> Iterator[Engine]:
    kv: Any = KvCacheConfig(dtype=kv_dtype)  # type: ignore[arg-type]
    made = Engine.from_pretrained(path, device="cpu", dtype=dtype, kv_cache_config=kv, show_progress=False)  # type: ignore[arg-type]
    with made:
        yield made


def asked_of_zoo(asked: Sequence[Question]) -> list[TextPrompt]:
    return [TextPrompt(prompt=q.question, multi_modal_data={"image": list(q.images)}) for q in asked]


def asked_of_tiny(count: int) -> list[TextPrompt]:
    """Questions about a picture each, all different."""
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return [
        TextPrompt(prompt=f"<|im_start|>user\n{image}Describe this image.", multi_modal_data={"image": made})
        for made in (picture(seed, 100 + 14 * (seed % 7), 90 + 14 * (seed % 5)) for seed in range(count))
    ]


def held_out(asked: list[Question]) -> dict[str, Any]:
    """Percentages right, kind by kind, with both kinds of cache."""
    scores = {kv: score(mm_backend(ZOO, kv_dtype=kv), asked)[0] for kv in ("auto", "fp8")}
    means = {kv: round(mean(found, KINDS), 3) for kv, found in scores.items()}
    return {
        "questions": len(asked),
        "right, %": means,
        "difference, points": round(means["fp8"] - means["auto"], 3),
        "kinds, %": {kind: [round(scores[kv][kind], 2) for kv in scores] for kind in KINDS if kind in scores["auto"]},
    }


def errors(path: Path, prompts: list[TextPrompt], max_tokens: int, *, ignore_eos: bool) -> dict[str, Any]:
    """|difference of log-probability| of each token of the float32 engine's answers."""
    greedy = SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=ignore_eos)
    with engine(path, "float32", "auto") as exact:
        answers = [output.token_ids for output in exact.generate(prompts, greedy)]
        wanted = log_probabilities(exact, prompts, answers)
    found: dict[str, Any] = {"tokens": len(wanted), "mean log-probability": round(float(wanted.mean()), 4)}
    for name, (dtype, kv_dtype) in VARIANTS.items():
        with engine(path, dtype, kv_dtype) as other:
            apart = (log_probabilities(other, prompts, answers) - wanted).abs()
        found[name] = {"mean": round(float(apart.mean()), 5), "max": round(float(apart.max()), 4)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--per-kind", type=int, default=200, help="held-out questions of each kind; 0: the frozen sample"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    asked = questions(options.per_kind) if options.per_kind else load(ZOO / "samples")
    result: dict[str, Any] = {
        "written_by": f"tests/bench/fp8_accuracy.py --per-kind {options.per_kind}",
        "date": date.today().isoformat(),
        "device": f"CPU, {platform.machine()}, torch {torch.__version__}",
        "zoo/qwen2vl-nano, held out": held_out(asked),
    }
    sample = asked_of_zoo(asked[:: max(len(asked) // 210, 1)])
    result["zoo/qwen2vl-nano, log-probabilities"] = errors(ZOO, sample, MAX_TOKENS, ignore_eos=False)
    with tempfile.TemporaryDirectory() as folder:
        tiny = make_tiny_qwen2vl(Path(folder))
        result["tiny Qwen2-VL, log-probabilities"] = errors(tiny, asked_of_tiny(24), 64, ignore_eos=True)
    text = re.sub(r"\[\s+([\d.]+),\s+([\d.]+)\s+\]", r"[\1, \2]", json.dumps(result, indent=1, ensure_ascii=False))
    print(text)
    if options.json:
        options.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
