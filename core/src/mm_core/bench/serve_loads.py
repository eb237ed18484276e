"""What a server is asked under load: arrivals, and conversations whose bytes are made before the clock starts."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from mm_core.bench.workloads import INSTRUCTION, QUESTION, noise_images
from mm_core.errors import ConfigError

KINDS = ("image", "text", "chat", "dataset")
WARMUP_TOKENS = 8
MAX_BYTES = 8 * 2**30  # of different pictures in the client's memory
_JPEG_BYTES_A_PIXEL = 1.0  # of noise at Pillow's own quality, in base64: a bit under this
_FILLER = "Say what is in it, where it is, and what it may mean, in one long answer without a list. "

Pieces = tuple[bytes, ...]


@dataclass(frozen=True)
class Load:
    """What is sent, and when.

    kind: of KINDS. requests: arrivals; of chats, conversations. rate: arrivals a second (infinite: all at once).
    burstiness: shape of the gamma distribution of gaps between arrivals: 1 is a Poisson process, less is burstier.
    items: different pictures (0: each request has its own), drawn by Zipf's law where `exponent` is above 0, else in
    turns. turns, think_s: of a conversation, and the seconds between an answer and the next turn. characters: of the
    question's text (None: as it is). images: of a request or of a conversation's first turn.
    """

    name: str
    kind: str
    requests: int
    rate: float = math.inf
    burstiness: float = 1.0
    output_tokens: int | None = 128
    stream: bool = True
    images: int = 1
    items: int = 0
    exponent: float = 0.0
    image_size: int = 448
    turns: int = 1
    think_s: float = 0.0
    characters: int | None = None
    dataset: str | None = None
    ignore_eos: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        found = asdict(self)
        return {**found, "rate": None if math.isinf(self.rate) else self.rate}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Load:
        """What `to_dict` gave."""
        return cls(**{**found, "rate": math.inf if found["rate"] is None else found["rate"]})


LOADS = {
    load.name: load
    for load in (
        Load("serve-burst", "image", 256, stream=False),
        Load("serve-poisson-10", "image", 120, rate=10.0, output_tokens=64),
        Load("serve-poisson-25", "image", 300, rate=25.0, output_tokens=64),
        Load("serve-zipf", "image", 240, rate=20.0, output_tokens=64, items=64, exponent=1.0),
        Load("serve-text", "text", 240, rate=20.0, output_tokens=128, images=0),
        Load("serve-chat", "chat", 24, rate=2.0, output_tokens=64, turns=4, think_s=1.0),
    )
}


@dataclass(frozen=True)
class Conversation:
    """Turns that follow each other, each the JSON of a user's message in pieces (pictures are shared, not copied)."""

    turns: tuple[Pieces, ...]
    output_tokens: int


def select_loads(names: str) -> list[Load]:
    """Loads by a comma list of names. Raises ConfigError for unknown or repeated ones."""
    chosen = [name.strip() for name in names.split(",")]
    unknown = [name for name in chosen if name not in LOADS]
    if unknown or len(set(chosen)) != len(chosen):
        fault = f"{unknown[0]!r} is no workload" if unknown else "a workload is named twice"
        raise ConfigError(f"--workload {names}: {fault}. There are: {', '.join(LOADS)}.")
    return [LOADS[name] for name in chosen]


def arrivals(load: Load) -> list[float]:
    """Seconds after the start at which requests arrive, in order.

    Gaps are gamma distributed, and scaled so that all of them together take requests / rate: the rate is met
    exactly, and for burstiness 1 this is a Poisson process of which the number of arrivals is given.
    """
    if math.isinf(load.rate):
        return [0.0] * load.requests
    import numpy as np

    gaps = np.random.default_rng([load.seed, 1]).gamma(load.burstiness, size=load.requests + 1)
    times = np.cumsum(gaps)
    found: list[float] = (times[:-1] / times[-1] * (load.requests / load.rate)).tolist()
    return found


def conversations(load: Load, part: int = 0, parts: int = 1, warm_up: bool = False) -> list[Conversation]:
    """Every `parts`-th conversation from number `part` on; for a warm-up with other pictures and short answers."""
    numbers = range(part, load.requests, parts)
    if load.kind == "dataset":
        return _from_dataset(load, numbers, warm_up)
    name = f"{'warm-up ' if warm_up else ''}{load.name}"
    pictures = _Pictures(name, load, warm_up)
    tokens = load.output_tokens or LOADS["serve-burst"].output_tokens or 0
    made = []
    for number in numbers:
        turns = []
        for turn in range(load.turns):
            images = pictures.of(number) if turn == 0 else []
            turns.append(user_message(question(load, number, turn, warm_up), images))
        made.append(Conversation(tuple(turns), min(tokens, WARMUP_TOKENS) if warm_up else tokens))
    return made


def question(load: Load, number: int, turn: int = 0, warm_up: bool = False) -> str:
    """A text that no other request has: cut, or repeated, to `load.characters`; its number always stays. Texts of a
    given length differ in digits alone, so that each has as many tokens."""
    shown = number if load.characters is None else _digits(load, number)
    mark = QUESTION.format(number=f"{'w' if warm_up else ''}{shown}{f'.{turn}' if turn else ''}")
    text = INSTRUCTION if load.images else _FILLER
    if load.characters is None:
        return text + mark
    left = max(0, load.characters - len(mark))
    return (text + " " + _FILLER * (left // len(_FILLER) + 1))[:left] + mark[-load.characters :]


def _digits(load: Load, number: int) -> str:
    """A number of as many digits as every other of the load, and one more, have; apart, so that no vocabulary makes
    one token of some of them and two of others."""
    return " ".join(str(10 ** len(str(load.requests)) + number))


def fitting_message(load: Load) -> Pieces:
    """A first message that has as many tokens as those of the load, whose `characters` are given. Its number is none
    of theirs, and its pictures are the warm-up's: nothing of a run is cached by it."""
    pictures = _Pictures(f"warm-up {load.name}", replace(load, requests=1), warm_up=True)
    return user_message(question(load, load.requests), pictures.of(0))


def user_message(text: str, media: Sequence[Pieces]) -> Pieces:
    """OpenAI's user message with parts of media before the text."""
    if not media:
        return (_json({"role": "user", "content": text}),)
    pieces: list[bytes] = [b'{"role":"user","content":[']
    for part in media:
        pieces += [*part, b","]
    return (*pieces, _json({"type": "text", "text": text}), b"]}")


def assistant_message(text: str) -> bytes:
    """The server's answer, for the next turn."""
    return _json({"role": "assistant", "content": text})


def body(model: str, load: Load, messages: Sequence[Pieces | bytes], output_tokens: int) -> list[bytes]:
    """A call's body in pieces: greedy, of `output_tokens` tokens."""
    settings: dict[str, Any] = {"model": model, "max_tokens": output_tokens, "temperature": 0.0}
    if load.ignore_eos:
        settings["ignore_eos"] = True
    if load.stream:
        settings |= {"stream": True, "stream_options": {"include_usage": True}}
    pieces = [_json({**settings, **load.extra})[:-1], b',"messages":[']
    for place, message in enumerate(messages):
        pieces += [b","] if place else []
        pieces += [message] if isinstance(message, bytes) else message
    return [*pieces, b"]}"]


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class _Pictures:
    """Which pictures a request has; each is encoded once."""

    def __init__(self, name: str, load: Load, warm_up: bool) -> None:
        self._load = load
        self._name = name
        self._parts: dict[int, Pieces] = {}
        count = load.items if load.items and not warm_up else load.requests * load.images
        if load.images and count * load.image_size**2 * _JPEG_BYTES_A_PIXEL > MAX_BYTES:
            raise ConfigError(
                f"{count} different pictures of {load.image_size}×{load.image_size} take more than "
                f"{MAX_BYTES // 2**30} GiB of the client's memory. Share some with --items."
            )
        self._drawn = self._draw(count) if load.exponent and load.items and not warm_up else None
        self._count = count

    def _draw(self, count: int) -> list[int]:
        """Which picture each request has, by Zipf's law: the one of rank k is drawn in proportion to k^-exponent."""
        import numpy as np

        weights = np.arange(1, count + 1, dtype=np.float64) ** -self._load.exponent
        total = self._load.requests * self._load.images
        generator = np.random.default_rng([self._load.seed, 2])
        found: list[int] = generator.choice(count, size=total, p=weights / weights.sum()).tolist()
        return found

    def of(self, number: int) -> list[Pieces]:
        places = range(number * self._load.images, (number + 1) * self._load.images)
        return [self._part(place % self._count if self._drawn is None else self._drawn[place]) for place in places]

    def _part(self, item: int) -> Pieces:
        if item not in self._parts:
            # One name an item: a process that needs few of them makes few.
            (image,) = noise_images(f"{self._name} {item}", 1, self._load.image_size, self._load.seed)
            buffer = io.BytesIO()
            image.save(buffer, "JPEG")
            self._parts[item] = media_part("image", buffer.getvalue())
        return self._parts[item]


_TYPES = (
    (b"\xff\xd8\xff", "image/jpeg"), (b"\x89PNG", "image/png"), (b"GIF8", "image/gif"), (b"BM", "image/bmp"),
    (b"II*\x00", "image/tiff"), (b"MM\x00*", "image/tiff"), (b"\x1aE\xdf\xa3", "video/webm"), (b"fLaC", "audio/flac"),
    (b"ID3", "audio/mpeg"), (b"OggS", "audio/ogg"),
)  # fmt: skip
_FORMS = {"audio/mpeg": "mp3", "audio/flac": "flac", "audio/ogg": "ogg"}


def media_type(modality: str, data: bytes) -> str:
    """The MIME type of encoded media, by how they begin."""
    if data[:4] == b"RIFF":
        return {b"WEBP": "image/webp", b"WAVE": "audio/wav"}.get(data[8:12], "video/x-msvideo")
    found = next((kind for begin, kind in _TYPES if data.startswith(begin)), "")
    if found.startswith(f"{modality}/"):
        return found
    return {"image": "image/png", "video": "video/mp4", "audio": "audio/wav"}[modality]


def media_part(modality: str, data: bytes) -> Pieces:
    """OpenAI's content part of encoded media: a data URL, or sound in the body."""
    kind, coded = media_type(modality, data), base64.b64encode(data)
    if modality == "audio":
        form = _FORMS.get(kind, "wav").encode()
        return (b'{"type":"input_audio","input_audio":{"format":"' + form + b'","data":"', coded, b'"}}')
    name = f"{modality}_url".encode()
    begin = b'{"type":"' + name + b'","' + name + b'":{"url":"data:' + kind.encode() + b";base64,"
    return (begin, coded, b'"}}')


def _from_dataset(load: Load, numbers: range, warm_up: bool) -> list[Conversation]:
    """Requests of a file; for a warm-up, the stand-in for its first one with pictures."""
    from mm_core.bench.dataset import read_dataset, stand_in

    entries = read_dataset(Path(load.dataset or ""), None, load.output_tokens)
    if warm_up:
        request = stand_in(entries)
        entries = [replace(request, output_tokens=min(request.output_tokens, WARMUP_TOKENS))]
    coded: dict[int, Pieces] = {}
    made = []
    for number in numbers:
        request = entries[number % len(entries)]
        parts = []
        for modality, items in (request.prompt.multi_modal_data or {}).items():
            for item in items:
                if id(item) not in coded:
                    coded[id(item)] = media_part(modality, item if isinstance(item, bytes) else _encoded(item))
                parts.append(coded[id(item)])
        made.append(Conversation((user_message(request.prompt.prompt or "", parts),), request.output_tokens))
    return made


def _encoded(image: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def sized(load: Load, given: Mapping[str, Any], duration: float | None) -> Load:
    """A load with the caller's own sizes. With a duration, as many requests as the rate brings in it."""
    load = replace(load, **given)
    if duration is None:
        return load
    if math.isinf(load.rate):
        raise ConfigError("--duration needs a --rate: requests that come all at once have none.")
    return replace(load, requests=max(1, round(load.rate * duration)))
