"""Made-up traces: pictures asked about as often as Zipf's law says, chats, system prompts, and all of them.

The same options give the same trace, on any machine.
"""

from __future__ import annotations

import bisect
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from mm_core.bench.traces import MAX_REQUESTS, MAX_SEED, MAX_TOKENS, Media, Segment, Text, Trace, TraceRequest
from mm_core.errors import ConfigError
from mm_core.types import Modality

COST_PER_ROW = 4  # patches a row of Qwen2-VL
HEAD_TOKENS = 4  # of a chat template, before the first message; the same for all
_HEAD, _SHARED = 0, 1  # their seeds; those of other texts are drawn
_SIZES: tuple[tuple[Modality, float], ...] = (  # of the mixed kind: items of so many times the usual rows
    ("image", 1 / 9), ("image", 1 / 4), ("image", 1.0), ("video", 2.0), ("audio", 0.65),
)  # fmt: skip


@dataclass(frozen=True)
class TraceOptions:
    """What a made-up trace is like.

    requests: how many, all turns counted. rate: that come in a second on average, at random (Poisson); 0: all at
    once. media: different items. exponent: of Zipf's law: the k-th most asked about has a share of 1/k^exponent.
    rows: of an item. shared_tokens: of the instruction behind it, the same for all; text_tokens: of the question
    behind that. output_tokens: of an answer. turns: of a conversation. think:
    seconds between an answer and the next turn, on average. systems: different system prompts of `system_tokens`
    tokens. salts: users who share nothing; 0: one.
    """

    requests: int = 2000
    seed: int = 0
    rate: float = 10.0
    media: int = 200
    exponent: float = 1.0
    rows: int = 2304
    shared_tokens: int = 12
    text_tokens: int = 22
    output_tokens: int = 64
    turns: int = 6
    think: float = 10.0
    systems: int = 20
    system_tokens: int = 1500
    salts: int = 0

    def check(self) -> None:
        """Raise ConfigError for sizes that no trace can have."""
        size, count = (1, MAX_TOKENS // 4), (1, MAX_REQUESTS)
        bounds: dict[str, tuple[float, float]] = {
            "requests": count, "seed": (0, MAX_SEED), "rate": (0, 1e6), "media": count, "exponent": (0, 10),
            "rows": size, "shared_tokens": (0, MAX_TOKENS // 4), "text_tokens": size, "output_tokens": size,
            "turns": (1, 1000), "think": (0, 1e6), "systems": count, "system_tokens": size, "salts": (0, MAX_REQUESTS),
        }  # fmt: skip
        for name, (least, most) in bounds.items():
            if not least <= (value := getattr(self, name)) <= most:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: want a number from {least:g} to {most:g}.")
        longest = (
            HEAD_TOKENS + 2 * self.rows + self.shared_tokens + 2 * self.turns * (self.text_tokens + self.output_tokens)
        )
        if longest > MAX_TOKENS:
            raise ConfigError(
                f"The last turn of {self.turns} would have {longest} tokens; a prompt has at most {MAX_TOKENS}. Lower "
                "--turns, --text-tokens or --output-tokens."
            )


class _Dice:
    """All that is drawn at random."""

    def __init__(self, options: TraceOptions) -> None:
        self.options = options
        self._random = random.Random(options.seed)

    def text(self, tokens: int) -> Text:
        """A text that no other is like."""
        return Text(self._random.getrandbits(62) + 2, max(tokens, 1))

    def length(self, mean: int) -> int:
        """Between half and one and a half of the mean."""
        return max(round(mean * self._random.uniform(0.5, 1.5)), 1)

    def gap(self, mean: float) -> float:
        """Seconds, exponentially distributed."""
        return self._random.expovariate(1 / mean) if mean else 0.0

    def salt(self) -> str | None:
        """One of the users, if there are several."""
        return f"user{self._random.randrange(self.options.salts)}" if self.options.salts else None

    def zipf(self, count: int) -> Callable[[], int]:
        """Draws ranks from 0, by Zipf's law."""
        shares = list(itertools.accumulate((rank + 1) ** -self.options.exponent for rank in range(count)))
        return lambda: min(bisect.bisect(shares, self._random.random() * shares[-1]), count - 1)


def _about(options: TraceOptions, name: str) -> tuple[Segment, ...]:
    """A prompt's beginning: an item, and what all say about one."""
    item = Media(name, options.rows, COST_PER_ROW * options.rows)
    shared = (Text(_SHARED, options.shared_tokens),) if options.shared_tokens else ()
    return (Text(_HEAD, HEAD_TOKENS), item, *shared)


Requests = Iterator[TraceRequest]


def _zipf(dice: _Dice) -> Requests:
    """One picture and one question each."""
    options = dice.options
    rank, at = dice.zipf(options.media), 0.0
    for _ in range(options.requests):
        at += dice.gap(1 / options.rate) if options.rate else 0.0
        about = _about(options, f"m{rank()}")
        question, answer = dice.text(options.text_tokens), dice.text(options.output_tokens)
        yield TraceRequest(at, (*about, question), answer, dice.salt())


def _chat(dice: _Dice) -> Requests:
    """Conversations about a picture of their own; each turn repeats what was said."""
    options = dice.options
    at, left = 0.0, options.requests
    for number in itertools.count():
        if not left:
            return
        at += dice.gap(options.turns / options.rate) if options.rate else 0.0
        turns = min(dice.length(options.turns), left)
        left -= turns
        salt = dice.salt()
        said: list[Segment] = [*_about(options, f"c{number}")]
        for turn in range(turns):
            said.append(dice.text(dice.length(options.text_tokens)))
            answer = dice.text(dice.length(options.output_tokens))
            think = dice.gap(options.think) if turn else 0.0
            yield TraceRequest(at, tuple(said), answer, salt, f"chat{number}", turn, think)
            said.append(answer)


def _system_prompts(dice: _Dice) -> Requests:
    """Questions without media, behind one of some long instructions."""
    options = dice.options
    systems = [dice.text(dice.length(options.system_tokens)) for _ in range(options.systems)]
    rank, at = dice.zipf(options.systems), 0.0
    for _ in range(options.requests):
        at += dice.gap(1 / options.rate) if options.rate else 0.0
        question, answer = dice.text(dice.length(options.text_tokens)), dice.text(options.output_tokens)
        yield TraceRequest(at, (Text(_HEAD, HEAD_TOKENS), systems[rank()], question), answer, dice.salt())


def _mixed(dice: _Dice) -> Requests:
    """A third of each, the first with pictures, clips and videos of several sizes."""
    options = dice.options
    parts: list[TraceRequest] = []
    third = options.requests // 3
    counts = (options.requests - 2 * third, third, third)
    for number, (make, count) in enumerate(zip((_zipf, _chat, _system_prompts), counts, strict=True)):
        if count:
            own = replace(options, requests=count, rate=options.rate / 3, seed=(options.seed + number) % (MAX_SEED + 1))
            parts += make(_Dice(own))
    for request in sorted(parts, key=lambda r: r.at):
        segments = tuple(_sized(s) if isinstance(s, Media) and s.name[0] == "m" else s for s in request.segments)
        yield replace(request, segments=segments)


def _sized(item: Media) -> Media:
    kind, times = _SIZES[int(item.name[1:]) % len(_SIZES)]
    rows = max(round(item.rows * times), 1)
    return Media(item.name, rows, COST_PER_ROW * rows, kind)


KINDS: Mapping[str, Callable[[_Dice], Requests]] = {
    "zipf": _zipf, "chat": _chat, "system-prompts": _system_prompts, "mixed": _mixed,
}  # fmt: skip


def make_trace(kind: str, options: TraceOptions) -> Trace:
    """A trace of one of KINDS. Raises ConfigError for an unknown one, or options out of bounds."""
    if kind not in KINDS:
        raise ConfigError(f"--generate {kind}: there are {', '.join(KINDS)}.")
    options.check()
    requests = sorted(KINDS[kind](_Dice(options)), key=lambda r: r.at)  # stable: turns stay in order
    return Trace(tuple(requests), kind, options.seed)
