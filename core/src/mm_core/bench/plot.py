"""One picture a result: what ran when, how many requests ran, and each phase beside its floor."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_core.bench.timeline import track_order
from mm_core.errors import MissingExtraError

if TYPE_CHECKING:
    from mm_core.bench.run import Result

_COLOURS = {
    "preprocess": "#8d99ae", "encode": "#e07a5f", "prefill": "#3d6fb6", "mixed": "#7b5ea7", "decode": "#2a9d8f",
    "schedule": "#e9c46a", "launch": "#f4845f", "update": "#bc8a5f", "wait": "#e5e5e5",
}  # fmt: skip
_OTHER = "#555555"


def plot(result: Result, about: str, path: Path) -> Path:
    """Write the PNG. Raises MissingExtraError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError(
            "Plots need matplotlib. Install it with `pip install 'mm-core[bench]'`; all else works without."
        ) from error
    figure = Figure(figsize=(13, 8), layout="constrained")
    FigureCanvasAgg(figure)
    lanes, running, bars = figure.subplots(3, 1, height_ratios=[4, 1.6, 2.4])
    _lanes(lanes, result)
    _running(running, result)
    running.sharex(lanes)
    _bars(bars, result)
    figures = result.figures
    figure.suptitle(
        f"{figures['workload']}: {figures['requests_per_s']:.1f} requests/s, {figures['seconds']:.3f} s; {about}",
        fontsize=11,
    )
    figure.savefig(path, dpi=110)
    return path


def _seconds(result: Result, nanoseconds: int) -> float:
    return (nanoseconds - result.start_ns) / 1e9


def _lanes(axes: Any, result: Result) -> None:
    tracks = sorted({s.track for s in result.spans}, key=track_order)
    named = set()
    for place, track in enumerate(tracks):
        for name in sorted({s.name for s in result.spans if s.track == track}):
            spans = [s for s in result.spans if s.track == track and s.name == name]
            bars = [(_seconds(result, s.start_ns), (s.end_ns - s.start_ns) / 1e9) for s in spans]
            label = None if name in named else name
            axes.broken_barh(bars, (place - 0.4, 0.8), facecolors=_COLOURS.get(name, _OTHER), label=label)
            named.add(name)
    axes.set_yticks(range(len(tracks)), tracks, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds")
    if named:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    else:
        axes.text(0.5, 0.5, "no timeline was recorded", ha="center", va="center", transform=axes.transAxes)


def _running(axes: Any, result: Result) -> None:
    steps = [s for s in result.spans if s.track == "decoder" and "sequences" in s.args]
    steps.sort(key=lambda s: s.start_ns)
    if steps:
        axes.step([_seconds(result, s.start_ns) for s in steps], [s.args["sequences"] for s in steps], where="post")
    axes.set_ylabel("sequences a step", fontsize=8)
    axes.set_xlabel("seconds")
    axes.set_ylim(bottom=0)


def _bars(axes: Any, result: Result) -> None:
    figures = result.figures
    measured = {name: phase["seconds"] for name, phase in figures.get("phases", {}).items()}
    floor = dict(figures["floor_s"])
    names = [*dict.fromkeys([*measured, *floor]), "whole run"]
    measured["whole run"], floor["whole run"] = figures["seconds"], sum(floor.values())
    places = range(len(names))
    for offset, values, label, colour in ((-0.2, measured, "measured", "#3d6fb6"), (0.2, floor, "floor", "#c9c9c9")):
        widths = [values.get(name, 0.0) for name in names]
        bars = axes.barh([place + offset for place in places], widths, 0.38, label=label, color=colour)
        axes.bar_label(bars, fmt="%.3f", fontsize=8, padding=2)
    axes.set_yticks(list(places), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("seconds of the device by phase (a mixed step has no floor of its own)")
    axes.legend(fontsize=8)
