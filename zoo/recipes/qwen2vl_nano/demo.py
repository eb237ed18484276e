"""The pictures of `make demo`: held-out fonts, backgrounds and handwriting, noise and JPEG artefacts included.

`python -m qwen2vl_nano.demo FOLDER` writes them with demo.json: pictures, questions and true answers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from .layouts import Picture, pair_of, picture
from .pair_questions import PAIR
from .questions import SINGLE, ask

# name, theme, sizes (height, width) of its pictures, kinds to ask, seed
DEMOS = (
    ("scene", "shapes", ((280, 336),), ("list", "relation_what", "position", "colour"), 1),
    ("crowd", "crowd", ((308, 308),), ("count", "exists"), 2),
    ("word", "text", ((168, 308),), ("word", "ink"), 3),
    ("digit", "digit", ((224, 224),), ("digit", "ink"), 4),
    ("pair", "shapes", ((196, 224), (196, 224)), ("pair_more", "pair_only", "pair_colour"), 5),
)


def make(
    theme: str, sizes: tuple[tuple[int, int], ...], kinds: tuple[str, ...], seed: int
) -> tuple[list[Picture], list[tuple[str, str]]]:
    """Pictures that allow every kind of question, and those questions."""
    rng = np.random.default_rng([seed, 77])
    while True:
        pictures = (
            [picture(rng, theme, *sizes[0], "heldout")]
            if len(sizes) == 1
            else pair_of(rng, theme, (sizes[0], sizes[1]), "heldout")
        )
        asked = [ask(rng, kind, pictures) for kind in kinds]
        busy = theme not in ("shapes", "crowd") or all(len(p.scene.things) >= 3 for p in pictures)
        if busy and all(one is not None and one[1] != "none" for one in asked):
            return pictures, [one for one in asked if one]


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, theme, sizes, kinds, seed in DEMOS:
        assert all(kind in (*SINGLE, *PAIR) for kind in kinds)
        pictures, asked = make(theme, sizes, kinds, seed)
        files = [name + ("-" + "ab"[i] if len(pictures) > 1 else "") + ".jpg" for i in range(len(pictures))]
        for file, shown in zip(files, pictures, strict=True):
            shown.image.save(folder / file, quality=75)
        rows += [{"images": files, "question": question, "answer": answer} for question, answer in asked]
    (folder / "demo.json").write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
