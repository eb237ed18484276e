"""The task `transcribe` beside transformers' `generate(..., return_timestamps=True)`, and what it refuses."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch
from support.tiny_whisper import WhisperReference, sound

from mm_core import Engine, MMError, SamplingParams, TextPrompt
from mm_core.errors import InvalidParamsError
from mm_plugin_whisper.asking import compression_ratio
from mm_plugin_whisper.windows import Piece, split

PLAIN = {"temperature": 0.0, "compression_ratio_threshold": None, "logprob_threshold": None,
         "no_speech_threshold": None}  # fmt: skip
Engines, References = Callable[..., Engine], Callable[..., WhisperReference]


def check(result: Any, wanted: Sequence[dict[str, Any]], reference: WhisperReference) -> None:
    """Segments are the reference's, as far as they begin within the sound; times end with it."""
    end = result.duration
    spoken = [s for s in wanted if reference.tokenizer.decode(s["tokens"], skip_special_tokens=True)]
    tokens = [list(s.tokens) for s in result.segments]
    assert tokens == [s["tokens"] for s in spoken[: len(tokens)]]
    assert all(s["start"] >= end for s in spoken[len(tokens) :])
    for ours, theirs in zip(result.segments, spoken, strict=False):
        assert ours.start == pytest.approx(min(theirs["start"], end), abs=1e-9)
        assert ours.end == pytest.approx(min(theirs["end"], end), abs=1e-9)
    assert result.text == "".join(s.text for s in result.segments).strip()


@pytest.mark.parametrize(
    ("seconds", "language", "task"),
    [(0.1, "French", "transcribe"), (7.0, "en", "translate"), (30.0, "en", "transcribe"),
     (30.01, "French", "translate"), (65.0, "en", "transcribe")],
)  # fmt: skip
def test_segments_equal_transformers(
    seconds: float, language: str, task: str, engine: Engines, reference: References
) -> None:
    samples = sound(seconds, 21)
    wanted = reference().transcribe(samples, language=language.lower(), task=task)
    result = engine().task("transcribe", audio=(samples, 16000), language=language, task=task, **PLAIN)
    check(result, wanted, reference())
    assert result.duration == pytest.approx(seconds)
    assert result.language == {"en": "en", "French": "fr"}[language]
    if seconds > 30:
        assert len({s["start"] // 30 for s in wanted}) > 1, "the reference heard one window: it proves nothing"


def test_the_other_layout_and_languages_that_are_heard(engine: Engines, reference: References) -> None:
    heard = set()
    for seed in range(3):
        settings = {"mels": 128, "layout": "tf5", "seed": seed}
        model, theirs = engine(**settings), reference(**settings)
        samples = sound(33.0, 30)
        result = model.transcribe((samples, 16000), **PLAIN)
        check(result, theirs.transcribe(samples, task="transcribe"), theirs)
        (language,) = theirs.model.detect_language(theirs.features(samples)).tolist()
        assert theirs.tokenizer.decode([language]) == f"<|{result.language}|>"
        heard.add(result.language)
    assert len(heard) > 1, "one language is heard by all: it proves nothing"


def test_english_only_models(engine: Engines, reference: References) -> None:
    model, theirs = engine(multilingual=False), reference(multilingual=False)
    samples = sound(41.0, 22)
    result = model.transcribe((samples, 16000), language="en", **PLAIN)
    check(result, theirs.transcribe(samples), theirs)
    assert result.language == "en"
    for wrong in ({"language": "de"}, {"task": "translate"}):
        with pytest.raises(InvalidParamsError, match="English-only"):
            model.transcribe((samples, 16000), **wrong)


PROMPT = "The quick brown fox. Der Hund schläft."
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("prompt", "condition"),
    [(None, True), (PROMPT, True), pytest.param(None, False, marks=SLOW), pytest.param(PROMPT, False, marks=SLOW)],
)
def test_text_before_equals_transformers(
    condition: bool, prompt: str | None, engine: Engines, reference: References
) -> None:
    """Prompt and the text of earlier windows, cut where they get too long."""
    samples, theirs = sound(65.0, 23), reference()
    ids = None if prompt is None else theirs.tokenizer.get_prompt_ids(prompt, return_tensors="pt")
    wanted = theirs.transcribe(
        samples, language="de", task="transcribe", prompt_ids=ids, condition_on_prev_tokens=condition
    )
    result = engine().transcribe(
        (samples, 16000), language="de", initial_prompt=prompt, condition_on_previous_text=condition, **PLAIN
    )
    check(result, wanted, theirs)
    alone = engine().transcribe((samples, 16000), language="de", **PLAIN)
    assert (result == alone) == (prompt is None and not condition)


def test_silence_is_left_out_as_transformers_does(engine: Engines, reference: References) -> None:
    """Windows whose answer is unlikely and whose no-speech probability is above a threshold between them."""
    samples, theirs = sound(80.0, 24), reference()
    options: dict[str, Any] = {"language": "en", "task": "transcribe"}
    off = {**PLAIN, "no_speech_threshold": 1.0, "logprob_threshold": 0.0}
    probs = sorted({s.no_speech_prob for s in engine().transcribe((samples, 16000), **options, **off).segments})
    assert len(probs) > 2
    for threshold in ((probs[0] + probs[1]) / 2, 2.0):
        limits = {"no_speech_threshold": threshold, "logprob_threshold": 0.0, "temperature": (0.0,)}
        wanted = theirs.transcribe(samples, return_dict_in_generate=True, output_scores=True, **options, **limits)
        result = engine().transcribe((samples, 16000), compression_ratio_threshold=None, **options, **limits)
        check(result, wanted, theirs)
        assert all(s.no_speech_prob <= threshold for s in result.segments)


def test_poor_answers_are_asked_again_warmer(engine: Engines) -> None:
    samples = (sound(6.0, 25), 16000)
    cold = engine().transcribe(samples, language="en")
    assert {s.temperature for s in cold.segments} == {1.0}, "a random model is never sure"
    sure = engine().transcribe(samples, language="en", logprob_threshold=-100.0, compression_ratio_threshold=100.0)
    assert {s.temperature for s in sure.segments} == {0.0}
    again = engine().transcribe(samples, language="en", temperature=[0.0, 0.3], logprob_threshold=None,
                                compression_ratio_threshold=0.0)  # fmt: skip
    assert {s.temperature for s in again.segments} == {0.3}


def test_the_compression_ratio_is_transformers(reference: References) -> None:
    model = reference().model
    for tokens in ([5, 6, 7], [9] * 60, list(range(300))):
        want = model._retrieve_compression_ratio(torch.tensor(tokens), 51865)
        assert compression_ratio(tokens, 51865) == want


@pytest.mark.parametrize("timestamps", [False, True])
def test_batched_windows_are_those_heard_alone(timestamps: bool, engine: Engines) -> None:
    samples = sound(70.0, 26)
    options = {"language": "en", "timestamps": timestamps, **PLAIN}
    steps = engine().stats()["steps"]
    result = engine().transcribe((samples, 16000), batched=True, **options)
    assert engine().stats()["steps"] - steps < 70, "the windows did not share steps"
    begins = sorted({0.0, *(s.start for s in result.segments if not timestamps)})
    if not timestamps:
        assert [s.start for s in result.segments] == begins
        assert [s.end for s in result.segments] == [*begins[1:], 70.0]
        for segment in result.segments:
            part = samples[round(segment.start * 16000) : round(segment.end * 16000)]
            alone = engine().transcribe((part, 16000), **options)
            assert [s.tokens for s in alone.segments] == [segment.tokens]
    assert all(a.start <= b.start for a, b in zip(result.segments, result.segments[1:], strict=False))
    assert result.segments[-1].start > 45


def test_without_timestamps_one_segment(engine: Engines, reference: References) -> None:
    samples = sound(9.0, 27)
    result = engine().transcribe((samples, 16000), language="en", timestamps=False, **PLAIN)
    (segment,) = result.segments
    ids = reference().tokenizer.convert_tokens_to_ids(
        ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    )
    want = reference().answer(samples, ids, 60).token_ids
    assert list(segment.tokens) == [t for t in want if t != reference().model.config.eos_token_id]
    assert (segment.start, segment.end) == (0.0, 9.0)


def test_sounds_in_every_form(engine: Engines, tmp_path: Path) -> None:
    """Files, bytes and arrays at other rates are those samples resampled."""
    samples = sound(31.5, 28, rate=24000) * 0.9
    stereo = np.stack([samples, samples], 1)
    want = engine().transcribe((soxr.resample(samples, 24000, 16000), 16000), language="en", **PLAIN)
    path = tmp_path / "talk.wav"
    soundfile.write(path, stereo, 24000, subtype="FLOAT")
    for given in ((torch.from_numpy(stereo), 24000), path, path.read_bytes()):
        result = engine().transcribe(given, language="en", **PLAIN)
        assert [s.tokens for s in result.segments] == [s.tokens for s in want.segments]


def test_a_list_is_heard_at_once_and_each_as_alone(engine: Engines) -> None:
    clips = [(sound(s, 40 + i), 16000) for i, s in enumerate((3.0, 34.0, 12.0))]
    steps = engine().stats()["steps"]
    together = engine().transcribe(clips, **PLAIN)
    shared = engine().stats()["steps"] - steps
    alone = [engine().transcribe(clip, **PLAIN) for clip in clips]
    assert [[s.tokens for s in t.segments] for t in together] == [[s.tokens for s in t.segments] for t in alone]
    assert shared < (engine().stats()["steps"] - steps - shared)


def test_the_same_clip_costs_neither_encoder_nor_projection(engine: Engines) -> None:
    model, clip = engine(), {"audio": (sound(4.4, 29), 16000)}
    prompt = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"
    params = SamplingParams(max_tokens=5, temperature=0.0)
    (first,) = model.generate(TextPrompt(prompt=prompt, multi_modal_data=clip), params)
    before = model.stats()
    (second,) = model.generate(TextPrompt(prompt=prompt, multi_modal_data=clip), params)
    (other,) = model.generate(TextPrompt(prompt=prompt.replace("en", "de"), multi_modal_data=clip), params)
    after = model.stats()
    assert second.token_ids == first.token_ids
    assert other.prompt_token_ids != first.prompt_token_ids
    assert before["encoded_items"] == after["encoded_items"]
    assert before["computed_sources"] == after["computed_sources"] > 0
    assert first.usage.encoded_media_tokens == 1500
    assert second.usage.encoded_media_tokens == 0


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"audio": (np.zeros(0, np.float32), 16000)}, "no samples"),
        ({"audio": (np.full(99, np.nan, np.float32), 16000)}, "NaN"),
        ({"audio": io.BytesIO(b"RIFF")}, "BytesIO"),
        ({"audio": b"RIFF"}, "."),
        ({"audio": "no-such-file.wav"}, "no-such-file"),
        ({"language": "Klingon"}, "'Klingon'"),
        ({"language": 7}, "language='7'"),
        ({"task": "summarise"}, "'summarise'"),
        ({"timestamps": "yes"}, "True or False"),
        ({"no_speech_threshold": "0.6"}, "a number or None"),
        ({"temperature": []}, "temperature is empty"),
        ({"temperature": -1.0}, "temperature"),
        ({"initial_prompt": "see <|startoftranscript|>"}, "special token"),
        ({"initial_prompt": 3}, "a str or None"),
        ({"beams": 5}, "'beams'"),
    ],
)
def test_wrong_arguments_are_named_and_the_engine_lives(wrong: dict[str, Any], told: str, engine: Engines) -> None:
    good = {"audio": (sound(1.0, 31), 16000), "language": "en", **PLAIN}
    with pytest.raises(MMError, match=told):
        engine().task("transcribe", **{**good, **wrong})
    assert engine().task("transcribe", **good).segments


def test_generate_refuses_a_long_clip_by_name(engine: Engines) -> None:
    prompt = TextPrompt(prompt="", multi_modal_data={"audio": (sound(30.5), 16000)})
    with pytest.raises(MMError, match=r"30\.50 s; generate takes up to 30 s\. Use engine\.transcribe"):
        engine().generate(prompt)


def test_pieces_of_answers() -> None:
    """Cases of the splitting rule by hand; 100 is <|0.00|>."""
    assert split([100, 1, 150], 100, 3000) == ([Piece(0.0, 1.0, (100, 1, 150))], 3000)
    assert split([1, 2], 100, 3000) == ([Piece(0.0, 30.0, (1, 2))], 3000)
    pairs = [100, 1, 150, 150, 2, 200, 200]
    want = [Piece(0.0, 1.0, (100, 1, 150)), Piece(1.0, 2.0, (150, 2, 200, 200))]
    assert split(pairs, 100, 3000) == (want, 200)
    assert split(pairs, 100, 3000, whole=True) == (want, 3000)
    begun = [100, 1, 150, 150, 2]
    assert split(begun, 100, 3000) == ([Piece(0.0, 1.0, (100, 1, 150, 150))], 100)
    kept = [Piece(0.0, 1.0, (100, 1, 150)), Piece(1.0, 20.0, (150, 2))]
    assert split(begun, 100, 2000, whole=True) == (kept, 2000)
    single = [100, 1, 150, 150, 2, 180]
    assert split(single, 100, 3000)[1] == 3000
    assert split(single, 100, 3000)[0][-1] == Piece(1.0, 1.6, (150, 2, 180))
