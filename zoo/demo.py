"""Ask the small model that the project ships about pictures, then show what asking again costs.

Run by `make demo`. The pictures were made with fonts, backgrounds and handwriting that the model never saw.
Colours are shown on a terminal; elsewhere set FORCE_COLOR=1, or the pictures' file names are printed instead.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

import mm_core
from mm_core import MMError, SamplingParams, TextPrompt
from mm_core.zoo import default_model

if TYPE_CHECKING:
    from mm_core import Engine, RequestOutput

WIDTH = 32  # characters of one picture; two stand side by side
QUESTIONS = 2  # of each picture
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)


@dataclass(frozen=True)
class Question:
    """A question about one picture or two, and the true answer."""

    images: tuple[Path, ...]
    text: str
    answer: str


@dataclass(frozen=True)
class Answer:
    """What the engine gave, with seconds to the first token and to the end."""

    output: RequestOutput
    first: float
    total: float


def main() -> int:
    """0: the demo ran, whatever the model answered. 1: the engine failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="another checkpoint than the one that the project ships")
    parser.add_argument("--samples", type=Path, help="folder with demo.json or questions.json and the pictures in it")
    parser.add_argument("--device", default="cpu", help='"cpu" (default), "cuda" or "auto"')
    options = parser.parse_args()
    try:
        model = options.model or default_model()
        groups = read_questions(options.samples or model / "samples")
        run(model, groups, options.device)
    except (MMError, OSError, ValueError) as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 1
    return 0


def run(model: Path, groups: list[list[Question]], device: str) -> None:
    """Load the model, ask everything, and end with the engine's own counters."""
    print(f"Loading {model.name} on {device}", flush=True)
    start = time.perf_counter()
    with mm_core.Engine.from_pretrained(model, device=device) as engine:  # imports torch: seconds
        print(f"Loaded in {time.perf_counter() - start:.1f} s")
        right = [answered_right(engine, question) for group in groups for question in shown(group)]
        print(f"\n{sum(right)} of {len(right)} answers are right.")
        show_reuse(engine, max(groups, key=len))
        stats = engine.stats()
    print(
        f"\nIn all: {stats['prompt_tokens']} prompt tokens, {stats['cached_tokens']} of them from the KV cache; "
        f"{stats['generated_tokens']} generated; {stats['encoder_calls']} encoder calls."
    )


def read_questions(samples: Path) -> list[list[Question]]:
    """Questions by picture: those made for the demo, else some of the frozen evaluation sample."""
    for path in (samples / "demo" / "demo.json", samples / "demo.json", samples / "questions.json"):
        if path.is_file():
            break
    else:
        raise FileNotFoundError(f"No demo.json or questions.json in {samples}. Fetch the repository again.")
    groups: dict[tuple[str, ...], list[Question]] = {}
    for row in json.loads(path.read_text(encoding="utf-8")):
        images = tuple(path.parent / name for name in row["images"])
        groups.setdefault(tuple(row["images"]), []).append(Question(images, row["question"], row["answer"]))
    if not groups:
        raise ValueError(f"{path} holds no questions. Fetch the repository again.")
    if path.name == "demo.json":
        return list(groups.values())
    by_kind = {row["kind"]: groups[tuple(row["images"])] for row in json.loads(path.read_text(encoding="utf-8"))}
    wanted = ("list", "count", "word", "digit", "pair_more")
    return [by_kind[kind] for kind in wanted if kind in by_kind] or list(groups.values())[:5]


def shown(group: list[Question]) -> list[Question]:
    """Print the pictures of a group; gives the questions to ask."""
    images = group[0].images
    if colours():
        print("\n" + "\n".join(half_blocks(images)))
    else:
        print(f"\n[{', '.join(str(_short(image)) for image in images)}]")
    return group[:QUESTIONS]


def _short(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def colours() -> bool:
    """Whether the terminal takes 24-bit colours, as far as anybody says."""
    if os.environ.get("FORCE_COLOR"):
        return True
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def half_blocks(paths: tuple[Path, ...]) -> list[str]:
    """Lines of upper half blocks: the text colour is the pixel above, the background the one below."""
    pictures = []
    for path in paths:
        with Image.open(path) as image:
            height = max(2, round(WIDTH * image.height / image.width / 2) * 2)
            pictures.append(image.convert("RGB").resize((WIDTH, height), Image.Resampling.BOX))
    lines = []
    for y in range(0, max(picture.height for picture in pictures), 2):
        lines.append("  ".join(_row(picture, y) for picture in pictures))
    return lines


def _row(picture: Image.Image, y: int) -> str:
    if y >= picture.height:
        return " " * picture.width
    cells = []
    for x in range(picture.width):
        above, below = picture.getpixel((x, y)), picture.getpixel((x, y + 1))
        assert isinstance(above, tuple)
        assert isinstance(below, tuple)
        cells.append("\x1b[38;2;{};{};{};48;2;{};{};{}m▀".format(*above, *below))
    return "".join(cells) + "\x1b[0m"


def ask(engine: Engine, question: Question, salt: str | None = None) -> Answer:
    """Ask and take the time."""
    prompt = TextPrompt(prompt=question.text, multi_modal_data={"image": list(question.images)}, cache_salt=salt)
    start = time.perf_counter()
    updates = engine.stream(prompt, GREEDY)
    output = next(updates)
    first = time.perf_counter() - start
    for output in updates:  # noqa: B007
        pass
    return Answer(output, first, time.perf_counter() - start)


def answered_right(engine: Engine, question: Question) -> bool:
    """Ask one question and print the answer beside the true one."""
    text = ask(engine, question).output.text
    right = plain(text) == plain(question.answer)
    verdict = "right" if right else f"wrong: it is {question.answer!r}"
    print(f"  {question.text}  ->  {text.strip() or '(nothing)'}  ({verdict})")
    return right


def plain(text: str) -> str:
    """Text without differences of case, spaces or a final full stop."""
    return re.sub(r"\s+", " ", text).strip().rstrip(".").lower()


def show_reuse(engine: Engine, group: list[Question]) -> None:
    """Two questions about one picture: the second finds the picture's work done."""
    first, second = group[0], group[1 % len(group)]
    print(f"\nReuse: two questions about {', '.join(image.name for image in first.images)}, nothing cached before")
    for name, question in (("first", first), ("second", second)):
        # A salt of its own shuts this pair off from what the questions above left in the caches.
        answer = ask(engine, question, salt="reuse")
        usage = answer.output.usage
        print(
            f"  {name + ':':7} prompt tokens {usage.prompt_tokens}, cached {usage.cached_tokens}; "
            f"encoder rows {usage.media_tokens}, encoded {usage.encoded_media_tokens}; "
            f"first token after {1e3 * answer.first:.0f} ms, answer after {1e3 * answer.total:.0f} ms"
        )


if __name__ == "__main__":
    sys.exit(main())
