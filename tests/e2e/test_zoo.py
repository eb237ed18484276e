"""The model that sees: the zoo checkpoint answers frozen held-out questions truthfully.

A change that breaks vision shows here as wrong answers, not only as other tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.forced import log_probabilities
from support.reference import Reference

from mm_core import Engine, KvCacheConfig, SamplingParams, TextPrompt

ZOO = Path(__file__).parents[2] / "zoo" / "qwen2vl-nano"
SAMPLES = ZOO / "samples"
GREEDY = SamplingParams(max_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.from_pretrained(ZOO, kv_cache_config=KvCacheConfig(num_blocks=1024), show_progress=False) as made:
        yield made


@pytest.fixture(scope="module")
def asked() -> list[dict[str, Any]]:
    rows = json.loads((SAMPLES / "questions.json").read_text(encoding="utf-8"))
    assert len(rows) >= 60
    return rows


def pictures(row: dict[str, Any]) -> list[Image.Image]:
    return [Image.open(SAMPLES / name).convert("RGB") for name in row["images"]]


def answers(engine: Engine, rows: list[dict[str, Any]], images: list[list[Image.Image]]) -> list[str]:
    prompts = [
        TextPrompt(prompt=row["question"], multi_modal_data={"image": shown})
        for row, shown in zip(rows, images, strict=True)
    ]
    return [output.text for output in engine.generate(prompts, GREEDY)]


def right(rows: list[dict[str, Any]], texts: list[str]) -> float:
    return sum(t.strip().lower() == r["answer"].lower() for r, t in zip(rows, texts, strict=True)) / len(rows)


def test_it_answers_truthfully(engine: Engine, asked: list[dict[str, Any]]) -> None:
    assert right(asked, answers(engine, asked, [pictures(row) for row in asked])) >= 0.92


def test_an_fp8_kv_cache_loses_no_answer_and_little_certainty(engine: Engine, asked: list[dict[str, Any]]) -> None:
    """The whole held-out set is scored by tests/bench/fp8_accuracy.py."""
    rows = asked[::3]
    prompts = [TextPrompt(prompt=r["question"], multi_modal_data={"image": pictures(r)}) for r in rows]
    exact = engine.generate(prompts, GREEDY)
    kv = KvCacheConfig(num_blocks=1024, dtype="fp8")
    with Engine.from_pretrained(ZOO, kv_cache_config=kv, show_progress=False) as other:
        found = other.generate(prompts, GREEDY)
        told = [log_probabilities(e, prompts, [o.token_ids for o in exact]) for e in (engine, other)]
    assert right(rows, [o.text for o in found]) >= right(rows, [o.text for o in exact]) >= 0.92
    apart = (told[1] - told[0]).abs()
    assert 0 < apart.mean() < 0.02
    assert apart.max() < 0.5


def test_the_accuracy_with_an_fp8_kv_cache_that_is_told_keeps_to_its_limit() -> None:
    told = json.loads((ZOO.parents[1] / "docs/benchmarks/fp8-accuracy.json").read_text(encoding="utf-8"))
    held_out = told["zoo/qwen2vl-nano, held out"]
    assert held_out["questions"] >= 4000
    assert abs(held_out["right, %"]["fp8"] - held_out["right, %"]["auto"]) <= 0.5


def test_it_looks_and_does_not_guess(engine: Engine, asked: list[dict[str, Any]]) -> None:
    blank = [[Image.new("RGB", image.size, (127, 127, 127)) for image in pictures(row)] for row in asked]
    assert right(asked, answers(engine, asked, blank)) <= 0.4


def test_pictures_swapped_between_questions_change_answers(engine: Engine, asked: list[dict[str, Any]]) -> None:
    """Each question with the next question's picture: most answers are no longer the true ones."""
    singles = [row for row in asked if len(row["images"]) == 1]
    shown = [pictures(row) for row in singles]
    assert right(singles, answers(engine, singles, [*shown[1:], shown[0]])) <= 0.5


def test_transformers_gives_the_same_answers(engine: Engine, asked: list[dict[str, Any]]) -> None:
    rows = asked[::4]
    reference = Reference(ZOO)
    texts = answers(engine, rows, [pictures(row) for row in rows])
    for row, text in zip(rows, texts, strict=True):
        content = [*({"type": "image"} for _ in row["images"]), {"type": "text", "text": row["question"]}]
        prompt = reference.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        wanted = reference.generate(prompt, pictures(row), max_tokens=24)
        assert text == reference.tokenizer.decode(wanted.token_ids, skip_special_tokens=True)


def test_the_card_tells_what_was_measured() -> None:
    """evaluation.json is the recipe's own output; the card's table holds its figures and its goals hold."""
    result = json.loads((ZOO / "evaluation.json").read_text(encoding="utf-8"))
    card = (ZOO / "README.md").read_text(encoding="utf-8")
    for kind, value in result["kinds"].items():
        assert f"| {kind} | {value:.1f} | {result['blank_kinds'][kind]:.1f} |" in card
    assert result["backend"] == "both"
    assert result["scene_macro_average"] >= 95
    assert result["handwritten_digits"] >= 90
    assert result["blank_picture_macro_average"] <= 40
    assert (ZOO / "model.safetensors").stat().st_size <= 12 * 2**20
