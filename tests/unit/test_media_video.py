"""Video: frame sampling, decoding, frames given directly, and what is refused."""

from __future__ import annotations

import ast
import io
import math
import struct
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mm_core.errors import (
    InvalidParamsError,
    MediaDecodeError,
    MediaTooLargeError,
    MissingExtraError,
    UnsupportedMediaError,
)
from mm_core.media import MediaLimits, VideoSampling, decode_video, frames_to_video, sample_indices

RNG = np.random.default_rng(0)


def reference_sampler() -> Any:
    """`sample_frames` as transformers has it; its module needs torchvision, the function does not."""
    import transformers

    path = Path(transformers.__file__).parent / "models/qwen2_vl/video_processing_qwen2_vl.py"
    tree = ast.parse(path.read_text())
    body = [
        n for c in tree.body if isinstance(c, ast.ClassDef) for n in c.body if getattr(n, "name", "") == "sample_frames"
    ]
    for argument in body[0].args.args:
        argument.annotation = None
    space: dict[str, Any] = {"math": math, "torch": torch}
    exec(compile(ast.Module(body, []), str(path), "exec"), space)
    return space["sample_frames"]


def test_sampling_is_that_of_transformers() -> None:
    reference = reference_sampler()
    for _ in range(400):
        total, rate = int(RNG.integers(2, 3000)), float(RNG.choice([1, 12.5, 24, 29.97, 30, 60, 1000]))
        by_count = bool(RNG.integers(2))
        sampling = VideoSampling(
            fps=None if by_count else float(RNG.uniform(0.1, 40)),
            num_frames=int(RNG.integers(2, 64)) if by_count else None,
            max_frames=int(RNG.integers(4, 768)),
            temporal_patch_size=int(RNG.integers(1, 3)),
        )
        if by_count and not sampling.num_frames <= min(total, sampling.max_frames) - 2:
            continue
        own = SimpleNamespace(num_frames=None, fps=None)
        wanted = reference(
            own, SimpleNamespace(total_num_frames=total, fps=rate), sampling.temporal_patch_size,
            sampling.min_frames, sampling.max_frames, sampling.num_frames, sampling.fps,
        )  # fmt: skip
        assert sample_indices(total, rate, sampling) == wanted.tolist()


def test_sampling_bounds() -> None:
    assert sample_indices(1, 30.0, VideoSampling()) == [0]
    assert sample_indices(3, None, VideoSampling(fps=None)) == [0, 1, 2]
    started = time.perf_counter()
    with pytest.raises(InvalidParamsError, match="num_frames"):
        sample_indices(3, 1.0, VideoSampling(num_frames=10**9, max_frames=10**9))
    with pytest.raises(MediaTooLargeError):
        sample_indices(10**9, 1.0, VideoSampling(fps=None))
    assert len(sample_indices(10**9, 1.0, VideoSampling())) == 768
    assert time.perf_counter() - started < 0.05
    with pytest.raises(InvalidParamsError, match="rate"):
        sample_indices(9, None, VideoSampling())


@pytest.mark.parametrize(("total", "count"), [(20, 8), (8, 8), (3, 8), (1, 4), (5, 1), (20, 7)])
def test_spread_frames(total: int, count: int) -> None:
    """From the first to the last; of a short video some come again, also of a file."""
    wanted = [round(i * (total - 1) / (count - 1)) if count > 1 else 0 for i in range(count)]
    sampling = VideoSampling(fps=None, num_frames=count, given_frames=True, spread=True)
    assert sample_indices(total, None, sampling) == wanted
    given = frames_to_video(np.arange(total, dtype=np.uint8)[:, None, None, None].repeat(3, 3), 5.0, sampling)
    assert given.frames[:, 0, 0, 0].tolist() == wanted
    assert given.times == tuple(i / 5.0 for i in wanted)
    data = clip(total)
    every = decode_video(data, VideoSampling(fps=None, num_frames=None)).frames
    assert np.array_equal(decode_video(data, sampling).frames, every[wanted])


def test_spread_frames_by_rate() -> None:
    sampling = VideoSampling(fps=2.0, spread=True, max_frames=50)
    assert sample_indices(100, 10.0, sampling) == [round(i * 99 / 19) for i in range(20)]
    assert sample_indices(3, 30.0, sampling) == [0]
    with pytest.raises(InvalidParamsError, match="num_frames"):
        sample_indices(3, None, sampling)
    with pytest.raises(MediaTooLargeError, match="the limit is 50"):
        sample_indices(1000, 10.0, sampling)


def clip(count: int = 20, kind: str = "mp4", size: tuple[int, int] = (64, 48), rate: int = 10) -> bytes:
    """Frame i is grey of level 10·i, its left half darker."""
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream({"mp4": "mpeg4", "avi": "mpeg4", "matroska": "mpeg4"}[kind], rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 4_000_000
        for index in range(count):
            pixels = np.full((size[1], size[0], 3), 10 * index, np.uint8)
            pixels[:, : size[0] // 2] //= 2
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["mp4", "avi", "matroska"])
def test_only_sampled_frames_are_kept(kind: str) -> None:
    video = decode_video(clip(kind=kind), VideoSampling(fps=2.0))
    assert video.frames.shape == (4, 48, 64, 3)
    assert video.fps == 10.0
    assert video.sample_fps == 2.0
    assert video.times == (0.0, 0.5, 1.0, 1.5)
    levels = video.frames[:, :, -16:].mean(axis=(1, 2, 3))
    assert np.abs(levels - [0, 50, 100, 150]).max() < 6


def test_one_frame_is_enough() -> None:
    assert decode_video(clip(1), VideoSampling()).frames.shape[0] == 1


def test_rotation_is_applied() -> None:
    """A phone held upright: the display matrix says a quarter turn clockwise."""
    data = bytearray(clip())
    matrix = data.index(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    plain, turned = (decode_video(d, VideoSampling()).frames for d in (clip(), bytes(data)))
    assert np.array_equal(turned, np.rot90(plain, -1, axes=(1, 2)))


def test_damaged_videos() -> None:
    data = clip()
    for bad in (b"", data[: len(data) // 2], data[:64], b"\x1a\x45\xdf\xa3" + bytes(200)):
        with pytest.raises(MediaDecodeError) as caught:
            decode_video(bad, VideoSampling())
        assert caught.value.code == "invalid_video"
        assert "0x" not in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", b"ffconcat version 1.0\nfile x\n", b"<MPD/>", b"\x89PNG\r\n\x1a\n"],
)
def test_playlists_and_others_are_refused(data: bytes) -> None:
    with pytest.raises(UnsupportedMediaError, match="MP4"):
        decode_video(data, VideoSampling())


def test_ceilings() -> None:
    data = clip()
    for limits in (
        MediaLimits(max_image_pixels=100),
        MediaLimits(max_source_frames=19),
        MediaLimits(max_video_pixels=64 * 48 * 3),
        MediaLimits(max_video_frames=3),
    ):
        with pytest.raises(MediaTooLargeError):
            decode_video(data, VideoSampling(), limits)


def test_missing_extra_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    data = clip(2)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r'pip install "mm-core\[video\]"'):
        decode_video(data, VideoSampling())


def test_frames_given_directly() -> None:
    frames = RNG.integers(0, 256, (6, 8, 10, 3), dtype=np.uint8)
    forms = [frames, torch.from_numpy(frames), list(frames), [Image.fromarray(f) for f in frames], frames / 255.0]
    for form in forms:
        video = frames_to_video(form, 3.0, VideoSampling())
        assert np.array_equal(video.frames, frames)
        assert video.times == tuple(i / 3.0 for i in range(6))
    assert frames_to_video(frames, None, VideoSampling()).sample_fps is None
    sampled = frames_to_video(frames, 3.0, VideoSampling(fps=None, num_frames=2, given_frames=True))
    assert np.array_equal(sampled.frames, frames[::3])
    assert sampled.sample_fps == 1.0


def test_bad_frames() -> None:
    good = np.zeros((4, 8, 10, 3), np.uint8)
    cases: list[tuple[Any, Any, type[Exception]]] = [
        ([], None, MediaDecodeError),
        (good[0], None, UnsupportedMediaError),
        ([good[0], good[0][:5]], None, MediaDecodeError),
        (good, float("nan"), MediaDecodeError),
        (good, 0, MediaDecodeError),
        (np.zeros((800, 1, 1, 3), np.uint8), None, MediaTooLargeError),
    ]
    for frames, fps, error in cases:
        with pytest.raises(error):
            frames_to_video(frames, fps, VideoSampling())


def test_a_resolution_that_changes_on_the_way() -> None:
    """A second film's packets behind the first one's, in one stream: each key frame brings its own size."""
    av = pytest.importorskip("av")
    joined, count = io.BytesIO(), 0
    with av.open(joined, "w", format="avi") as out:
        stream = None
        for size in ((64, 48), (96, 80)):
            with av.open(io.BytesIO(clip(5, "avi", size))) as source:
                stream = stream or out.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.stream, packet.pts, packet.dts, count = stream, count, count, count + 1
                        out.mux(packet)
    for sampling in (VideoSampling(fps=None), VideoSampling(num_frames=4)):
        with pytest.raises(MediaDecodeError, match="resolution") as caught:
            decode_video(joined.getvalue(), sampling)
        assert caught.value.code == "invalid_video"


@pytest.mark.parametrize("rate", [0, 1, 0xFFFFFFFF])
def test_rates_that_a_header_invents(rate: int) -> None:
    """AVI: rate over scale, in the stream's header. Whatever it says, as many frames are kept as may be, or none."""
    data = bytearray(clip(12, "avi"))
    head = data.index(b"strh") + 8
    data[head + 24 : head + 28] = rate.to_bytes(4, "little")
    try:
        video = decode_video(bytes(data), VideoSampling(fps=2.0, max_frames=8))
    except MediaDecodeError as error:
        assert error.code == "invalid_video"  # noqa: PT017
    else:
        assert 1 <= len(video.frames) <= 8
