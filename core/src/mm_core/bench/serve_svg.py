"""Small plots as SVG text: lines over linear or logarithmic axes, and bars of requests. Text has the page's colour."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#3d6fb6", "#e07a5f", "#2a9d8f", "#9a6fc2", "#c9971c", "#7d8ca3")
WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 26, 34


@dataclass(frozen=True)
class Line:
    """Points of one series, in the axes' units."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]


@dataclass(frozen=True)
class Bar:
    """One request's life: sent, first text (None: none was seen), end, in seconds; told on hovering."""

    sent: float
    first: float | None
    ended: float
    failed: bool
    told: str


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers in [low, high]; none on an axis without a length."""
    if high <= low:
        return []
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [place * step for place in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten in [low, high]; powers alone where those are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
    found = [tick for tick in every if low * 0.999 <= tick <= high * 1.001]
    return found if len(found) <= 9 else [10.0**power for power in powers if low * 0.999 <= 10.0**power <= high * 1.001]


def _number(value: float) -> str:
    return f"{value:,.10g}" if abs(value) < 1e6 else f"{value:.3g}"


def _text(x: float, y: float, text: str, anchor: str = "middle", kind: str = "t") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        """Its place in the picture."""
        if self.log:
            value, low, high = (math.log10(max(v, self.low)) for v in (value, self.low, self.high))
        else:
            low, high = self.low, self.high
        return self.start + (self.end - self.start) * ((value - low) / (high - low) if high > low else 0.5)

    @property
    def ticks(self) -> list[float]:
        """Where numbers stand."""
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high)


def _frame(title: str, x: _Axis, y: _Axis, x_label: str, height: int) -> list[str]:
    parts = [_text(LEFT, 15, title, "start", "h"), _text((LEFT + WIDTH - RIGHT) / 2, height - 4, x_label)]
    for tick in x.ticks:
        at = x.at(tick)
        parts.append(f'<line class="g" x1="{at:.1f}" x2="{at:.1f}" y1="{y.end:.1f}" y2="{y.start:.1f}"/>')
        parts.append(_text(at, y.start + 13, _number(tick)))
    for tick in y.ticks:
        at = y.at(tick)
        parts.append(f'<line class="g" x1="{x.start:.1f}" x2="{x.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_text(x.start - 5, at + 3.5, _number(tick), "end"))
    return parts


def _svg(parts: Sequence[str], title: str, height: int) -> str:
    named = f'role="img" aria-label="{escape(title, quote=True)}"'
    return f'<svg viewBox="0 0 {WIDTH} {height}" {named}>{"".join(parts)}</svg>'


def lines(title: str, x_label: str, series: Sequence[Line], *, log_x: bool = False, step: bool = False) -> str:
    """A plot of lines, with a legend where there are several; "" where there is nothing to draw."""
    series = [line for line in series if len(line.xs) > 0]
    xs = [v for line in series for v in line.xs if not log_x or v > 0]
    if not xs:
        return ""
    low, high = min(xs), max(xs)
    if log_x:
        low, high = low / 1.05, max(high * 1.05, low * 1.2)
    x = _Axis(low, high if high > low else low + 1, LEFT, WIDTH - RIGHT, log_x)
    y = _Axis(0.0, max((v for line in series for v in line.ys), default=1.0) or 1.0, HEIGHT - BOTTOM, TOP)
    parts = _frame(title, x, y, x_label, HEIGHT)
    for number, line in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        places: list[str] = []
        before: float | None = None
        for px, py in zip(line.xs, line.ys, strict=True):
            if step and before is not None:
                places.append(f"{x.at(px):.1f},{before:.1f}")
            before = y.at(py)
            places.append(f"{x.at(px):.1f},{before:.1f}")
        parts.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.6" points="{" ".join(places)}"/>')
        if len(series) > 1:
            top = TOP + 12 + 14 * number
            parts.append(f'<rect x="{WIDTH - 150}" y="{top - 8}" width="12" height="8" fill="{colour}"/>')
            parts.append(_text(WIDTH - 133, top, line.label[:24], "start"))
    return _svg(parts, title, HEIGHT)


def requests(title: str, bars: Sequence[Bar], most: int = 300) -> str:
    """A line a request: waiting for its first text, then being answered. Of many, every so manieth is drawn."""
    if not bars:
        return ""
    every = max(1, math.ceil(len(bars) / most))
    shown = sorted(bars, key=lambda bar: bar.sent)[::every]
    if every > 1:
        title = f"{title}; one in {every} is drawn"
    thick = max(1.5, min(6.0, 420 / len(shown)))
    height = int(TOP + BOTTOM + thick * len(shown))
    x = _Axis(0.0, max(bar.ended for bar in shown) or 1.0, LEFT, WIDTH - RIGHT)
    y = _Axis(0.0, float(len(shown)), TOP, height - BOTTOM)
    parts = _frame(title, x, _Axis(0.0, 0.0, height - BOTTOM, TOP), "seconds", height)
    for place, bar in enumerate(shown):
        top, tall = y.at(place), max(1.0, thick - 0.6)
        first = bar.ended if bar.first is None else bar.first
        begin, middle, end = x.at(bar.sent), x.at(first), x.at(bar.ended)
        waiting = "f" if bar.failed else "w"
        cells = [f'<rect class="{waiting}" x="{begin:.1f}" y="{top:.1f}" width="{max(0.5, middle - begin):.1f}" '
                 f'height="{tall:.1f}"/>']  # fmt: skip
        if end > middle:
            kind = "f" if bar.failed else "a"
            cells.append(
                f'<rect class="{kind}" x="{middle:.1f}" y="{top:.1f}" width="{end - middle:.1f}" height="{tall:.1f}"/>'
            )
        parts.append(f"<g><title>{escape(bar.told)}</title>{''.join(cells)}</g>")
    return _svg(parts, title, height)
