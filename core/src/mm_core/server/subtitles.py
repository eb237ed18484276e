"""Segments of speech as SubRip (.srt) and WebVTT (.vtt) text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_LEAST_MS = 1  # WebVTT 4.1: a cue ends after it begins


Spoken = tuple[float, float, str]
"""Begin and end in seconds, and what was said."""


class Cue(NamedTuple):
    """start, end: in whole milliseconds, end > start. lines: at least one, none empty."""

    start: int
    end: int
    lines: tuple[str, ...]


def to_srt(segments: Iterable[Spoken]) -> str:
    """SubRip: numbered cues. The format has no escapes: an arrow in the text is written with one dash."""
    return "".join(
        f"{number}\n{_span(cue, ',')}\n{_arrowless(cue.lines)}\n\n" for number, cue in enumerate(_cues(segments), 1)
    )


def to_vtt(segments: Iterable[Spoken]) -> str:
    """WebVTT. `&`, `<` and `>` are escaped, so that no text is read as markup, or as a cue's times."""
    cues = (f"{_span(cue, '.')}\n{_escaped(cue.lines)}\n\n" for cue in _cues(segments))
    return "WEBVTT\n\n" + "".join(cues)


def timestamp(milliseconds: int, mark: str) -> str:
    """hh:mm:ss and the milliseconds behind `mark`; hours take as many digits as they need."""
    seconds, ms = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{mark}{ms:03}"


def _cues(segments: Iterable[Spoken]) -> Iterator[Cue]:
    """Segments with text, in the order they begin in. Those that overlap stay so: both were heard. One that ends
    where it begins, or before, is shown for the shortest time there is."""
    cues = []
    for begin, end, text in segments:
        # A blank line would end the cue.
        lines = tuple(line for line in map(str.strip, text.replace("\0", "\ufffd").splitlines()) if line)
        if lines:
            start = _milliseconds(begin)
            cues.append(Cue(start, max(_milliseconds(end), start + _LEAST_MS), lines))
    return iter(sorted(cues, key=lambda cue: cue.start))


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000) if math.isfinite(seconds) and seconds > 0 else 0


def _span(cue: Cue, mark: str) -> str:
    return f"{timestamp(cue.start, mark)} --> {timestamp(cue.end, mark)}"


def _arrowless(lines: tuple[str, ...]) -> str:
    text = "\n".join(lines)
    while "-->" in text:
        text = text.replace("-->", "->")
    return text


def _escaped(lines: tuple[str, ...]) -> str:
    return "\n".join(lines).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
