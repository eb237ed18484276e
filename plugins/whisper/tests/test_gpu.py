"""On a GPU: rows as on a CPU, nothing waits for the device, tokens and segments equal transformers'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tiny_whisper import WhisperReference, sound

from mm_core import Engine, SamplingParams, TextPrompt
from mm_core.checkpoint import open_checkpoint
from mm_core.hookspecs import BuildContext, MediaRequest
from mm_core.types import LogitsRows, MediaFeature, MediaItem
from mm_plugin_whisper.encoder import AudioConfig, WhisperEncoder
from mm_plugin_whisper.processor import WhisperProcessor
from mm_plugin_whisper.rules import OneOf, Suppress, TimestampRules
from mm_plugin_whisper.windows import Clip

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
PROMPT = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"


def features(processor: WhisperProcessor) -> list[MediaFeature]:
    """Clips and windows of a longer sound."""
    given = [((sound(s, 50), 16000), {}) for s in (0.3, 30.0, 9.0)]
    clip = Clip(sound(45.0, 51), processor._sound)
    given += [(w.audio, w.kwargs or {}) for w in (clip.window(0), clip.window(2000))]
    items = [(MediaItem("audio", b"", samples, {}), kwargs) for (samples, _), kwargs in given]
    return [processor.prepare(i, processor.variant(i, MediaRequest({"audio": 1}, kwargs))) for i, kwargs in items]


@torch.inference_mode()
def test_the_encoder_computes_the_same_without_waiting(checkpoint: Callable[..., Path]) -> None:
    found = open_checkpoint(str(checkpoint()))
    config = AudioConfig.from_checkpoint(found)
    here = WhisperEncoder(config, BuildContext(torch.device("cpu"), torch.float32, 64))
    there = WhisperEncoder(config, BuildContext(torch.device("cuda"), torch.float32, 64))
    generator = torch.Generator().manual_seed(0)
    for ours, theirs in zip(here.parameters(), there.parameters(), strict=True):
        ours.copy_(torch.randn(ours.shape, generator=generator) * 0.2)
        theirs.copy_(ours)
    for module in (*here.modules(), *there.modules()):
        getattr(module, "finish_loading", lambda: None)()
    given = features(WhisperProcessor(found))
    want = torch.cat(here(given))
    moved = [replace(f, tensors={k: t.to("cuda") for k, t in f.tensors.items()}) for f in given]
    with torch.cuda.stream(torch.cuda.Stream()):
        there(moved)  # compiles kernels, which may wait
        there.use_graphs()
        for _ in range(3):
            try:
                torch.cuda.set_sync_debug_mode("error")
                rows = torch.cat(there(moved))
            finally:
                torch.cuda.set_sync_debug_mode("default")
            torch.testing.assert_close(rows.cpu(), want, atol=2e-3, rtol=1e-3)
    assert there._captured._graphs


def test_rules_do_not_wait() -> None:
    said = torch.tensor([[101, 3, 110, -1], [101, -1, -1, -1], [-1, -1, -1, -1]], device="cuda")
    rows = LogitsRows([(1,)] * 3, said, [3, 1, 0], torch.tensor([3, 1, 0], device="cuda"))
    logits = torch.randn((3, 160), device="cuda")
    rules = (Suppress((1, 2)), Suppress((5, 90), at_begin=True), TimestampRules(100, 90, 99, 20), OneOf((7, 8)))
    for rule in rules:
        rule(logits.clone(), rows)  # its ids go to the device once
    try:
        torch.cuda.set_sync_debug_mode("error")
        got = [rule(logits.clone(), rows) for rule in rules]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    here = LogitsRows(rows.prompt_token_ids, said.cpu(), rows.num_output_tokens, rows.lengths.cpu())
    for rule, found in zip(rules, got, strict=True):
        torch.testing.assert_close(found.cpu(), rule(logits.cpu().clone(), here), atol=1e-5, rtol=0)


def test_tokens_and_segments_equal_transformers(
    checkpoint: Callable[..., Path], reference: Callable[..., WhisperReference]
) -> None:
    theirs, ids = reference(), reference().tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    clips = [sound(s, 52 + i) for i, s in enumerate((0.1, 4.0, 30.0, 11.0))]
    with Engine.from_pretrained(checkpoint(), dtype="float32", device="cuda") as engine:
        prompts = [TextPrompt(prompt=PROMPT, multi_modal_data={"audio": (c, 16000)}) for c in clips]
        for _ in range(2):
            outputs = engine.generate(prompts, SamplingParams(max_tokens=24, temperature=0.0))
            for output, clip in zip(outputs, clips, strict=True):
                assert list(output.token_ids) == theirs.answer(clip, ids, 24).token_ids
        long = sound(65.0, 60)
        heard = engine.transcribe(
            (long, 16000), language="en", temperature=0.0, logprob_threshold=None,
            compression_ratio_threshold=None, no_speech_threshold=None,
        )  # fmt: skip
        wanted = theirs.transcribe(long, language="en", task="transcribe")
        got = [list(s.tokens) for s in heard.segments]
        assert got == [s["tokens"] for s in wanted][: len(got)]
        assert len(got) > 3
