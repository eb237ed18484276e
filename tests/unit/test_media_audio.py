"""Sound in every form to mono samples: against the standard library's WAV writer, numpy and soxr."""

from __future__ import annotations

import io
import logging
import struct
import sys
import wave
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr
import torch

from mm_core.errors import MediaDecodeError, MediaError, MediaTooLargeError, MissingExtraError, UnsupportedMediaError
from mm_core.media import MediaLimits, decode_audio, samples_to_audio
from mm_core.media.sniff import audio_format

RATE = 16000
TIMES = np.arange(RATE) / RATE
TONE = (0.5 * np.sin(2 * np.pi * 440 * TIMES)).astype(np.float32)
NOISE = np.random.default_rng(0).uniform(-0.5, 0.5, 30_000).astype(np.float32)


def encoded(samples: np.ndarray = TONE, kind: str = "WAV", subtype: str | None = None, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def wav16(channels: list[np.ndarray], rate: int = RATE) -> bytes:
    """16-bit WAV by the standard library."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.stack(channels, axis=1).astype("<i2").tobytes())
    return buffer.getvalue()


def patched(data: bytes, at: int, form: str, value: int) -> bytes:
    """`data` with one little-endian field of its header overwritten."""
    copy = bytearray(data)
    struct.pack_into(form, copy, at, value)
    return bytes(copy)


def film_of(codec: str | None, channels: str = "stereo", kind: str = "mp4") -> bytes:
    """An MP4 or WebM with one second of sound (left 440 Hz, right silent), or with pictures only."""
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as out:
        if codec is None:
            stream = out.add_stream("mpeg4", rate=10)
            stream.width = stream.height = 32
            for _ in range(3):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")))
            out.mux(stream.encode(None))
        else:
            stream = out.add_stream(codec, rate=48000, layout=channels)
            tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(48000) / 48000)
            planes = np.stack([tone, np.zeros(48000)][: 2 if channels == "stereo" else 1]).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(planes, "fltp", channels)
            frame.rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
            out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
    return buffer.getvalue()


def refuse(code: str, data: Any, **more: Any) -> MediaError:
    with pytest.raises(MediaError) as caught:
        decode_audio(data, **more) if isinstance(data, bytes) else samples_to_audio(*data, **more)
    assert caught.value.code == code, caught.value
    assert "0x" not in str(caught.value)
    return caught.value


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("subtype", "step"),
    [
        ("PCM_U8", 2**-7), ("PCM_16", 2**-15), ("PCM_24", 2**-23), ("PCM_32", 2**-24), ("FLOAT", 0.0),
        ("DOUBLE", 0.0), ("ULAW", 0.02), ("ALAW", 0.02),
    ],
)  # fmt: skip
def test_wav_of_every_width(subtype: str, step: float) -> None:
    audio = decode_audio(encoded(subtype=subtype))
    assert (audio.rate, audio.samples.dtype, audio.cut_off) == (RATE, np.float32, False)
    assert np.abs(audio.samples - TONE).max() <= step * 1.01


@pytest.mark.parametrize(
    ("kind", "subtype", "bound"),
    [("FLAC", None, 1e-4), ("RF64", "FLOAT", 0.0), ("OGG", "VORBIS", 0.05), ("OGG", "OPUS", 0.05), ("MP3", None, 0.05)],
)
def test_other_formats(kind: str, subtype: str | None, bound: float) -> None:
    audio = decode_audio(encoded(kind=kind, subtype=subtype))
    assert audio.samples.shape == TONE.shape
    middle = slice(2000, -2000)  # codecs fade in and out
    assert np.abs(audio.samples - TONE)[middle].max() <= bound


def test_an_mp3_behind_a_tag_and_one_without() -> None:
    bare = encoded(kind="MP3")
    tag = b"ID3\x04\x00\x00\x00\x00\x00\x0a" + bytes(10)
    assert (audio_format(bare), audio_format(tag + bare)) == ("MP3", "MP3")
    assert np.array_equal(decode_audio(bare).samples, decode_audio(tag + bare).samples)
    assert audio_format(b"\xff\xf1\x50\x80") is None  # AAC in ADTS
    assert audio_format(b"\xff\xd8\xff\xe0") is None  # JPEG


def test_sixteen_bits_and_channels_equal_the_standard_library() -> None:
    rng = np.random.default_rng(1)
    channels = [rng.integers(-32768, 32768, 5000) for _ in range(6)]
    for count in (1, 2, 6):
        wanted = np.mean([c / 32768 for c in channels[:count]], axis=0)
        assert np.abs(decode_audio(wav16(channels[:count])).samples - wanted).max() < 1e-6


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(np.stack([NOISE, NOISE[::-1]], axis=1), subtype="FLOAT", rate=44100)
    whole = decode_audio(data, RATE).samples
    monkeypatch.setattr("mm_core.media.audio._BLOCK_SAMPLES", 997)
    assert np.array_equal(decode_audio(data, RATE).samples, whole)
    assert np.array_equal(whole, samples_to_audio(np.stack([NOISE, NOISE[::-1]]), 44100, RATE).samples)


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000, 192_000])
def test_resampling_is_soxr_in_high_quality(rate: int) -> None:
    audio = decode_audio(encoded(NOISE, subtype="FLOAT", rate=rate), RATE)
    assert audio.rate == RATE
    assert np.abs(audio.samples - soxr.resample(NOISE, rate, RATE, quality="HQ")).max() < 1e-6
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate)
    heard = samples_to_audio(tone, rate, RATE).samples
    assert len(heard) == RATE
    assert np.abs(heard - TONE)[500:-500].max() < 1e-3


@pytest.mark.parametrize(("codec", "channels", "kind"), [("aac", "stereo", "mp4"), ("libopus", "mono", "webm")])
def test_the_sound_of_a_video_file(codec: str, channels: str, kind: str) -> None:
    audio = decode_audio(film_of(codec, channels, kind), RATE)
    assert audio.rate == RATE
    assert abs(len(audio.samples) - RATE) < 0.1 * RATE
    middle = audio.samples[4000:12000].astype(np.float64)
    peak = np.abs(np.fft.rfft(middle * np.hanning(8000)))
    assert peak.argmax() * RATE / 8000 == pytest.approx(440, abs=2)
    assert np.abs(middle).max() == pytest.approx(0.25 if channels == "stereo" else 0.5, abs=0.05)


def test_a_file_cut_off_gives_what_is_there_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    for data in (encoded(), encoded(kind="MP3")):
        with caplog.at_level(logging.WARNING, logger="mm_core"):
            audio = decode_audio(data[: len(data) // 2])
        assert audio.cut_off
        assert 0 < len(audio.samples) < RATE
        assert "cut off" in caplog.text
        caplog.clear()
    long = patched(encoded(), encoded().index(b"data") + 4, "<I", 24 * 3600 * RATE * 2 % 2**31)
    audio = decode_audio(long)
    assert (len(audio.samples), audio.cut_off) == (RATE, True)
    streamed = decode_audio(patched(encoded(), encoded().index(b"data") + 4, "<I", 2**32 - 1))
    assert (len(streamed.samples), streamed.cut_off) == (RATE, False)


def test_bad_files() -> None:
    wav = encoded()
    refuse("empty_audio", b"")
    refuse("empty_audio", encoded(TONE[:0]))
    refuse("nonfinite_audio", encoded(np.array([0.0, np.nan, 0.5]), subtype="FLOAT"))
    refuse("nonfinite_audio", encoded(np.array([0.0, np.inf]), subtype="DOUBLE"))
    for rate in (0, 1, 4 * 10**9):
        refuse("invalid_audio", patched(wav, 24, "<I", rate))
    for channels in (0, 65535):
        refuse("invalid_audio", patched(wav, 22, "<H", channels))
    refuse("invalid_audio", wav[:20])
    refuse("invalid_audio", b"fLaC" + NOISE.tobytes())
    refuse("invalid_audio", encoded(kind="OGG")[:200])
    for junk in (
        b"RIFF",
        b"<html></html>",
        b"%PDF-1.7",
        b"MThd" + bytes(40),
        b"#EXTM3U\nfile:///etc/passwd",
        bytes(64),
    ):
        refuse("unsupported_media", junk)


def test_a_flac_that_does_not_say_how_long_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written to a pipe, its header has 0 samples, which is unknown."""
    monkeypatch.setattr("mm_core.media.audio._BLOCK_SAMPLES", 5000)
    whole = bytearray(encoded(kind="FLAC"))
    whole[21] &= 0xF0  # STREAMINFO's 36 bits of the number of samples
    whole[22:26] = bytes(4)
    audio = decode_audio(bytes(whole))
    np.testing.assert_array_equal(audio.samples, decode_audio(encoded(kind="FLAC")).samples)
    assert not audio.cut_off
    refuse("audio_too_long", bytes(whole), limits=MediaLimits(max_audio_samples=RATE - 1))


def test_samples_whose_mean_is_not_finite() -> None:
    opposite = np.stack([np.full(100, np.inf), np.full(100, -np.inf)], 1)
    refuse("nonfinite_audio", encoded(opposite, subtype="FLOAT"))
    refuse("nonfinite_audio", (opposite, RATE))
    refuse("nonfinite_audio", (np.full((100, 2), 3e38, np.float32), RATE))


def test_samples_too_loud_for_a_spectrum() -> None:
    """Finite, but their power is not: a model would see infinities."""
    refuse("nonfinite_audio", (-1e19 * TONE, RATE))
    assert len(samples_to_audio(1e9 * TONE, RATE).samples) == RATE


def test_a_file_without_sound() -> None:
    refuse("no_audio_stream", film_of(None))
    refuse("invalid_audio", film_of("aac")[:300])


def test_length_is_bounded_before_and_while_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    wav = encoded()
    few = MediaLimits(max_audio_samples=RATE)
    assert len(decode_audio(wav, limits=few).samples) == RATE
    assert len(decode_audio(wav, 8000, MediaLimits(max_audio_samples=8000)).samples) == 8000
    refuse("audio_too_long", wav, limits=MediaLimits(max_audio_samples=RATE - 1))
    refuse("audio_too_long", wav, sampling_rate=32000, limits=few)
    refuse("audio_too_long", encoded(np.stack([TONE, TONE], 1)), limits=MediaLimits(max_source_samples=RATE))
    with pytest.raises(MediaTooLargeError, match="limit"):
        samples_to_audio(TONE, RATE, 48000, few)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *a, **k: pytest.fail("decoded"))
    bomb = refuse("audio_too_long", encoded(np.zeros(200_000), kind="FLAC"), limits=few)
    assert "1 s" in str(bomb)


def test_a_header_that_lies_low_does_not_help(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes is counted, whatever was announced."""
    monkeypatch.setattr("mm_core.media.audio._BLOCK_SAMPLES", 1000)
    reads: list[int] = []
    real = soundfile.SoundFile.read

    def read(self: Any, *args: Any, **kwargs: Any) -> Any:
        reads.append(1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(soundfile.SoundFile, "frames", property(lambda self: 10), raising=False)
    monkeypatch.setattr(soundfile.SoundFile, "_check_frames", lambda self, frames, fill: frames)
    monkeypatch.setattr(soundfile.SoundFile, "read", read)
    refuse("audio_too_long", encoded(), limits=MediaLimits(max_audio_samples=2500))
    assert len(reads) == 3


@pytest.mark.parametrize("package", ["soundfile", "soxr", "av"])
def test_missing_packages_are_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = film_of("aac") if package == "av" else encoded()
    monkeypatch.setitem(sys.modules, package, None)
    extra = "video" if package == "av" else "audio"
    with pytest.raises(MissingExtraError, match=rf'pip install "mm-core\[{extra}\]"'):
        decode_audio(data, 8000)
    assert len(samples_to_audio(TONE, RATE, RATE).samples) == RATE  # which needs none of them


# --- arrays ---------------------------------------------------------------------------------------


def test_forms_of_samples() -> None:
    ints = np.array([-32768, -1, 0, 1, 32767], np.int16)
    wanted = ints / 32768
    forms = [
        wanted, wanted.astype(np.float32), wanted.tolist(), torch.from_numpy(wanted), ints, torch.from_numpy(ints),
        ints.astype(np.int32) * 65536,
    ]  # fmt: skip
    for form in forms:
        samples = samples_to_audio(form, RATE).samples
        assert samples.dtype == np.float32
        assert np.array_equal(samples, wanted.astype(np.float32))
    assert np.array_equal(samples_to_audio(np.array([0, 128, 255], np.uint8), RATE).samples, [-1, 0, 127 / 128])
    assert np.array_equal(samples_to_audio(np.array([-128, 0, 127], np.int8), RATE).samples, [-1, 0, 127 / 128])
    assert np.array_equal(samples_to_audio(torch.tensor([0.5, -1], dtype=torch.bfloat16), RATE).samples, [0.5, -1])
    assert samples_to_audio(TONE, np.int64(RATE)).rate == RATE


def test_channels_of_arrays() -> None:
    both = np.stack([TONE, 3 * TONE])
    for form in (both, both.T, torch.from_numpy(both), TONE[None], TONE[:, None]):
        mono = samples_to_audio(form, RATE).samples
        assert np.allclose(mono, 2 * TONE if min(form.shape) == 2 else TONE, atol=1e-6)
    for shape in ((2, 4), (8, 8), (9, 20), (2, 2, 100), ()):
        if shape:
            assert "Mix them down" in str(refuse("unsupported_media", (np.zeros(shape), RATE)))


def test_bad_arrays() -> None:
    refuse("empty_audio", (np.zeros(0), RATE))
    refuse("empty_audio", ([], RATE))
    refuse("empty_audio", (np.zeros((2, 0)), RATE))
    refuse("empty_audio", (np.zeros(1), 44100), sampling_rate=RATE)
    refuse("nonfinite_audio", (np.array([0.0, np.nan]), RATE))
    refuse("nonfinite_audio", (np.array([1e300]), RATE))
    for rate in (0, -1, 999, 768_001, 16000.0, "16000", None, True, 4 * 10**9):
        refuse("invalid_audio", (TONE, rate))
    for samples in (np.array([1, 2]), np.array([True]), np.array([1j]), np.array(["a"]), [[0.0], [0.0, 1.0]], object()):
        refuse("unsupported_media", (samples, RATE))


def test_the_samples_are_nobody_elses() -> None:
    mine = TONE.copy()
    audio = samples_to_audio(mine, RATE)
    mine[:] = 0
    assert np.array_equal(audio.samples, TONE)


def test_errors_are_of_the_tree() -> None:
    assert issubclass(MediaDecodeError, MediaError)
    with pytest.raises(UnsupportedMediaError, match="WAV, FLAC, Ogg, MP3"):
        decode_audio(b"GIF89a" + bytes(20))


def test_many_channels_are_refused_before_a_block_is_read() -> None:
    """A block is of so many samples, whatever the channels: 64 take no more memory than one."""
    few = np.zeros((1000, 64), np.float32)
    assert len(decode_audio(encoded(few)).samples) == 1000
    error = refuse("invalid_audio", encoded(np.zeros((10, 65), np.float32)))
    assert "65 channels" in str(error)


def test_seconds_are_bounded() -> None:
    limits = MediaLimits(max_audio_seconds=1.0)
    assert len(decode_audio(encoded(), limits=limits).samples) == RATE
    for data in (encoded(NOISE), encoded(NOISE, "FLAC"), encoded(NOISE, "OGG")):
        error = refuse("audio_too_long", data, limits=limits)
        assert "limit is 1 s" in str(error)
    refuse("audio_too_long", (NOISE, RATE), limits=limits)
    assert len(samples_to_audio(NOISE, 2 * RATE, limits=limits).samples) == len(NOISE)


def test_silence_is_refused_without_being_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten minutes in a few kB: the header says how long it is."""
    for kind in ("FLAC", "OGG"):
        bomb = encoded(np.zeros(600 * RATE, np.float32), kind, "OPUS" if kind == "OGG" else "PCM_16")
        assert len(bomb) < 200_000
        monkeypatch.setattr(soundfile.SoundFile, "read", lambda *a, **k: pytest.fail("decoded"))
        refuse("audio_too_long", bomb, limits=MediaLimits(max_audio_seconds=60.0))
        monkeypatch.undo()
