"""Questions about two pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from .layouts import NAMES, pick
from .questions import Answered, choose, plural
from .scenes import SHAPES, Scene

ORDER = ("first", "second")


def more(rng: np.random.Generator, first: Scene, second: Scene) -> Answered:
    things = [*first.things, *second.things]
    if not things:
        return None
    thing = choose(rng, things)
    style = rng.random()
    if style < 0.45:
        what, counts = (
            plural(thing.shape),
            [sum(t.shape == thing.shape for t in s.things) for s in (first, second)],
        )
    elif style < 0.7:
        what = f"{thing.colour} shapes"
        counts = [sum(t.colour == thing.colour for t in s.things) for s in (first, second)]
    else:
        what, counts = "shapes", [len(first.things), len(second.things)]
    asked = pick(
        rng,
        (
            "Which image has more {}?",
            "Which picture has more {}?",
            "Where are there more {}, in the first or the second image?",
        ),
    )
    return asked.format(what), "same" if counts[0] == counts[1] else ORDER[counts[1] > counts[0]]


def same(rng: np.random.Generator, first: Scene, second: Scene) -> Answered:
    for kind in ("word", "number", "digit"):
        one, two = first.mark(kind), second.mark(kind)
        if one and two:
            asked = pick(rng, ("Is it the same {} in both images?", "Do both pictures show the same {}?"))
            return asked.format(kind), "yes" if one.text == two.text else "no"
    if len(first.things) == 1 and len(second.things) == 1:
        kind = pick(rng, ("shape", "colour"))
        asked = pick(rng, ("Is it the same {} in both images?", "Do both pictures show the same {}?"))
        return asked.format(kind), "yes" if getattr(first.things[0], kind) == getattr(second.things[0], kind) else "no"
    return None


def read(rng: np.random.Generator, first: Scene, second: Scene) -> Answered:
    which = int(rng.integers(2))
    for kind in ("word", "number"):
        mark = (first, second)[which].mark(kind)
        if mark:
            asked = pick(
                rng,
                (
                    "What {0} is in the {1} image?",
                    "Read the {0} in the {1} picture.",
                    "Which {0} does the {1} image show?",
                ),
            )
            return asked.format(kind, ORDER[which]), mark.text
    return None


def digit(rng: np.random.Generator, first: Scene, second: Scene) -> Answered:
    which = int(rng.integers(2))
    mark = (first, second)[which].mark("digit")
    if not mark:
        return None
    asked = pick(rng, ("What digit is in the {} image?", "Which digit does the {} picture show?"))
    return asked.format(ORDER[which]), mark.text


def colour(rng: np.random.Generator, first: Scene, second: Scene) -> Answered:
    which = int(rng.integers(2))
    scene = (first, second)[which]
    shapes = Counter(thing.shape for thing in scene.things)
    lone = [thing for thing in scene.things if shapes[thing.shape] == 1]
    if not lone:
        return None
    thing = choose(rng, lone)
    asked = pick(rng, ("What colour is the {} in the {} image?", "Which colour is the {} in the {} picture?"))
    return asked.format(thing.shape, ORDER[which]), thing.colour


def count(rng: np.random.Generator, first: Scene, second: Scene) -> Answered:
    which = int(rng.integers(2))
    scene = (first, second)[which]
    shape = choose(rng, scene.things).shape if scene.things and rng.random() < 0.85 else pick(rng, SHAPES)
    what, number = plural(shape), sum(thing.shape == shape for thing in scene.things)
    if rng.random() < 0.35:
        what, number = "shapes", len(scene.things)
    asked = pick(rng, ("How many {} are in the {} image?", "Count the {} in the {} picture."))
    return asked.format(what, ORDER[which]), str(number)


def only(rng: np.random.Generator, first: Scene, second: Scene) -> Answered:
    which = int(rng.integers(2))
    here, there = (first, second) if which == 0 else (second, first)
    what, names = ("shape", SHAPES) if rng.random() < 0.6 else ("colour", NAMES)
    mine = {getattr(thing, what) for thing in here.things}
    others = {getattr(thing, what) for thing in there.things}
    lone = [name for name in names if name in mine - others]
    if len(lone) != 1:
        return None
    asked = pick(rng, ("Which {} is only in the {} image?", "What {} is in the {} image but not in the other?"))
    return asked.format(what, ORDER[which]), lone[0]


PAIR: dict[str, Callable[[np.random.Generator, Scene, Scene], Answered]] = {
    "pair_more": more, "pair_same": same, "pair_read": read, "pair_digit": digit, "pair_colour": colour,
    "pair_count": count, "pair_only": only,
}  # fmt: skip
