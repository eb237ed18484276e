"""Running requests against one engine, and what is measured of them."""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mm_core.bench.analysis import Facts, Measured, check_counts, difference, ideal_reuse, summarise, without_tensors
from mm_core.bench.dataset import stand_in
from mm_core.bench.device import MeasuredCeilings, measure_ceilings
from mm_core.bench.models import family_of, place_model, workloads_of
from mm_core.bench.timeline import clipped
from mm_core.bench.work import DecoderSize
from mm_core.bench.workloads import WORKLOADS, BenchRequest, PromptMaker, make_requests, resized, select
from mm_core.benchspecs import BenchFamily, BenchWorkload
from mm_core.checkpoint.config import resolve_dtype
from mm_core.config import EngineConfig, SamplingParams
from mm_core.engine.engine import Engine
from mm_core.engine.frontend import Frontend
from mm_core.errors import ConfigError
from mm_core.plugins import PluginRegistry
from mm_core.runner.memory import kv_dtype
from mm_core.runner.runner import resolve_device
from mm_core.tracing import Span
from mm_core.types import PreparedRequest, RequestOutput

# A warm-up fills a step of prefill and goes on to decode: what is compiled or chosen by shape is there then.
WARMUP_PROMPT_TOKENS = 12288
WARMUP_REQUESTS = range(4, 65)
WARMUP_TOKENS = 8
LATENCY_WARMUP = 3
PREPARED_AT_ONCE = 32


@dataclass(frozen=True)
class Settings:
    """What a session is made of: the model, the engine's own settings, and the caller's sizes."""

    model: str
    engine: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    warmup: bool = True
    requests: int | None = None
    output_tokens: int | None = None
    image_size: int | None = None


@dataclass(frozen=True)
class Result:
    """A run's figures, and its spans for a timeline."""

    name: str
    figures: dict[str, Any]
    spans: list[Span]
    start_ns: int


class Session:
    """One engine on which workloads are run one after another.

    measured: the device's ceilings. startup_s: seconds from the call to an engine that is ready.
    """

    measured: MeasuredCeilings
    startup_s: float
    frontend: Frontend
    engine: Engine
    family: BenchFamily | None

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._stack = ExitStack()
        self._runs: Counter[str] = Counter()
        self._registry = PluginRegistry()
        try:
            self._open()
        except BaseException:
            self._stack.close()
            raise

    def _open(self) -> None:
        """Place the model, measure the device while it is empty, and start the engine."""
        chosen = {"record_timeline": True, "show_progress": sys.stderr.isatty(), **self.settings.engine}
        config = EngineConfig(**chosen)
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mm-bench-")))
        registry = self._registry
        path = place_model(self.settings.model, config.load_format, registry, folder)
        self.measured = measure_ceilings(str(resolve_device(config)), config.dtype)
        begin = time.perf_counter()
        self.frontend = Frontend(path, config, None)
        self.startup_s = time.perf_counter() - begin
        self.engine = Engine(self.frontend)
        self._stack.callback(self.engine.close)
        self.family = family_of(registry, self.frontend.model.checkpoint.architectures)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    # -- what is run -----------------------------------------------------------------------

    def workload(self, workload: BenchWorkload, *, one_by_one: bool = False) -> Result:
        """Run a named workload. Raises ConfigError where the model cannot have its token counts."""
        given = self.settings
        workload = resized(workload, given.requests, given.output_tokens, given.image_size)
        if one_by_one or workload.one_by_one:
            return self._latency(workload)
        maker, rows = self._maker(workload)
        media = self._media_name(workload)
        self._warm_up(workload, media, maker, rows)
        self.engine.clear_cache()
        before: list[BenchRequest] = []
        if workload.primed:
            before = make_requests(workload, maker, given.seed, rows, media=media)
            self._generate(before)
        requests = make_requests(workload, maker, given.seed, rows, len(before), media)
        measured = self._measure(lambda: self._generate(requests))
        check_counts(workload.name, requests, measured.outputs)
        figures = self._figures(measured, requests, before)
        return self._result(workload.name, "throughput", measured, {"definition": asdict(workload), **figures})

    def workloads(self, names: str) -> list[BenchWorkload]:
        """Those that a comma list names; "all": the family's own, and core's where it is asked questions."""
        own = () if self.family is None else self.family.workloads
        if names != "all":
            return select(names, workloads_of(self._registry))
        asked = self.family is not None and self.family.prompt.complete is None
        return [*(WORKLOADS.values() if asked else ()), *own]

    def dataset(self, name: str, requests: Sequence[BenchRequest], *, one_by_one: bool = False) -> Result:
        """Run requests from a file, all at once or one by one. The warm-up has none of their media."""
        if self.settings.warmup:
            self._generate([replace(stand_in(requests), output_tokens=WARMUP_TOKENS)])
        self.engine.clear_cache()
        call = self._one_by_one if one_by_one else self._generate
        measured = self._measure(lambda: call(requests))
        kind = "latency" if one_by_one else "throughput"
        figures = self._figures(measured, requests, together=not one_by_one)
        return self._result(name, kind, measured, {"definition": {"requests": len(requests)}, **figures})

    def _latency(self, workload: BenchWorkload) -> Result:
        """First tokens from requests of one output token, then tokens after the first from full
        answers; every request has its own image."""
        count = workload.requests
        workload = replace(workload, items=count if workload.items else 0, primed=False)
        maker, rows = self._maker(workload)
        media = self._media_name(workload)
        everything = replace(workload, requests=2 * count, items=2 * workload.items)
        requests = make_requests(everything, maker, self.settings.seed, rows, media=media)
        firsts = [replace(r, output_tokens=1) for r in requests[:count]]
        self._warm_up(workload, media, maker, rows, LATENCY_WARMUP)
        self.engine.clear_cache()
        first = self._measure(lambda: self._one_by_one(firsts))
        check_counts(workload.name, firsts, first.outputs)
        full = self._measure(lambda: self._one_by_one(requests[count:]))
        check_counts(workload.name, requests[count:], full.outputs)
        figures = self._figures(full, requests[count:], together=False)
        single = self._figures(first, firsts, together=False)
        figures["ttft_ms"] = single["ttft_ms"]
        figures["ttft_floor_ms"] = {p: s * 1e3 / count for p, s in (single.get("floor_s") or {}).items()}
        figures["one_token"] = {key: single[key] for key in ("seconds", "phases", "timeline") if key in single}
        return self._result(workload.name, "latency", full, {"definition": asdict(workload), **figures})

    # -- its parts -------------------------------------------------------------------------

    def _maker(self, workload: BenchWorkload) -> tuple[PromptMaker, int]:
        """The prompt maker, and the rows that this model makes of one of the workload's images."""
        if self.family is None:
            raise ConfigError(
                f"The plugin of family {self.frontend.model.family!r} has no mm_bench hook, so named workloads have no "
                "prompt for it. Use --dataset FILE."
            )
        processor = self.frontend.model.processor
        if workload.items and workload.modality not in processor.modalities:
            raise ConfigError(
                f"Workload {workload.name!r} has media ({workload.modality}) that family "
                f"{self.frontend.model.family!r} does not read. Take one of its own, or --dataset FILE."
            )
        maker = PromptMaker.of(processor, self.family.prompt, workload.modality if workload.items else None)
        if not workload.items:
            return maker, 0
        probe = make_requests(replace(workload, name="probe", requests=1, items=1), maker, 0, 0)
        rows = sum(r.feature.num_placed for r in self._prepared(probe)[0].media)
        if workload.rows is not None and rows != workload.rows:
            raise ConfigError(
                f"Workload {workload.name!r} has {workload.rows} rows an item (images of {workload.image_size}×"
                f"{workload.image_size}); this model makes {rows}. Its figures would compare with nobody's. Pass "
                f"--image-size {workload.image_size} to measure it all the same, or another size."
            )
        return maker, rows

    def _prepared(self, requests: Sequence[BenchRequest]) -> list[PreparedRequest]:
        """The requests as the scheduler gets them, without their pixels, off the clock; some at a time,
        for prepared media take memory."""
        found: list[PreparedRequest] = []
        for start in range(0, len(requests), PREPARED_AT_ONCE):
            part = requests[start : start + PREPARED_AT_ONCE]
            pending = [self.frontend.pipeline.submit("bench", r.prompt) for r in part]
            found += [without_tensors(p.result()) for p in pending]
        return found

    def _media_name(self, workload: BenchWorkload) -> str:
        """A name for this run's images that no earlier run of the session had: encoder and processor
        caches outlive a run."""
        self._runs[workload.name] += 1
        again = self._runs[workload.name]
        return workload.name if again == 1 else f"{workload.name}, run {again}"

    def _warm_up(
        self, workload: BenchWorkload, media: str, maker: PromptMaker, rows: int, count: int | None = None
    ) -> None:
        """Run `count` requests of a workload's shape with other images; one by one where a count is given."""
        if not self.settings.warmup:
            return
        call = self._generate if count is None else self._one_by_one
        if count is None:
            fitting = WARMUP_PROMPT_TOKENS // (workload.shared + workload.own + rows)
            count = min(workload.requests, max(WARMUP_REQUESTS.start, min(WARMUP_REQUESTS.stop - 1, fitting)))
        small = replace(
            workload,
            name=f"warm-up {workload.name}",
            requests=count,
            items=min(count, workload.items),
            output_tokens=min(WARMUP_TOKENS, workload.output_tokens),
        )
        call(make_requests(small, maker, self.settings.seed, rows, media=f"warm-up {media}"))

    def _generate(self, requests: Sequence[BenchRequest]) -> list[RequestOutput]:
        params = [SamplingParams(max_tokens=r.output_tokens, temperature=0.0, ignore_eos=True) for r in requests]
        return self.engine.generate([r.prompt for r in requests], params)

    def _one_by_one(self, requests: Iterable[BenchRequest]) -> list[RequestOutput]:
        return [self._generate([request])[0] for request in requests]

    def _measure(self, call: Callable[[], list[RequestOutput]]) -> Measured:
        recording = self.frontend.config.record_timeline
        if recording:
            self.engine.timeline()
        before = self.engine.stats()
        start = time.perf_counter_ns()
        outputs = call()
        end = time.perf_counter_ns()
        self.engine.wait_idle()
        after = self.engine.stats()
        dropped = self.frontend.recorder.dropped if self.frontend.recorder is not None else 0
        spans = self.engine.timeline() if recording else []
        return Measured(start, end, outputs, spans, difference(before, after), dropped)

    def _figures(
        self,
        measured: Measured,
        requests: Sequence[BenchRequest],
        before: Sequence[BenchRequest] = (),
        together: bool = True,
    ) -> dict[str, Any]:
        """Everything a report says of one run."""
        model, config = self.frontend.model, self.frontend.config
        prepared, primed = self._prepared(requests), self._prepared(before)
        outputs = [r.output_tokens for r in requests]
        asked = ideal_reuse(prepared, primed, outputs, config.kv_cache_config.block_size)
        dtype = resolve_dtype(config.dtype, model.checkpoint, resolve_device(config))
        kv_itemsize = kv_dtype(config.kv_cache_config, dtype).itemsize
        facts = Facts(
            decoder=self._decoder_size(dtype.itemsize, kv_itemsize),
            config=model.checkpoint.config,
            family=self.family,
            ceilings=self.measured.ceilings,
            max_num_seqs=config.max_num_seqs,
            together=together,
        )
        return summarise(facts, measured, asked)

    def _decoder_size(self, itemsize: int, kv_itemsize: int) -> DecoderSize:
        checkpoint = self.frontend.model.checkpoint
        if self.family is None or self.family.decoder is None:
            return DecoderSize.from_text_config(checkpoint.text_config, itemsize, kv_itemsize)
        return DecoderSize.of(self.family.decoder(checkpoint.config), itemsize, kv_itemsize)

    def _result(self, name: str, kind: str, measured: Measured, figures: dict[str, Any]) -> Result:
        spans = clipped(measured.spans, measured.start_ns, measured.end_ns)
        return Result(name, {"workload": name, "kind": kind, **figures}, spans, measured.start_ns)
