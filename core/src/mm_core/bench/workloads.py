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

from mm_core.benchspecs import BenchPrompt, BenchWorkload
from mm_core.errors import ConfigError
from mm_core.hookspecs import Processor
from mm_core.types import TextPrompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from mm_core.types import Modality

INSTRUCTION = "Describe this image in detail."
QUESTION = " Question number {number}."
SAMPLE_RATE = 16_000  # Hz, what speech models read


WORKLOADS = {
    w.name: w
    for w in (
        BenchWorkload("image-distinct", requests=256, items=256, output_tokens=128),
        BenchWorkload("image-reuse", requests=256, items=16, output_tokens=128),
        BenchWorkload("image-reuse-warm", requests=256, items=16, output_tokens=128, primed=True),
        BenchWorkload("image-large", requests=32, items=32, output_tokens=64, image_size=1344, rows=2304),
        BenchWorkload("text", requests=256, items=0, output_tokens=256, rows=None, shared=14),
        BenchWorkload("latency", requests=20, items=20, output_tokens=129, one_by_one=True),
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
    """Builds prompts of exact token counts in a family's template, or repeats its complete one.

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
    def of(cls, processor: Processor, pieces: BenchPrompt, modality: Modality | None) -> PromptMaker:
        """For a processor's tokenizer, with an item of `modality` or none."""
        tokenizer = processor.tokenizer
        special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        ordinary = sorted(set(tokenizer.get_vocab().values()) - special)
        return cls(tokenizer, pieces, None if modality is None else processor.placeholder_id(modality), ordinary)

    def ids(self, workload: BenchWorkload, number: int) -> list[int]:
        """Prompt ids of request `number`, its item being one placeholder id, where it has a place."""
        if self.pieces.complete is not None:
            return self._encode(self.pieces.complete)
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


def select(names: str, own: Sequence[BenchWorkload] = ()) -> list[BenchWorkload]:
    """Workloads by a comma list of names: core's, and the plugins' `own`. Raises ConfigError for unknown or
    repeated ones."""
    known = {**WORKLOADS, **{w.name: w for w in own}}
    chosen = [name.strip() for name in names.split(",")]
    unknown = [name for name in chosen if name not in known]
    if unknown or len(set(chosen)) != len(chosen):
        fault = f"{unknown[0]!r} is no workload" if unknown else "a workload is named twice"
        raise ConfigError(f"--workload {names}: {fault}. There are: {', '.join(known)}, all.")
    return [known[name] for name in chosen]


def resized(
    workload: BenchWorkload, requests: int | None, output_tokens: int | None, image_size: int | None
) -> BenchWorkload:
    """A workload with the caller's sizes. With other requests, as many share an item as before. With
    an image size of the caller's, rows are whatever the model makes of it."""
    changes: dict[str, Any] = {}
    if requests is not None:
        items = max(1, workload.items * requests // workload.requests) if workload.items else 0
        changes |= {"requests": requests, "items": items}
    if output_tokens is not None:
        changes["output_tokens"] = output_tokens
    if image_size is not None and workload.items and workload.modality == "image":
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


def noise_clips(name: str, count: int, seconds: float, seed: int) -> list[Any]:
    """`count` clips of uniform noise, as (float32 samples, rate); the same for the same name, length and seed."""
    import numpy as np

    length = round(seconds * SAMPLE_RATE)
    streams = [np.random.default_rng([seed, zlib.crc32(name.encode()), length, index]) for index in range(count)]
    return [(stream.uniform(-0.5, 0.5, length).astype(np.float32), SAMPLE_RATE) for stream in streams]


def make_requests(
    workload: BenchWorkload, maker: PromptMaker, seed: int, rows: int, first: int = 0, media: str | None = None
) -> list[BenchRequest]:
    """The workload's requests, with questions numbered from `first`. rows: of one item in this model.
    media: the name that items are drawn under (None: the workload's own)."""
    name = media or workload.name
    items: list[Any]
    if workload.modality == "audio":
        items = noise_clips(name, workload.items, workload.seconds, seed)
    else:
        items = noise_images(name, workload.items, workload.image_size, seed)
    requests = []
    for index in range(workload.requests):
        ids = maker.ids(workload, first + index)
        data: dict[str, Any] | None = {workload.modality: [items[index % len(items)]]} if items else None
        count = rows if items else 0
        placed = count + workload.beside - 1 if items and maker.placeholder_id is not None else 0
        prompt = TextPrompt(prompt_token_ids=ids, multi_modal_data=data)
        requests.append(BenchRequest(prompt, workload.output_tokens, len(ids) + placed, count))
    return requests
