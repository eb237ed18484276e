"""The held-out questions: fonts, backgrounds and handwriting never trained on; the same for everybody, by seed."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .layouts import Picture, pair_of, picture
from .pair_questions import PAIR
from .questions import SINGLE, ask

SCENE_KINDS = (
    *(kind for kind in SINGLE if kind != "digit"),
    *(kind for kind in PAIR if kind != "pair_digit"),
)
DIGIT_KINDS = ("digit", "pair_digit")
KINDS = (*SINGLE, *PAIR)
SEED = 20_000
# The largest share of a kind's questions that one answer may have, so that guessing scores low.
CAPS = {
    "count": 0.2, "colour": 0.13, "shape": 0.16, "position": 0.14, "relation_where": 0.26, "relation_yes_no": 0.5,
    "exists": 0.5, "digit": 0.12, "ink": 0.13, "pair_more": 0.36, "pair_same": 0.5, "pair_digit": 0.12,
    "pair_colour": 0.13, "pair_count": 0.3, "pair_only": 0.14,
}  # fmt: skip
THEMES = {
    "count": ("crowd", "crowd", "shapes"), "word": ("text", "text", "mixed"), "number": ("text", "text", "mixed"),
    "ink": ("text", "mixed", "digit"), "digit": ("digit",), "exists": ("shapes", "shapes", "crowd"),
    "pair_more": ("crowd", "shapes"), "pair_same": ("text", "digit", "shapes"), "pair_read": ("text",),
    "pair_digit": ("digit",), "pair_count": ("crowd", "shapes"),
}  # fmt: skip


@dataclass(frozen=True)
class Question:
    kind: str
    images: tuple[Image.Image, ...]
    question: str
    answer: str


def _size(rng: np.random.Generator, theme: str, most: int) -> tuple[int, int]:
    while True:
        height, width = int(rng.integers(84, most + 1)), int(rng.integers(84, most + 1))
        if max(height, width) <= 2.5 * min(height, width) and (width >= 140 or theme not in ("text", "mixed")):
            return height, width


def _pictures(rng: np.random.Generator, kind: str) -> list[Picture]:
    themes = THEMES.get(kind, ("shapes",))
    theme = themes[int(rng.integers(len(themes)))]
    if kind in SINGLE:
        return [picture(rng, theme, *_size(rng, theme, 336), "heldout")]
    return pair_of(rng, theme, (_size(rng, theme, 224), _size(rng, theme, 224)), "heldout")


def questions(per_kind: int, kinds: tuple[str, ...] = KINDS, seed: int = SEED) -> list[Question]:
    found = []
    for kind in kinds:
        rng = np.random.default_rng([seed, KINDS.index(kind)])
        answers: Counter[str] = Counter()
        most = math.ceil(per_kind * CAPS.get(kind, 1.0))
        rare = math.ceil(per_kind * 0.04)  # 'none' and 'nothing': true, but easy
        while answers.total() < per_kind:
            pictures = _pictures(rng, kind)
            asked = ask(rng, kind, pictures)
            if asked is None or answers[asked[1]] >= (rare if asked[1] in ("none", "nothing") else most):
                continue
            answers[asked[1]] += 1
            found.append(Question(kind, tuple(shown.image for shown in pictures), *asked))
    return found


def blanked(asked: list[Question], seed: int = SEED) -> list[Question]:
    """The same questions about pictures of the same size that show nothing but one colour."""
    rng = np.random.default_rng([seed, 99])
    blanks = []
    for q in asked:
        colours = [tuple(rng.integers(60, 236, 3).tolist()) for _ in q.images]
        images = tuple(Image.new("RGB", i.size, c) for i, c in zip(q.images, colours, strict=True))
        blanks.append(Question(q.kind, images, q.question, q.answer))
    return blanks


def right(given: str, wanted: str) -> bool:
    """Equal but for case, spaces around and a final full stop."""
    return re.sub(r"\s+", " ", given).strip().rstrip(".").lower() == wanted.lower()


def export(folder: Path, per_kind: int = 3, seed: int = SEED + 1) -> int:
    """Write a small frozen sample: pictures as JPEG, and questions.json. Returns the number of bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, asked in enumerate(questions(per_kind, seed=seed)):
        names = []
        for part, image in enumerate(asked.images):
            name = f"{index:02d}-{asked.kind}{'ab'[part] if len(asked.images) > 1 else ''}.jpg"
            image.save(folder / name, quality=90)
            names.append(name)
        rows.append({"kind": asked.kind, "images": names, "question": asked.question, "answer": asked.answer})
    (folder / "questions.json").write_text(json.dumps(rows, indent=1) + "\n")
    return sum(path.stat().st_size for path in folder.iterdir())


def load(folder: Path) -> list[Question]:
    """A frozen sample, read back."""
    rows = json.loads((folder / "questions.json").read_text())
    return [
        Question(
            r["kind"],
            tuple(Image.open(folder / n).convert("RGB") for n in r["images"]),
            r["question"],
            r["answer"],
        )
        for r in rows
    ]
