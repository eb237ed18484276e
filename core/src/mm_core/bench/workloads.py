"""The named workloads: how many requests of what media, text and output length.

Token counts are part of a workload, whatever the model's tokenizer: prompts are put together from
token ids, repeated or cut to the counts below, and checked against what the engine made of them.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mm_core.errors import ConfigError
from mm_core.hookspecs import BenchPrompt, Processor
from mm_core.types import TextPrompt

if TYPE_CHECKING:
    from PIL.Image import Image

INSTRUCTION = "Describe this image in detail."
QUESTION = " Question number {number}."


@dataclass(frozen=True)
class Workload:
    """One row of the table of workloads.

    images: how many different ones the requests share (request i has image i mod images; 0: none).
    rows: encoder rows an image, where the workload fixes them. shared: prompt tokens beside those
    rows that all requests begin with, own: those of the request's question and after it.
    primed: as many requests with other questions on the same images run first, off the clock.
    one_by_one: requests follow each other instead of coming all at once.
    """

    name: str
    requests: int
    images: int
    output_tokens: int
    image_size: int = 448
    rows: int | None = 256
    shared: int = 16
    own: int = 22
    primed: bool = False
    one_by_one: bool = False


WORKLOADS = {
    w.name: w
    for w in (
        Workload("image-distinct", requests=256, images=256, output_tokens=128),
        Workload("image-reuse", requests=256, images=16, output_tokens=128),
        Workload("image-reuse-warm", requests=256, images=16, output_tokens=128, primed=True),
        Workload("image-large", requests=32, images=32, output_tokens=64, image_size=1344, rows=2304),
        Workload("text", requests=256, images=0, output_tokens=256, rows=None, shared=14),
        Workload("latency", requests=20, images=20, output_tokens=129, one_by_one=True),
    )
}


@dataclass(frozen=True)
class BenchRequest:
    """One request with its greedy output length, and where its prompt is fixed, what it must come to:
    `expected_tokens` in all, `expected_rows` of them rows of media."""

    prompt: TextPrompt
    output_tokens: int
    expected_tokens: int | None = None
    expected_rows: int | None = None


@dataclass(frozen=True)
class PromptMaker:
    """Builds prompts of exact token counts in a family's template.

    tokenizer, placeholder_id: the model's. The shared part is head, media and the instruction,
    repeated or cut at its end. The own part is one ordinary token that no other request has there, so
    that what can be reused ends before it; the question, cut at its beginning (its number is at the
    end) or preceded by more of the instruction; and the tail.
    """

    tokenizer: Any
    pieces: BenchPrompt
    placeholder_id: int | None
    marks: Sequence[int]
    _cache: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, processor: Processor, pieces: BenchPrompt, *, media: bool) -> PromptMaker:
        """For a processor's tokenizer, with or without an image."""
        tokenizer = processor.tokenizer
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        ordinary = sorted(set(tokenizer.get_vocab().values()) - special)
        return cls(tokenizer, pieces, processor.placeholder_id("image") if media else None, ordinary)

    def ids(self, workload: Workload, number: int) -> list[int]:
        """Prompt ids of request `number`, the image being one placeholder id."""
        head = self._encode(self.pieces.head)
        media = self._encode(self.pieces.media) if self.placeholder_id is not None else []
        tail = self._encode(self.pieces.tail)
        if self.placeholder_id is not None and media.count(self.placeholder_id) != 1:
            raise ConfigError(
                f"The family's media text {self.pieces.media!r} has {media.count(self.placeholder_id)} placeholders "
                f"in this tokenizer; one is wanted. Take the model's own tokenizer."
            )
        template = len(head + media) - bool(media)
        left = workload.own - 1 - len(tail)
        if template > workload.shared or left < 0 or number >= len(self.marks):
            raise ConfigError(
                f"Workload {workload.name!r} has {workload.shared} + {workload.own} tokens of text and question "
                f"{number}; with this tokenizer the template alone takes {template} + {len(tail)}, and there are "
                f"{len(self.marks)} ordinary tokens to tell questions apart. Use --dataset for this model."
            )
        shared = head + media + self._fill(workload.shared - template)
        return [*shared, self.marks[number], *self._question(number, left), *tail]

    def _fill(self, count: int) -> list[int]:
        return list(itertools.islice(itertools.cycle(self._encode(INSTRUCTION)), count))

    def _question(self, number: int, count: int) -> list[int]:
        ids = self._encode(QUESTION.format(number=number))
        return ids[len(ids) - count :] if len(ids) >= count else self._fill(count - len(ids)) + ids

    def _encode(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = list(self.tokenizer.encode(text, add_special_tokens=False))
        return self._cache[text]


def select(names: str) -> list[Workload]:
    """Workloads by a comma list of names, or "all". Raises ConfigError for unknown or repeated ones."""
    if names == "all":
        return list(WORKLOADS.values())
    chosen = [name.strip() for name in names.split(",")]
    unknown = [name for name in chosen if name not in WORKLOADS]
    if unknown or len(set(chosen)) != len(chosen):
        fault = f"{unknown[0]!r} is no workload" if unknown else "a workload is named twice"
        raise ConfigError(f"--workload {names}: {fault}. There are: {', '.join(WORKLOADS)}, all.")
    return [WORKLOADS[name] for name in chosen]


def resized(workload: Workload, requests: int | None, output_tokens: int | None, image_size: int | None) -> Workload:
    """A workload with the caller's sizes. With other requests, as many share an image as before. With
    an image size of the caller's, rows are whatever the model makes of it."""
    changes: dict[str, Any] = {}
    if requests is not None:
        images = max(1, workload.images * requests // workload.requests) if workload.images else 0
        changes |= {"requests": requests, "images": images}
    if output_tokens is not None:
        changes["output_tokens"] = output_tokens
    if image_size is not None and workload.images:
        changes |= {"image_size": image_size, "rows": None}
    return replace(workload, **changes)


def noise_images(name: str, count: int, size: int, seed: int) -> list[Image]:
    """`count` square RGB images of uniform noise; the same for the same name, size and seed."""
    import numpy as np
    from PIL import Image

    images = []
    for index in range(count):
        generator = np.random.default_rng([seed, zlib.crc32(name.encode()), size, index])
        images.append(Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)))
    return images


def make_requests(
    workload: Workload, maker: PromptMaker, seed: int, rows: int, first: int = 0, media: str | None = None
) -> list[BenchRequest]:
    """The workload's requests, with questions numbered from `first`. rows: of one image in this model.
    media: the name that images are drawn under (None: the workload's own)."""
    images = noise_images(media or workload.name, workload.images, workload.image_size, seed)
    requests = []
    for index in range(workload.requests):
        image = images[index % workload.images] if images else None
        prompt = TextPrompt(
            prompt_token_ids=maker.ids(workload, first + index),
            multi_modal_data=None if image is None else {"image": [image]},
        )
        count = rows if image is not None else 0
        requests.append(BenchRequest(prompt, workload.output_tokens, workload.shared + workload.own + count, count))
    return requests
