"""ModelRunner: launches scheduled batches on the device: encode, fuse, forward, sample."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mm_core.config import EngineConfig
from mm_core.errors import ConfigError, MMError, OutOfMemoryError
from mm_core.hookspecs import Decoder, Encoder
from mm_core.kernels.paged_attention import plan_cpu
from mm_core.kernels.shared_prefixes import SharedPrefixes
from mm_core.layers.context import AttentionMetadata, ForwardContext
from mm_core.runner.batch import BatchBuilder, HostBatch
from mm_core.runner.chunk_graphs import ChunkGraphs
from mm_core.runner.encoders import EncoderRows
from mm_core.runner.graphs import DecodeGraphs, resolve_ids
from mm_core.runner.memory import KVCache, is_out_of_memory
from mm_core.runner.sampler import PendingSample, Sampler, SamplingRow
from mm_core.runner.spans import DeviceSpans
from mm_core.runner.step import LaunchedStep
from mm_core.runner.upload import reserve_pinned, upload
from mm_core.scheduler.sequence import EncodeItem, SampledToken, ScheduledBatch, ScheduledSequence, StepResult
from mm_core.tracing import SpanRecorder
from mm_core.types import MediaFeature

_SEED_STRIDE = 0x9E3779B97F4A7C15  # spreads the seeds of a request's n answers (2^64 / golden ratio)


@dataclass(frozen=True)
class RunnerLimits:
    """Sizes of what the runner allocates once. cuda_graphs: whether decode steps may be captured."""

    max_num_seqs: int
    max_model_len: int
    encoder_cache_tokens: int
    max_num_batched_tokens: int
    cuda_graphs: bool = True


class ModelRunner:
    """Owns the device: modules, KV tensors, encoder rows and streams.

    On a GPU the decoder has a stream of high priority and the encoder one of its own: items that no
    sequence of the batch needs yet are encoded beside the decoder's work.
    """

    def __init__(
        self,
        decoder: Decoder,
        encoder: Encoder,
        kv: KVCache,
        family: str,
        device: torch.device,
        limits: RunnerLimits,
        recorder: SpanRecorder | None = None,
    ) -> None:
        self.device = device
        self.kv = kv
        self._decoder = decoder
        self._limits = limits
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device, priority=-1) if on_gpu else None  # type: ignore[no-untyped-call]
        self._spans = DeviceSpans(recorder, device)
        self.rows = EncoderRows(encoder, family, limits.encoder_cache_tokens, device, self._spans)
        axes = decoder.position_axes
        self._builder = BatchBuilder(limits.max_num_seqs, limits.max_model_len, kv.block_size, axes)
        self._sampler = Sampler(limits.max_num_seqs, decoder.vocab_size, device)
        self._graphs: tuple[DecodeGraphs | ChunkGraphs, ...] = ()

    @torch.inference_mode()
    def capture_graphs(self, examples: Sequence[MediaFeature] = ()) -> None:
        """Capture decode steps, small steps with prompts and small passes of the encoder where that is
        possible: on a GPU. What a step reads has to exist by now. examples: items such as requests bring."""
        if self._stream is None or not self._limits.cuda_graphs:
            return
        torch.cuda.synchronize(self.device)
        last_ids, limits = self._sampler.last_ids, self._limits
        with self._on_stream():
            pool = torch.cuda.graph_pool_handle()
            tables = (self._decoder, self.kv.caches, last_ids)
            graphs = DecodeGraphs(*tables, self._builder.width, limits.max_model_len)
            chunks = ChunkGraphs(*tables, self.rows.slab, self._builder.width, limits.max_num_batched_tokens)
            graphs.capture(pool)
            chunks.capture(pool)
        torch.cuda.synchronize(self.device)
        self._graphs = (graphs, chunks)
        self.rows.rehearse(examples)

    @torch.inference_mode()
    def reserve(self, examples: Sequence[MediaFeature], encoder_budget: int) -> None:
        """Run steps as large as there can be, which write nothing, so that torch holds the memory they take.

        Asking the system for memory while the device works waits until it is idle: a step that needs more
        than any before it would stop the steps behind it from being launched.
        """
        if self._stream is None:
            return
        with self._on_stream():
            host = largest_batch(self._limits, self.kv.block_size, self._decoder.position_axes, self._builder.width)
            self._decoder.logits(self._forward(host))
        self.rows.reserve(examples, encoder_budget)
        reserve_pinned()
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Drop modules, KV tensors and encoder rows; nothing can run afterwards."""
        if self.device.type == "cuda":
            with suppress(RuntimeError):  # a lost device has nothing left to wait for
                torch.cuda.synchronize(self.device)
        self._graphs = ()
        self.kv.caches.clear()
        self.rows.release()
        del self._decoder, self._sampler
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
        self.rows.drop(batch.evicted_media)
        keys = _media_keys(batch)
        failed_media = self.rows.encode([item for item in batch.encode if item.key in keys])
        pending, failed = None, {}
        chosen = [s for s in batch.sequences if s.samples]
        done: torch.cuda.Event | None = None
        if batch.sequences:
            host = self._builder.build(batch, self.rows.places)
            for slot in host.new_owners:
                self._sampler.release(slot)
            self._sampler.keep([s.seq.slot for s in batch.sequences])
            self.rows.wait_for(keys)
            pending, failed = self._run(host, chosen), dict(host.failed)
            if self._stream is not None and pending is None:
                done = torch.cuda.Event()  # type: ignore[no-untyped-call]
                done.record(self._stream)
        # What nobody waits for yet goes behind the decoder's work in this thread, beside it on the device.
        failed_media |= self._encode_ahead([item for item in batch.encode if item.key not in keys])

        def wait() -> StepResult:
            sampled = {} if pending is None else _by_sequence(pending, chosen)
            if done is not None:
                done.synchronize()
            self._spans.resolve()
            return StepResult(sampled, failed, frozenset(failed_media))

        return LaunchedStep(wait, bool(failed or failed_media))

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

    def _run(self, host: HostBatch, chosen: Sequence[ScheduledSequence]) -> PendingSample | None:
        name = "decode" if host.only_decodes else "mixed" if host.num_decodes else "prefill"
        sizes = {"tokens": len(host.token_ids), "sequences": len(host.kv_lens), "kv_tokens": int(host.kv_lens.sum())}
        with self._spans.span("decoder", name, **sizes):
            hidden = next((h for graphs in self._graphs if (h := graphs.run(host)) is not None), None)
            if hidden is None:
                hidden = self._forward(host)
            if not chosen:
                return None
            sampler = self._sampler
            return sampler.launch(self._decoder.logits(hidden), [_sampling_row(s, sampler) for s in chosen])

    def _forward(self, host: HostBatch) -> Tensor:
        """Hidden states of the sampled rows (of all where none is)."""
        arrays = [host.token_ids, host.positions, host.bounds, host.kv_lens, host.slots, host.tables]
        arrays += [host.media_rows, host.media_from]
        if host.sample_rows is not None:
            arrays.append(host.sample_rows)
        if host.shared is not None and self.device.type == "cuda":
            arrays += [host.shared.members, host.shared.bounds, host.shared.lens]
        given = iter(upload(arrays, self.device))
        raw, positions, bounds, kv_lens, slots, tables, media_rows, media_from = (next(given) for _ in range(8))
        rows = None if host.sample_rows is None else next(given).long()
        if rows is not None and not len(rows):
            rows = None  # nothing is sampled: any rows will do
        shared = SharedPrefixes(*given) if host.shared is not None and self.device.type == "cuda" else None
        embeds = self._decoder.embed(resolve_ids(raw, self._sampler.last_ids))
        if len(host.media_rows):
            found = self.rows.slab.index_select(0, media_from)
            embeds.index_copy_(0, media_rows.long(), found.to(embeds.dtype))
        on_cpu = self.device.type == "cpu"
        metadata = AttentionMetadata(
            tables,
            bounds,
            kv_lens,
            slot_mapping=slots.long(),
            max_q_len=host.max_q_len,
            max_kv_len=host.max_kv_len,
            num_decodes=host.num_decodes,
            shared=shared,
            cpu_plan=plan_cpu(tables, bounds, kv_lens, self.kv.block_size) if on_cpu else None,
        )
        context = ForwardContext({"self": metadata}, self.kv.caches, rows)
        return self._decoder(embeds, positions, context)


def largest_batch(limits: RunnerLimits, block_size: int, axes: int, width: int) -> HostBatch:
    """As many tokens as a step may have, as long chunks of as few sequences as can be, as many of them sampled
    as can be. Nothing is written: no token has a slot."""
    tokens = limits.max_num_batched_tokens
    longest = min(tokens, limits.max_model_len)
    bounds = np.minimum(np.arange(0, tokens + longest, longest), tokens).astype(np.int32)
    lens = np.diff(bounds)
    zeros = np.zeros(tokens, np.int32)
    blocks = min(-(-longest // block_size), width)
    return HostBatch(
        token_ids=zeros,
        positions=np.zeros((axes, tokens), np.int32),
        bounds=bounds,
        kv_lens=lens,
        slots=zeros - 1,
        tables=np.zeros((len(lens), blocks), np.int32),
        sample_rows=zeros[: limits.max_num_seqs],
        media_rows=zeros[:1],
        media_from=zeros[:1],
        num_decodes=0,
        max_q_len=int(lens.max()),
        max_kv_len=int(lens.max()),
    )


def _media_keys(batch: ScheduledBatch) -> set[bytes]:
    """Items whose rows this batch's tokens take."""
    return {
        r.feature.key
        for s in batch.sequences
        for r in (() if s.start >= s.seq.prompt_len else s.seq.ranges)
        if r.offset < s.start + s.length and r.end > s.start
    }


def _sampling_row(scheduled: ScheduledSequence, sampler: Sampler) -> SamplingRow:
    seq = scheduled.seq
    step = scheduled.start + scheduled.length - seq.prompt_len
    owner = (seq.seq_id, scheduled.epoch)
    read = seq.params.penalised and not sampler.knows(seq.slot, owner, step)  # else a copy at every step
    return SamplingRow(
        seq.params,
        (seq.seed + _SEED_STRIDE * seq.index) % 2**63,
        step,
        seq.request.token_ids,
        seq.output_token_ids if read else (),
        seq.masked_stop_ids,
        seq.slot,
        owner,
    )


def _by_sequence(pending: PendingSample, chosen: Sequence[ScheduledSequence]) -> dict[int, SampledToken]:
    drawn = pending.collect()
    return {
        s.seq.seq_id: SampledToken(token, logprobs, ok)
        for s, token, logprobs, ok in zip(chosen, drawn.token_ids, drawn.logprobs, drawn.finite, strict=True)
    }


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
