"""Video: bounded decoding of files (PyAV), frame sampling, and frames given directly.

A file is opened from memory by one demuxer, chosen by its first bytes, so that nothing it names
can be opened. Only sampled frames are converted to RGB, in one sequential pass.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mm_core.errors import (
    InvalidParamsError,
    MediaDecodeError,
    MediaError,
    MediaTooLargeError,
    MissingExtraError,
    UnsupportedMediaError,
)
from mm_core.media.decode import (
    DEFAULT_LIMITS,
    MediaLimits,
    array_to_image,
    array_to_uint8,
    check_pixels,
    out_of_memory,
    to_rgb,
)
from mm_core.media.sniff import video_demuxer

Frames = np.ndarray[Any, np.dtype[np.uint8]]
Choose = Callable[[int, float], Sequence[int]]
"""Indices of the frames to keep, ascending, of a video of so many frames at so many a second."""
Allocate = Callable[[tuple[int, ...], Any], np.ndarray[Any, Any]]
INVALID = "invalid_video"


@dataclass(frozen=True)
class VideoSampling:
    """Which frames of a video are kept: `num_frames` of them, or `fps` a second, or all (both None).

    `min_frames` and `max_frames` bound what `fps` gives; counts are multiples of
    `temporal_patch_size` (the arithmetic of transformers' Qwen2-VL video processor).
    `given_frames`: whether frames that the caller passed directly are sampled too. `spread`: that many frames
    from the first to the last, at round(linspace(0, n - 1, count)); where a video has fewer, some come again.
    """

    fps: float | None = 2.0
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    temporal_patch_size: int = 2
    given_frames: bool = False
    spread: bool = False


@dataclass(frozen=True)
class Video:
    """Frames uint8 [n, height, width, 3], the source's frames a second, the frames' times in seconds.

    sample_fps: kept frames a second of the source. fps, sample_fps and times are None/empty where
    no fps is known.
    """

    frames: Frames
    fps: float | None = None
    sample_fps: float | None = None
    times: tuple[float, ...] = ()


def sample_indices(total: int, fps: float | None, sampling: VideoSampling) -> list[int]:
    """Indices of the frames to keep of `total`, ascending.

    Source: `Qwen2VLVideoProcessor.sample_frames` of transformers; where that divides by zero (fewer
    frames than a temporal patch) all frames are kept. Raises InvalidParamsError, MediaTooLargeError.
    """
    if sampling.spread:
        return _spread_indices(total, fps, sampling)
    step = sampling.temporal_patch_size
    if sampling.num_frames is not None:
        count: float = max(round(sampling.num_frames / step) * step, 1)
        if count > total:
            raise InvalidParamsError(
                f"num_frames={sampling.num_frames} is more than the video's {total} frames. Lower num_frames.",
                param="mm_processor_kwargs",
            )
    elif sampling.fps is not None:
        fps = _known(fps)
        ceiling = math.floor(min(sampling.max_frames, total) / step) * step
        count = min(max(total / fps * sampling.fps, sampling.min_frames), ceiling, total)
        count = math.floor(count / step) * step
    else:
        count = total
    if count > sampling.max_frames:
        raise MediaTooLargeError(
            f"{count} frames of the video would be kept; the limit is {sampling.max_frames}. "
            "Pass fps or num_frames in mm_processor_kwargs to keep fewer."
        )
    if count <= 0 or count == total:
        return list(range(min(total, sampling.max_frames)))
    import torch  # arange's own float32 rounding decides some indices

    return [int(i) for i in torch.arange(0, total, total / count).int().tolist()]


def _spread_indices(total: int, fps: float | None, sampling: VideoSampling) -> list[int]:
    count = sampling.num_frames or total
    if sampling.num_frames is None and sampling.fps is not None:
        count = min(max(round(total / _known(fps) * sampling.fps), 1), total)
    if count > sampling.max_frames:
        raise MediaTooLargeError(
            f"{count} frames of the video would be kept; the limit is {sampling.max_frames}. "
            "Pass fps or num_frames in mm_processor_kwargs to keep fewer."
        )
    return [int(i) for i in np.round(np.linspace(0, total - 1, count))]


def _known(fps: float | None) -> float:
    if fps is None:
        raise InvalidParamsError(
            "fps sampling needs the video's own rate: pass (frames, fps), or use num_frames.",
            param="mm_processor_kwargs",
        )
    return fps


def decode_video(data: bytes, sampling: VideoSampling, limits: MediaLimits = DEFAULT_LIMITS) -> Video:
    """Sampled frames of an encoded video (MP4/MOV, WebM/Matroska, AVI), upright.

    Raises MediaDecodeError (code "invalid_video"), MediaTooLargeError, UnsupportedMediaError, and
    MissingExtraError where PyAV is not installed.
    """
    return decode_chosen(data, lambda total, fps: sample_indices(total, fps, sampling), limits)


def decode_chosen(
    data: bytes, choose: Choose, limits: MediaLimits = DEFAULT_LIMITS, allocate: Allocate = np.empty
) -> Video:
    """`decode_video` with the frames that `choose` names, into memory that `allocate` gives as `numpy.empty` does.
    Needs no torch."""
    if not data:
        raise MediaDecodeError(
            "The video is empty (0 bytes). Send the bytes of an MP4, WebM or AVI file.", code=INVALID
        )
    demuxer = video_demuxer(data)
    if demuxer is None:
        raise UnsupportedMediaError(
            "The bytes are no video that mm-core reads (MP4/MOV, WebM/Matroska, AVI). Convert the file to MP4."
        )
    _require_av()
    try:
        return _decode(data, demuxer, choose, limits, allocate)
    except (MediaError, InvalidParamsError):
        raise
    except MemoryError as error:
        raise out_of_memory(MediaTooLargeError.code) from error
    except Exception as error:  # demuxers and codecs raise whatever a damaged file makes them raise
        raise _damaged() from error


def _require_av() -> None:
    try:
        import av  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "av":
            raise
        raise MissingExtraError(
            'Decoding video files needs PyAV. Install it with `pip install "mm-core[video]"`, '
            "or pass the frames as (frames, fps)."
        ) from None


def _damaged() -> MediaDecodeError:
    return MediaDecodeError(
        "The video is damaged or cut off and cannot be decoded. Export it again (MP4, H.264) and resend it.",
        code=INVALID,
    )


def _decode(data: bytes, demuxer: str, choose: Choose, limits: MediaLimits, allocate: Allocate) -> Video:
    total, fps = _scan(data, demuxer, limits)
    indices = choose(total, fps)
    frames, seen = _pick(data, demuxer, indices, limits, allocate)
    if frames is None:
        # Some codecs have packets that show nothing; now the true number of frames is known.
        total = seen
        if total == 0:
            raise _damaged()
        indices = choose(total, fps)
        frames, _ = _pick(data, demuxer, indices, limits, allocate)
        if frames is None:
            raise _damaged()
    return Video(frames, fps, len(indices) / total * fps, tuple(i / fps for i in indices))


def _scan(data: bytes, demuxer: str, limits: MediaLimits) -> tuple[int, float]:
    """Number of frames, counted and not believed, and frames a second; decodes nothing."""
    import av

    with av.open(io.BytesIO(data), format=demuxer, metadata_errors="ignore") as container:
        if not container.streams.video:
            raise MediaDecodeError("The file has no video stream. Send a file with pictures in it.", code=INVALID)
        stream = container.streams.video[0]
        check_pixels(stream.width, stream.height, limits.max_image_pixels)
        declared, rate = stream.frames, stream.average_rate or stream.guessed_rate
        seconds = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
        total = 0
        for packet in container.demux(stream):
            total += packet.size > 0
            if total > limits.max_source_frames:
                raise MediaTooLargeError(
                    f"The video has more than {limits.max_source_frames} frames. Cut it into shorter parts."
                )
    if total == 0 or total < 0.9 * declared:
        raise _damaged()
    fps = float(rate) if rate and rate > 0 else total / seconds if seconds > 0 else 0.0
    if not (math.isfinite(fps) and fps > 0):
        raise MediaDecodeError("The video declares no frame rate. Export it with a constant one.", code=INVALID)
    return total, fps


def _pick(
    data: bytes, demuxer: str, indices: Sequence[int], limits: MediaLimits, allocate: Allocate
) -> tuple[Frames | None, int]:
    """The frames at `indices` (ascending, some perhaps more than once), or None where the video has not as many, and
    how many were decoded to get them."""
    import av

    slots: dict[int, list[int]] = {}
    for slot, index in enumerate(indices):
        slots.setdefault(index, []).append(slot)
    frames: Frames | None = None
    filled = seen = 0
    with av.open(io.BytesIO(data), format=demuxer, metadata_errors="ignore") as container:
        container.streams.video[0].codec_context.thread_count = limits.decoder_threads
        for frame in container.decode(video=0):
            if seen in slots:
                check_frames(len(indices), frame.width, frame.height, limits)
                turns = round(frame.rotation / 90) % 4  # counter-clockwise, as numpy counts them
                picture = np.rot90(_rgb(frame, limits), turns)
                if frames is None:
                    frames = allocate((len(indices), *picture.shape), np.uint8)
                elif picture.shape != frames.shape[1:]:
                    raise MediaDecodeError(
                        "The video changes its resolution on the way. Export it with a constant one.", code=INVALID
                    )
                frames[slots[seen]] = picture
                filled += len(slots[seen])
            seen += 1
            if seen > indices[-1]:
                break
    return frames if filled == len(indices) else None, seen


def _rgb(frame: Any, limits: MediaLimits) -> np.ndarray[Any, Any]:
    if limits.decoder_threads:
        with contextlib.suppress(TypeError):  # a PyAV without this option converts in one thread
            frame = frame.reformat(format="rgb24", threads=limits.decoder_threads)
    pixels: np.ndarray[Any, Any] = frame.to_ndarray(format="rgb24")
    return pixels


def check_frames(count: int, width: int, height: int, limits: MediaLimits) -> None:
    """Raise MediaTooLargeError where a video's kept frames are too many or too large together."""
    check_pixels(width, height, limits.max_image_pixels)
    if count > limits.max_video_frames:
        raise MediaTooLargeError(
            f"The video has {count} frames; the limit is {limits.max_video_frames}. "
            "Pass fewer, or raise max_video_frames."
        )
    if count * width * height > limits.max_video_pixels:
        raise MediaTooLargeError(
            f"{count} frames of {width}×{height} have {count * width * height} pixels; the limit is "
            f"{limits.max_video_pixels}. Keep fewer frames (fps, num_frames), or scale the video down."
        )


def frames_to_video(
    frames: Any, fps: float | None, sampling: VideoSampling, limits: MediaLimits = DEFAULT_LIMITS
) -> Video:
    """Frames given directly: [n, height, width, 3] (uint8 or float in 0…1), or a list of images or arrays.

    All are kept, unless `sampling.given_frames`. fps: of the frames as given, where it is known.
    """
    if fps is not None and not (isinstance(fps, int | float) and math.isfinite(fps) and 0 < fps <= 1e6):
        raise MediaDecodeError(f"fps={fps!r} is no frame rate. Pass a number above 0.", code=INVALID)
    total = len(frames)
    if total == 0:
        raise MediaDecodeError("The video has no frames. Pass at least one.", code=INVALID)
    if sampling.given_frames:
        indices = sample_indices(total, fps, sampling)
    else:
        check_frames(total, 1, 1, limits)
        indices = list(range(total))
    stacked = _stack(frames, indices, limits)
    if fps is None:
        return Video(stacked)
    rate = float(fps)
    return Video(stacked, rate, len(indices) / total * rate, tuple(i / rate for i in indices))


def _stack(frames: Any, indices: Sequence[int], limits: MediaLimits) -> Frames:
    if not isinstance(frames, list | tuple):
        shape = tuple(frames.shape)
        if len(shape) != 4 or shape[3] != 3:
            raise UnsupportedMediaError(
                f"A video array has shape [frames, height, width, 3]; this one has {list(shape)}."
            )
        check_frames(len(indices), shape[2], shape[1], limits)
        kept = frames if len(indices) == shape[0] else frames[list(indices)]
        # A copy: the caller may write to theirs between digest and prepare.
        return np.array(array_to_uint8(kept), order="C", copy=True)
    first = _frame(frames[indices[0]], limits)
    check_frames(len(indices), first.shape[1], first.shape[0], limits)
    stacked: Frames = np.empty((len(indices), *first.shape), np.uint8)
    for slot, index in enumerate(indices):
        frame = _frame(frames[index], limits)
        if frame.shape != first.shape:
            raise MediaDecodeError(
                f"Frame {index} is {frame.shape[1]}×{frame.shape[0]}, the first one {first.shape[1]}×{first.shape[0]}. "
                "Pass frames of one size.",
                code=INVALID,
            )
        stacked[slot] = frame
    return stacked


def _frame(value: Any, limits: MediaLimits) -> Frames:
    image = to_rgb(value, limits) if isinstance(value, Image.Image) else array_to_image(value, limits)
    return np.asarray(image)
