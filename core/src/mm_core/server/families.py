"""Metric families of the engine's and the gate's counters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
    SummaryMetricFamily,
)

from mm_core.engine.health import EngineState
from mm_core.server.histogram import Histogram
from mm_core.server.snapshots import Snapshots

if TYPE_CHECKING:
    from mm_core.engine.health import EngineHealth
    from mm_core.server.gate import Gate

PREFIX = "mm:"
Values = float | Mapping[Any, float]
"""One number, or numbers by tuples of labels' values."""


class Families:
    """Makes families that all have the label model_name."""

    def __init__(self, model_name: str) -> None:
        self._model = model_name

    def counter(self, name: str, text: str, values: Values, labels: Sequence[str] = ()) -> Metric:
        """A counter; its samples end in _total."""
        return self._filled(CounterMetricFamily(PREFIX + name, text, labels=("model_name", *labels)), values)

    def gauge(self, name: str, text: str, values: Values, labels: Sequence[str] = ()) -> Metric:
        """A value that rises and falls."""
        return self._filled(GaugeMetricFamily(PREFIX + name, text, labels=("model_name", *labels)), values)

    def histogram(self, name: str, text: str, found: Histogram) -> Metric:
        """Times."""
        family = HistogramMetricFamily(PREFIX + name, text, labels=("model_name",))
        family.add_metric((self._model,), found.buckets(), found.total)
        return family

    def summary(
        self, name: str, text: str, values: Mapping[Any, tuple[float, float]], labels: Sequence[str] = ()
    ) -> Metric:
        """Counts and sums."""
        family = SummaryMetricFamily(PREFIX + name, text, labels=("model_name", *labels))
        for given, (count, total) in values.items():
            family.add_metric((self._model, *given), int(count), total)
        return family

    def _filled(self, family: Any, values: Values) -> Metric:
        for given, value in values.items() if isinstance(values, Mapping) else [((), values)]:
            family.add_metric((self._model, *given), value)
        return family  # type: ignore[no-any-return]


def kv_usage(blocks: Mapping[str, int]) -> float:
    """The share of KV blocks that nothing else could have now: cached ones can be evicted."""
    return 1.0 - (blocks.get("free", 0) + blocks.get("cached", 0)) / max(sum(blocks.values()), 1)


def is_idle(stats: Mapping[str, Any]) -> bool:
    """Whether the engine has nothing to do."""
    return not any(stats.get(name, 0) for name in ("running", "waiting", "steps_in_flight"))


def leaked_blocks(stats: Mapping[str, Any]) -> int:
    """KV blocks that somebody seems to hold while the engine has nothing to do."""
    return int(stats.get("blocks", {}).get("in_use", 0)) if is_idle(stats) else 0


def engine_families(
    families: Families, snapshots: Snapshots, health: EngineHealth, waiting_outside: int
) -> Iterator[Metric]:
    """waiting_outside: calls that wait before the engine."""
    gauge, counter, stats = families.gauge, families.counter, snapshots.latest
    states = {(state,): float(health.state == state) for state in get_args(EngineState)}
    yield gauge("engine_up", "1 while the engine serves.", float(health.ready))
    yield gauge("engine_state", "1 for the state that it is in.", states, ("state",))
    yield counter("engine_restarts", "Starts of the engine's process beyond the first.", health.restarts)
    yield gauge("num_requests_running", "Answers that are being made.", stats.get("running", 0))
    yield gauge(
        "num_requests_waiting", "Calls in the gate's queue and requests in the engine's.",
        stats.get("waiting", 0) + waiting_outside,
    )  # fmt: skip
    blocks = stats.get("blocks", {})
    yield gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1.", kv_usage(blocks) if blocks else 0.0)
    yield gauge("kv_blocks", "KV blocks by state.", {(name,): n for name, n in blocks.items()}, ("state",))
    yield gauge("leaked_blocks", "KV blocks in use though the engine has nothing to do.", leaked_blocks(stats))
    yield from _token_families(families, snapshots)
    yield from _media_families(families, snapshots)


def _token_families(families: Families, snapshots: Snapshots) -> Iterator[Metric]:
    counter, found = families.counter, snapshots.counters
    stored = "host_cache" in snapshots.latest
    looked_for, device = found.get("queried_tokens", 0), found.get("device_hits", 0)
    behind = found.get("host_hits", 0) + found.get("disk_hits", 0)
    yield counter("prefix_cache_queries", "Prompt tokens that were looked for in the KV cache.", looked_for)
    yield counter("prefix_cache_hits", "Of those, found on the device.", device)
    yield counter(
        "external_prefix_cache_queries", "Prompt tokens that were looked for in the host's memory and on disk.",
        looked_for - device if stored else 0,
    )  # fmt: skip
    yield counter("external_prefix_cache_hits", "Of those, found.", behind)
    levels = {(level,): found.get(f"{level}_hits", 0) for level in ("device", "host", "disk")}
    yield counter("cached_tokens", "Prompt tokens that were not computed, by where they came from.", levels, ("level",))
    for name, counted, text in (
        ("num_preemptions", "preemptions", "Answers that lost their KV blocks to others, and were computed again."),
        ("prompt_tokens", "prompt_tokens", "Prompt tokens of requests that the engine took."),
        ("generation_tokens", "generated_tokens", "Tokens that were generated."),
        ("computed_tokens", "computed_tokens", "Tokens that went through the decoder."),
        ("engine_steps", "steps", "Steps of the engine's loop."),
        ("kv_block_evictions", "block_evictions", "Cached KV blocks that were given to others."),
    ):
        yield counter(name, text, found.get(counted, 0))


def _media_families(families: Families, snapshots: Snapshots) -> Iterator[Metric]:
    stats, found = snapshots.latest, snapshots.counters
    prepared = stats.get("processor_cache", {})
    hits, misses = prepared.get("hits", 0), prepared.get("misses", 0)
    yield families.counter("mm_cache_queries", "Items of media that were looked for prepared.", hits + misses)
    yield families.counter("mm_cache_hits", "Of those, found.", hits)
    yield families.counter("encoded_tokens", "Rows that the encoder made.", found.get("encoded_rows", 0))
    packs = {(): (found.get("encoder_calls", 0), found.get("encoder_seconds", 0))}
    yield families.summary("encoder_seconds", "Time of encoder passes, each over one or more items.", packs)
    decoded = {(kind,): (each["items"], each["seconds"]) for kind, each in stats.get("decoded", {}).items()}
    yield families.summary("media_decode_seconds", "Time of decoding, per item.", decoded, ("modality",))
    rows = stats.get("encoder_cache", {})
    yield families.gauge("encoder_cache_used_tokens", "Rows that the encoder cache holds.", rows.get("rows", 0))


def gate_families(families: Families, gate: Gate) -> Iterator[Metric]:
    """What waits before the engine."""
    yield families.gauge("calls_in_flight", "Calls on their way, in the engine or not.", gate.calls)
    yield families.gauge("calls_waiting", "Calls that wait for a place in the engine.", gate.waiting)
    yield families.gauge("pending_bytes", "Of the bodies of calls on their way.", gate.bytes_held)
    yield families.counter("calls_refused", "Calls that were refused for want of room.", gate.refused)
