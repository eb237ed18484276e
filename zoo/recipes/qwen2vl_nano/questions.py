"""Questions in plain English with their true answers, drawn from what a picture is known to hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np

from .layouts import NAMES, Picture, pick
from .scenes import SHAPES, Mark, Scene, Thing

Answered = tuple[str, str] | None
SIDES = ("left of", "right of", "above", "below")
WHERE = {"left of": "left", "right of": "right", "above": "above", "below": "below"}


def plural(shape: str) -> str:
    return shape + ("es" if shape == "cross" else "s")


def unique(scene: Scene) -> list[Thing]:
    """Things whose colour and shape together occur once."""
    names = Counter(thing.name for thing in scene.things)
    return [thing for thing in scene.things if names[thing.name] == 1]


def refer(rng: np.random.Generator, scene: Scene, thing: Thing) -> str:
    """A name that fits this thing alone: 'red circle', or 'circle' where there is one circle."""
    alone = sum(other.shape == thing.shape for other in scene.things) == 1
    return thing.shape if alone and rng.random() < 0.3 else thing.name


def choose(rng: np.random.Generator, things: list[Thing]) -> Thing:
    return things[int(rng.integers(len(things)))]


def count(rng: np.random.Generator, scene: Scene) -> Answered:
    shape, colour = pick(rng, SHAPES), pick(rng, NAMES)
    if scene.things and rng.random() < 0.88:
        thing = choose(rng, scene.things)
        shape, colour = thing.shape, thing.colour
    style = rng.random()
    if style < 0.4:
        what, number = plural(shape), sum(t.shape == shape for t in scene.things)
    elif style < 0.6:
        what, number = (
            f"{colour} {plural(shape)}",
            sum((t.shape, t.colour) == (shape, colour) for t in scene.things),
        )
    elif style < 0.8:
        what, number = f"{colour} shapes", sum(t.colour == colour for t in scene.things)
    else:
        what, number = "shapes", len(scene.things)
    asked = pick(
        rng,
        (
            "How many {} are there?",
            "How many {} can you see?",
            "Count the {}.",
            "How many {} are in the picture?",
        ),
    )
    return asked.format(what), str(number)


def colour(rng: np.random.Generator, scene: Scene) -> Answered:
    shapes = Counter(thing.shape for thing in scene.things)
    lone = [thing for thing in scene.things if shapes[thing.shape] == 1]
    shape, answer = (lambda t: (t.shape, t.colour))(choose(rng, lone)) if lone else ("", "")
    if not lone or rng.random() < 0.06:
        absent = [name for name in SHAPES if name not in shapes]
        shape, answer = pick(rng, absent), "none"
    asked = pick(
        rng,
        (
            "What colour is the {}?",
            "Which colour is the {}?",
            "What is the colour of the {}?",
            "What color is the {}?",
        ),
    )
    return asked.format(shape), answer


def shape(rng: np.random.Generator, scene: Scene) -> Answered:
    colours = Counter(thing.colour for thing in scene.things)
    lone = [thing for thing in scene.things if colours[thing.colour] == 1]
    colour_name, answer = (lambda t: (t.colour, t.shape))(choose(rng, lone)) if lone else ("", "")
    if not lone or rng.random() < 0.06:
        absent = [name for name in NAMES if name not in colours]
        colour_name, answer = pick(rng, absent), "none"
    asked = pick(
        rng,
        ("What shape is {}?", "Which shape is {}?", "What shape is the {} thing?", "What is the {} shape?"),
    )
    return asked.format(colour_name), answer


def position(rng: np.random.Generator, scene: Scene) -> Answered:
    placed = [(thing, scene.zone(thing.x, thing.y)) for thing in unique(scene)]
    placed = [(thing, zone) for thing, zone in placed if zone]
    if not placed:
        return None
    thing, zone = placed[int(rng.integers(len(placed)))]
    asked = pick(
        rng,
        ("Where is the {}?", "Where in the picture is the {}?", "In which part of the picture is the {}?"),
    )
    return asked.format(refer(rng, scene, thing)), str(zone)


def biggest(rng: np.random.Generator, scene: Scene) -> Answered:
    things = sorted(scene.things, key=lambda thing: thing.size)
    if len(things) < 2 or len(unique(scene)) < len(things):
        return None
    large = things[-1].size > 1.25 * things[-2].size
    small = things[1].size > 1.25 * things[0].size
    if large and (not small or rng.random() < 0.5):
        return pick(
            rng, ("Which shape is the biggest?", "What is the largest shape?", "Which is the biggest thing?")
        ), things[-1].name
    if small:
        return pick(
            rng,
            ("Which shape is the smallest?", "What is the smallest shape?", "Which is the smallest thing?"),
        ), things[0].name
    return None


def _holds(side: str, thing: Thing, other: Thing, scene: Scene) -> bool | None:
    """Whether `thing` is on that side of `other`; None where it is too close to tell."""
    gap = (thing.x - other.x) if side in ("left of", "right of") else (thing.y - other.y)
    near = 0.12 * (scene.width if side in ("left of", "right of") else scene.height) + 6
    gap = -gap if side in ("left of", "above") else gap
    return None if abs(gap) < near else gap > 0


def relation_what(rng: np.random.Generator, scene: Scene) -> Answered:
    things = unique(scene)
    if len(things) < 3 or len(things) < len(scene.things):
        return None  # of two things, the answer would be the one that is not named
    options = []
    for anchor in things:
        for side in SIDES:
            held = [(thing, _holds(side, thing, anchor, scene)) for thing in things if thing is not anchor]
            if sum(value is True for _, value in held) == 1 and all(value is not None for _, value in held):
                options.append((anchor, side, next(thing for thing, value in held if value)))
    if not options:
        return None
    anchor, side, answer = options[int(rng.integers(len(options)))]
    side = side if side in ("above", "below") or rng.random() < 0.5 else "to the " + side
    asked = pick(rng, ("What is {} the {}?", "Which shape is {} the {}?", "What can you see {} the {}?"))
    return asked.format(side, refer(rng, scene, anchor)), answer.name


def relation_where(rng: np.random.Generator, scene: Scene) -> Answered:
    things = unique(scene)
    if len(things) < 2:
        return None
    first, second = (things[int(i)] for i in rng.choice(len(things), 2, replace=False))
    dx, dy = first.x - second.x, first.y - second.y
    if max(abs(dx), abs(dy)) < 1.6 * min(abs(dx), abs(dy)):
        return None
    answer = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
    asked = pick(
        rng,
        (
            "Where is the {} relative to the {}?",
            "On which side of the {1} is the {0}?",
            "Where is the {} seen from the {}?",
        ),
    )
    asked = asked.replace("{}", "{0}", 1).replace("{}", "{1}", 1)
    return asked.format(refer(rng, scene, first), refer(rng, scene, second)), answer


def relation_yes_no(rng: np.random.Generator, scene: Scene) -> Answered:
    things = unique(scene)
    if len(things) < 2:
        return None
    first, second = (things[int(i)] for i in rng.choice(len(things), 2, replace=False))
    side = pick(rng, SIDES)
    held = _holds(side, first, second, scene)
    if held is None:
        return None
    asked = pick(rng, ("Is the {} {} the {}?", "Is the {} {} the {} in the picture?"))
    return asked.format(refer(rng, scene, first), side, refer(rng, scene, second)), "yes" if held else "no"


def exists(rng: np.random.Generator, scene: Scene) -> Answered:
    shape_name, colour_name = pick(rng, SHAPES), pick(rng, NAMES)
    if scene.things and rng.random() < 0.75:
        thing = choose(rng, scene.things)
        shape_name, colour_name = thing.shape, thing.colour
        swap = rng.random()
        shape_name = pick(rng, SHAPES) if swap < 0.3 else shape_name
        colour_name = pick(rng, NAMES) if 0.3 <= swap < 0.5 else colour_name
    if rng.random() < 0.3:
        what, held = shape_name, any(t.shape == shape_name for t in scene.things)
    else:
        what, held = (
            f"{colour_name} {shape_name}",
            any((t.shape, t.colour) == (shape_name, colour_name) for t in scene.things),
        )
    what = ("an " if what[0] in "aeiou" else "a ") + what
    asked = pick(rng, ("Is there {}?", "Can you see {}?", "Is there {} in the picture?", "Does the picture show {}?"))
    return asked.format(what), "yes" if held else "no"


def listing(rng: np.random.Generator, scene: Scene) -> Answered:
    things = sorted(scene.things, key=lambda thing: thing.x)
    if len(things) > 4 or scene.marks:
        return None
    if any(b.x - a.x < 0.06 * scene.width + 2 for a, b in pairwise(things)):
        return None
    asked = pick(
        rng,
        (
            "List the shapes from left to right.",
            "What is in the picture?",
            "Describe the picture.",
            "Name every shape, from left to right.",
        ),
    )
    return asked, ", ".join(thing.name for thing in things) or "nothing"


def _reading(rng: np.random.Generator, scene: Scene, kind: str, asked: tuple[str, ...]) -> Answered:
    mark = scene.mark(kind)
    return None if mark is None else (pick(rng, asked), mark.text)


def word(rng: np.random.Generator, scene: Scene) -> Answered:
    words = sorted((mark for mark in scene.marks if mark.kind == "word"), key=lambda mark: mark.y)
    if len(words) == 2 and words[1].y - words[0].y > 0.12 * scene.height:
        which = int(rng.integers(2))
        asked = pick(rng, ("What is the {} word?", "Read the {} word.", "What does the {} word say?"))
        return asked.format(("upper", "lower")[which]), words[which].text
    return _reading(
        rng,
        scene,
        "word",
        (
            "What word is written?",
            "What word is this?",
            "Read the word.",
            "Which word is printed in the picture?",
            "What does the picture say?",
        ),
    )


def number(rng: np.random.Generator, scene: Scene) -> Answered:
    return _reading(
        rng,
        scene,
        "number",
        (
            "What number is written?",
            "What number is this?",
            "Read the number.",
            "Which number is printed in the picture?",
        ),
    )


def digit(rng: np.random.Generator, scene: Scene) -> Answered:
    return _reading(
        rng,
        scene,
        "digit",
        (
            "Which digit is this?",
            "What digit is written by hand?",
            "Which handwritten digit is this?",
            "Read the handwritten digit.",
        ),
    )


def ink(rng: np.random.Generator, scene: Scene) -> Answered:
    marks = [mark for kind in ("word", "number", "digit") if (mark := scene.mark(kind))]
    if not marks:
        return None
    mark: Mark = marks[int(rng.integers(len(marks)))]
    asked = pick(rng, ("What colour is the {}?", "In which colour is the {} written?", "What is the colour of the {}?"))
    return asked.format(mark.kind), mark.colour


SINGLE: dict[str, Callable[[np.random.Generator, Scene], Answered]] = {
    "count": count, "colour": colour, "shape": shape, "position": position, "biggest": biggest,
    "relation_what": relation_what, "relation_where": relation_where, "relation_yes_no": relation_yes_no,
    "exists": exists, "list": listing, "word": word, "number": number, "ink": ink, "digit": digit,
}  # fmt: skip


def ask(rng: np.random.Generator, kind: str, pictures: list[Picture]) -> Answered:
    """One question of a kind about one picture or two, or None where the pictures do not allow it."""
    from .pair_questions import PAIR

    if len(pictures) == 1:
        return SINGLE[kind](rng, pictures[0].scene)
    return PAIR[kind](rng, pictures[0].scene, pictures[1].scene)


def vary(rng: np.random.Generator, question: str) -> str:
    """People type carelessly: sometimes no capital, sometimes no question mark."""
    if rng.random() < 0.12:
        question = question[0].lower() + question[1:]
    return question[:-1] if rng.random() < 0.08 else question
