"""Backgrounds: a scalar field in [0, 1] over the picture, coloured by a ramp between two colours."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

Field = np.ndarray
Colour = tuple[int, int, int]


@lru_cache(maxsize=256)
def _axes(height: int, width: int) -> tuple[Field, Field]:
    ys = np.arange(height, dtype=np.float32)[:, None]
    xs = np.arange(width, dtype=np.float32)[None, :]
    return ys, xs


def plain(rng: np.random.Generator, height: int, width: int) -> Field:
    return np.zeros((height, width), np.float32)


def gradient(rng: np.random.Generator, height: int, width: int) -> Field:
    ys, xs = _axes(height, width)
    angle = rng.uniform(0, 2 * np.pi)
    field = xs * np.float32(np.cos(angle)) + ys * np.float32(np.sin(angle))
    low, high = float(field.min()), float(field.max())
    return (field - low) / max(high - low, 1.0)


def radial(rng: np.random.Generator, height: int, width: int) -> Field:
    ys, xs = _axes(height, width)
    y0, x0 = rng.uniform(0, height), rng.uniform(0, width)
    return np.clip(np.hypot(ys - y0, xs - x0) / np.float32(0.9 * max(height, width)), 0, 1)


def stripes(rng: np.random.Generator, height: int, width: int) -> Field:
    ys, xs = _axes(height, width)
    angle = rng.choice([0.0, np.pi / 2, np.pi / 4, -np.pi / 4])
    period = rng.uniform(10, 44)
    phase = (xs * np.float32(np.cos(angle)) + ys * np.float32(np.sin(angle))) / np.float32(period)
    return ((phase + np.float32(rng.uniform())) % 1 > rng.uniform(0.3, 0.7)).astype(np.float32)


def checker(rng: np.random.Generator, height: int, width: int) -> Field:
    ys, xs = _axes(height, width)
    cell = rng.uniform(9, 36)
    return ((np.floor(ys / cell) + np.floor(xs / cell)) % 2).astype(np.float32)


def dots(rng: np.random.Generator, height: int, width: int) -> Field:
    ys, xs = _axes(height, width)
    cell = rng.uniform(12, 32)
    return (np.hypot(ys % cell - cell / 2, xs % cell - cell / 2) < cell * rng.uniform(0.15, 0.35)).astype(np.float32)


def grain(rng: np.random.Generator, height: int, width: int) -> Field:
    return rng.random((height, width), dtype=np.float32)


def blobs(rng: np.random.Generator, height: int, width: int) -> Field:
    coarse = rng.random((int(rng.integers(3, 9)), int(rng.integers(3, 9))), dtype=np.float32)
    return _stretch(coarse, height, width)


def scratches(rng: np.random.Generator, height: int, width: int) -> Field:
    thin = rng.random((1, width) if rng.random() < 0.5 else (height, 1), dtype=np.float32)
    return np.broadcast_to(thin, (height, width)) * np.float32(rng.uniform(0.4, 1))


def waves(rng: np.random.Generator, height: int, width: int) -> Field:
    ys, xs = _axes(height, width)
    if rng.random() < 0.5:
        ys, xs = xs, ys
    bend = rng.uniform(3, 9) * np.sin(xs / np.float32(rng.uniform(8, 20)))
    return 0.5 + 0.5 * np.sin((ys + bend) / np.float32(rng.uniform(4, 10)))


def rings(rng: np.random.Generator, height: int, width: int) -> Field:
    ys, xs = _axes(height, width)
    distance = np.hypot(ys - rng.uniform(0, height), xs - rng.uniform(0, width))
    return (distance / np.float32(rng.uniform(14, 36)) % 1 > 0.5).astype(np.float32)


def bricks(rng: np.random.Generator, height: int, width: int) -> Field:
    ys, xs = _axes(height, width)
    tall, wide = rng.uniform(12, 22), rng.uniform(24, 48)
    row = np.floor(ys / tall)
    joint = (ys % tall < 2) | ((xs + row % 2 * wide / 2) % wide < 2)
    return joint.astype(np.float32)


def plaid(rng: np.random.Generator, height: int, width: int) -> Field:
    ys, xs = _axes(height, width)
    period = rng.uniform(16, 44)
    return 0.5 * (ys % period > period / 2) + 0.5 * (xs % period > period / 2)


def _stretch(coarse: Field, height: int, width: int) -> Field:
    """Bilinear interpolation of a small grid to the picture's size."""
    rows = np.linspace(0, coarse.shape[0] - 1, height, dtype=np.float32)
    cols = np.linspace(0, coarse.shape[1] - 1, width, dtype=np.float32)
    top = np.minimum(rows.astype(np.int32), coarse.shape[0] - 2)
    left = np.minimum(cols.astype(np.int32), coarse.shape[1] - 2)
    dy, dx = (rows - top)[:, None], cols - left
    tall = coarse[top] * (1 - dy) + coarse[top + 1] * dy
    return tall[:, left] * (1 - dx) + tall[:, left + 1] * dx


BACKGROUNDS: dict[str, tuple[Callable[[np.random.Generator, int, int], Field], ...]] = {
    "train": (plain, plain, gradient, radial, stripes, checker, dots, grain, blobs, scratches, rings),
    "heldout": (waves, bricks, plaid),
}


def ramp_colours(rng: np.random.Generator, inks: list[Colour], contrast: float = 105.0) -> tuple[Colour, Colour]:
    """Two background colours that every ink stands out from (the best found, should none be good enough)."""
    best, best_distance = (235, 235, 235), -1.0
    for _ in range(24):
        pale = rng.random() < 0.6
        level = rng.uniform(150, 250) if pale else rng.uniform(10, 130)
        colour = np.clip(level + rng.uniform(-38, 38, 3), 0, 255)
        distance = min((float(np.linalg.norm(colour - np.array(ink))) for ink in inks), default=999.0)
        if distance > best_distance:
            best, best_distance = (int(colour[0]), int(colour[1]), int(colour[2])), distance
        if best_distance > contrast:
            break
    other = best
    for _ in range(12):
        second = np.clip(np.array(best) + rng.uniform(-55, 55, 3), 0, 255)
        distance = min((float(np.linalg.norm(second - np.array(ink))) for ink in inks), default=999.0)
        if distance > min(contrast, best_distance) * 0.9:
            other = (int(second[0]), int(second[1]), int(second[2]))
            break
    return best, other


def paint(rng: np.random.Generator, height: int, width: int, inks: list[Colour], split: str) -> np.ndarray:
    """An RGB background, uint8 [height, width, 3]."""
    makers = BACKGROUNDS[split]
    field = makers[int(rng.integers(len(makers)))](rng, height, width)
    first, second = ramp_colours(rng, inks)
    steps = np.linspace(0, 1, 256, dtype=np.float32)[:, None]
    ramp = np.array(first, np.float32) * (1 - steps) + np.array(second, np.float32) * steps
    return ramp.astype(np.uint8)[(field * 255).astype(np.uint8)]
