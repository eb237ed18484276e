"""Figures of replays: a dict each, a table of all, a document for JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mm_core import __version__
from mm_core.bench.analysis import percentiles
from mm_core.bench.sim_costs import SimCosts
from mm_core.bench.simulate import Replay
from mm_core.bench.traces import Trace

LEVELS = ("device", "host", "disk", "computed")


def figures(replay: Replay) -> dict[str, Any]:
    """One replay's figures. tokens: of the prompts as they first began, by where they came from; seconds and
    milliseconds of the virtual clock."""
    setup, done = replay.setup, [r for r in replay.requests if r.error is None]
    prompt = sum(r.request.prompt_tokens for r in done)
    cached = sum(r.cached_tokens for r in done)
    host, disk = replay.counters.get("host_hits", 0), replay.counters.get("disk_hits", 0)
    tokens = {"device": cached - host - disk, "host": host, "disk": disk, "computed": prompt - cached}
    seconds = replay.seconds
    output = sum(len(r.token_ids) for r in done)
    return {
        "policy": setup.policy,
        "kv_tokens": setup.kv_tokens,
        "host_tokens": setup.host_tokens,
        "disk_tokens": setup.disk_tokens,
        "requests": len(done),
        "failed": len(replay.requests) - len(done),
        "seconds": seconds,
        "requests_per_s": len(done) / seconds if seconds else 0.0,
        "output_tokens_per_s": output / seconds if seconds else 0.0,
        "tokens": {"prompt": prompt, **tokens},
        "hit_rate": {level: tokens[level] / prompt if prompt else 0.0 for level in LEVELS},
        "media_rows": sum(r.request.media_rows for r in done),
        "encoded_rows": sum(r.encoded_rows for r in done),
        "ttft_ms": percentiles([(r.first - r.arrival) * 1e3 for r in done]),
        "request_ms": percentiles([(r.end - r.arrival) * 1e3 for r in done]),
        "preemptions": replay.counters["preemptions"],
        "device_busy": replay.device.busy_seconds / seconds if seconds else 0.0,
        "encoder_busy": replay.device.encoder_seconds / seconds if seconds else 0.0,
        "copied_bytes": dict(replay.device.copied),
        "counters": replay.counters,
    }


def document(trace: Trace, costs: SimCosts, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Everything, ready for JSON."""
    return {
        "schema_version": 1,
        "mm_core": __version__,
        "trace": {
            "kind": trace.kind,
            "seed": trace.seed,
            "requests": len(trace.requests),
            "media": len(trace.media),
            "prompt_tokens": sum(r.prompt_tokens for r in trace.requests),
            "output_tokens": sum(r.answer.tokens for r in trace.requests),
        },
        "costs": asdict(costs),
        "results": list(results),
    }


_HEAD = (
    "policy", "KV", "host", "disk", "hit", "device", "host", "disk", "computed", "req/s", "TTFT p50", "p99",
    "encoded", "preempted",
)  # fmt: skip


def table(results: Sequence[dict[str, Any]]) -> str:
    """One line a result: sizes in thousands of tokens, shares of the prompts' tokens, seconds to the first token,
    shares of media rows that were encoded (more than once: above 100 %)."""
    rows = [_HEAD, *map(_row, results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    shares, ttft = found["hit_rate"], found["ttft_ms"] or {"p50": 0.0, "p99": 0.0}
    rows = found["media_rows"]
    return (
        found["policy"],
        *(_thousands(found[name]) for name in ("kv_tokens", "host_tokens", "disk_tokens")),
        f"{1 - shares['computed']:.1%}",
        *(f"{shares[level]:.1%}" for level in LEVELS),
        f"{found['requests_per_s']:.2f}",
        f"{ttft['p50'] / 1e3:.3f} s",
        f"{ttft['p99'] / 1e3:.3f} s",
        f"{found['encoded_rows'] / rows:.1%}" if rows else "-",
        str(found["preemptions"]),
    )


def _thousands(tokens: int) -> str:
    return f"{tokens / 1000:g}k" if tokens else "-"
