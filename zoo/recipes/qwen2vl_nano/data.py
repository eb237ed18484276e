"""Training data made on the fly: worker processes paint shards of pictures and pack questions about them.

A shard's pictures have one grid, so that a batch needs no padding. Shards travel through shared memory.
"""

from __future__ import annotations

import mmap
import multiprocessing as mp
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .layouts import CELL, THEME_WEIGHTS, THEMES, Picture, pair, picture
from .preprocess import resize, smart_resize
from .questions import ask, vary

Grid = tuple[int, int]
Key = tuple[Grid, ...]
SINGLES, PAIRS = 64, 48  # rows of a shard
ROUNDS = 3  # packs of questions for each picture
TURNS = {1: 128, 2: 96}  # tokens of a pack, by the number of pictures
SLOT_BYTES = 40 << 20
WEIGHTS = {
    "shapes": {"count": 0.8, "colour": 0.7, "shape": 0.9, "position": 2.0, "biggest": 1, "relation_what": 2.5,
               "relation_where": 3, "relation_yes_no": 2.5, "exists": 0.7, "list": 1.2},
    "crowd": {"count": 5.0, "colour": 0.5, "shape": 0.5, "exists": 0.6, "list": 0.3, "biggest": 0.4},
    "text": {"word": 4.0, "number": 4, "ink": 1, "count": 0.04, "exists": 0.04, "colour": 0.04, "shape": 0.04},
    "mixed": {"word": 3.0, "number": 3, "ink": 1, "colour": 0.5, "shape": 0.5, "position": 0.5, "count": 0.5,
              "relation_what": 0.5, "exists": 0.3},
    "digit": {"digit": 4.0, "ink": 1, "exists": 0.1, "count": 0.1},
    "pair": {"pair_more": 1.5, "pair_same": 1.2, "pair_read": 1.5, "pair_digit": 1.2, "pair_colour": 1,
             "pair_count": 1, "pair_only": 2},
}  # fmt: skip


def single_grids() -> list[Grid]:
    """Forty-eight of the grids, by lot, and always the corners: the network never sees a batch of the others."""
    sides = range(3, 13)
    every = [(h, w) for h in sides for w in sides if max(h, w) / min(h, w) <= 2.7]
    chosen = np.random.default_rng(12).permutation(len(every))[:45]
    return sorted({*(every[int(i)] for i in chosen), (3, 3), (12, 12), (8, 8)})


def pair_grids() -> list[Key]:
    rng = np.random.default_rng(11)
    small = [(h, w) for h in range(3, 9) for w in range(3, 9) if h * w <= 56 and max(h, w) <= 2.5 * min(h, w)]
    return [(small[int(rng.integers(len(small)))], small[int(rng.integers(len(small)))]) for _ in range(24)]


class Packer:
    """Turns questions and answers into one row of token ids, with segments, positions and what is scored."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.encode = lru_cache(maxsize=200_000)(
            lambda text: tuple(tokenizer.encode(text, add_special_tokens=False).ids)
        )
        self.pad = tokenizer.token_to_id("<|endoftext|>")

    def turn(self, question: str, answer: str, follows: bool) -> tuple[list[int], int]:
        """Token ids of a turn and how many of them come before the answer."""
        head = (*(self.encode("\n<|im_start|>user\n") if follows else ()), *self.encode(question))
        head = (*head, *self.encode("<|im_end|>\n<|im_start|>assistant\n"))
        return [*head, *self.encode(answer), *self.encode("<|im_end|>")], len(head)

    def pack(
        self, rng: np.random.Generator, pictures: list[Picture], weights: dict[str, float], room: int
    ) -> np.ndarray:
        """int16 [4, room]: tokens, segment, position, scored."""
        row = np.zeros((4, room), np.int16)
        row[0] = self.pad
        chatty = rng.random() < 0.12
        kinds, odds = list(weights), np.array(list(weights.values()))
        start = segment = position = misses = 0
        for kind in rng.choice(len(kinds), 24, p=odds / odds.sum()):
            asked = ask(rng, kinds[kind], pictures)
            if asked is None:
                continue
            follows = chatty and segment > 0 and rng.random() < 0.6
            ids, before = self.turn(vary(rng, asked[0]), asked[1], follows)
            if start + len(ids) > room:
                misses += 1
                if misses > 2:
                    break
                continue
            if not follows:
                segment, position = segment + 1, 0
            end = start + len(ids)
            row[0, start:end], row[1, start:end] = ids, segment
            row[2, start:end] = np.arange(position, position + len(ids))
            row[3, start + before : end] = 1
            start, position = end, position + len(ids)
        return row


def original_size(rng: np.random.Generator, grid: Grid) -> Grid:
    """A picture size that smart resize brings to this grid; now and then a large one that is shrunk."""
    goal = (grid[0] * CELL, grid[1] * CELL)
    scale = rng.uniform(1.1, 2.0) if grid[0] * grid[1] > 110 and rng.random() < 0.3 else 1.0
    for _ in range(6):
        height, width = (int(side * scale + rng.uniform(-13, 14)) for side in goal)
        if smart_resize(height, width) == goal:
            return height, width
        scale = 1.0
    return goal


@dataclass
class Shard:
    """What a worker made: pixels [rows, H, W, 3] per picture, and packs [ROUNDS, rows, 4, tokens]."""

    key: Key
    pixels: list[np.ndarray]
    packs: np.ndarray


def make_shard(rng: np.random.Generator, key: Key, packer: Packer) -> Shard:
    rows = SINGLES if len(key) == 1 else PAIRS
    pixels = [np.empty((rows, h * CELL, w * CELL, 3), np.uint8) for h, w in key]
    packs = np.empty((ROUNDS, rows, 4, TURNS[len(key)]), np.int16)
    for row in range(rows):
        sizes = [original_size(rng, grid) for grid in key]
        if len(key) == 1:
            odds = np.array(THEME_WEIGHTS)
            if key[0][1] < 5:  # too narrow for most words
                odds = odds * (1, 1, 0.3, 0.5, 1)
            theme = THEMES[int(rng.choice(len(THEMES), p=odds / odds.sum()))]
            pictures = [picture(rng, theme, *sizes[0], "train")]
        else:
            theme, pictures = "pair", pair(rng, (sizes[0], sizes[1]), "train")[1]
        for index, shown in enumerate(pictures):
            pixels[index][row] = resize(shown.image)
        for turn in range(ROUNDS):
            packs[turn, row] = packer.pack(rng, pictures, WEIGHTS[theme], TURNS[len(key)])
    return Shard(key, pixels, packs)


def shard_views(buffer: mmap.mmap, slot: int, key: Key) -> Shard:
    """Arrays over the slot's shared memory."""
    rows, offset, pixels = (SINGLES if len(key) == 1 else PAIRS), slot * SLOT_BYTES, []
    shape = (ROUNDS, rows, 4, TURNS[len(key)])
    packs = np.frombuffer(buffer, np.int16, int(np.prod(shape)), offset).reshape(shape)
    offset += packs.nbytes
    for h, w in key:
        shape = (rows, h * CELL, w * CELL, 3)
        pixels.append(np.frombuffer(buffer, np.uint8, int(np.prod(shape)), offset).reshape(shape))
        offset += pixels[-1].nbytes
    return Shard(key, pixels, packs)


def _work(seed: int, tokenizer: str, buffer: mmap.mmap, free: mp.Queue, full: mp.Queue) -> None:
    os.nice(5)
    rng = np.random.default_rng(seed)
    packer = Packer(Tokenizer.from_file(tokenizer))
    grids, pairs = single_grids(), pair_grids()
    odds = np.array([(h * w) ** -0.4 for h, w in grids])
    odds /= odds.sum()
    while True:
        lone = rng.random() < 0.62
        key: Key = (grids[int(rng.choice(len(grids), p=odds))],) if lone else pairs[int(rng.integers(len(pairs)))]
        shard = make_shard(rng, key, packer)
        slot = free.get()
        views = shard_views(buffer, slot, key)
        views.packs[:] = shard.packs
        for view, array in zip(views.pixels, shard.pixels, strict=True):
            view[:] = array
        full.put((slot, key))


class Feed:
    """Worker processes and their shared memory. Start it before the GPU is touched: the workers are forked."""

    def __init__(self, tokenizer: Path, workers: int, seed: int, slots: int = 40) -> None:
        context = mp.get_context("fork")
        self.buffer = mmap.mmap(-1, slots * SLOT_BYTES)
        self.free, self.full = context.Queue(), context.Queue()
        for slot in range(slots):
            self.free.put(slot)
        self.workers = [
            context.Process(
                target=_work,
                args=(seed * 1000 + i, str(tokenizer), self.buffer, self.free, self.full),
                daemon=True,
            )
            for i in range(workers)
        ]
        for worker in self.workers:
            worker.start()

    def get(self) -> tuple[int, Shard]:
        """The next shard and its slot; hand the slot back with `done` once the arrays are copied."""
        slot, key = self.full.get()
        return slot, shard_views(self.buffer, slot, key)

    def done(self, slot: int) -> None:
        self.free.put(slot)

    def close(self) -> None:
        for worker in self.workers:
            worker.terminate()
