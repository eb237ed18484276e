"""What decoders read by cross-attention: computed once, from the right rows, into the right blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.fake_cross import (
    HIDDEN,
    Condition,
    CrossDecoder,
    Plain,
    RowsEncoder,
    encode,
    feature,
    keys_at,
    make_runner,
    media_source,
    scheduled,
    text_source,
)
from torch import Tensor, nn

from mm_core.errors import OutOfMemoryError, PluginError
from mm_core.hookspecs import KVCacheSpec
from mm_core.runner.fusing import Modules, check_modules
from mm_core.runner.runner import ModelRunner
from mm_core.runner.sources import made_up_sources
from mm_core.scheduler.sequence import ScheduledBatch, ScheduledSequence
from mm_core.types import PlaceholderRange, Source

A, B, C = feature("a", 21), feature("b", 40), feature("c", 5)


def source_rows(runner: ModelRunner, source: Source, instruction: tuple[int, ...] = ()) -> Tensor:
    """What `write_source` must get, one item after another."""
    modules: Any = runner._modules
    rows = [r.feature.tensors["rows"] for r in source.ranges]
    if modules.conditions:
        rows = modules.fusion.condition(rows, [instruction] * len(rows))
    if not source.token_ids:
        return torch.cat(rows)
    embeds = modules.decoder.embed(torch.tensor(source.token_ids))
    for r, found in zip(source.ranges, rows, strict=True):
        embeds[r.offset : r.end] = found
    bounds = torch.tensor([0, len(embeds)], dtype=torch.int32)
    encoded: Tensor = modules.decoder.encode_source(embeds, bounds, len(embeds))
    return encoded


def run(runner: ModelRunner, batch: ScheduledBatch) -> tuple[Tensor, dict[int, Any], frozenset[bytes]]:
    """Hidden states of all sampled rows, and what failed."""
    seen: list[Tensor] = []
    logits = runner._decoder.logits
    runner._decoder.logits = lambda hidden: seen.append(hidden) or logits(hidden)  # type: ignore[method-assign, func-returns-value]
    result = runner.execute(batch)
    del runner._decoder.logits
    return seen[0], dict(result.failed), result.failed_media


@torch.inference_mode()
def check(runner: ModelRunner, s: ScheduledSequence, hidden: Tensor) -> None:
    """`hidden` is that of a sequence's last token, computed densely."""
    source, decoder = s.seq.request.source, runner._decoder
    assert isinstance(decoder, CrossDecoder)
    assert source is not None
    rows = source_rows(runner, source, s.seq.request.instruction)
    wanted = decoder.dense(s.seq.token_ids[: s.start + s.length], rows)
    torch.testing.assert_close(hidden, wanted[-1], atol=1e-5, rtol=1e-5)
    other = decoder.dense(s.seq.token_ids[: s.start + s.length], rows.flip(0) * 0.5)
    assert float((hidden - other[-1]).abs().max()) > 1e-2, "the source does not matter"


def test_sources_are_written_once_and_read_by_all_who_share_them() -> None:
    runner = make_runner(Plain("cross_attention"))
    one = scheduled(0, 0, 3, 3, media_source(A))
    two = scheduled(1, 0, 5, 5, media_source(B), block=1)
    twin = scheduled(2, 0, 4, 4, media_source(A))  # another answer to the first request
    batch = ScheduledBatch(1, (one, two, twin), encode(A, B), sources=(one.seq, two.seq))
    hidden, failed, _ = run(runner, batch)
    assert not failed
    assert runner.sources.calls == 1
    assert runner._decoder.written == [61]  # type: ignore[attr-defined]
    for s, row in zip(batch.sequences, hidden, strict=True):
        check(runner, s, row)
    for _ in range(2):  # decodes: nothing is computed any more, though the encoder's rows are gone
        later = tuple(ScheduledSequence(s.seq, s.start + s.length, 1, True, s.tables) for s in batch.sequences)
        for s in later:
            s.seq.token_ids.append(11 + s.seq.slot)
        hidden, _, _ = run(runner, ScheduledBatch(2, later, evicted_media=(A.key, B.key)))
        for s, row in zip(later, hidden, strict=True):
            check(runner, s, row)
        batch = ScheduledBatch(3, later)
    assert runner.sources.calls == 1


def test_a_source_of_several_items_holds_their_rows_in_order() -> None:
    runner = make_runner(Plain("cross_attention"))
    s = scheduled(3, 0, 2, 2, media_source(B, C, A))
    hidden, _, _ = run(runner, ScheduledBatch(1, (s,), encode(A, B, C), sources=(s.seq,)))
    check(runner, s, hidden[0])


def test_blocks_past_a_source_and_of_others_are_left_alone() -> None:
    runner = make_runner(Plain("cross_attention"))
    s = scheduled(0, 0, 1, 1, media_source(A))
    before = [k.clone() for k, *_ in runner.kv.caches["cross"]]
    run(runner, ScheduledBatch(1, (s,), encode(A), sources=(s.seq,)))
    for (k, *_), old in zip(runner.kv.caches["cross"], before, strict=True):
        changed = (k != old).flatten(2).any(2)
        slots = {(b, i) for b, i in changed.nonzero().tolist()}
        table = s.tables["cross"]
        assert slots == {(table[i // 16], i % 16) for i in range(21)} | {(0, 0)}


def test_a_text_encoder_reads_text_with_rows_in_place() -> None:
    runner = make_runner(Plain("encoder_decoder"), reads_text=True)
    wide = make_wide(runner)
    ids = tuple(range(10, 40))
    one = scheduled(0, 0, 3, 3, text_source(ids, (2, wide["a"]), (25, wide["c"])))
    two = scheduled(1, 0, 1, 1, text_source(ids[:7]), block=1)
    batch = ScheduledBatch(1, (two, one), encode(*wide.values()), sources=(one.seq, two.seq))
    hidden, failed, _ = run(runner, batch)
    assert not failed
    assert runner.sources.calls == 1
    for s, row in zip(batch.sequences, hidden, strict=True):
        check(runner, s, row)


def make_wide(runner: ModelRunner) -> dict[str, Any]:
    """Items whose rows are as wide as the decoder's, and an encoder for them."""
    encoder: Any = runner.rows._encoder
    encoder.hidden_size = HIDDEN
    runner.rows.slab = torch.zeros(200, HIDDEN)
    made = {name: feature(name, rows) for name, rows in (("a", 21), ("c", 5))}
    for f in made.values():
        f.tensors["rows"] = torch.randn(f.num_tokens, HIDDEN)  # type: ignore[index]
    return made


@pytest.mark.parametrize("kind", ["cross_attention", "encoder_decoder"])
def test_conditioned_rows_are_made_for_each_question(kind: str) -> None:
    fusion = Condition(kind)
    text = kind == "encoder_decoder"
    runner = make_runner(fusion, reads_text=text, decoder=CrossDecoder(reads_text=True))
    fused = feature("a", 21, num_fused=2)
    source = text_source(range(10, 20), (3, fused)) if text else media_source(fused)
    one = scheduled(0, 0, 2, 2, source, instruction=(1, 2))
    two = scheduled(1, 0, 2, 2, source, block=1, instruction=(3,))
    hidden, failed, _ = run(runner, ScheduledBatch(1, (one, two), encode(fused), sources=(one.seq, two.seq)))
    assert not failed
    assert fusion.calls == 1
    for s, row in zip((one, two), hidden, strict=True):
        check(runner, s, row)
    assert float((hidden[0] - hidden[1]).abs().max()) > 1e-3


def test_a_bad_source_fails_alone_and_so_does_a_bad_item() -> None:
    runner = make_runner(Plain("cross_attention"))
    bad = feature("x", 9, broken=True)
    made = [scheduled(i, 0, 2, 2, media_source(f), block=i) for i, f in enumerate((A, B, bad))]
    twin = scheduled(3, 0, 2, 2, media_source(B), block=1)
    runner._decoder.broken = {40}  # type: ignore[attr-defined]
    sources = tuple(s.seq for s in made)
    batch = ScheduledBatch(1, (*made, twin), encode(A, B, bad), sources=sources)
    hidden, failed, failed_media = run(runner, batch)
    assert failed_media == {b"x"}
    assert set(failed) == {1, 2, 3}
    assert "'fake' failed with ValueError" in str(failed[1])
    assert all(isinstance(error, PluginError) for error in failed.values())
    check(runner, made[0], hidden[0])


def test_a_source_of_another_length_than_its_media_is_the_plugins_fault() -> None:
    runner = make_runner(Plain("cross_attention"))
    source = media_source(A)
    s = scheduled(0, 0, 2, 2, Source(b"odd", source.num_tokens + 1, (), source.ranges))
    _, failed, _ = run(runner, ScheduledBatch(1, (s,), encode(A), sources=(s.seq,)))
    assert "22 rows" in str(failed[0])


def test_memory_that_runs_out_in_a_source_is_no_sources_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = make_runner(Plain("cross_attention"))
    s = scheduled(0, 0, 2, 2, media_source(A))

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runner._decoder, "write_source", full)
    with pytest.raises(OutOfMemoryError, match="max_num_batched_tokens"):
        runner.launch(ScheduledBatch(1, (s,), encode(A), sources=(s.seq,)))


def test_made_up_sources_write_nothing() -> None:
    for kind, text in (("cross_attention", False), ("encoder_decoder", True)):
        runner = make_runner(Plain(kind), reads_text=text)
        before = keys_at(runner, range(64), 1024)
        with torch.inference_mode():
            runner.sources.run(made_up_sources(128, 50, text))
        assert runner._decoder.written == [128]  # type: ignore[attr-defined]
        for old, new in zip(before, keys_at(runner, range(64), 1024), strict=True):
            np.testing.assert_array_equal(old, new)


# -- conditioned rows in prompts ---------------------------------------------------------------------


class PromptDecoder(nn.Module):
    """Its hidden states are its inputs."""

    hidden_size, vocab_size, position_axes = HIDDEN, 97, 1
    kv_specs = (KVCacheSpec("self", 1, 1, 8),)

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(97, HIDDEN)

    def embed(self, ids: Tensor) -> Tensor:
        rows: Tensor = self.embed_tokens(ids)
        return rows

    def forward(self, embeds: Tensor, positions: Tensor, context: Any) -> Tensor:
        self.seen = embeds.clone()
        return embeds if context.rows is None else embeds[context.rows]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden @ self.embed_tokens.weight.T


def prompt(slot: int, start: int, length: int, item: Any, asked: tuple[int, ...]) -> ScheduledSequence:
    place = PlaceholderRange(2, 3, (True, False, True), item)
    return scheduled(slot, start, length, 8, None, ranges=(place,), instruction=asked)


@torch.inference_mode()
def test_prompts_take_conditioned_rows_however_they_are_cut() -> None:
    fusion = Condition()
    runner = make_runner(fusion, decoder=PromptDecoder())
    item, decoder = feature("a", 21, num_fused=2), runner._decoder
    whole, asked_else = prompt(0, 0, 8, item, (1,)), prompt(1, 0, 4, item, (5, 7))
    run(runner, ScheduledBatch(1, (whole, asked_else), encode(item)))
    seen = decoder.seen  # type: ignore[attr-defined]
    assert fusion.calls == 1
    first, second = fusion.condition([item.tensors["rows"]] * 2, [(1,), (5, 7)])
    torch.testing.assert_close(seen[[2, 4]], first)
    torch.testing.assert_close(seen[8 + 2], second[0])
    torch.testing.assert_close(seen[3], decoder.embed(torch.tensor(whole.seq.token_ids[3])))
    rest = ScheduledSequence(asked_else.seq, 4, 4, True, asked_else.tables)
    run(runner, ScheduledBatch(2, (rest,)))
    torch.testing.assert_close(decoder.seen[0], second[1])  # type: ignore[attr-defined]
    calls = fusion.calls
    run(runner, ScheduledBatch(3, (ScheduledSequence(rest.seq, 7, 1, True, rest.tables),)))
    assert fusion.calls == calls, "nothing of the item was read"


@torch.inference_mode()
def test_a_question_that_fails_fails_alone() -> None:
    fusion = Condition()
    runner = make_runner(fusion, decoder=PromptDecoder())
    fusion.broken = (5, 7)
    item = feature("a", 21, num_fused=2)
    good, bad = prompt(0, 0, 8, item, (1,)), prompt(1, 0, 8, item, (5, 7))
    _, failed, failed_media = run(runner, ScheduledBatch(1, (good, bad), encode(item)))
    assert list(failed) == [1]
    assert not failed_media, "the encoder's rows are as good as ever"
    assert "Fusion.condition of family 'fake' failed with ValueError" in str(failed[1])
    (wanted,) = fusion.condition([item.tensors["rows"]], [(1,)])
    torch.testing.assert_close(runner._decoder.seen[[2, 4]], wanted)  # type: ignore[attr-defined]


def test_conditioned_rows_of_another_shape_than_promised_name_the_plugin() -> None:
    runner = make_runner(Condition(), decoder=PromptDecoder())
    item = feature("a", 21, num_fused=3)
    place = PlaceholderRange(2, 3, (True,) * 3, item)
    s = scheduled(0, 0, 8, 8, None, ranges=(place,))
    _, failed, _ = run(runner, ScheduledBatch(1, (s,), encode(item)))
    assert f"[(2, {HIDDEN})] where [(3, {HIDDEN})]" in str(failed[0])


# -- parts that do not fit together --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fusion", "decoder", "missing"),
    [
        (Plain("cross_attention"), PromptDecoder(), ["'cross', 'self'", "write_source"]),
        (Plain("embed"), CrossDecoder(), ["kv_specs named ['self']"]),
        (SimpleNamespace(kind="encoder_decoder"), PromptDecoder(), ["encode_source", "decoder_prompt"]),
        (SimpleNamespace(kind="embed", condition=lambda rows, asked: rows), PromptDecoder(), ["weight_map"]),
    ],
)
def test_what_a_family_lacks_is_named(fusion: Any, decoder: Any, missing: list[str]) -> None:
    with pytest.raises(PluginError, match="Family 'fake' fuses by") as caught:
        check_modules(Modules("fake", decoder, RowsEncoder(), fusion))
    for text in missing:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("fusion", "decoder"),
    [
        (Plain("embed"), PromptDecoder()),
        (Condition(), PromptDecoder()),
        (Plain("cross_attention"), CrossDecoder()),
        (Condition("encoder_decoder"), CrossDecoder(reads_text=True)),
    ],
)
def test_whole_families_pass(fusion: Any, decoder: Any) -> None:
    check_modules(Modules("fake", decoder, RowsEncoder(), fusion))
