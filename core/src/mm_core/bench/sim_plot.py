"""A picture of replays: hit rate, throughput and time to the first token against cache size, by policy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_core.errors import ConfigError, MissingExtraError

_SIZES = {"kv_tokens": "KV cache", "host_tokens": "host tier", "disk_tokens": "disk tier"}
_COLOURS = ("#3d6fb6", "#e07a5f", "#2a9d8f", "#7b5ea7", "#e9c46a", "#8d99ae")
_MARKERS = "os^Dvx"

Result = Mapping[str, Any]


def check_plots() -> None:
    """Raise MissingExtraError without matplotlib."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "Plots need matplotlib. Install it with `pip install 'mm-core[bench]'`; all else works without."
        ) from error


def plot(results: Sequence[Result], about: str, path: Path) -> Path:
    """Write the PNG."""
    check_plots()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    along = max(_SIZES, key=lambda name: len({r[name] for r in results}))
    for number, (label, series) in enumerate(_series(results, along).items()):
        places = [r[along] / 1000 for r in series]
        style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)], "ms": 4}
        panels[0].plot(places, [100 * (1 - r["hit_rate"]["computed"]) for r in series], label=label, **style)
        panels[1].plot(places, [r["requests_per_s"] for r in series], **style)
        for percentile, line in (("p50", "-"), ("p99", ":")):
            values = [r["ttft_ms"][percentile] / 1e3 for r in series if r["ttft_ms"]]
            panels[2].plot(places[: len(values)], values, linestyle=line, **style)
    for axes, title in zip(panels, ("prompt tokens from a cache, %", "requests/s", "first token, s"), strict=True):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(f"{_SIZES[along]}, thousands of tokens", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    panels[1].set_ylim(0, 1.1 * max([r["requests_per_s"] for r in results], default=0) or 1)
    panels[2].set_yscale("log")
    panels[2].text(0.98, 0.97, "solid p50, dotted p99", fontsize=7, ha="right", va="top", transform=panels[2].transAxes)
    figure.suptitle(about, fontsize=9)
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        text = f"--plot {path} cannot be written ({type(error).__name__}). Name a .png file."
        raise ConfigError(text) from error
    return path


def _series(results: Sequence[Result], along: str) -> dict[str, list[Result]]:
    """Results that differ in `along` alone, by what sets them apart from the others."""
    others = [name for name in _SIZES if name != along and len({r[name] for r in results}) > 1]
    found: dict[str, list[Result]] = {}
    for result in results:
        sizes = [f"{_SIZES[name]} {result[name] / 1000:g}k" for name in others]
        found.setdefault(", ".join([result["policy"], *sizes]), []).append(result)
    return {label: sorted(series, key=lambda r: int(r[along])) for label, series in found.items()}
