"""ModelRunner: launches scheduled batches on the device: encode, fuse, forward, sample."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import numpy as np
import torch
from torch import Tensor

from mm_core.config import EngineConfig
from mm_core.errors import ConfigError, MMError, OutOfMemoryError
from mm_core.kernels.paged_attention import CpuPlan, plan_cpu
from mm_core.kernels.shared_prefixes import SharedPrefixes
from mm_core.layers.context import AttentionMetadata, ForwardContext
from mm_core.runner.batch import BatchBuilder, CrossTables, HostBatch
from mm_core.runner.chunk_graphs import ChunkGraphs
from mm_core.runner.encoders import EncoderRows
from mm_core.runner.fusing import Conditioner, Modules, made_up_items
from mm_core.runner.graphs import DecodeGraphs, GraphInputs, resolve_ids
from mm_core.runner.guidance import Follower
from mm_core.runner.limits import RunnerLimits as RunnerLimits
from mm_core.runner.limits import largest_batch
from mm_core.runner.memory import KVCache, is_out_of_memory
from mm_core.runner.sampler import PendingSample, Sampler, SamplingRow
from mm_core.runner.sources import SourceWriter, made_up_sources
from mm_core.runner.spans import DeviceSpans
from mm_core.runner.step import LaunchedStep
from mm_core.runner.transfers import TierOptions, TransfersRunner
from mm_core.runner.upload import reserve_pinned, upload
from mm_core.scheduler.sequence import EncodeItem, SampledToken, ScheduledBatch, ScheduledSequence, StepResult
from mm_core.tracing import SpanRecorder
from mm_core.types import MediaFeature

_SEED_STRIDE = 0x9E3779B97F4A7C15  # spreads the seeds of a request's n answers (2^64 / golden ratio)


class ModelRunner:
    """Owns the device: modules, KV tensors, encoder rows and streams.

    On a GPU the decoder has a stream of high priority and the encoder one of its own: items that no
    sequence of the batch needs yet are encoded beside the decoder's work.
    """

    def __init__(
        self,
        modules: Modules,
        kv: KVCache,
        device: torch.device,
        limits: RunnerLimits,
        recorder: SpanRecorder | None = None,
        tier: TierOptions | None = None,
    ) -> None:
        self.device = device
        self.kv = kv
        self._modules = modules
        self._decoder = modules.decoder
        self._limits = limits
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device, priority=-1) if on_gpu else None  # type: ignore[no-untyped-call]
        self._spans = DeviceSpans(recorder, device)
        capacity = limits.encoder_cache_tokens
        self.rows = EncoderRows(modules.encoder, modules.family, capacity, device, self._spans)
        with self._on_stream():
            self.transfers = TransfersRunner(kv.stores, self.rows, device, self._spans, tier)
        self.rows.restore = self.transfers.load_rows
        self._conditioner = Conditioner(modules, self.rows.slab) if modules.conditions else None
        self.sources = SourceWriter(modules, self.rows, self._conditioner, kv, self._spans)
        self._builder = BatchBuilder(
            limits.max_num_seqs,
            limits.max_model_len,
            kv.block_size,
            self._decoder.position_axes,
            cross=modules.has_cross,
            conditioned=modules.conditions,
            min_saved=max(limits.min_saved_bytes // kv.token_bytes, 1),
        )
        self._sampler = Sampler(limits.max_num_seqs, self._decoder.vocab_size, device)
        self._graphs: tuple[DecodeGraphs | ChunkGraphs, ...] = ()

    @torch.inference_mode()
    def capture_graphs(self, examples: Sequence[MediaFeature] = ()) -> None:
        """Capture decode steps, small steps with prompts and small passes of the encoder where that is
        possible: on a GPU. What a step reads has to exist by now. examples: items such as requests bring."""
        if self._stream is None or not self._limits.cuda_graphs:
            return
        torch.cuda.synchronize(self.device)
        with self._on_stream():
            pool = torch.cuda.graph_pool_handle()
            inputs = self._graph_inputs(max((f.num_placed for f in examples), default=0))
            graphs = DecodeGraphs(inputs)
            chunks = ChunkGraphs(inputs, self._slab_for_prompts(), self._limits.max_num_batched_tokens)
            graphs.capture(pool)
            chunks.capture(pool)
        torch.cuda.synchronize(self.device)
        self._graphs = (graphs, chunks)
        self.rows.rehearse(examples)

    def _graph_inputs(self, longest_item: int) -> GraphInputs:
        length = self._limits.max_model_len
        sources = self._modules.source_len(length, longest_item)
        tables = (self._builder.width, length, sources)
        return GraphInputs(self._decoder, self.kv.caches, self._sampler.last_ids, *tables)

    def _slab_for_prompts(self) -> Tensor | None:
        """The encoder's rows, if they are put into prompts as they are."""
        return None if self._modules.conditions or self._modules.has_cross else self.rows.slab

    @torch.inference_mode()
    def reserve(self, examples: Sequence[MediaFeature], encoder_budget: int) -> None:
        """Run steps as large as there can be, which write nothing, so that torch holds the memory they take.

        Asking the system for memory while the device works waits until it is idle: a step that needs more
        than any before it would stop the steps behind it from being launched.
        """
        if self._stream is None:
            return
        with self._on_stream():
            sources = self._modules.source_len(self._limits.max_model_len)
            host = largest_batch(self._limits, self.kv.block_size, self._decoder.position_axes, sources)
            self._decoder.logits(self._forward(host))
            if sources and self._limits.source_budget:
                budget = self._limits.source_budget
                self.sources.run(made_up_sources(budget, min(sources, budget), self._modules.reads_text))
            if self._conditioner is not None:
                sizes = self._limits.max_num_batched_tokens, self._limits.encoder_cache_tokens
                for feature in examples:
                    self._conditioner.run(made_up_items(feature, self._modules.instruction, *sizes))
        self.rows.reserve(examples, encoder_budget)
        reserve_pinned()
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Drop modules, KV tensors and encoder rows; nothing can run afterwards."""
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # a lost device has nothing left to wait for
                torch.cuda.synchronize(self.device)
        self._graphs = ()
        self.transfers.close()
        self.kv.release()
        self.rows.release()
        del self._decoder, self._modules, self._conditioner, self.sources, self._sampler
        if self.device.type == "cuda":
            gc.collect()  # modules refer to each other in circles
            torch.cuda.empty_cache()

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self._stream is None:
            yield
        else:
            with torch.cuda.stream(self._stream):
                yield

    @property
    def follower(self) -> Follower:
        """What answers that follow a grammar share."""
        return self._sampler.follower

    def execute(self, batch: ScheduledBatch) -> StepResult:
        """Run one step to its end."""
        return self.launch(batch).wait()

    @torch.inference_mode()
    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        """Start one step without waiting for it. Raises OutOfMemoryError; whatever concerns one item or
        request is in the result."""
        try:
            with self._on_stream():
                return self._launch(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"The device ran out of memory in a step of {batch.num_tokens} tokens and {len(batch.encode)} "
                "media items. Lower max_num_batched_tokens, encoder_budget or "
                "KvCacheConfig(free_gpu_memory_fraction=...)."
            ) from error

    def _launch(self, batch: ScheduledBatch) -> LaunchedStep:
        if batch.transfers:
            self.transfers.launch(batch.transfers)
        self.rows.drop(batch.evicted_media)
        keys = _media_keys(batch)
        failed_media = self.rows.encode([item for item in batch.encode if item.key in keys])
        pending: PendingSample | None = None
        failed: dict[int, MMError] = {}
        chosen = [s for s in batch.sequences if s.samples]
        done: torch.cuda.Event | None = None
        if batch.sequences:
            host = self._builder.build(batch, self.rows.places)
            for slot in host.new_owners:
                self._sampler.release(slot)
            self._sampler.keep([s.seq.slot for s in batch.sequences])
            self.rows.wait_for(keys)
            placed, failed = self._prepare(batch, host)
            pending = self._run(host, placed, chosen)
            if self._stream is not None and pending is None:
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record(self._stream)
        # What nobody waits for yet goes behind the decoder's work in this thread, beside it on the device.
        failed_media |= self._encode_ahead([item for item in batch.encode if item.key not in keys])
        damaged: frozenset[bytes] = self.rows.take_damaged() if batch.encode else frozenset()
        loaded = self.transfers.take_loaded()

        def wait() -> StepResult:
            sampled, faults = ({}, {}) if pending is None else _by_sequence(pending, chosen)
            if done is not None:
                done.synchronize()
            if loaded is not None:
                loaded.wait()  # the slots are given to others when the step is done
            self._spans.resolve()
            return StepResult(sampled, failed | faults, frozenset(failed_media), damaged)

        return LaunchedStep(wait, bool(failed or failed_media or (pending is not None and pending.failed)))

    def _prepare(self, batch: ScheduledBatch, host: HostBatch) -> tuple[Tensor | None, dict[int, MMError]]:
        """What precedes the forward pass: sources, and the rows that `condition` makes of the batch's items. The
        latter, and the sequences that failed."""
        failed = dict(host.failed)
        if batch.sources:
            errors = self.sources.write(batch.sources)
            for s in batch.sequences if errors else ():
                source = s.seq.request.source
                if source is not None and source.key in errors:
                    failed[s.seq.seq_id] = errors[source.key]
        if self._conditioner is None or not host.items:
            return None, failed
        with self._spans.span("decoder", "condition", items=len(host.items)):
            placed, faults = self._conditioner.run(host.items)
        return placed, failed | faults

    def _encode_ahead(self, items: Sequence[EncodeItem]) -> dict[bytes, MMError]:
        """Items for later steps. Where memory does not suffice the batch goes on, and they are encoded
        when they are needed."""
        try:
            return self.rows.encode(items)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            fault = OutOfMemoryError("The device ran out of memory in the encoder. Lower encoder_budget.")
            fault.__cause__ = error
            return {item.key: fault for item in items if item.key not in self.rows}

    def _run(self, host: HostBatch, placed: Tensor | None, chosen: Sequence[ScheduledSequence]) -> PendingSample | None:
        name = "decode" if host.only_decodes else "mixed" if host.num_decodes else "prefill"
        sizes = {"tokens": len(host.token_ids), "sequences": len(host.kv_lens), "kv_tokens": int(host.kv_lens.sum())}
        if host.cross is not None:
            sizes["source_tokens"] = int(host.cross.kv_lens.sum())
        with self._spans.span("decoder", name, **sizes):
            hidden = next((h for graphs in self._graphs if (h := graphs.run(host)) is not None), None)
            if hidden is None:
                hidden = self._forward(host, placed)
            if not chosen:
                return None
            sampler = self._sampler
            return sampler.launch(self._decoder.logits(hidden), [_sampling_row(s, sampler) for s in chosen])

    def _forward(self, host: HostBatch, placed: Tensor | None = None) -> Tensor:
        """Hidden states of the sampled rows (of all where none is). placed: what the batch's items became, where
        it is not the encoder's rows."""
        cross = host.cross or _NO_CROSS
        arrays = [host.token_ids, host.positions, host.bounds, host.kv_lens, host.slots, host.tables]
        arrays += [host.media_rows, host.media_from, cross.tables, cross.kv_lens]
        if host.sample_rows is not None:
            arrays.append(host.sample_rows)
        if host.shared is not None and self.device.type == "cuda":
            arrays += [host.shared.members, host.shared.bounds, host.shared.lens]
        given = iter(upload(arrays, self.device))
        raw, positions, bounds, kv_lens, slots, tables, media_rows, media_from = (next(given) for _ in range(8))
        cross_tables, cross_lens = next(given), next(given)
        rows = None if host.sample_rows is None else next(given).long()
        if rows is not None and not len(rows):
            rows = None  # nothing is sampled: any rows will do
        shared = SharedPrefixes(*given) if host.shared is not None and self.device.type == "cuda" else None
        embeds = self._decoder.embed(resolve_ids(raw, self._sampler.last_ids))
        if len(host.media_rows):
            found = (self.rows.slab if placed is None else placed).index_select(0, media_from)
            embeds.index_copy_(0, media_rows.long(), found.to(embeds.dtype))
        metadata = AttentionMetadata(
            tables,
            bounds,
            kv_lens,
            slot_mapping=slots.long(),
            max_q_len=host.max_q_len,
            max_kv_len=host.max_kv_len,
            num_decodes=host.num_decodes,
            shared=shared,
            cpu_plan=self._plan(tables, bounds, kv_lens),
        )
        kinds = {"self": metadata}
        if host.cross is not None:
            kinds["cross"] = AttentionMetadata(
                cross_tables,
                bounds,
                cross_lens,
                slot_mapping=None,
                max_q_len=host.max_q_len,
                max_kv_len=max(cross.max_kv_len, 1),
                causal=False,
                num_decodes=host.num_decodes,
                cpu_plan=self._plan(cross_tables, bounds, cross_lens),
            )
        return self._decoder(embeds, positions, ForwardContext(kinds, self.kv.caches, rows))

    def _plan(self, tables: Tensor, bounds: Tensor, kv_lens: Tensor) -> CpuPlan | None:
        return plan_cpu(tables, bounds, kv_lens, self.kv.block_size) if self.device.type == "cpu" else None


_NO_CROSS = CrossTables(np.zeros((0, 0), np.int32), np.zeros(0, np.int32), 0)


def _media_keys(batch: ScheduledBatch) -> set[bytes]:
    """Items whose rows this batch's tokens and sources take."""
    taken = {
        r.feature.key
        for s in batch.sequences
        for r in (() if s.start >= s.seq.prompt_len else s.seq.ranges)
        if r.offset < s.start + s.length and r.end > s.start
    }
    return taken.union(r.feature.key for seq in batch.sources for r in seq.request.media)


def _sampling_row(scheduled: ScheduledSequence, sampler: Sampler) -> SamplingRow:
    seq = scheduled.seq
    step = scheduled.start + scheduled.length - seq.prompt_len
    owner = (seq.seq_id, scheduled.epoch)
    read = seq.params.reads_tokens and not sampler.knows(seq.slot, owner, step)  # else a copy at every step
    return SamplingRow(
        seq.params,
        (seq.seed + _SEED_STRIDE * seq.index) % 2**63,
        step,
        seq.request.token_ids,
        seq.output_token_ids if read else (),
        seq.masked_stop_ids,
        seq.slot,
        owner,
        seq.grammar,
    )


def _by_sequence(
    pending: PendingSample, chosen: Sequence[ScheduledSequence]
) -> tuple[dict[int, SampledToken], dict[int, MMError]]:
    """What was drawn, and whose logits processors failed."""
    drawn = pending.collect()
    sampled = {
        s.seq.seq_id: SampledToken(token, logprobs, ok)
        for s, token, logprobs, ok in zip(chosen, drawn.token_ids, drawn.logprobs, drawn.finite, strict=True)
    }
    return sampled, {chosen[row].seq.seq_id: error for row, error in drawn.faults.items()}


def resolve_device(config: EngineConfig) -> torch.device:
    """`auto` is the first GPU where there is one, else the CPU. Raises ConfigError for what is not there."""
    if config.device == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device={config.device!r} is not supported. Use 'auto', 'cpu', 'cuda' or 'cuda:N'.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={config.device!r}: torch sees {torch.cuda.device_count()} CUDA devices. Use device='cpu', or "
            "install a CUDA build of torch and a driver."
        )
    return torch.device("cuda:0") if device == torch.device("cuda") else device
