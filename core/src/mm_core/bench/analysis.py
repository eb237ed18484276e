"""From a clocked run to its figures: rates, latencies, reuse, phases against the floor."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mm_core.bench import timeline
from mm_core.bench.work import (
    Ceilings,
    DecoderSize,
    RequestSize,
    Work,
    encoder_work,
    floor_seconds,
    span_work,
)
from mm_core.bench.workloads import BenchRequest
from mm_core.benchspecs import BenchFamily
from mm_core.errors import ConfigError
from mm_core.hashing import get_hasher
from mm_core.scheduler.sequence import Sequence as SequenceState
from mm_core.tracing import Span
from mm_core.types import PreparedRequest, RequestOutput

PERCENTILES = (50, 90, 99)
_COUNTERS = ("steps", "preemptions", "computed_tokens", "partial_prefills")
_LENGTHS_SHOWN = 16
_DECODER_NAMES = ("source", "prefill", "mixed", "decode")

Info = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """One clocked run. Times are in nanoseconds of `time.perf_counter_ns()`; counters are what the
    engine's own grew by; dropped: spans that the recorder had no room for."""

    start_ns: int
    end_ns: int
    outputs: list[RequestOutput]
    spans: list[Span]
    counters: dict[str, Any]
    dropped: int = 0

    @property
    def seconds(self) -> float:
        """The clock's span."""
        return (self.end_ns - self.start_ns) / 1e9


@dataclass(frozen=True)
class Asked:
    """What one request comes to when everything that can be reused is: its size, and the items to encode;
    items: all that it has."""

    size: RequestSize
    encode: list[Info] = field(default_factory=list)
    items: list[Info] = field(default_factory=list)


@dataclass(frozen=True)
class Facts:
    """The model and the device, as far as figures depend on them. together: requests came all at once."""

    decoder: DecoderSize
    config: Mapping[str, Any]
    family: BenchFamily | None
    ceilings: Ceilings
    max_num_seqs: int
    together: bool = True

    def encode(self, items: Sequence[Info], passes: int = 1) -> Work:
        """Work to encode items; nothing where the plugin gives no formula."""
        if self.family is None or not items:
            return Work()
        flops = [self.family.encoder_flops(self.config, info) for info in items]
        return encoder_work(flops, self.family.encoder_params(self.config), self.decoder.itemsize, passes)


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What numbers grew by, in nested mappings too."""
    grown: dict[str, Any] = {}
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, Mapping):
            grown[key] = difference(old if isinstance(old, Mapping) else {}, value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            grown[key] = value - (old if isinstance(old, int | float) else 0)
    return grown


def check_counts(name: str, requests: Sequence[BenchRequest], outputs: Sequence[RequestOutput]) -> None:
    """Raise ConfigError unless every prompt and answer has the workload's token counts."""
    for request, output in zip(requests, outputs, strict=True):
        found = (output.usage.prompt_tokens, output.usage.media_tokens, len(output.token_ids))
        wanted = (request.expected_tokens, request.expected_rows, request.output_tokens)
        if any(w is not None and w != f for w, f in zip(wanted, found, strict=True)):
            raise ConfigError(
                f"Workload {name!r}: a request came to {found[0]} prompt tokens, {found[1]} of media, and {found[2]} "
                f"output tokens; {wanted[0]}, {wanted[1]} and {wanted[2]} are its definition. Its figures would not "
                "compare: check the model's processor and max_model_len, or use --dataset."
            )


def without_tensors(request: PreparedRequest) -> PreparedRequest:
    """A request whose features keep their keys and facts only."""
    slim = tuple(replace(r, feature=replace(r.feature, tensors={})) for r in request.media)
    if request.source is None:
        return replace(request, ranges=slim)
    return replace(request, source=replace(request.source, ranges=slim))


def ideal_reuse(
    requests: Sequence[PreparedRequest], before: Sequence[PreparedRequest], output: Sequence[int], block_size: int
) -> list[Asked]:
    """What each request would need computed if every full block and every item were reused that came
    earlier (in `before`, or in the list). By the engine's own keys."""
    blocks: set[bytes] = set()
    media: set[bytes] = set()
    sources: set[bytes] = set()
    asked = []
    for index, request in enumerate([*before, *requests]):
        sequence = SequenceState(index, request)
        contents = sequence.fill_contents(len(request.token_ids) // block_size, block_size, get_hasher("xxh3_128"))
        hits = next((i for i, c in enumerate(contents) if c.key not in blocks), len(contents))
        blocks.update(c.key for c in contents)
        # The last token is computed even where all are cached: its logits choose the next one.
        cached = min(hits * block_size, len(request.token_ids) - 1)
        read, rows, projected = [r.feature for r in request.ranges if r.end > cached], 0, 0
        if (source := request.source) is not None:
            rows = source.num_tokens
            if source.key not in sources:
                read, projected = [r.feature for r in source.ranges], rows
            sources.add(source.key)
        needed = [f for f in read if f.key not in media]
        media.update(f.key for f in needed)
        if index >= len(before):
            size = RequestSize(len(request.token_ids), cached, output[index - len(before)], rows, projected)
            items = [r.feature.info for r in request.media]
            asked.append(Asked(size, [f.info for f in {f.key: f for f in needed}.values()], items))
    return asked


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50, p90, p99, mean and largest; None of nothing."""
    if not values:
        return None
    import numpy as np

    found = np.percentile(values, PERCENTILES)
    named = {f"p{p}": float(v) for p, v in zip(PERCENTILES, found, strict=True)}
    return {**named, "mean": float(np.mean(values)), "max": float(max(values))}


def summarise(facts: Facts, measured: Measured, asked: Sequence[Asked]) -> dict[str, Any]:
    """All figures of one run, ready for JSON."""
    outputs, seconds = measured.outputs, measured.seconds
    prompt = sum(o.usage.prompt_tokens for o in outputs)
    completion = sum(o.usage.completion_tokens for o in outputs)
    inside = timeline.clipped(measured.spans, measured.start_ns, measured.end_ns)
    floor = floors(facts, asked)
    figures: dict[str, Any] = {
        "requests": len(outputs),
        "seconds": seconds,
        "requests_per_s": len(outputs) / seconds,
        "output_tokens_per_s": completion / seconds,
        "total_tokens_per_s": (prompt + completion) / seconds,
        "tokens": _tokens(measured, asked),
        **latencies(outputs, measured.start_ns if facts.together else None),
        "caches": _caches(measured.counters),
        "engine": {name: measured.counters.get(name) for name in _COUNTERS},
        "floor_s": floor,
        "floor_requests_per_s": len(outputs) / total if (total := sum(floor.values())) else None,
    }
    if inside:
        # What is encoded though all could be reused is taken for the requests' mean item.
        items = [info for a in asked for info in a.encode] or [info for a in asked for info in a.items]
        summary = timeline.summary(inside, measured.start_ns, measured.end_ns)
        figures["timeline"] = summary | {"dropped_spans": measured.dropped}
        figures["phases"] = phases(facts, inside, items, measured.counters.get("encoded_items", 0))
    return figures


def _tokens(measured: Measured, asked: Sequence[Asked]) -> dict[str, Any]:
    usages = [o.usage for o in measured.outputs]
    lengths = sorted({u.prompt_tokens for u in usages})
    return {
        "prompt": sum(u.prompt_tokens for u in usages),
        "prompt_each": lengths[:_LENGTHS_SHOWN],
        "prompt_min": min(lengths, default=0),
        "prompt_max": max(lengths, default=0),
        "media": sum(u.media_tokens for u in usages),
        "encoded_media": sum(u.encoded_media_tokens for u in usages),
        "cached": sum(u.cached_tokens for u in usages),
        "reusable": sum(a.size.cached for a in asked),
        "output": sum(u.completion_tokens for u in usages),
    }


def _caches(counters: Mapping[str, Any]) -> dict[str, Any]:
    encoder, processor = counters.get("encoder_cache", {}), counters.get("processor_cache", {})
    host = counters.get("host_cache", {})
    return {
        "kv_cached_tokens": counters.get("cached_tokens"),
        "copied_tokens": counters.get("copied_tokens"),
        "encoder_hits": encoder.get("hits"),
        "encoder_misses": encoder.get("misses"),
        "encoded_items": counters.get("encoded_items"),
        "processor_hits": processor.get("hits"),
        "processor_misses": processor.get("misses"),
        "restored_tokens": host.get("restored_tokens"),
        "restored_items": host.get("restored_items"),
    }


def latencies(outputs: Sequence[RequestOutput], start_ns: int | None) -> dict[str, Any]:
    """Milliseconds to the first token (from the clock's start, or each request's own arrival) and
    between tokens: of every pair, and the mean of each request ("per_token_ms"); and to the last one
    ("request_ms")."""
    first, between, each, whole = [], [], [], []
    for output in outputs:
        metrics = output.metrics
        if metrics is None or metrics.first_token is None or metrics.last_token is None:
            continue
        begin = metrics.arrival if start_ns is None else start_ns / 1e9
        first.append((metrics.first_token - begin) * 1e3)
        whole.append((metrics.last_token - begin) * 1e3)
        times = metrics.token_times or ()
        between += [(b - a) * 1e3 for a, b in itertools.pairwise(times)]
        if (count := len(output.token_ids)) > 1:
            each.append((metrics.last_token - metrics.first_token) * 1e3 / (count - 1))
    return {
        "ttft_ms": percentiles(first),
        "inter_token_ms": percentiles(between),
        "per_token_ms": percentiles(each),
        "request_ms": percentiles(whole),
    }


def floors(facts: Facts, asked: Sequence[Asked]) -> dict[str, float]:
    """Seconds by phase, as `floor_seconds` counts them; of requests one by one, their sum."""
    groups = [asked] if facts.together else [[a] for a in asked]
    total = {"encode": 0.0, "prefill": 0.0, "decode": 0.0}
    for group in groups:
        encode = facts.encode([info for a in group for info in a.encode])
        found = floor_seconds(facts.ceilings, encode, facts.decoder, [a.size for a in group], facts.max_num_seqs)
        total = {phase: total[phase] + found[phase] for phase in total}
    return total


def phases(facts: Facts, spans: Sequence[Span], items: Sequence[Info], encoded: int) -> dict[str, dict[str, Any]]:
    """By span name of the device's tracks: seconds, operations and bytes a second, share of the ceilings.

    Encoding is counted as `encoded` items of the mean arithmetic of those asked for.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, of_name, work in _phase_work(facts, spans, items, encoded):
        seconds = timeline.length(timeline.union(of_name))
        if not seconds:
            continue
        found[name] = {
            "seconds": seconds,
            "spans": len(of_name),
            "tflops": work.flops / seconds / 1e12,
            "tflops_share": work.flops / seconds / facts.ceilings.flops,
            "tbs": work.bytes / seconds / 1e12,
            "tbs_share": work.bytes / seconds / facts.ceilings.bandwidth,
        }
    return found


def _phase_work(
    facts: Facts, spans: Sequence[Span], items: Sequence[Info], encoded: int
) -> Iterator[tuple[str, list[Span], Work]]:
    encoder = [s for s in spans if s.track == "encoder"]
    whole = facts.encode(items, len(encoder))
    share = encoded / len(items) if items else 0.0
    yield "encode", encoder, Work(whole.flops * share, whole.bytes)
    for name in _DECODER_NAMES:
        steps = [s for s in spans if s.track == "decoder" and s.name == name]
        work = Work()
        for step in steps:
            work += span_work(facts.decoder, step)
        yield name, steps, work
