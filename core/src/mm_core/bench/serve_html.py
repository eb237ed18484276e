"""A page of one or several servers' results: tables and plots in one file that loads nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mm_core.bench import serve_svg as svg
from mm_core.bench.serve_figures import PERCENTILES
from mm_core.bench.serve_report import by_workload, result_text

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#777}
body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem}
h2{margin-top:2.5rem;border-bottom:1px solid var(--line)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(22rem,1fr));gap:1rem}
svg{width:100%;height:auto}svg .t{font:10px system-ui,sans-serif;fill:var(--soft)}
svg .h{font:600 12px system-ui,sans-serif;fill:currentColor}svg .g{stroke:var(--line);stroke-width:.6}
svg .w{fill:#c9971c}svg .a{fill:#3d6fb6}svg .f{fill:#c0392b}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .7rem;text-align:right;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}
pre{overflow-x:auto;font-size:12.5px;border:1px solid var(--line);padding:.7rem}.bad{color:#c0392b;font-weight:600}
.wrap{overflow-x:auto}p.note{color:var(--soft)}
"""
_SPANS = {"ttft_ms": "first token, ms", "inter_token_ms": "between tokens, ms", "e2e_ms": "whole answer, ms"}

Runs = Sequence[tuple[str, Mapping[str, Any]]]


def page(documents: Sequence[Mapping[str, Any]]) -> str:
    """The report of documents of `mm bench serve`, workloads with the same name side by side."""
    servers = "".join(
        f"<tr><td>{escape(str(each['label']))}</td><td>{escape(str(each['url']))}</td>"
        f"<td>{escape(str(each['model']))}</td><td>{escape(str(each['written']))}</td>"
        f"<td>{escape(', '.join(f'{k} {v}' for k, v in each['environment'].items()))}</td></tr>"
        for each in documents
    )
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>mm bench serve</title>',
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_STYLE}</style></head><body>',
        "<h1>Load on a server</h1>",
        '<div class="wrap"><table><tr><th>server</th><th>address</th><th>model</th><th>written</th>',
        "<th>client</th></tr>",
        f"{servers}</table></div>",
        *(_workload(name, runs) for name, runs in by_workload(documents).items()),
        '<p class="note">Times run from when a request was sent, connecting included, to events that bring text; '
        "failed requests are counted, and are in no percentile.</p></body></html>\n",
    ]
    return "".join(parts)


def _workload(name: str, runs: Runs) -> str:
    plots = [
        svg.lines("Requests without an answer", "seconds", _over_time(runs, "running"), step=True),
        svg.lines("Events with text a second", "seconds", _over_time(runs, "events_per_s"), step=True),
        *(_distribution(runs, key, title) for key, title in _SPANS.items()),
        *(_histogram(runs, key, title) for key, title in _SPANS.items()),
        *(svg.requests(f"Requests of {label}", _bars(figures)) for label, figures in runs),
    ]
    texts = "".join(
        f"<details><summary>{escape(label)}, in words</summary><pre>{escape(result_text(figures))}</pre></details>"
        for label, figures in runs
    )
    shown = "".join(f"<div>{plot}</div>" for plot in plots if plot)
    key = (
        '<p class="note">Of each request: '
        '<span style="color:#c9971c">waiting for its first text</span>, '
        '<span style="color:#3d6fb6">being answered</span>, <span class="bad">failed</span>.</p>'
    )
    return f'<h2>{escape(name)}</h2>{_table(runs)}{texts}<div class="plots">{shown}</div>{key}'


def _table(runs: Runs) -> str:
    names = [f"{short} p{p}" for short in ("ttft", "itl", "e2e") for p in PERCENTILES]
    head = ["server", "requests/s", "output tok/s", *names, "goodput", "failed", "client late"]
    rows = ["<tr>" + "".join(f"<th>{name}</th>" for name in head) + "</tr>"]
    for label, figures in runs:
        cells = [label, f"{figures['requests_per_s']:.2f}", f"{figures['output_tokens_per_s']:.0f}"]
        for key in _SPANS:
            cells += ["–" if figures[key] is None else f"{figures[key][f'p{p}']:.1f}" for p in PERCENTILES]
        goodput = figures["goodput"]
        cells.append("–" if goodput is None else f"{goodput['share']:.1%}")
        failed, late = figures["requests"]["failed"], figures["client"]["late"]
        row = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        row += f'<td class="{"bad" if failed else ""}">{failed}</td><td class="{"bad" if late else ""}">'
        rows.append(f"<tr>{row}{'yes' if late else 'no'}</td></tr>")
    return f'<div class="wrap"><table>{"".join(rows)}</table></div>'


def _over_time(runs: Runs, name: str) -> list[svg.Line]:
    found = []
    for label, figures in runs:
        curve, step = figures["curves"][name], figures["curves"]["step_s"]
        if any(curve):
            found.append(svg.Line(label, [place * step for place in range(len(curve))], curve))
    return found


def _distribution(runs: Runs, key: str, title: str) -> str:
    """Share of requests (or gaps) that took at most so long."""
    found = []
    for label, figures in runs:
        curve = figures["curves"][key]
        last = max(1, len(curve) - 1)
        found.append(svg.Line(label, curve, [100 * place / last for place in range(len(curve))]))
    return svg.lines(f"% of all that took at most … ({title})", title, found, log_x=True)


def _histogram(runs: Runs, key: str, title: str, bins: int = 40) -> str:
    """Shares in equal bins up to the largest p99, from the distributions."""
    most = max((figures[key]["p99"] for _, figures in runs if figures[key] is not None), default=0.0)
    if most <= 0:
        return ""
    found = []
    for label, figures in runs:
        curve = figures["curves"][key]
        counts = [0] * bins
        for value in curve:
            if value <= most:
                counts[min(bins - 1, int(value / most * bins))] += 1
        shares = [100 * count / max(1, len(curve)) for count in counts]
        found.append(svg.Line(label, [place * most / bins for place in range(bins)], shares))
    return svg.lines(f"% of all in each bin, up to p99 ({title})", title, found, step=True)


def _bars(figures: Mapping[str, Any]) -> list[svg.Bar]:
    bars = []
    for row in figures["records"]:
        r = dict(zip(figures["record_fields"], row, strict=True))
        told = f"request {r['number']}" + (f", turn {r['turn'] + 1}" if r["turn"] else "")
        told += f": sent at {r['sent']:.3f} s, ended at {r['ended']:.3f} s"
        if r["first"] is not None:
            told += f", first text after {(r['first'] - r['sent']) * 1e3:.1f} ms"
        if r["output"] is not None:
            told += f"; {r['prompt']} prompt tokens, {r['output']} output tokens"
        bars.append(
            svg.Bar(r["sent"], r["first"], r["ended"], r["error"] is not None, told + f"; {r['error'] or 'ok'}")
        )
    return bars
