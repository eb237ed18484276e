"""Results for people (text) and for programs (JSON)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mm_core.bench.analysis import PERCENTILES
from mm_core.bench.plot import plot
from mm_core.bench.run import Result, Session
from mm_core.bench.timeline import write_trace
from mm_core.errors import MissingExtraError
from mm_core.tracing import MAX_SPANS

SCHEMA_VERSION = 1


def document(session: Session, environment: Mapping[str, Any], results: Sequence[Result]) -> dict[str, Any]:
    """Everything a run found, for `--json`."""
    measured = session.measured
    stats = session.engine.stats()
    blocks = stats.get("blocks", {})
    return {
        "schema_version": SCHEMA_VERSION,
        "environment": dict(environment),
        "model": session.settings.model,
        "seed": session.settings.seed,
        "config": session.frontend.config.model_dump(mode="json"),
        "startup": {"seconds": session.startup_s, **(stats.get("startup") or {})},
        "kv_cache_tokens": sum(blocks.values()) * stats.get("block_size", 0),
        "ceilings": asdict(measured),
        "results": [result.figures for result in results],
    }


def write_json(found: Mapping[str, Any], path: Path) -> None:
    """Write a document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def write_report(result: Result, about: str, folder: Path) -> list[str]:
    """Trace and plot of one result; returns what to tell the user about each."""
    folder.mkdir(parents=True, exist_ok=True)
    told = []
    if result.spans:
        path = folder / f"{result.name}.trace.json"
        write_trace(result.spans, result.start_ns, path)
        told.append(f"timeline: {path} (open it in https://ui.perfetto.dev)")
    try:
        told.append(f"plot: {plot(result, about, folder / f'{result.name}.png')}")
    except MissingExtraError as error:
        told.append(f"no plot: {error}")
    return told


def startup_text(found: Mapping[str, Any]) -> str:
    """What was measured before the first workload."""
    facts, ceilings, start = found["environment"], found["ceilings"], dict(found["startup"])
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in start.items() if name != "seconds")
    return "\n".join(
        [
            f"{facts['device']}, torch {facts['torch']}, mm-core {facts['mm_core']}; model {Path(found['model']).name}",
            f"ceilings: copy {ceilings['copy_bandwidth'] / 1e12:.3g} TB/s, read "
            f"{ceilings['read_bandwidth'] / 1e12:.3g} TB/s, matmul {ceilings['matmul']} "
            f"{ceilings['matmul_flops'] / 1e12:.4g} TFLOP/s",
            f"ready in {start['seconds']:.1f} s{f' ({parts})' if parts else ''}; KV cache of "
            f"{found['kv_cache_tokens']:,} tokens",
        ]
    )


def result_text(figures: Mapping[str, Any]) -> str:
    """One result as a block of lines."""
    lines = [f"{figures['workload']} ({figures['kind']}): {figures['requests']} requests in {figures['seconds']:.3f} s"]
    lines += _rates(figures)
    labels = {"ttft_ms": "first token", "inter_token_ms": "between tokens", "per_token_ms": "per token"}
    for key, label in {**labels, "request_ms": "last token"}.items():
        if (found := figures.get(key)) is not None:
            shown = ", ".join(f"p{p} {found[f'p{p}']:.2f}" for p in PERCENTILES)
            lines.append(f"  {label:<15} {shown} ms (mean {found['mean']:.2f}, largest {found['max']:.2f})")
    lines += _reuse(figures) + _phases(figures)
    return "\n".join(lines)


def _rates(figures: Mapping[str, Any]) -> list[str]:
    floor, total = figures["floor_s"], sum(figures["floor_s"].values())
    parts = ", ".join(f"{phase} {seconds:.3f}" for phase, seconds in floor.items() if seconds)
    lines = [
        f"  {'rates':<15} {figures['requests_per_s']:.2f} requests/s, {figures['output_tokens_per_s']:.0f} output "
        f"tokens/s, {figures['total_tokens_per_s']:.0f} tokens/s in all",
        f"  {'floor':<15} {total:.3f} s ({parts}): {figures['floor_requests_per_s']:.2f} requests/s; "
        f"measured is {figures['seconds'] / total:.2f} × the floor",
    ]
    if single := figures.get("ttft_floor_ms"):
        lines.append(f"  {'floor, first':<15} {sum(single.values()):.2f} ms")
    return lines


def _reuse(figures: Mapping[str, Any]) -> list[str]:
    tokens, caches = figures["tokens"], figures["caches"]
    low, high = tokens["prompt_min"], tokens["prompt_max"]
    spread = f"{low} each" if low == high else f"{low} to {high} each"
    told = [
        f"  {'tokens':<15} {tokens['prompt']} of prompts ({spread}), {tokens['media']} of media, {tokens['output']} of "
        "output",
        f"  {'reuse':<15} {tokens['cached']} prompt tokens from the KV cache ({tokens['reusable']} could be); encoder "
        f"{caches['encoder_hits']} hits, {caches['encoded_items']} encoded; processor {caches['processor_hits']} hits, "
        f"{caches['processor_misses']} prepared",
    ]
    if caches.get("restored_tokens") is not None:
        restored = f"{caches['restored_tokens']} tokens and {caches['restored_items']} items"
        told.append(f"  {'':<15} copied back from behind the device: {restored}")
    return told


def _phases(figures: Mapping[str, Any]) -> list[str]:
    if "timeline" not in figures:
        return []
    found, floor = figures["timeline"], figures["floor_s"]
    lines = []
    if (idle := found["device_idle_s"]) is not None:
        tracks = found["device_tracks_s"]
        lines = [
            f"  {'device':<15} busy {found['device_busy_fraction']:.1%}; idle {idle['before']:.3f} s before the first "
            f"launch, {idle['between']:.3f} between, {idle['after']:.3f} after the last",
            f"  {'':<15} encoder {tracks['encoder']:.3f} s (floor {floor['encode']:.3f}), decoder "
            f"{tracks['decoder']:.3f} s (floor {floor['prefill'] + floor['decode']:.3f}), both at once "
            f"{found['encoder_decoder_overlap_s']:.3f} s",
        ]
    lines += _loop(found["by_name"], figures["engine"]["steps"])
    for name, phase in figures["phases"].items():
        line = f"  {name:<15} {phase['seconds']:.3f} s (floor {floor.get(name, 0.0):.3f}) in {phase['spans']} launches"
        if phase["tflops"]:  # 0: the plugin has no formula, so nothing is known of them
            line += (
                f", {phase['tflops']:.4g} TFLOP/s ({phase['tflops_share']:.0%}), {phase['tbs']:.3g} TB/s "
                f"({phase['tbs_share']:.0%})"
            )
        lines.append(line)
    if dropped := found["dropped_spans"]:
        lines.append(
            f"  {'warning':<15} {dropped:,} spans came after the first {MAX_SPANS:,} and were dropped: device, loop "
            "and phases leave them out"
        )
    return lines


def _loop(names: Mapping[str, Any], steps: int | None) -> list[str]:
    """What the engine's thread did a step, on average."""
    parts = {name: names[name]["seconds"] for name in ("schedule", "launch", "update", "wait") if name in names}
    if not parts or not steps:
        return []
    shown = ", ".join(f"{name} {seconds / steps * 1e3:.2f}" for name, seconds in parts.items())
    return [f"  {'loop, a step':<15} {shown} ms ({steps} steps)"]
