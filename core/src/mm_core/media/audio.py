"""Audio in the forms users have to mono float32 samples, resampled; bounded before memory is taken.

Files are read by libsndfile (soundfile), the sound of video files by FFmpeg (PyAV); resampled by soxr in
its quality HQ. All channels are mixed down to their mean. What a decoder says goes to the cause only.
"""

from __future__ import annotations

import importlib
import io
import logging
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mm_core.errors import MediaDecodeError, MediaError, MediaTooLargeError, MissingExtraError, UnsupportedMediaError
from mm_core.media.decode import DEFAULT_LIMITS, MediaLimits, out_of_memory
from mm_core.media.encoded import read_encoded
from mm_core.media.sniff import audio_format, video_demuxer, wav_is_cut_off

logger = logging.getLogger(__name__)

Samples = np.ndarray[Any, np.dtype[np.float32]]
Allocate = Callable[[tuple[int, ...], Any], np.ndarray[Any, Any]]
"""Gives an array of a shape and dtype, as `numpy.empty` does: where the result goes."""
MIN_SAMPLE_RATE, MAX_SAMPLE_RATE = 1000, 768_000
MAX_CHANNELS = 8
"""An array's axis of at most so many entries is that of the channels."""
MAX_FILE_CHANNELS = 64
INVALID = "invalid_audio"
_BLOCK_SAMPLES = 2**18
_UNKNOWN_FRAMES = 2**63 - 1
_LOUDEST = 1e12  # from 1e18 on a spectrum's powers are infinite
# What full scale is, by the dtype of integer samples; uint8 has its zero at 128 (as in WAV files).
_FULL_SCALE = {"int8": 2.0**7, "uint8": 2.0**7, "int16": 2.0**15, "int32": 2.0**31}


@dataclass(frozen=True)
class Audio:
    """Mono float32 samples [n], nominally in -1…1, and how many of them are a second.

    cut_off: the file announced more than it holds, and these are the samples it has.
    """

    samples: Samples
    rate: int
    cut_off: bool = False


def load_audio(value: Any, sampling_rate: int | None = None, limits: MediaLimits = DEFAULT_LIMITS) -> Audio:
    """A sound in any form users have: a path, bytes, a `data:` URL, or `(samples, rate)`.

    What `decode_audio` and `samples_to_audio` say holds, errors included.
    """
    if isinstance(value, str | Path):
        value = read_encoded("audio", value, limits)
    if isinstance(value, bytes | bytearray | memoryview):
        return decode_audio(bytes(value), sampling_rate, limits)
    return given_samples(value, sampling_rate, limits)


def given_samples(value: Any, sampling_rate: int | None, limits: MediaLimits) -> Audio:
    """`(samples, rate)`, and nothing else."""
    if not isinstance(value, tuple) or len(value) != 2:
        raise UnsupportedMediaError(
            f"Audio cannot be a {type(value).__name__}. Pass (samples, rate), floats in -1…1 and their sample rate "
            "in Hz; or a path, bytes or a data: URL."
        )
    return samples_to_audio(*value, sampling_rate, limits)


def decode_audio(
    data: bytes,
    sampling_rate: int | None = None,
    limits: MediaLimits = DEFAULT_LIMITS,
    allocate: Allocate = np.empty,
) -> Audio:
    """An encoded sound (WAV, FLAC, Ogg Vorbis or Opus, MP3; the first sound of an MP4, WebM or AVI), told by
    content, at `sampling_rate` Hz where that is given, else at its own.

    A file that was cut off gives what it holds, marked so, and a warning in the log. Raises MediaDecodeError
    (codes "empty_audio", "nonfinite_audio", "no_audio_stream", "invalid_audio"), MediaTooLargeError
    ("audio_too_long"), UnsupportedMediaError, and MissingExtraError where a decoder is not installed.
    """
    if not data:
        raise _empty("The audio file is empty (0 bytes). Send the bytes of a WAV, FLAC, Ogg or MP3 file.")
    demuxer = video_demuxer(data)
    if demuxer is None and audio_format(data) is None:
        raise UnsupportedMediaError(
            "The bytes are no sound that mm-core reads (WAV, FLAC, Ogg, MP3; the sound of MP4, WebM and AVI). "
            "Convert the file to WAV or FLAC, or pass (samples, rate)."
        )
    try:
        if demuxer is not None:
            return _decode_container(data, demuxer, sampling_rate, limits, allocate)
        return _decode_file(data, sampling_rate, limits, allocate)
    except (MediaError, MissingExtraError):
        raise
    except MemoryError as error:
        raise out_of_memory("audio_too_long") from error
    except Exception as error:  # decoders raise whatever a damaged file makes them raise
        raise MediaDecodeError(
            "The audio is damaged or cut off and cannot be decoded. Export it again (WAV or FLAC) and resend it.",
            code=INVALID,
        ) from error


def _decode_file(data: bytes, sampling_rate: int | None, limits: MediaLimits, allocate: Allocate) -> Audio:
    soundfile = _require("soundfile")
    with soundfile.SoundFile(io.BytesIO(data)) as file:
        rate = file.samplerate
        announced = file.frames
        if announced == _UNKNOWN_FRAMES:  # a FLAC that was written to a pipe
            announced, file.seekable = 0, lambda: False  # or soundfile would seek to the end, and fail
        _check_channels(file.channels)
        kept = _Mixer(rate, sampling_rate, limits)
        kept.check(announced, file.channels)
        seen = 0
        while True:
            block = file.read(_BLOCK_SAMPLES // file.channels, dtype="float32", always_2d=True)  # [frames, channels]
            if not len(block):
                break
            seen += len(block)
            kept.add(block, 1)
    cut_off = seen < announced or wav_is_cut_off(data)
    if cut_off:
        logger.warning("an audio file was cut off: %.2f s of it are there and are used", seen / rate)
    return kept.finish(cut_off, allocate)


def _decode_container(
    data: bytes, demuxer: str, sampling_rate: int | None, limits: MediaLimits, allocate: Allocate
) -> Audio:
    av = _require("av")
    with av.open(io.BytesIO(data), format=demuxer, metadata_errors="ignore") as container:
        if not container.streams.audio:
            raise MediaDecodeError("The file has no audio stream. Send a file with sound.", code="no_audio_stream")
        stream = container.streams.audio[0]
        stream.codec_context.thread_count = limits.decoder_threads
        _check_channels(stream.channels)
        kept = _Mixer(stream.rate, sampling_rate, limits)
        kept.check(int(stream.duration * stream.time_base * stream.rate) if stream.duration else 0, stream.channels)
        to_float = av.AudioResampler(format="fltp")  # layout and rate stay as they are
        for frame in container.decode(stream):
            for part in to_float.resample(frame):
                kept.add(part.to_ndarray(), 0)  # [channels, frames]
    return kept.finish(False, allocate)


class _Mixer:
    """Blocks of a file to one mono sound at the rate asked for, counted as they come."""

    def __init__(self, rate: int, sampling_rate: int | None, limits: MediaLimits) -> None:
        check_rate(rate)
        self._rate, self._target = rate, sampling_rate or rate
        self._limits = limits
        self._stream = _resampler(rate, self._target)
        self._parts: list[Samples] = []
        self._read = self._kept = 0

    def check(self, frames: int, channels: int) -> None:
        """Raise MediaTooLargeError where so much is too much: before it is decoded, and of what was."""
        check_length(frames * self._target // self._rate, self._target, self._limits)
        if frames * channels > self._limits.max_source_samples:
            raise MediaTooLargeError(
                f"The audio has {frames} × {channels} samples; the limit is {self._limits.max_source_samples}. "
                "Cut it into shorter parts.",
                code="audio_too_long",
            )

    def add(self, block: np.ndarray[Any, Any], axis: int) -> None:
        """The next samples, their channels along `axis`."""
        self._read += block.shape[1 - axis]
        self.check(self._read, block.shape[axis])
        mono = _mean(block, axis) if block.shape[axis] > 1 else block.reshape(-1)
        _check_finite(mono)
        self._put(mono if self._stream is None else self._stream.resample_chunk(mono))

    def finish(self, cut_off: bool, allocate: Allocate) -> Audio:
        """The whole sound; MediaDecodeError where there is none."""
        if self._stream is not None:
            self._put(self._stream.resample_chunk(np.zeros(0, np.float32), last=True))
        if not self._kept:
            raise _empty("The audio has no samples. Send a longer sound.")
        samples = np.concatenate(self._parts, out=allocate((self._kept,), np.float32))
        return Audio(samples, self._target, cut_off)

    def _put(self, samples: Samples) -> None:
        self._kept += len(samples)
        check_length(self._kept, self._target, self._limits)
        self._parts.append(samples)


def samples_to_audio(
    samples: Any, rate: Any, sampling_rate: int | None = None, limits: MediaLimits = DEFAULT_LIMITS
) -> Audio:
    """Samples in memory, numpy, torch or a list: [n], or [n, channels] or [channels, n], where the channels are
    the one axis of at most 8. Floats in -1…1, or int8, uint8, int16 or int32 over their full scale.

    Raises as `decode_audio` does. The result is never the caller's own memory.
    """
    rate = check_rate(rate)
    array = _as_floats(samples, limits)
    if array.ndim == 2:
        array = _mix_array(array)
    elif array.ndim != 1:
        raise _bad_shape(array.shape)
    if array.size == 0:
        raise _empty("The audio has no samples. Pass at least one.")
    _check_finite(array)
    target = sampling_rate or rate
    check_length(len(array) * target // rate, target, limits)
    stream = _resampler(rate, target)
    if stream is not None:
        array = stream.resample_chunk(array, last=True)
        if not len(array):
            raise _empty(f"The audio is shorter than one sample at {target} Hz. Pass a longer sound.")
    return Audio(array, target)


def _as_floats(samples: Any, limits: MediaLimits) -> np.ndarray[Any, Any]:
    """A float32 copy (the caller may write to theirs between digest and prepare), integers scaled."""
    try:
        if hasattr(samples, "detach"):
            samples = samples.detach().cpu()
            samples = samples.float() if samples.is_floating_point() else samples  # numpy has no bfloat16
        array = np.asarray(samples)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedMediaError("The samples are no array of numbers. Pass float32 [samples].") from error
    if array.size > limits.max_source_samples:
        raise MediaTooLargeError(
            f"The audio has {array.size} samples; the limit is {limits.max_source_samples}. Pass shorter parts.",
            code="audio_too_long",
        )
    scale = _FULL_SCALE.get(array.dtype.name)
    if scale is None and array.size and not np.issubdtype(array.dtype, np.floating):
        raise UnsupportedMediaError(
            f"Samples of dtype {array.dtype} are not read. Pass floats in -1…1, or int16, int32, int8 or uint8 samples."
        )
    with np.errstate(over="ignore"):  # what does not fit becomes infinite, and is refused as such
        floats = np.array(array, dtype=np.float32, order="C", copy=True, ndmin=1)
    if array.dtype == np.uint8:
        floats -= np.float32(scale)
    if scale is not None:
        floats /= np.float32(scale)
    return floats


def _mix_array(array: Samples) -> Samples:
    """[n, channels] or [channels, n] → [n]."""
    few = [axis for axis in (0, 1) if 0 < array.shape[axis] <= MAX_CHANNELS]
    if array.size and len(few) != 1:
        raise _bad_shape(array.shape)
    return _mean(array, few[0]) if array.size else array.reshape(-1)


def _mean(array: np.ndarray[Any, Any], axis: int) -> Samples:
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused as such
        mixed: Samples = array.mean(axis=axis, dtype=np.float32)
    return mixed


def _bad_shape(shape: tuple[int, ...]) -> UnsupportedMediaError:
    return UnsupportedMediaError(
        f"Samples have shape [n] (mono), [n, channels] or [channels, n] with at most {MAX_CHANNELS} channels and more "
        f"samples than that; these have {list(shape)}. Mix them down to [n]: `samples.mean(axis)`."
    )


def check_rate(rate: Any) -> int:
    """`rate` as an int; MediaDecodeError unless it is a whole number of 1000 to 768000 Hz."""
    try:
        value = operator.index(rate) if not isinstance(rate, bool) else 0
    except TypeError:
        value = 0
    if not MIN_SAMPLE_RATE <= value <= MAX_SAMPLE_RATE:
        raise MediaDecodeError(
            f"The sample rate is a whole number from {MIN_SAMPLE_RATE} to {MAX_SAMPLE_RATE} (Hz). "
            "Pass the rate the sound was recorded at.",
            code=INVALID,
        )
    return value


def _check_channels(count: int) -> None:
    if not 1 <= count <= MAX_FILE_CHANNELS:
        raise MediaDecodeError(
            f"The audio has {count} channels; 1 to {MAX_FILE_CHANNELS} are read. Mix them down to one.", code=INVALID
        )


def check_length(samples: int, rate: int, limits: MediaLimits) -> None:
    """Raise MediaTooLargeError where mono samples at `rate` Hz are more than may be kept."""
    most = min(limits.max_audio_samples, int(limits.max_audio_seconds * rate))
    if samples > most:
        raise MediaTooLargeError(
            f"The audio has {samples / rate:.0f} s or more; at {rate} Hz the limit is {most / rate:.0f} s. "
            "Cut it into parts.",
            code="audio_too_long",
        )


def _check_finite(samples: Samples) -> None:
    if samples.size and not max(samples.max(), -samples.min()) <= _LOUDEST:  # NaN is not either
        raise MediaDecodeError(
            f"The audio has samples that are NaN, infinite, or beyond {_LOUDEST:.0e}. Clean it first: samples lie in "
            "-1…1.",
            code="nonfinite_audio",
        )


def _empty(text: str) -> MediaDecodeError:
    return MediaDecodeError(text, code="empty_audio")


def _resampler(rate: int, target: int) -> Any:
    """What turns chunks at one rate into chunks at another, the same in pieces as at once; None where they agree."""
    if rate == target:
        return None
    return _require("soxr").ResampleStream(rate, target, 1, dtype="float32", quality="HQ")


def _require(package: str) -> Any:
    """An optional package, imported where it is first needed; MissingExtraError where it is not there."""
    try:
        return importlib.import_module(package)
    except (ModuleNotFoundError, OSError) as error:  # OSError: soundfile without the library it binds
        if isinstance(error, ModuleNotFoundError) and error.name != package:
            raise
        raise MissingExtraError(_REMEDIES[package]) from None


_REMEDIES = {
    "av": 'Reading the sound of a video file needs PyAV. Install it with `pip install "mm-core[video]"`, '
    "or convert the sound to WAV or FLAC.",
    "soundfile": 'Decoding audio files needs soundfile. Install it with `pip install "mm-core[audio]"`, '
    "or pass (samples, rate).",
    "soxr": 'Resampling audio needs soxr. Install it with `pip install "mm-core[audio]"`, '
    "or pass samples at the model's own rate.",
}
