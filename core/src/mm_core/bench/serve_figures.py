"""From the records of a run to its figures: rates, percentiles, goodput, errors, and how the client did."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mm_core.bench.serve_loads import Load
from mm_core.bench.serve_run import Outcome, Record
from mm_core.errors import ConfigError

PERCENTILES = (50, 90, 95, 99)
OBJECTIVES = ("ttft", "itl", "tpot", "e2e")
LATE_MS, SLOW_LOOP_MS = 10.0, 20.0  # p99 above which the client itself is part of what was measured,
_LATE_SHARE = 0.01  # or, where all requests come at once, above that share of the run
_CURVE_POINTS = 200
_BINS = 240
_DETAILS_SHOWN = 3


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """p50 to p99, mean, largest and how many; None of nothing. As numpy's default (linear) interpolation."""
    if not values:
        return None
    ordered = sorted(values)
    named = {f"p{p}": at_share(ordered, p / 100) for p in PERCENTILES}
    return {**named, "mean": sum(ordered) / len(ordered), "max": ordered[-1], "count": len(ordered)}


def at_share(ordered: Sequence[float], share: float) -> float:
    """The value below which that share of ordered values lies."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def read_objectives(texts: Sequence[str]) -> dict[str, float]:
    """`ttft=200 itl=50`, in ms. Raises ConfigError."""
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            found[name] = float(value)
        except ValueError:
            found[name] = -1.0
        if name not in OBJECTIVES or not found[name] > 0:
            raise ConfigError(f"--slo {text}: want NAME=MS with NAME one of {', '.join(OBJECTIVES)}, e.g. ttft=200.")
    return found


def latencies(record: Record) -> dict[str, float | None]:
    """One good answer's, in ms; None where it is not to be known.

    ttft: from the sending to the first text. itl: the 99th percentile of its gaps. tpot: from the first text to the
    answer's end, by tokens after the first. e2e: from the sending to the answer's end.
    """
    times = record.times
    gaps = gaps_of(record)
    tokens = record.output_tokens if record.output_tokens is not None else len(times)
    spread = (record.ended - times[0]) * 1e3 / (tokens - 1) if times and tokens > 1 else None
    return {
        "ttft": (times[0] - record.sent) * 1e3 if times else None,
        "itl": at_share(sorted(gaps), 0.99) if gaps else None,
        "tpot": spread,
        "e2e": (record.ended - record.sent) * 1e3,
    }


def gaps_of(record: Record) -> list[float]:
    """Between every two events with text that follow each other, in ms."""
    return [(late - early) * 1e3 for early, late in zip(record.times, record.times[1:], strict=False)]


def summarise(load: Load, outcome: Outcome, objectives: Mapping[str, float]) -> dict[str, Any]:
    """All figures of a run, ready for JSON."""
    good = [record for record in outcome.records if record.error is None]
    own = [latencies(record) for record in good]
    gaps = [gap for record in good for gap in gaps_of(record)]
    spans = {name: [each[name] for each in own if each[name] is not None] for name in OBJECTIVES}
    seconds = outcome.seconds or 1e-9
    tokens = _tokens(good)
    return {
        "workload": load.name,
        "load": load.to_dict(),
        "seconds": outcome.seconds,
        "requests": {"sent": len(outcome.records), "good": len(good), "failed": len(outcome.records) - len(good)},
        "errors": _errors(outcome.records),
        "requests_per_s": len(good) / seconds,
        "output_tokens_per_s": tokens["output"] / seconds,
        "total_tokens_per_s": (tokens["output"] + tokens["prompt"]) / seconds,
        "tokens": tokens,
        "ttft_ms": percentiles([v for v in spans["ttft"] if v is not None]),
        "inter_token_ms": percentiles(gaps),
        "per_token_ms": percentiles([v for v in spans["tpot"] if v is not None]),
        "e2e_ms": percentiles([v for v in spans["e2e"] if v is not None]),
        "turns": _turns(good, load),
        "goodput": _goodput(own, objectives, len(outcome.records), seconds) if objectives else None,
        "health": _health(outcome.health),
        "client": _client(outcome, _LATE_SHARE * seconds * 1e3 if math.isinf(load.rate) else 0.0),
        "curves": {
            "ttft_ms": _curve([v for v in spans["ttft"] if v is not None]),
            "inter_token_ms": _curve(gaps),
            "e2e_ms": _curve([v for v in spans["e2e"] if v is not None]),
            **_over_time(outcome),
        },
        "records": [_row(record) for record in outcome.records],
        "record_fields": list(ROW),
    }


ROW = ("number", "turn", "due", "sent", "first", "last", "ended", "prompt", "cached", "output", "error")


def _row(r: Record) -> list[Any]:
    times = [round(t, 5) for t in (r.due, r.sent)]
    ends = [round(r.times[0], 5), round(r.times[-1], 5)] if r.times else [None, None]
    return [r.number, r.turn, *times, *ends, round(r.ended, 5), r.prompt_tokens, r.cached_tokens, r.output_tokens,
            r.error]  # fmt: skip


def _tokens(good: Sequence[Record]) -> dict[str, Any]:
    """Counts as the server tells them; where it does not, events with text stand for output tokens."""
    prompts = [r.prompt_tokens for r in good if r.prompt_tokens is not None]
    cached = [r.cached_tokens for r in good if r.cached_tokens is not None]
    outputs = [len(r.times) if r.output_tokens is None else r.output_tokens for r in good]
    events, streamed = sum(len(r.times) for r in good), sum(o for r, o in zip(good, outputs, strict=True) if r.times)
    return {
        "prompt": sum(prompts),
        "prompt_min": min(prompts, default=None),
        "prompt_max": max(prompts, default=None),
        "cached": sum(cached) if cached else None,
        "output": sum(outputs),
        "an_event": streamed / events if events else None,
        "without_usage": sum(r.output_tokens is None for r in good),
        "without_text": sum(not r.times for r in good) if events else 0,
        "short": sum(o < r.asked_tokens for r, o in zip(good, outputs, strict=True)),
    }


def _errors(records: Sequence[Record]) -> dict[str, Any]:
    """Failed requests by kind, most first, each with some of what the server said."""
    counts = Counter(r.error for r in records if r.error is not None)
    found = {}
    for kind, count in counts.most_common():
        told = dict.fromkeys(r.detail for r in records if r.error == kind and r.detail)
        found[str(kind)] = {"count": count, "told": list(told)[:_DETAILS_SHOWN]}
    return found


def _turns(good: Sequence[Record], load: Load) -> list[dict[str, Any]] | None:
    """First-token times and cached prompt tokens by turn of the conversation."""
    if load.turns == 1:
        return None
    rows = []
    for turn in range(load.turns):
        mine = [r for r in good if r.turn == turn]
        found = percentiles([(r.times[0] - r.sent) * 1e3 for r in mine if r.times])
        cached = [r.cached_tokens for r in mine if r.cached_tokens is not None]
        prompt = sum(r.prompt_tokens or 0 for r in mine)
        rows.append({"requests": len(mine), "ttft_ms": found, "prompt": prompt, "cached": sum(cached)})
    return rows


def _goodput(
    own: Sequence[Mapping[str, float | None]], objectives: Mapping[str, float], sent: int, seconds: float
) -> dict[str, Any]:
    """Answers that keep every objective; failed ones do not, nor those of which it cannot be known."""
    kept = {
        name: sum(1 for each in own if (value := each[name]) is not None and value <= limit)
        for name, limit in objectives.items()
    }
    met = sum(
        all((value := each[name]) is not None and value <= limit for name, limit in objectives.items()) for each in own
    )
    return {
        "objectives_ms": dict(objectives),
        "met": met,
        "share": met / sent if sent else 0.0,
        "requests_per_s": met / seconds,
        "met_each": kept,
        "answers": len(own),
        "unmeasured": {name: sum(each[name] is None for each in own) for name in objectives},
    }


def _health(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if found is None else {**found, "ms": None, "latency_ms": percentiles(found["ms"])}


def _client(outcome: Outcome, allowed_ms: float) -> dict[str, Any]:
    """How late requests were sent (less what they were held back on purpose) and the loop ran, and the processor's
    time. `late`: by more than `allowed_ms` and the usual bounds: some of what was measured is the client's own."""
    lags = [max(0.0, r.sent - r.due - r.held) * 1e3 for r in outcome.records]
    found = {
        "lag_ms": percentiles(lags),
        "held_ms": percentiles([r.held * 1e3 for r in outcome.records if r.held]),
        "loop_delay_ms": percentiles([delay * 1e3 for delay in outcome.delays]),
        "cpu_s": outcome.cpu_s,
    }
    lag, loop = found["lag_ms"], found["loop_delay_ms"]
    late = isinstance(lag, dict) and lag["p99"] > max(LATE_MS, allowed_ms)
    slow = isinstance(loop, dict) and loop["p99"] > max(SLOW_LOOP_MS, allowed_ms)
    return {**found, "late": late or slow}


def _curve(values: Sequence[float]) -> list[float]:
    """Values at equal steps of their share, lowest first: a cumulative distribution of few points."""
    if not values:
        return []
    ordered = sorted(values)
    count = min(_CURVE_POINTS, len(ordered))
    return [round(at_share(ordered, place / max(1, count - 1)), 4) for place in range(count)]


def _over_time(outcome: Outcome) -> dict[str, Any]:
    """Requests without an answer, and events with text a second, along the run."""
    width = max(outcome.seconds, 1e-6) / _BINS
    running, events = [0.0] * _BINS, [0] * _BINS
    for record in outcome.records:
        first, last = record.sent / width, record.ended / width
        for place in range(max(0, int(first)), min(_BINS, int(last) + 1)):
            running[place] += max(0.0, min(last, place + 1) - max(first, place))
        for when in record.times:
            events[min(_BINS - 1, max(0, int(when / width)))] += 1
    return {
        "step_s": width,
        "running": [round(value, 3) for value in running],
        "events_per_s": [round(count / width, 2) for count in events],
    }
