"""Requests of a world without tensors, and what a lone run of each gives."""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from mm_core.config import SamplingParams
from mm_core.types import MediaFeature, PlaceholderRange, PreparedRequest, Source

VOCAB = 50
IMAGE = 7


def feature(name: str, rows: int, cost: int | None = None) -> MediaFeature:
    return MediaFeature("image", rows, {}, {"cost": rows * 4 if cost is None else cost}, name.encode())


def make_request(
    request_id: str, parts: Iterable[int | MediaFeature], params: SamplingParams | None = None, **extra: object
) -> PreparedRequest:
    """parts: token ids and media, in prompt order."""
    ids: list[int] = []
    ranges: list[PlaceholderRange] = []
    for part in parts:
        if isinstance(part, MediaFeature):
            ranges.append(PlaceholderRange(len(ids), part.num_tokens, (True,) * part.num_tokens, part))
            ids += [IMAGE] * part.num_tokens
        else:
            ids.append(part)
    params = params or SamplingParams(max_tokens=4, temperature=0)
    return PreparedRequest(request_id, tuple(ids), params, tuple(ranges), **extra)  # type: ignore[arg-type]


def make_source(parts: Iterable[int | MediaFeature]) -> Source:
    """What cross-attention reads: media alone, or text and media of a text encoder."""
    request = make_request("", parts := list(parts))
    key = repr([p.key if isinstance(p, MediaFeature) else p for p in parts]).encode()
    if IMAGE in request.token_ids and not any(isinstance(p, int) for p in parts):
        ranges = tuple(PlaceholderRange(0, 0, (), r.feature) for r in request.ranges)
        return Source(key, len(request.token_ids), (), ranges)
    return Source(key, len(request.token_ids), request.token_ids, request.ranges)


def make_answer(
    request_id: str, source: Source, prompt: Iterable[int] = (8,), params: SamplingParams | None = None
) -> PreparedRequest:
    """A request whose decoder begins with `prompt` and attends to `source`."""
    return make_request(request_id, prompt, params, source=source, kv_context=source.key)


class Truth:
    """What a lone run of a request gives: the chain of every token, and every output token."""

    def __init__(self, request: PreparedRequest) -> None:
        self._contents = [str(token) for token in request.token_ids]
        for r in request.ranges:
            self._contents[r.offset : r.end] = [f"{r.feature.key!r}:{i}" for i in range(r.length)]
        if request.source is not None:
            self._contents[0] += f"|{request.source.key!r}"
        self._shift = 0 if request.positions is None else request.decode_delta
        if request.positions is not None:
            for index, place in enumerate(request.positions.T.tolist()):
                if place != [index] * len(place):
                    self._contents[index] += f"@{place}"
        self._prompt_len = len(request.token_ids)
        self._chains: list[int] = []
        self.tokens: list[int] = []

    def chain(self, position: int) -> int:
        while len(self._chains) <= position:
            before = self._chains[-1] if self._chains else 0
            if len(self._chains) == len(self._contents):
                content, place = str(self.token(len(self._contents) - self._prompt_len)), len(self._contents)
                self._contents.append(f"{content}@{[place + self._shift] * 3}" if self._shift else content)
            self._chains.append(zlib.crc32(f"{before}|{self._contents[len(self._chains)]}".encode()))
        return self._chains[position]

    def token(self, index: int) -> int:
        """Output token `index`."""
        while len(self.tokens) <= index:
            self.tokens.append(8 + self.chain(self._prompt_len + len(self.tokens) - 1) % (VOCAB - 8))
        return self.tokens[index]


def expected_tokens(request: PreparedRequest, limit: int) -> list[int]:
    truth = Truth(request)
    return [truth.token(i) for i in range(limit)]
