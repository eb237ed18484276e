"""Traces: who asked what and when, without the content. Made by `trace_kinds`, replayed by `simulate`.

A trace is a file of JSON lines. The first one is the header:

    {"format": "mm-trace", "version": 1, "kind": "zipf", "seed": 0}

Each other line is a request:

    {"at": 0.25, "segments": [{"text": 7, "tokens": 20}, {"media": "m3", "rows": 2304, "cost": 9216, "kind": "image"}],
     "answer": {"text": 99, "tokens": 64}, "salt": "a", "conversation": "c1", "turn": 0, "think": 2.5}

at: seconds from the start. segments: the prompt in order; a text is told by a seed and its length, and equal seeds
give equal tokens (of different lengths: as far as both go); media by name, rows, what encoding costs (in the
encoder's units; for Qwen2-VL patches) and kind. answer: the text that comes out. salt, conversation, turn and think
may be absent: a conversation's turns follow each other in the file, numbered from 0, and a turn comes no earlier than
`think` seconds after the answer before it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from mm_core.errors import DatasetError
from mm_core.types import MODALITIES, Modality

FORMAT, VERSION = "mm-trace", 1
MAX_REQUESTS = 1_000_000
MAX_LINE = 2**20  # characters
MAX_SEGMENTS = 4096
MAX_TOKENS = 2**20  # of a prompt, and of an answer
MAX_COST = 2**40
MAX_NAME = 256  # characters
MAX_SECONDS = 1e9
MAX_SEED = 2**63 - 1

_HEADER = frozenset({"format", "version", "kind", "seed"})
_REQUEST = frozenset({"at", "segments", "answer", "salt", "conversation", "turn", "think"})


@dataclass(frozen=True)
class Text:
    """`tokens` tokens of the endless text that `seed` stands for."""

    seed: int
    tokens: int


@dataclass(frozen=True)
class Media:
    """An item of so many encoder rows, each with a place in the prompt. cost: of encoding it, in the encoder's
    units."""

    name: str
    rows: int
    cost: int
    kind: Modality = "image"


Segment = Text | Media


@dataclass(frozen=True)
class TraceRequest:
    """One request. at, think: seconds."""

    at: float
    segments: tuple[Segment, ...]
    answer: Text
    salt: str | None = None
    conversation: str | None = None
    turn: int = 0
    think: float = 0.0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt, media included."""
        return sum(s.tokens if isinstance(s, Text) else s.rows for s in self.segments)

    @property
    def media_rows(self) -> int:
        """Of those, rows of media."""
        return sum(s.rows for s in self.segments if isinstance(s, Media))


@dataclass(frozen=True)
class Trace:
    """Requests in the file's order, and what they were made by."""

    requests: tuple[TraceRequest, ...]
    kind: str = ""
    seed: int = 0

    @property
    def media(self) -> dict[str, Media]:
        """All items by name."""
        return {s.name: s for r in self.requests for s in r.segments if isinstance(s, Media)}


def write_trace(trace: Trace, path: Path) -> None:
    """Write a trace; raises DatasetError where that fails."""
    header = {"format": FORMAT, "version": VERSION, "kind": trace.kind, "seed": trace.seed}
    try:
        with path.open("w", encoding="utf-8") as file:
            for entry in (header, *map(_entry, trace.requests)):
                file.write(json.dumps(entry, separators=(",", ":")) + "\n")
    except OSError as error:
        raise DatasetError(f"The trace {path} cannot be written ({type(error).__name__}). Name another file.") from None


def _entry(request: TraceRequest) -> dict[str, Any]:
    segments = [
        {"text": s.seed, "tokens": s.tokens}
        if isinstance(s, Text)
        else {"media": s.name, "rows": s.rows, "cost": s.cost, "kind": s.kind}
        for s in request.segments
    ]
    answer = {"text": request.answer.seed, "tokens": request.answer.tokens}
    entry: dict[str, Any] = {"at": request.at, "segments": segments, "answer": answer}
    if request.salt is not None:
        entry["salt"] = request.salt
    if request.conversation is not None:
        entry |= {"conversation": request.conversation, "turn": request.turn, "think": request.think}
    return entry


# -- reading ---------------------------------------------------------------------------------


def read_trace(path: Path) -> Trace:
    """Read a trace. Strict: raises DatasetError, which names file and line, for anything that is not as written
    above, and for sizes beyond the limits of this module."""
    reader = _Reader(path)
    lines = reader.lines()
    header = next(lines, None)
    if header is None:
        raise DatasetError(f"{path} is empty. Make a trace with `mm cache-sim --generate zipf -o FILE`.")
    kind, seed = reader.header(header)
    requests = tuple(map(reader.request, lines))
    if not requests:
        raise DatasetError(f"{path} has a header and no requests: there is nothing to replay.")
    return Trace(requests, kind, seed)


@dataclass
class _Reader:
    """One file's reading. number: of the line at hand, from 1."""

    path: Path
    number: int = 0
    turns: dict[str, int] = field(default_factory=dict)
    media: dict[str, Media] = field(default_factory=dict)

    def fail(self, what: str) -> NoReturn:
        raise DatasetError(f"{self.path}, line {self.number}: {what}")

    def lines(self) -> Iterator[Any]:
        """Each line's JSON value."""
        try:
            with self.path.open(encoding="utf-8") as file:
                while line := file.readline(MAX_LINE + 1):
                    self.number += 1
                    if len(line) > MAX_LINE:
                        self.fail(f"it is longer than {MAX_LINE} characters.")
                    if self.number > MAX_REQUESTS + 1:
                        self.fail(f"a trace has at most {MAX_REQUESTS} requests.")
                    if line.strip():
                        yield self._parse(line)
        except (OSError, UnicodeDecodeError) as error:
            text = f"The trace {self.path} cannot be read ({type(error).__name__}). Give a UTF-8 file of JSON lines."
            raise DatasetError(text) from None

    def _parse(self, line: str) -> Any:
        try:
            return json.loads(line, parse_constant=self._constant, object_pairs_hook=self._object)
        except (ValueError, RecursionError) as error:
            if isinstance(error, DatasetError):
                raise
            self.fail("not JSON. A trace has one object a line.")

    def _constant(self, name: str) -> NoReturn:
        self.fail(f"{name} is no number that a trace can have.")

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            self.fail("an object has a key twice.")
        return found

    def header(self, entry: Any) -> tuple[str, int]:
        if not isinstance(entry, Mapping) or entry.get("format") != FORMAT:
            self.fail(f'this is no trace: its first line must be {{"format": "{FORMAT}", "version": {VERSION}, …}}.')
        if entry.get("version") != VERSION or isinstance(entry["version"], bool):
            self.fail(f"version {_shown(entry.get('version'))} is not known; this release reads {VERSION}.")
        self._keys(entry, _HEADER, "the header")
        return self._name(entry, "kind") or "", self._whole(entry, "seed", 0, MAX_SEED, 0)

    def request(self, entry: Any) -> TraceRequest:
        if not isinstance(entry, Mapping):
            self.fail("a request is an object.")
        self._keys(entry, _REQUEST, "a request")
        segments = entry.get("segments")
        if not isinstance(segments, list) or not 1 <= len(segments) <= MAX_SEGMENTS:
            self.fail(f"`segments` is a list of 1 to {MAX_SEGMENTS} texts and media.")
        conversation = self._name(entry, "conversation")
        request = TraceRequest(
            at=self._seconds(entry, "at"),
            segments=tuple(map(self._segment, segments)),
            answer=self._text(entry.get("answer"), "`answer`"),
            salt=self._name(entry, "salt"),
            conversation=conversation,
            turn=self._turn(entry, conversation),
            think=self._seconds(entry, "think", 0.0),
        )
        if request.prompt_tokens > MAX_TOKENS:
            self.fail(f"a prompt has at most {MAX_TOKENS} tokens; this one has {request.prompt_tokens}.")
        return request

    def _turn(self, entry: Mapping[str, Any], conversation: str | None) -> int:
        turn = self._whole(entry, "turn", 0, MAX_REQUESTS, 0)
        expected = 0 if conversation is None else self.turns.get(conversation, 0)
        if turn != expected:
            of = "a request without `conversation`" if conversation is None else f"conversation {conversation!r}"
            self.fail(f"`turn` is {turn}, but {expected} is the next one of {of}.")
        if conversation is not None:
            self.turns[conversation] = turn + 1
        return turn

    def _segment(self, entry: Any) -> Segment:
        if not isinstance(entry, Mapping) or ("text" in entry) == ("media" in entry):
            self.fail("a segment is an object with `text` and `tokens`, or with `media`, `rows`, `cost` and `kind`.")
        if "text" in entry:
            return self._text(entry, "a text")
        self._keys(entry, frozenset({"media", "rows", "cost", "kind"}), "an item")
        kind = entry.get("kind", "image")
        if kind not in MODALITIES:
            self.fail(f"`kind` is {_shown(kind)}; it is one of {', '.join(MODALITIES)}.")
        rows, cost = self._whole(entry, "rows", 1, MAX_TOKENS), self._whole(entry, "cost", 0, MAX_COST)
        name = self._name(entry, "media")
        if name is None:
            self.fail("`media` is an item's name; found null.")
        item = Media(name, rows, cost, kind)
        if self.media.setdefault(item.name, item) != item:
            self.fail(f"item {item.name!r} was described otherwise before.")
        return item

    def _text(self, entry: Any, what: str) -> Text:
        if not isinstance(entry, Mapping):
            self.fail(f"{what} is an object with `text` (a seed) and `tokens`.")
        self._keys(entry, frozenset({"text", "tokens"}), what)
        return Text(self._whole(entry, "text", 0, MAX_SEED), self._whole(entry, "tokens", 1, MAX_TOKENS))

    # -- values --

    def _keys(self, entry: Mapping[str, Any], known: Iterable[str], what: str) -> None:
        if unknown := sorted(set(entry) - set(known)):
            self.fail(f"{_shown(unknown[0])} is not a key of {what}. Keys: {', '.join(sorted(known))}.")

    def _whole(self, entry: Mapping[str, Any], key: str, least: int, most: int, default: int | None = None) -> int:
        value = entry.get(key, default)
        if type(value) is not int or not least <= value <= most:
            self.fail(f"`{key}` is a whole number from {least} to {most}; found {_shown(value)}.")
        return value

    def _seconds(self, entry: Mapping[str, Any], key: str, default: float | None = None) -> float:
        value = entry.get(key, default)
        if type(value) not in (int, float) or not math.isfinite(value) or not 0 <= value <= MAX_SECONDS:
            self.fail(f"`{key}` is a number of seconds from 0 to {MAX_SECONDS:.0e}; found {_shown(value)}.")
        return float(value)

    def _name(self, entry: Mapping[str, Any], key: str) -> str | None:
        """A text; None where it is absent, or null."""
        value = entry.get(key)
        if value is not None and (not isinstance(value, str) or not 1 <= len(value) <= MAX_NAME):
            self.fail(f"`{key}` is a text of 1 to {MAX_NAME} characters; found {_shown(value)}.")
        return value


def _shown(value: Any) -> str:
    """A value in an error's text: short, whatever it is."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**18:
        return "a very large number"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
