"""What `mm bench serve` found, for people (text) and for programs (JSON); and such files read again."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_core import __version__
from mm_core.bench.serve_figures import PERCENTILES
from mm_core.errors import DatasetError

SCHEMA_VERSION = 1
KIND = "mm bench serve"
_ROWS = {
    "ttft_ms": "first token", "inter_token_ms": "between tokens", "per_token_ms": "per token", "e2e_ms": "whole answer",
}  # fmt: skip


def document(label: str, url: str, model: str, results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that was found on one server."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "label": label,
        "url": url,
        "model": model,
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "environment": {"mm_core": __version__, "python": platform.python_version(), "client": platform.platform()},
        "results": list(results),
    }


def read_document(path: Path) -> dict[str, Any]:
    """A file that `--json` wrote. Raises DatasetError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"--compare {path} cannot be read ({type(error).__name__}).") from error
    if not isinstance(found, dict) or found.get("kind") != KIND or found.get("schema_version") != SCHEMA_VERSION:
        raise DatasetError(f"--compare {path} was not written by this version's `mm bench serve --json`.")
    return found


def result_text(figures: Mapping[str, Any]) -> str:
    """One result as a block of lines."""
    requests, load, tokens = figures["requests"], figures["load"], figures["tokens"]
    pace = "all at once" if load["rate"] is None else f"{load['rate']:g} a second"
    if load["rate"] is not None and load["burstiness"] != 1.0:
        pace += f", burstiness {load['burstiness']:g}"
    lines = [
        f"{figures['workload']}: {requests['sent']} requests, {pace}, in {figures['seconds']:.3f} s; "
        f"{requests['good']} answered, {requests['failed']} failed",
        f"  {'rates':<15} {figures['requests_per_s']:.2f} requests/s, {figures['output_tokens_per_s']:.0f} output "
        f"tokens/s, {figures['total_tokens_per_s']:.0f} tokens/s in all",
    ]
    for key, name in _ROWS.items():
        if (found := figures[key]) is not None:
            shown = ", ".join(f"p{p} {found[f'p{p}']:.2f}" for p in PERCENTILES)
            lines.append(f"  {name:<15} {shown} ms (mean {found['mean']:.2f}, largest {found['max']:.2f})")
    lines.append(f"  {'tokens':<15} {_tokens_text(tokens)}")
    for number, turn in enumerate(figures["turns"] or ()):
        if turn["ttft_ms"] is not None:
            lines.append(
                f"  {f'turn {number + 1}':<15} first token p50 {turn['ttft_ms']['p50']:.2f}, p99 "
                f"{turn['ttft_ms']['p99']:.2f} ms; {turn['cached']} of {turn['prompt']} prompt tokens from a cache"
            )
    return "\n".join([*lines, *_goodput_text(figures["goodput"]), *_errors_text(figures), *_client_text(figures)])


def _tokens_text(tokens: Mapping[str, Any]) -> str:
    low, high = tokens["prompt_min"], tokens["prompt_max"]
    spread = f"{low} each" if low == high else f"{low} to {high} each"
    told = [f"{tokens['prompt']} of prompts ({spread})" if low is not None else "prompts not told"]
    if tokens["cached"] is not None:
        told.append(f"{tokens['cached']} of them from a cache")
    told.append(f"{tokens['output']} of output")
    if tokens["an_event"] is not None:
        told.append(f"{tokens['an_event']:.2f} an event")
    if tokens["without_usage"]:
        told.append(f"{tokens['without_usage']} answers without usage, whose events are counted")
    if tokens["without_text"]:
        told.append(f"{tokens['without_text']} answers without text, which have no first token")
    if tokens["short"]:
        told.append(f"{tokens['short']} answers SHORTER than asked for")
    return ", ".join(told)


def _goodput_text(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    limits = ", ".join(f"{name} ≤ {limit:g} ms" for name, limit in found["objectives_ms"].items())
    kept = f"{found['met']} ({found['share']:.1%}) keep {limits}"
    lines = [f"  {'goodput':<15} {found['requests_per_s']:.2f} requests/s: {kept}"]
    for name, count in found["unmeasured"].items():
        if count:
            told = f"{name} could not be measured for {count} of {found['answers']} answers; they keep no bound"
            lines.append(f"  {'note':<15} {told}")
    return lines


def _errors_text(figures: Mapping[str, Any]) -> list[str]:
    lines = []
    for kind, found in figures["errors"].items():
        told = f": {found['told'][0]}" if found["told"] else ""
        lines.append(f"  {'failed':<15} {found['count']} × {kind}{told}")
    return lines


def _client_text(figures: Mapping[str, Any]) -> list[str]:
    client, health = figures["client"], figures["health"]
    lines = []
    if health is not None and health["latency_ms"] is not None:
        found = health["latency_ms"]
        statuses = ", ".join(f"{count} × {status}" for status, count in health["statuses"].items())
        lines.append(
            f"  {health['path'][:15]:<15} p50 {found['p50']:.2f}, p99 {found['p99']:.2f}, largest "
            f"{found['max']:.2f} ms ({statuses})"
        )
    lag, loop = client["lag_ms"], client["loop_delay_ms"]
    told = [] if lag is None else [f"requests sent late by p50 {lag['p50']:.2f}, p99 {lag['p99']:.2f} ms"]
    told += [] if loop is None else [f"its loop by p99 {loop['p99']:.2f} ms"]
    if client["held_ms"] is not None:
        told.append(f"{client['held_ms']['count']} held back by --max-concurrency")
    share = client["cpu_s"] / figures["seconds"] if figures["seconds"] else 0.0
    lines.append(f"  {'client':<15} {', '.join([*told, f'{share:.0%} of a processor'])}")
    if client["late"]:
        lines.append(
            f"  {'warning':<15} the client could not keep up: some of these times are its own. Use --processes, or a "
            "machine with less to do"
        )
    return lines


def comparison_text(documents: Sequence[Mapping[str, Any]]) -> str:
    """Servers side by side, a block a workload."""
    blocks = []
    for name, runs in by_workload(documents).items():
        head = ["", "requests/s", "tokens/s", "ttft p50", "p99", "itl p50", "p99", "e2e p50", "p99", "failed"]
        rows = [[label, *cells(figures)] for label, figures in runs]
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        lines = ["  ".join(cell.rjust(widths[i]) if i else cell.ljust(widths[i]) for i, cell in enumerate(row))
                 for row in [head, *rows]]  # fmt: skip
        blocks.append("\n".join([f"{name} (ms)", *("  " + line for line in lines)]))
    return "\n\n".join(blocks)


def cells(figures: Mapping[str, Any]) -> list[str]:
    """The figures of a comparison's row."""
    found = [f"{figures['requests_per_s']:.2f}", f"{figures['output_tokens_per_s']:.0f}"]
    for key in ("ttft_ms", "inter_token_ms", "e2e_ms"):
        spread = figures[key] or {"p50": math.nan, "p99": math.nan}
        found += ["-" if math.isnan(spread[p]) else f"{spread[p]:.1f}" for p in ("p50", "p99")]
    return [*found, str(figures["requests"]["failed"])]


def by_workload(documents: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[str, Mapping[str, Any]]]]:
    """Results with their servers' labels; labels that occur again are numbered."""
    found: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for each in documents:
        for figures in each["results"]:
            runs = found.setdefault(figures["workload"], [])
            label, taken = each["label"], {label for label, _ in runs}
            number = 2
            while label in taken:
                label, number = f"{each['label']} ({number})", number + 1
            runs.append((label, figures))
    return found
