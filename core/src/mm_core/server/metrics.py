"""What Prometheus reads. docs/metrics.md lists all of it.

Everything here is called in the server's event loop, by one thread, so nothing is locked.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import Metric

from mm_core.errors import MediaError, MediaNotCachedError, RequestAbortedError, RequestTimeoutError
from mm_core.server.context import Call
from mm_core.server.families import Families, engine_families, gate_families
from mm_core.server.histogram import FIRST_TOKEN, REQUEST, TOKEN, Histogram
from mm_core.server.snapshots import Snapshots
from mm_core.types import FinishReason, RequestMetrics, RequestOutput

if TYPE_CHECKING:
    from mm_core.engine.health import EngineHealth
    from mm_core.server.gate import Gate

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_KEPT = 256  # requests that ended, for the page's timeline
_HISTOGRAMS = (
    ("time_to_first_token_seconds", FIRST_TOKEN, "From a call's arrival to its request's first token."),
    ("inter_token_latency_seconds", TOKEN, "Between two tokens of an answer."),
    ("e2e_request_latency_seconds", REQUEST, "From a call's arrival to the end of its request."),
    ("request_admit_time_seconds", REQUEST, "Before the engine was asked: the body, fetching media, the gate."),
    ("request_prepare_time_seconds", REQUEST, "Decoding and preprocessing media, tokenising."),
    ("request_queue_time_seconds", REQUEST, "From ready to scheduled for the first time."),
    ("request_prefill_time_seconds", REQUEST, "From scheduled to the first token; encoding media is part of it."),
    ("request_decode_time_seconds", REQUEST, "From the first token to the last."),
    ("media_fetch_seconds", REQUEST, "For one URL."),
)


@dataclass(frozen=True)
class EndedRequest:
    """A request that ended, for the page: no content. Times as in RequestMetrics; arrived: the call."""

    caller: str
    request_id: str
    arrived: float
    times: RequestMetrics
    ended: float
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class TokenGaps:
    """Times between the tokens of one request. Where several tokens come in one update, the time is shared out; its n
    answers grow together."""

    __slots__ = ("_begun", "_histogram", "_tokens", "_when")

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._begun = self._tokens = 0
        self._when = 0.0

    def add(self, output: RequestOutput) -> None:
        """The next output of the request, or its only one."""
        times, tokens = output.metrics, output.usage.completion_tokens
        if times is None or times.first_token is None or times.last_token is None or tokens <= self._tokens:
            return
        answers = output.outputs
        begun = 1 if len(answers) == 1 else sum(bool(answer.token_ids) for answer in answers)
        new = tokens - self._tokens - (begun - self._begun)  # no gap before an answer's first token
        if new > 0:
            since = self._when if self._begun else times.first_token
            self._histogram.observe((times.last_token - since) * begun / max(new, begun), new)
        self._begun, self._tokens, self._when = begun, tokens, times.last_token


class Metrics:
    """A server's counters and times. model_name: a label of all families. snapshots: the engine's counters.
    calls: those on their way. ended: requests that ended lately."""

    def __init__(self, model_name: str = "") -> None:
        self.snapshots = Snapshots()
        self.calls: dict[Call, None] = {}
        self.ended: deque[EndedRequest] = deque(maxlen=_KEPT)
        self._label = model_name
        self._histograms = {name: Histogram(bounds) for name, bounds, _ in _HISTOGRAMS}
        self._finished: Counter[str] = Counter({reason.value: 0 for reason in FinishReason})
        self._http: Counter[tuple[str, str]] = Counter()
        self._errors: Counter[str] = Counter()
        self._rejects: Counter[str] = Counter(dict.fromkeys(media_codes(), 0))
        self._aborts: Counter[tuple[str, str]] = Counter()
        self._media = self._encoded = 0
        self._looked_at: tuple[EngineHealth, Gate] | None = None
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    # -- what is told ----------------------------------------------------------------------

    def on_call_begin(self, call: Call) -> None:
        """A call was let in."""
        self.calls[call] = None

    def on_call_end(self, call: Call, status: int, error: str | None) -> None:
        """A call ended; status 499: its client left before the reply. error: the code of what went wrong."""
        self.calls.pop(call, None)
        self._http[call.route or "(none)", str(status)] += 1
        if error is None:
            return
        self._errors[error] += 1
        if error in self._rejects:
            self._rejects[error] += 1
        if error == RequestAbortedError.code or status == 499:
            self._aborts[call.phase, "disconnect"] += 1
        elif error == RequestTimeoutError.code:
            self._aborts[call.phase, "timeout"] += 1

    def token_gaps(self) -> TokenGaps:
        """For one request's outputs."""
        return TokenGaps(self._histograms["inter_token_latency_seconds"])

    def on_output(self, call: Call, output: RequestOutput) -> None:
        """A request's last output."""
        now, usage, times = time.perf_counter(), output.usage, output.metrics
        self._finished.update(answer.finish_reason or FinishReason.ABORT.value for answer in output.outputs)
        self._media += usage.media_tokens
        self._encoded += usage.encoded_media_tokens
        self._observe("e2e_request_latency_seconds", call.arrival, now)
        if times is None:
            return
        began = times.started
        self._observe("time_to_first_token_seconds", call.arrival, times.first_token)
        self._observe("request_admit_time_seconds", call.arrival, times.arrival)
        self._observe("request_prepare_time_seconds", times.arrival, times.prepared)
        self._observe("request_queue_time_seconds", times.prepared, began)
        self._observe("request_prefill_time_seconds", began, times.first_token)
        self._observe("request_decode_time_seconds", times.first_token, times.last_token)
        self.ended.append(
            EndedRequest(
                call.caller.name, call.request_id, call.arrival, times, now,
                usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens,
            )
        )  # fmt: skip

    def on_media(self, seconds: float, kind: Literal["fetch"] = "fetch") -> None:
        """Time that fetching one URL took, whatever came of it."""
        self._histograms[f"media_{kind}_seconds"].observe(seconds)

    def _observe(self, name: str, begin: float | None, end: float | None) -> None:
        if begin is not None and end is not None:
            self._histograms[name].observe(end - begin)

    # -- what is read ----------------------------------------------------------------------

    def render(self, health: EngineHealth, gate: Gate) -> bytes:
        """All families in Prometheus' text format; the engine's as of the last snapshot."""
        self._looked_at = (health, gate)
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        """For the registry."""
        families = Families(self._label)
        if self._looked_at is not None:
            health, gate = self._looked_at
            yield from engine_families(families, self.snapshots, health, gate.waiting)
            yield from gate_families(families, gate)
        yield from self._own(families)

    def _own(self, families: Families) -> Iterator[Metric]:
        finished = {(reason,): count for reason, count in sorted(self._finished.items())}
        yield families.counter("request_success", "Answers that ended.", finished, ("finished_reason",))
        yield families.counter("encoder_cache_queries", "Media tokens of requests that ended.", self._media)
        yield families.counter(
            "encoder_cache_hits", "Of those, not encoded for them: a cache had their rows or keys.",
            self._media - self._encoded,
        )  # fmt: skip
        for name, _, text in _HISTOGRAMS:
            yield families.histogram(name, text, self._histograms[name])
        rejects = {(code,): count for code, count in sorted(self._rejects.items())}
        yield families.counter("media_rejects", "Calls refused for their media.", rejects, ("code",))
        errors = {(code,): count for code, count in sorted(self._errors.items())}
        yield families.counter("request_errors", "Calls that ended with an error.", errors, ("code",))
        yield families.counter(
            "request_aborts", "Calls that ended before their answer did.", dict(self._aborts), ("phase", "reason")
        )
        yield families.counter("http_requests", "Replies.", dict(self._http), ("route", "status"))


# Codes that MediaError and its kinds are given beside those of their classes.
_GIVEN = (
    "audio_too_long", "empty_audio", "image_aspect", "image_too_large", "invalid_audio", "invalid_video",
    "no_audio_stream", "nonfinite_audio",
)  # fmt: skip


def media_codes() -> set[str]:
    """Every code that a call can be refused with for its media."""
    return {*_codes(MediaError), *_GIVEN, MediaNotCachedError.code}


def _codes(kind: type[MediaError]) -> set[str]:
    """Codes of an error and of its kinds."""
    return {kind.code}.union(*(_codes(each) for each in kind.__subclasses__()))
