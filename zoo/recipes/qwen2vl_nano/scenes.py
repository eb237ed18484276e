"""Pictures with a known content: shapes, printed words and numbers, handwritten digits. Deterministic by seed."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, field
from functools import cache, lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from . import backgrounds
from .fonts import font_files

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 38, 38), "orange": (245, 138, 22), "yellow": (246, 222, 48), "green": (46, 160, 68),
    "blue": (42, 86, 214), "purple": (128, 52, 172), "pink": (246, 128, 182), "brown": (122, 74, 38),
    "black": (22, 22, 22), "white": (250, 250, 250),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "diamond", "heart", "cross", "ring")
WORD_LIST = (
    "apple bread chair table house river stone cloud tiger horse sheep mouse snake eagle whale shark lemon grape "
    "peach melon onion sugar honey water milk coffee juice plate spoon knife fork glass bottle window door floor "
    "wall roof garden flower tree leaf grass beach ocean island mountain valley forest desert bridge road street "
    "train plane boat truck wheel engine clock watch phone camera radio music piano guitar drum dance paper pencil "
    "book letter school teacher doctor friend family child baby king queen castle crown sword magic dream night "
    "morning summer winter storm snow rain wind fire light shadow silver gold market money open stop exit sale hello "
    "world"
)
WORDS = tuple(WORD_LIST.split())
ZONES = (
    ("top left", "top", "top right"),
    ("left", "centre", "right"),
    ("bottom left", "bottom", "bottom right"),
)
MASK_SIDE = 144
DIGIT_STRIDE = 6  # every sixth handwritten digit of scikit-learn's set is held out


@dataclass
class Thing:
    """A coloured shape: centre and diameter in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    size: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass
class Mark:
    """Something to read: a 'word', a 'number' or a handwritten 'digit', with its centre and box in pixels."""

    kind: str
    text: str
    colour: str
    x: float
    y: float
    width: float
    height: float
    mask: Image.Image = field(repr=False)


@dataclass
class Scene:
    width: int
    height: int
    things: list[Thing] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    def mark(self, kind: str) -> Mark | None:
        found = [mark for mark in self.marks if mark.kind == kind]
        return found[0] if len(found) == 1 else None

    def zone(self, x: float, y: float) -> str | None:
        """The picture's third that a point clearly lies in, or None near a border between two thirds."""
        column, row = _third(x / self.width), _third(y / self.height)
        return None if column is None or row is None else ZONES[row][column]


def _third(share: float) -> int | None:
    return 0 if share < 0.31 else 1 if 0.38 < share < 0.62 else 2 if share > 0.69 else None


@cache
def _handwriting(split: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data = load_digits()
    heldout = np.arange(len(data.target)) % DIGIT_STRIDE == DIGIT_STRIDE - 1
    chosen = heldout if split == "heldout" else ~heldout
    return (data.images[chosen] * (255 / 16)).astype(np.uint8), data.target[chosen]


def _polygon(points: list[tuple[float, float]], side: int) -> Image.Image:
    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).polygon([(x * side, y * side) for x, y in points], fill=255)
    return mask


def _wheel(count: int, radii: tuple[float, ...]) -> list[tuple[float, float]]:
    angles = [math.tau * i / count - math.pi / 2 for i in range(count)]
    return [
        (0.5 + radii[i % len(radii)] * math.cos(a), 0.5 + radii[i % len(radii)] * math.sin(a))
        for i, a in enumerate(angles)
    ]


def _heart() -> list[tuple[float, float]]:
    points = []
    for i in range(40):
        t = math.tau * i / 40
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((0.5 + x / 35, 0.47 - y / 35))
    return points


@cache
def _shape_mask(shape: str, side: int = MASK_SIDE) -> Image.Image:
    if shape in ("circle", "ring"):
        mask = Image.new("L", (side, side), 0)
        draw = ImageDraw.Draw(mask)
        draw.ellipse((0, 0, side - 1, side - 1), fill=255)
        if shape == "ring":
            draw.ellipse((side * 0.24, side * 0.24, side * 0.76, side * 0.76), fill=0)
        return mask
    third, rest = 0.33, 0.67
    outlines = {
        "square": [(0.07, 0.07), (0.93, 0.07), (0.93, 0.93), (0.07, 0.93)],
        "triangle": [(0.5, 0.04), (0.98, 0.92), (0.02, 0.92)],
        "star": _wheel(10, (0.5, 0.21)),
        "diamond": [(0.5, 0.0), (0.86, 0.5), (0.5, 1.0), (0.14, 0.5)],
        "heart": _heart(),
        "cross": [
            (third, 0.02), (rest, 0.02), (rest, third), (0.98, third), (0.98, rest), (rest, rest),
            (rest, 0.98), (third, 0.98), (third, rest), (0.02, rest), (0.02, third), (third, third),
        ],
    }  # fmt: skip
    return _polygon(outlines[shape], side)


@lru_cache(maxsize=4096)
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def shade(rng: np.random.Generator, colour: str) -> tuple[int, int, int]:
    red, green, blue = np.clip(np.array(COLOURS[colour]) + rng.integers(-12, 13, 3), 0, 255)
    return int(red), int(green), int(blue)


def print_mark(rng: np.random.Generator, text: str, kind: str, room: tuple[float, float], split: str) -> Mark | None:
    """Print a text in some font, as large as drawn by lot within `room` (width, height); None if too small."""
    paths = font_files(split)
    path = paths[int(rng.integers(len(paths)))]
    style = rng.random()
    shown = text.upper() if style < 0.3 else text.capitalize() if style < 0.5 else text
    left, top, right, bottom = _font(path, 40).getbbox(shown)
    largest = min(room[0] / (right - left), room[1] / (bottom - top)) * 40
    smallest = 30.0
    if largest < smallest:
        return None
    size = int(rng.uniform(smallest, min(largest, 110)))
    face = _font(path, size)
    left, top, right, bottom = face.getbbox(shown)
    mask = Image.new("L", (int(right - left) + 4, int(bottom - top) + 4), 0)
    ImageDraw.Draw(mask).text((2 - left, 2 - top), shown, fill=255, font=face)
    return _place_mark(rng, mask, text, kind, 7.0)


def write_digit(rng: np.random.Generator, room: float, split: str) -> Mark:
    """A handwritten digit, enlarged, bent a little, with a thinner or thicker pen."""
    images, targets = _handwriting(split)
    index = int(rng.integers(len(targets)))
    side = int(rng.uniform(38, max(40, min(room, 150))))
    glyph = Image.fromarray(np.pad(images[index], 1)).resize((side, int(side * rng.uniform(1.0, 1.25))), Image.BICUBIC)
    shear, squeeze = rng.uniform(-0.18, 0.18), rng.uniform(0.9, 1.1)
    width, height = glyph.size
    matrix = (squeeze, shear, -shear * height / 2 + (1 - squeeze) * width / 2, 0.0, 1.0, 0.0)
    glyph = glyph.transform(glyph.size, Image.AFFINE, matrix, Image.BILINEAR)
    low, high = rng.uniform(40, 90), rng.uniform(120, 190)
    pen = np.clip((np.asarray(glyph, np.float32) - low) * (255 / (high - low)), 0, 255)
    return _place_mark(rng, Image.fromarray(pen.astype(np.uint8)), str(targets[index]), "digit", 12.0)


def _place_mark(rng: np.random.Generator, mask: Image.Image, text: str, kind: str, tilt: float) -> Mark:
    if rng.random() < 0.5:
        mask = mask.rotate(float(rng.uniform(-tilt, tilt)), Image.BICUBIC, expand=True)
    names = tuple(COLOURS)
    colour = names[int(rng.integers(len(names)))]
    return Mark(kind, text, colour, 0.0, 0.0, mask.width, mask.height, mask)


def render(rng: np.random.Generator, scene: Scene, split: str) -> Image.Image:
    """Paint the scene on a background of the split, then take it with a noisy camera."""
    inks = [COLOURS[item.colour] for item in (*scene.things, *scene.marks)]
    canvas = Image.fromarray(backgrounds.paint(rng, scene.height, scene.width, inks, split))
    for thing in scene.things:
        side = max(8, int(thing.size))
        mask = _shape_mask(thing.shape)
        if rng.random() < 0.5:
            mask = mask.rotate(float(rng.uniform(-11, 11)), Image.BILINEAR)
        mask = mask.resize((side, side), Image.BILINEAR, reducing_gap=2.0)
        corner = (int(thing.x - side / 2), int(thing.y - side / 2))
        canvas.paste(shade(rng, thing.colour), (*corner, corner[0] + side, corner[1] + side), mask)
    for mark in scene.marks:
        corner = (int(mark.x - mark.width / 2), int(mark.y - mark.height / 2))
        box = (*corner, corner[0] + mark.mask.width, corner[1] + mark.mask.height)
        canvas.paste(shade(rng, mark.colour), box, mark.mask)
    return camera(rng, canvas)


@cache
def _noise_bank() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(1 << 21, dtype=np.float32)


def camera(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """Exposure, sensor noise and JPEG artefacts, each on some pictures."""
    if rng.random() < 0.6:
        pixels = np.asarray(picture, np.float32)
        bank = _noise_bank()
        start = int(rng.integers(0, bank.size - pixels.size)) if pixels.size < bank.size else 0
        noise = np.resize(bank[start : start + pixels.size], pixels.shape)
        pixels = pixels * np.float32(rng.uniform(0.88, 1.06)) + noise * np.float32(rng.uniform(1, 13))
        picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        stream = io.BytesIO()
        picture.save(stream, "JPEG", quality=int(rng.integers(35, 96)))
        picture = Image.open(stream).convert("RGB")
    return picture
