"""Themes: what a picture holds and where. A layout places things so that no two overlap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from .scenes import COLOURS, SHAPES, WORDS, Mark, Scene, Thing, print_mark, render, write_digit

CELL = 28
MIN_PIXELS = 84 * 84
MAX_PIXELS = 336 * 336
NAMES = tuple(COLOURS)
THEMES = ("shapes", "crowd", "text", "mixed", "digit")
THEME_WEIGHTS = (0.36, 0.13, 0.31, 0.10, 0.10)


@dataclass
class Picture:
    """A rendered picture with what it truly shows."""

    image: Image.Image
    scene: Scene


def pick(rng: np.random.Generator, values: tuple[str, ...] | list[str]) -> str:
    return values[int(rng.integers(len(values)))]


def _number(rng: np.random.Generator) -> str:
    digits = int(rng.choice(3, p=(0.3, 0.45, 0.25)))
    return str(int(rng.integers(*((0, 10), (10, 100), (100, 1000))[digits])))


def _free_spot(
    rng: np.random.Generator,
    scene: Scene,
    width: float,
    height: float,
    taken: list[tuple[float, float, float, float]],
) -> tuple[float, float] | None:
    """A centre where a box of this size fits inside the picture and overlaps nothing yet taken."""
    if width > scene.width or height > scene.height:
        return None
    for _ in range(25):
        x = rng.uniform(width / 2, scene.width - width / 2)
        y = rng.uniform(height / 2, scene.height - height / 2)
        if all(abs(x - a) > (width + w) / 2 + 1 or abs(y - b) > (height + h) / 2 + 1 for a, b, w, h in taken):
            return float(x), float(y)
    return None


def _add_things(rng: np.random.Generator, scene: Scene, kinds: list[tuple[str, str]], largest: float) -> None:
    taken = [(mark.x, mark.y, mark.width, mark.height) for mark in scene.marks]
    side = min(scene.width, scene.height)
    for shape, colour in kinds:
        low, high = 28.0, max(30.0, side * largest)
        size = float(rng.uniform(low, high))
        if rng.random() < 0.4:
            size = float(rng.choice([low, (low + high) / 2, high]))
        spot = _free_spot(rng, scene, size, size, taken)
        if spot is not None:
            scene.things.append(Thing(shape, colour, *spot, size))
            taken.append((*spot, size, size))


def _add_mark(rng: np.random.Generator, scene: Scene, mark: Mark | None) -> None:
    if mark is not None:
        taken = [(old.x, old.y, old.width, old.height) for old in scene.marks]
        spot = _free_spot(rng, scene, mark.width, mark.height, taken)
        if spot is not None:
            mark.x, mark.y = spot
            scene.marks.append(mark)


def _distinct(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Different (shape, colour) pairs; now and then one of the two repeats."""
    kinds: list[tuple[str, str]] = []
    while len(kinds) < count:
        kind = (pick(rng, SHAPES), pick(rng, NAMES))
        if kinds and rng.random() < 0.2:
            kind = (kinds[0][0], kind[1]) if rng.random() < 0.5 else (kind[0], kinds[0][1])
        if kind not in kinds:
            kinds.append(kind)
    return kinds


def _crowd(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Up to six things of few kinds, for counting."""
    shapes = [pick(rng, SHAPES) for _ in range(int(rng.integers(1, 4)))]
    colours = [pick(rng, NAMES) for _ in range(int(rng.integers(1, 4)))]
    return [(pick(rng, shapes), pick(rng, colours)) for _ in range(int(rng.integers(2, 7)))]


def _read(rng: np.random.Generator, scene: Scene, split: str, share: float) -> Mark | None:
    """A word or a number that fits the given share of the picture."""
    room = (scene.width * 0.96, scene.height * share)
    if rng.random() < 0.6:
        for _ in range(4):
            mark = print_mark(rng, pick(rng, WORDS), "word", room, split)
            if mark is not None:
                return mark
    return print_mark(rng, _number(rng), "number", room, split)


def lay_out(rng: np.random.Generator, theme: str, height: int, width: int, split: str) -> Scene:
    scene = Scene(width, height)
    cells = height * width / CELL**2
    if theme == "shapes":
        most = 1 if cells < 13 else 2 if cells < 20 else 3 if cells < 30 else 4
        count = int(rng.integers(0, most + 1)) if rng.random() < 0.2 else int(rng.integers(1, most + 1, 2).max())
        _add_things(rng, scene, _distinct(rng, count), 0.5 if count < 3 else 0.4)
    elif theme == "crowd":
        _add_things(rng, scene, _crowd(rng), 0.27)
    elif theme == "digit":
        _add_mark(rng, scene, write_digit(rng, min(height, width) * 0.92, split))
    else:
        _add_mark(rng, scene, _read(rng, scene, split, 0.9 if theme == "text" else 0.4))
        if theme == "text" and rng.random() < 0.25:
            _add_mark(rng, scene, _read(rng, scene, split, 0.4))
        if theme == "mixed":
            _add_things(rng, scene, _distinct(rng, int(rng.integers(1, 4))), 0.34)
    return scene


def picture(rng: np.random.Generator, theme: str, height: int, width: int, split: str) -> Picture:
    scene = lay_out(rng, theme, height, width, split)
    return Picture(render(rng, scene, split), scene)


def pair(
    rng: np.random.Generator, sizes: tuple[tuple[int, int], tuple[int, int]], split: str
) -> tuple[str, list[Picture]]:
    """Two pictures of one theme, which now and then agree in what is asked about; returns (theme, pictures)."""
    theme = ("shapes", "crowd", "text", "digit")[int(rng.choice(4, p=(0.36, 0.2, 0.26, 0.18)))]
    return theme, pair_of(rng, theme, sizes, split)


def pair_of(
    rng: np.random.Generator, theme: str, sizes: tuple[tuple[int, int], tuple[int, int]], split: str
) -> list[Picture]:
    first = lay_out(rng, theme, *sizes[0], split)
    second = lay_out(rng, theme, *sizes[1], split)
    if rng.random() < 0.5 and first.marks and theme == "text":
        room = (second.width * 0.96, second.height * 0.9)
        copy = print_mark(rng, first.marks[0].text, first.marks[0].kind, room, split)
        if copy is not None:
            second = Scene(second.width, second.height)
            _add_mark(rng, second, copy)
    if rng.random() < 0.4 and first.things and theme in ("shapes", "crowd"):
        kinds = [(thing.shape, thing.colour) for thing in first.things]
        if len(kinds) > 1 and rng.random() < 0.6:
            kinds = kinds[1:]
        extra = (pick(rng, SHAPES), pick(rng, NAMES))
        kinds = [*kinds, extra] if rng.random() < 0.6 and extra not in kinds else kinds
        second = Scene(second.width, second.height)
        _add_things(rng, second, kinds, 0.4 if len(kinds) < 4 else 0.27)
    return [Picture(render(rng, scene, split), scene) for scene in (first, second)]
