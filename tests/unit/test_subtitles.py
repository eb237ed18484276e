"""Subtitles: the two formats, and what must not break them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_core.server.subtitles import timestamp, to_srt, to_vtt

TALK = [(0.0, 2.5, " Hello there."), (2.5, 3661.042, "  How are you?\nFine. ")]
SRT = """1
00:00:00,000 --> 00:00:02,500
Hello there.

2
00:00:02,500 --> 01:01:01,042
How are you?
Fine.

"""
VTT = """WEBVTT

00:00:00.000 --> 00:00:02.500
Hello there.

00:00:02.500 --> 01:01:01.042
How are you?
Fine.

"""


def test_both_formats() -> None:
    assert to_srt(TALK) == SRT
    assert to_vtt(TALK) == VTT


def test_nothing_said() -> None:
    for segments in ([], [(0.0, 1.0, ""), (1.0, 2.0, " \n\t ")]):
        assert to_srt(segments) == ""
        assert to_vtt(segments) == "WEBVTT\n\n"


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0, "00:00:00,000"), (999, "00:00:00,999"), (59_999, "00:00:59,999"), (60_000, "00:01:00,000"),
     (3_599_999, "00:59:59,999"), (99 * 3_600_000, "99:00:00,000"), (100 * 3_600_000 + 1, "100:00:00,001")],
)  # fmt: skip
def test_timestamps(milliseconds: int, text: str) -> None:
    assert timestamp(milliseconds, ",") == text


def test_times_are_rounded_to_the_nearest_millisecond() -> None:
    assert "00:00:01,001 --> 00:00:02,000" in to_srt([(1.0006, 1.9999, "a")])


@pytest.mark.parametrize("end", [5.0, 4.0, -1.0, math.nan, math.inf])
def test_a_cue_ends_after_it_begins(end: float) -> None:
    assert to_srt([(5.0, end, "a")]).splitlines()[1] == "00:00:05,000 --> 00:00:05,001"


@pytest.mark.parametrize("start", [-3.0, math.nan, -math.inf])
def test_no_cue_begins_before_the_sound(start: float) -> None:
    assert to_vtt([(start, 2.0, "a")]).splitlines()[2] == "00:00:00.000 --> 00:00:02.000"


def test_cues_come_in_order_and_may_overlap() -> None:
    lines = to_srt([(3.0, 4.0, "c"), (0.0, 5.0, "a"), (1.0, 2.0, "b"), (1.0, 3.0, "b again")]).splitlines()
    assert [line for line in lines if line.isalpha() or " again" in line] == ["a", "b", "b again", "c"]
    assert lines[1] == "00:00:00,000 --> 00:00:05,000"
    assert [line for line in lines if line.isdigit()] == ["1", "2", "3", "4"]


def test_text_is_no_markup() -> None:
    said = [(0.0, 1.0, "a --> b ---> c <i>d</i> & e")]
    assert to_srt(said).splitlines()[2] == "a -> b -> c <i>d</i> & e"
    assert to_vtt(said).splitlines()[3] == "a --&gt; b ---&gt; c &lt;i&gt;d&lt;/i&gt; &amp; e"


def test_text_cannot_end_its_cue() -> None:
    forged = "one\r\n\r\n2\n00:00:00,000 --> 00:00:09,000\n\u2028\u2029\x0b\x0c\x85\nforged\0"
    assert to_srt([(0.0, 1.0, forged)]).count(" --> ") == 1
    assert "\n\n" not in to_srt([(0.0, 1.0, forged)])[:-2]
    vtt = to_vtt([(0.0, 1.0, forged)])
    assert vtt.count("-->") == 1
    assert "\0" not in vtt


_SPAN = re.compile(r"(\d{2,}):([0-5]\d):([0-5]\d)\.(\d{3}) --> (\d{2,}):([0-5]\d):([0-5]\d)\.(\d{3})")


def read_vtt(text: str) -> list[tuple[int, int, list[str]]]:
    """A strict reader: header, then cues between blank lines."""
    head, *blocks = text.split("\n\n")
    assert (head, blocks.pop()) == ("WEBVTT", "")
    cues = []
    for block in blocks:
        times, *lines = block.split("\n")
        match = _SPAN.fullmatch(times)
        assert match, times
        h, m, s, ms, *rest = map(int, match.groups())
        end = ((rest[0] * 60 + rest[1]) * 60 + rest[2]) * 1000 + rest[3]
        cues.append((((h * 60 + m) * 60 + s) * 1000 + ms, end, lines))
    return cues


@given(st.lists(st.tuples(st.floats(), st.floats(), st.text())))
def test_whatever_is_said_can_be_read_again(segments: Sequence[tuple[float, float, str]]) -> None:
    segments = [(min(s, 1e9), min(e, 1e9), text) for s, e, text in segments]
    cues = read_vtt(to_vtt(segments))
    assert len(cues) == len([1 for *_, text in segments if any(map(str.strip, text.splitlines()))])
    assert [start for start, *_ in cues] == sorted(start for start, *_ in cues)
    for start, end, lines in cues:
        assert end > start
        assert lines
        assert all(line.strip() for line in lines)
    assert to_srt(segments).count(" --> ") == len(cues)
