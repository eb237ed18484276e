"""Samples to frames and rows: the spectrogram, its windows, and the encoder, beside transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.loading import load_renamed
from support.tiny_whisper import WhisperReference, sound
from transformers import WhisperFeatureExtractor

from mm_core.errors import CheckpointError, ConfigError, InvalidParamsError, MediaTooLargeError
from mm_core.hookspecs import BuildContext, MediaRequest
from mm_core.types import MediaFeature, MediaItem
from mm_plugin_whisper.encoder import AudioConfig, LogMel, WhisperEncoder
from mm_plugin_whisper.processor import WhisperProcessor
from mm_plugin_whisper.settings import Sound
from mm_plugin_whisper.windows import Clip, Window, quietest

TOLERANCE = 1e-4
CPU = torch.device("cpu")


def plain(path: Path) -> Any:
    from mm_core.checkpoint import open_checkpoint

    return open_checkpoint(str(path))


def item(samples: np.ndarray[Any, Any]) -> MediaItem:
    return MediaItem("audio", b"", samples, {"sample_rate": 16000, "samples": len(samples)})


def prepared(processor: WhisperProcessor, samples: np.ndarray[Any, Any], **kwargs: Any) -> MediaFeature:
    processor.check_kwargs(kwargs)
    one = item(samples)
    return processor.prepare(one, processor.variant(one, MediaRequest({"audio": 1}, kwargs)))


def of_window(processor: WhisperProcessor, window: Window) -> MediaFeature:
    return prepared(processor, window.audio[0], **(window.kwargs or {}))


@pytest.fixture
def processor(checkpoint: Callable[..., Path]) -> WhisperProcessor:
    return WhisperProcessor(plain(checkpoint()))


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("seconds", [1 / 16000, 0.01, 0.1, 2.0, 17.3, 29.99, 29.9999, 30.0])
def test_frames_equal_the_feature_extractor(processor: WhisperProcessor, mels: int, seconds: float) -> None:
    samples = sound(seconds, 7)
    want = WhisperFeatureExtractor(feature_size=mels)(samples, sampling_rate=16000, return_tensors="pt")
    got = LogMel(Sound(mels=mels), CPU)([prepared(processor, samples)])
    torch.testing.assert_close(got, want["input_features"], atol=TOLERANCE, rtol=0)


def test_clips_of_different_lengths_go_together(processor: WhisperProcessor) -> None:
    features = [prepared(processor, sound(s, 8)) for s in (0.2, 30.0, 4.0)]
    mel = LogMel(Sound(), CPU)
    torch.testing.assert_close(mel(features), torch.cat([mel([f]) for f in features]), atol=1e-6, rtol=0)
    silence = mel([prepared(processor, np.zeros(400, np.float32))])
    assert silence.unique().tolist() == [-1.5]


@pytest.mark.parametrize("seconds", [4.0, 30.0, 30.0001, 47.11, 65.0])
def test_windows_are_slices_of_the_whole_sound(processor: WhisperProcessor, seconds: float) -> None:
    """As transformers cuts them: normalised together, zero behind the end."""
    samples = sound(seconds, 9)
    samples[: len(samples) // 2] *= 0.01  # so that the first window's own loudest place is another one
    padded = {"truncation": False, "padding": "longest"} if seconds > 30 else {}
    want = WhisperFeatureExtractor()(samples, sampling_rate=16000, return_tensors="pt", **padded)["input_features"]
    clip = Clip(samples, Sound())
    assert clip.frames == want.shape[2]
    for seek in (0, 2, 1234, clip.frames - 3000, clip.frames - 17):
        window = clip.window(seek)
        assert window.frames == min(3000, clip.frames - seek)
        part = torch.nn.functional.pad(want[..., seek : seek + 3000], (0, 3000 - window.frames))
        got = LogMel(Sound(), CPU)([of_window(processor, window)])
        torch.testing.assert_close(got, part, atol=TOLERANCE, rtol=0)
    assert clip.over(clip.frames)
    assert not clip.over(0)


def test_a_short_sound_is_over_where_its_samples_are() -> None:
    clip = Clip(sound(4.0), Sound())
    assert clip.frames == 3000
    assert not clip.over(399)
    assert clip.over(400)


def test_chunks_are_cut_where_it_is_quiet() -> None:
    samples = sound(70.0, 10)
    samples[16000 * 25 : 16000 * 25 + 8000] = 0.0
    samples[16000 * 49 : 16000 * 49 + 6000] = 0.0
    chunks = Clip(samples, Sound()).chunks()
    assert [round(c.start, 1) for c in chunks[1:]] == pytest.approx([25.2, 49.2], abs=0.25)
    assert np.array_equal(np.concatenate([c.audio[0] for c in chunks]), samples)
    assert all(c.kwargs is None and len(c.audio[0]) <= 480000 for c in chunks)
    assert [c.end for c in chunks] == [*(c.start for c in chunks[1:]), 70.0]
    assert len(Clip(sound(30.0), Sound()).chunks()) == 1
    assert quietest(np.array([1, 1, 0, 0, 1], np.float32), 2) == 3


def test_a_long_clip_is_refused_by_name(processor: WhisperProcessor) -> None:
    with pytest.raises(MediaTooLargeError, match=r"engine\.transcribe") as caught:
        prepared(processor, sound(30 + 1 / 16000))
    assert caught.value.code == "audio_too_long"


@pytest.mark.parametrize(
    "kwargs",
    [{"language": "en"}, {"frames": 10}, {"frames": 0, "peak": 0.0}, {"frames": 3001, "peak": 0.0},
     {"frames": 10, "peak": float("nan")}, {"frames": True, "peak": 1.0}, {"frames": 10, "peak": 0.0, "x": 1}],
)  # fmt: skip
def test_other_arguments_are_refused(processor: WhisperProcessor, kwargs: dict[str, Any]) -> None:
    with pytest.raises(InvalidParamsError, match=r"engine\.transcribe"):
        processor.check_kwargs(kwargs)


def test_a_window_of_other_length_is_refused(processor: WhisperProcessor) -> None:
    with pytest.raises(InvalidParamsError, match="1840 samples; these are 1600"):
        prepared(processor, sound(0.1), frames=10, peak=0.5)


@pytest.mark.parametrize(("mels", "layout"), [(80, "hub"), (128, "tf5")])
@torch.inference_mode()
def test_rows_equal_the_reference(
    mels: int, layout: str, checkpoint: Callable[..., Path], reference: Callable[..., WhisperReference]
) -> None:
    found = plain(checkpoint(mels=mels, layout=layout))
    theirs = reference(mels=mels, layout=layout)
    encoder = WhisperEncoder(AudioConfig.from_checkpoint(found), BuildContext(CPU, torch.float32, 64))
    unused = load_renamed(encoder, {k: v for k, v in theirs.model.state_dict().items() if "encoder." in k
                                    and not k.startswith("model.decoder")}, encoder.weight_map)  # fmt: skip
    assert not unused
    for module in encoder.modules():
        getattr(module, "finish_loading", lambda: None)()
    processor = WhisperProcessor(found)
    sounds = [sound(s, 11) for s in (0.5, 30.0, 12.0)]
    features = [prepared(processor, s) for s in sounds]
    want = [theirs.model.model.encoder(theirs.features(s)).last_hidden_state[0] for s in sounds]
    got = encoder(features)
    assert [tuple(r.shape) for r in got] == [(1500, 32)] * 3
    assert [f.num_tokens for f in features] == [1500] * 3
    assert torch.stack(want).std() > 0.3
    torch.testing.assert_close(got, want, atol=5e-4, rtol=0)
    torch.testing.assert_close(encoder(features[1:2])[0], got[1], atol=TOLERANCE, rtol=0)
    assert encoder([]) == []
    assert encoder.cost(features[0]) == 1500


def test_settings_that_do_not_fit_are_named(checkpoint: Callable[..., Path]) -> None:
    good = plain(checkpoint())
    part = {"feature_extractor": {**good.processor_config["feature_extractor"], "feature_size": 128}}
    with pytest.raises(CheckpointError, match="3000 frames of 128 bands"):
        Sound.from_checkpoint(SimpleNamespace(config=good.config, processor_config=part))  # type: ignore[arg-type]
    odd = SimpleNamespace(config={**good.config, "activation_function": "tan"}, processor_config=good.processor_config)
    with pytest.raises(ConfigError, match="'tan'"):
        AudioConfig.from_checkpoint(odd)  # type: ignore[arg-type]
