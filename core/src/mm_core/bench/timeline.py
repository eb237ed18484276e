"""What ran when: spans to a Chrome trace, and how much of the time the device worked and overlapped.

Tracks: "preprocess N" (a thread each), "encoder" and "decoder" (the device's streams), "engine" (the
loop's thread: schedule, launch, wait for the device, update). Spans share the clock of
`time.perf_counter_ns`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mm_core.tracing import Span

DEVICE_TRACKS = ("encoder", "decoder")
_ORDER = ("preprocess", "encoder", "decoder", "engine")

Interval = tuple[int, int]


def clipped(spans: Iterable[Span], start_ns: int, end_ns: int) -> list[Span]:
    """The spans, or their parts, inside a window, in order of their start."""
    inside = [
        replace(s, start_ns=max(s.start_ns, start_ns), end_ns=min(s.end_ns, end_ns))
        for s in spans
        if s.end_ns > start_ns and s.start_ns < end_ns
    ]
    return sorted(inside, key=lambda s: s.start_ns)


def union(spans: Iterable[Span]) -> list[Interval]:
    """Disjoint intervals in which at least one span runs, in order."""
    merged: list[Interval] = []
    for start, end in sorted((s.start_ns, s.end_ns) for s in spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def length(intervals: Iterable[Interval]) -> float:
    """Seconds covered by disjoint intervals."""
    return sum(end - start for start, end in intervals) / 1e9


def overlap_seconds(spans: Sequence[Span]) -> float:
    """Seconds in which encoder and decoder both run."""
    first, second = (union(s for s in spans if s.track == track) for track in DEVICE_TRACKS)
    both, i, j = 0, 0, 0
    while i < len(first) and j < len(second):
        both += max(0, min(first[i][1], second[j][1]) - max(first[i][0], second[j][0]))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return both / 1e9


def summary(spans: Sequence[Span], start_ns: int, end_ns: int) -> dict[str, Any]:
    """Busy fraction of the device in a window, where it idles, seconds a device track, overlap, and
    seconds by span name (sums, which may overlap)."""
    device = union(s for s in spans if s.track in DEVICE_TRACKS)
    names: dict[str, dict[str, float]] = {}
    for span in spans:
        entry = names.setdefault(span.name, {"spans": 0, "seconds": 0.0})
        entry["spans"] += 1
        entry["seconds"] += (span.end_ns - span.start_ns) / 1e9
    wall, busy = (end_ns - start_ns) / 1e9, length(device)
    found: dict[str, Any] = {"device_busy_s": busy, "device_busy_fraction": None, "device_idle_s": None}
    if device:
        first, last = (device[0][0] - start_ns) / 1e9, (end_ns - device[-1][1]) / 1e9
        found["device_busy_fraction"] = busy / wall
        found["device_idle_s"] = {"before": first, "between": wall - busy - first - last, "after": last}
    tracks = {track: length(union(s for s in spans if s.track == track)) for track in DEVICE_TRACKS}
    return found | {
        "device_tracks_s": tracks,
        "encoder_decoder_overlap_s": overlap_seconds(spans),
        "by_name": dict(sorted(names.items())),
    }


def chrome_trace(spans: Sequence[Span], origin_ns: int) -> dict[str, Any]:
    """The Trace Event Format: one process, a thread a track, complete ("X") events in microseconds
    from `origin_ns`. Perfetto and chrome://tracing open it."""
    tracks = sorted({s.track for s in spans}, key=track_order)
    numbers = {track: number for number, track in enumerate(tracks, 1)}
    events: list[dict[str, Any]] = [
        {"ph": "M", "pid": 1, "tid": 0, "name": "process_name", "args": {"name": "mm-core"}}
    ]
    for track, number in numbers.items():
        events.append({"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": track}})
        events.append({"ph": "M", "pid": 1, "tid": number, "name": "thread_sort_index", "args": {"sort_index": number}})
    for span in sorted(spans, key=lambda s: s.start_ns):
        events.append(
            {
                "ph": "X",
                "pid": 1,
                "tid": numbers[span.track],
                "name": span.name,
                "ts": (span.start_ns - origin_ns) / 1e3,
                "dur": (span.end_ns - span.start_ns) / 1e3,
                "args": dict(span.args),
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def track_order(track: str) -> tuple[int, str, int]:
    """Sort key of tracks: preprocessing threads by number, encoder, decoder, engine, others."""
    kind, _, number = track.partition(" ")
    place = _ORDER.index(kind) if kind in _ORDER else len(_ORDER)
    return place, kind, int(number) if number.isdigit() else 0


def write_trace(spans: Sequence[Span], origin_ns: int, path: Path) -> None:
    """Write the Chrome trace as JSON."""
    path.write_text(json.dumps(chrome_trace(spans, origin_ns)), encoding="utf-8")


def read_trace(path: Path) -> list[Span]:
    """The spans of a trace that `write_trace` wrote, on a clock that begins at its origin."""
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    return [
        Span(tracks[e["tid"]], e["name"], round(e["ts"] * 1e3), round((e["ts"] + e["dur"]) * 1e3), e["args"])
        for e in events
        if e["ph"] == "X"
    ]
