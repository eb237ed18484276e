"""Score the checkpoint on held-out questions and write the scores into its card.

`python -m qwen2vl_nano.evaluate CHECKPOINT --backend transformers --per-kind 250` (see README.md).
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .backends import BACKENDS, Answer
from .heldout import DIGIT_KINDS, KINDS, SCENE_KINDS, SEED, Question, blanked, export, load, questions, right

BEGIN, END = "<!-- evaluation: begin -->", "<!-- evaluation: end -->"


def score(answer: Answer, asked: list[Question]) -> tuple[dict[str, float], list[tuple[Question, str]]]:
    """Percentage right by kind, and what was answered wrongly."""
    given = answer([(q.images, q.question) for q in asked])
    marks: dict[str, list[bool]] = defaultdict(list)
    wrong = []
    for question, text in zip(asked, given, strict=True):
        marks[question.kind].append(right(text, question.answer))
        if not marks[question.kind][-1]:
            wrong.append((question, text))
    return {kind: 100 * sum(m) / len(m) for kind, m in marks.items()}, wrong


def agreeing(first: Answer, second: Answer) -> Answer:
    """What `first` answers, once `second` has given the same; SystemExit where they differ."""

    def answer(asked: list[tuple[Sequence[Image.Image], str]]) -> list[str]:
        texts, others = first(asked), second(asked)
        differ = [i for i, (a, b) in enumerate(zip(texts, others, strict=True)) if a != b]
        if differ:
            i = differ[0]
            raise SystemExit(f"{len(differ)} answers differ; {asked[i][1]!r}: {texts[i]!r} and {others[i]!r}")
        return texts

    return answer


def mean(scores: dict[str, float], kinds: tuple[str, ...]) -> float:
    chosen = [scores[kind] for kind in kinds if kind in scores]
    return sum(chosen) / len(chosen) if chosen else float("nan")


def report(scores: dict[str, float], blank: dict[str, float], options: argparse.Namespace) -> dict[str, object]:
    return {
        "backend": options.backend if options.kv_dtype == "auto" else f"{options.backend}, {options.kv_dtype} KV",
        "per_kind": options.per_kind,
        "seed": options.seed,
        "scene_macro_average": round(mean(scores, SCENE_KINDS), 2),
        "scene_worst_kind": min((k for k in SCENE_KINDS if k in scores), key=lambda k: scores[k]),
        "handwritten_digits": round(scores["digit"], 2),
        "all_kinds_macro_average": round(mean(scores, KINDS), 2),
        "blank_picture_macro_average": round(mean(blank, KINDS), 2),
        "kinds": {kind: round(scores[kind], 2) for kind in KINDS if kind in scores},
        "blank_kinds": {kind: round(blank[kind], 2) for kind in KINDS if kind in blank},
    }


def table(result: dict) -> str:
    """The report as Markdown, for the model card."""
    lines = [
        f"{result['per_kind']} held-out questions of each kind; exact match, greedy decoding in float32 by "
        + (
            "transformers and by mm-core: every answer is the same."
            if result["backend"] == "both"
            else f"`{result['backend']}`."
        ),
        "",
        "| kind of question | right, % | blank picture, % |",
        "|---|---|---|",
    ]
    lines += [
        f"| {kind} | {value:.1f} | {result['blank_kinds'][kind]:.1f} |" for kind, value in result["kinds"].items()
    ]
    scenes = tuple(k for k in SCENE_KINDS if k in result["kinds"])
    lines += [
        f"| **scene kinds, macro-average ({len(scenes)})** | **{result['scene_macro_average']:.1f}** | "
        f"{mean(result['blank_kinds'], scenes):.1f} |",
        f"| **handwritten kinds ({len(DIGIT_KINDS)})** | **{mean(result['kinds'], DIGIT_KINDS):.1f}** | "
        f"{mean(result['blank_kinds'], DIGIT_KINDS):.1f} |",
        f"| **all kinds ({len(result['kinds'])})** | **{result['all_kinds_macro_average']:.1f}** | "
        f"**{result['blank_picture_macro_average']:.1f}** |",
        "",
    ]
    low = [f"{kind} ({value:.1f} %)" for kind, value in result["kinds"].items() if value < 85]
    lines.append("Kinds under 85 %: " + (", ".join(low) if low else "none") + ".")
    return "\n".join(lines)


def write_card(folder: Path, result: dict) -> None:
    """evaluation.json, and the table between the markers of README.md if that is there."""
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    card = folder / "README.md"
    if card.exists() and BEGIN in (text := card.read_text()):
        head, rest = text.split(BEGIN, 1)
        card.write_text(f"{head}{BEGIN}\n{table(result)}\n{END}{rest.split(END, 1)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--backend", choices=(*BACKENDS, "both"), default="transformers",
                        help="'both' scores mm-core too and fails unless every answer is the same")  # fmt: skip
    parser.add_argument("--kv-dtype", choices=("auto", "fp8"), default="auto",
                        help="how mm-core keeps keys and values; other than auto not with --write")  # fmt: skip
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--per-kind", type=int, default=250)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--write", action="store_true", help="write evaluation.json and the card's table")
    parser.add_argument("--wrong", type=int, default=0, help="print this many wrong answers")
    parser.add_argument("--export-samples", type=Path, help="only write a small frozen sample to this folder")
    parser.add_argument("--samples", type=Path, help="score a frozen sample instead")
    options = parser.parse_args()
    if options.kv_dtype != "auto" and (options.write or options.backend != "mm"):
        parser.error("--kv-dtype is an option of --backend mm, without --write")
    if options.export_samples:
        print(f"{export(options.export_samples)} bytes in {options.export_samples}")
        return
    begun = time.time()
    asked = load(options.samples) if options.samples else questions(options.per_kind, seed=options.seed)
    print(f"{len(asked)} questions in {time.time() - begun:.0f} s", flush=True)
    backends = {**BACKENDS, "mm": functools.partial(BACKENDS["mm"], kv_dtype=options.kv_dtype)}
    first = "transformers" if options.backend == "both" else options.backend
    answer = backends[first](options.checkpoint, options.device)
    if options.backend == "both":
        answer = agreeing(answer, backends["mm"](options.checkpoint, options.device))
    scores, wrong = score(answer, asked)
    blank, _ = score(answer, blanked(asked))
    result = report(scores, blank, options)
    for question, text in wrong[:: max(1, len(wrong) // options.wrong)] if options.wrong else ():
        print(f"{question.kind}: {question.question} -> {text!r}, truly {question.answer!r}")
    if options.write:
        write_card(options.checkpoint, result)
    print(table(result), f"\n{time.time() - begun:.0f} s")


if __name__ == "__main__":
    main()
