"""Values in all their forms to items; the digest is of the content, whatever form it came in."""

from __future__ import annotations

import base64
import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mm_core.errors import MediaDecodeError, MediaError, MediaTooLargeError, UnsupportedMediaError
from mm_core.hashing import get_hasher
from mm_core.inputs.fetch import Fetcher, require_modality
from mm_core.media import MediaLimits, VideoSampling, decoder, load_audio
from mm_core.media.encoded import decode_data_url

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
IMAGE = Image.fromarray(PIXELS)


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    IMAGE.save(buffer, kind)
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


@pytest.fixture
def fetcher() -> Fetcher:
    return Fetcher(get_hasher("xxh3_128"), MediaLimits())


def test_every_form_has_the_same_digest(fetcher: Fetcher, tmp_path: Path) -> None:
    png = encoded("PNG")
    (tmp_path / "a.png").write_bytes(png)
    forms = [
        IMAGE, png, bytearray(png), encoded("BMP"), tmp_path / "a.png", str(tmp_path / "a.png"),
        data_url(png), data_url(png, "image/jpeg"), PIXELS, torch.from_numpy(PIXELS), Image.open(tmp_path / "a.png"),
    ]  # fmt: skip
    items = [fetcher.fetch("image", form).load() for form in forms]
    assert len({item.digest for item in items}) == 1
    assert all(np.array_equal(np.asarray(item.data), PIXELS) for item in items)
    assert items[0].info == {"width": 20, "height": 12}


def test_known_bytes_are_not_decoded_again(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = decoder.decode_image
    monkeypatch.setattr(decoder, "decode_image", lambda *a: calls.append(1) or real(*a))
    first = fetcher.fetch("image", encoded("PNG"))
    again = fetcher.fetch("image", encoded("PNG"))
    assert len(calls) == 1
    assert again.item.data is None
    assert (again.item.digest, again.item.info) == (first.item.digest, first.item.info)
    assert np.array_equal(np.asarray(again.load().data), PIXELS)
    assert len(calls) == 2


def test_failures_are_not_remembered(fetcher: Fetcher) -> None:
    for _ in range(2):
        with pytest.raises(MediaDecodeError):
            fetcher.fetch("image", b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    "url",
    ["http://x/a.png", "https://x/a.png", "HTTP://x", "file:///etc/passwd", "ftp://x", "javascript:1", "s3://b/k"],
)
def test_urls_are_not_fetched(fetcher: Fetcher, url: str) -> None:
    with pytest.raises(UnsupportedMediaError, match="Download the file"):
        fetcher.fetch("image", url)


@pytest.mark.parametrize("value", ["/etc/hostname", "picture.png", ""])
def test_paths_can_be_shut(fetcher: Fetcher, value: str) -> None:
    with pytest.raises(UnsupportedMediaError, match="data: URL"):
        fetcher.fetch("image", value, allow_paths=False)


BODY = base64.b64encode(b"12345678901").decode()


@pytest.mark.parametrize(
    "url",
    [
        "data:", "data:image/png;base64", "data:image/png;base64,", f"data:image/png,{BODY}",
        f"data:text/html;base64,{BODY}",
        f"data:image/png;base64,{BODY[:-1]}", f"data:image/png;base64, {BODY}", f"data:image/png;base64,{BODY}\n",
        f"data:image/png;base64,{BODY[:4]}\n{BODY[4:]}", "data:image/png;base64,_-_-", "data:image/png;base64,Ä",
        f"data:image/png;base64,{BODY}====",
    ],
)  # fmt: skip
def test_data_urls_are_strict(url: str) -> None:
    with pytest.raises(MediaDecodeError) as caught:
        decode_data_url(url, "image", MediaLimits(max_encoded_bytes=1000))
    assert caught.value.code == "invalid_image"


def test_data_urls_are_bounded() -> None:
    eleven = MediaLimits(max_encoded_bytes=11)
    assert decode_data_url(f"data:image/png;base64,{BODY}", "image", eleven) == b"12345678901"
    with pytest.raises(MediaTooLargeError):
        decode_data_url("data:image/png;base64," + "!" * 10_000, "image", MediaLimits(max_encoded_bytes=1000))


def test_other_values(fetcher: Fetcher) -> None:
    for value in (3, 2.5, object(), {"a": 1}, [IMAGE], (IMAGE, 2.0)):
        with pytest.raises(UnsupportedMediaError, match="Pass"):
            fetcher.fetch("image", value)
    for value in (3, {"frame": []}, (IMAGE, "x", 3), object()):
        with pytest.raises(MediaError):
            fetcher.fetch("video", value)


def test_video_values(fetcher: Fetcher) -> None:
    frames = np.stack([PIXELS, PIXELS[::-1]])
    forms = [
        (frames, 2.0),
        (list(frames), 2.0),
        {"frames": frames, "fps": 2.0},
        ([Image.fromarray(f) for f in frames], 2),
    ]
    items = [fetcher.fetch("video", form).item for form in forms]
    assert len({item.digest for item in items}) == 1
    assert items[0].info["times"] == (0.0, 0.5)
    assert items[0].data.shape == (2, 12, 20, 3)
    assert fetcher.fetch("video", frames).item.digest != items[0].digest
    assert fetcher.fetch("video", (frames, 4.0)).item.digest != items[0].digest


def test_video_aliases_know_the_sampling(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    from mm_core.media import frames_to_video

    frames = np.stack([PIXELS] * 8)

    def decode(data: bytes, sampling: VideoSampling, limits: MediaLimits):
        return frames_to_video(frames[: sampling.num_frames], 4.0, VideoSampling())

    monkeypatch.setattr(decoder, "decode_video", decode)
    two, four = (fetcher.fetch("video", b"bytes", VideoSampling(num_frames=n)) for n in (2, 4))
    assert two.item.digest != four.item.digest
    assert fetcher.fetch("video", b"bytes", VideoSampling(num_frames=2)).item.digest == two.item.digest


def test_audio_values(fetcher: Fetcher) -> None:
    item = fetcher.fetch("audio", (np.zeros(160, np.float64), 16000)).item
    assert item.data.dtype == np.float32
    assert item.info == {"sample_rate": 16000, "samples": 160}
    bad = {
        "empty_audio": (np.zeros(0), 16000),
        "nonfinite_audio": (np.array([0.0, np.nan]), 16000),
        "invalid_audio": (np.zeros(4), 0),
        "unsupported_media": (np.zeros((2, 4)), 16000),
    }
    for code, value in bad.items():
        with pytest.raises(MediaError) as caught:
            fetcher.fetch("audio", value)
        assert caught.value.code == code
    for bare in (np.zeros(160), 3, (np.zeros(160), 16000, 1), [np.zeros(160), 16000]):
        with pytest.raises(UnsupportedMediaError, match="samples, rate"):
            fetcher.fetch("audio", bare)
        with pytest.raises(UnsupportedMediaError, match="samples, rate"):
            load_audio(bare)
    with pytest.raises(UnsupportedMediaError, match="WAV"):
        fetcher.fetch("audio", b"RIFF")


def wav(samples: np.ndarray, rate: int = 8000) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


SOUND = np.random.default_rng(1).uniform(-1, 1, 4000).astype(np.float32)


def test_every_form_of_a_sound_has_the_same_digest(fetcher: Fetcher, tmp_path: Path) -> None:
    file = wav(SOUND)
    (tmp_path / "a.mp3").write_bytes(file)  # told by content
    forms = [
        (SOUND, 8000), (torch.from_numpy(SOUND), 8000), (SOUND[None], 8000), (np.stack([SOUND, SOUND], 1), 8000), file,
        bytearray(file), tmp_path / "a.mp3", str(tmp_path / "a.mp3"), data_url(file, "audio/any"),
    ]  # fmt: skip
    items = [fetcher.fetch("audio", form).load() for form in forms]
    assert len({item.digest for item in items}) == 1
    assert all(np.array_equal(item.data, SOUND) for item in items)
    assert all(np.array_equal(load_audio(form).samples, SOUND) for form in forms)
    assert items[0].info == items[4].info == {"sample_rate": 8000, "samples": 4000}
    assert fetcher.fetch("audio", (SOUND, 8001)).item.digest != items[0].digest


def test_the_digest_and_the_alias_know_the_rate(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int | None] = []
    real = decoder.decode_audio
    monkeypatch.setattr(
        decoder, "decode_audio", lambda data, rate, limits: calls.append(rate) or real(data, rate, limits)
    )
    file = wav(SOUND)
    found = {rate: fetcher.fetch("audio", file, sampling_rate=rate).item for rate in (None, 8000, 16000, 8000, None)}
    assert calls == [None, 8000, 16000]  # known bytes are not decoded again
    assert found[None].digest == found[8000].digest != found[16000].digest
    assert found[16000].info == {"sample_rate": 16000, "samples": 8000}
    again = fetcher.fetch("audio", file, sampling_rate=16000)
    assert again.item.data is None
    assert again.load().data.shape == (8000,)
    assert fetcher.fetch("audio", (SOUND, 8000), sampling_rate=16000).item.digest == found[16000].digest


def test_a_sound_that_was_cut_off_is_marked(fetcher: Fetcher) -> None:
    for _ in range(2):
        assert fetcher.fetch("audio", wav(SOUND)[:9000]).item.info["cut_off"]


def test_modalities_of_the_family() -> None:
    assert require_modality("video", "qwen2vl", ("image", "video")) == "video"
    with pytest.raises(UnsupportedMediaError, match="image and video, not 'audio'"):
        require_modality("audio", "qwen2vl", ("image", "video"))


def test_one_lazy_image_in_many_threads(fetcher: Fetcher) -> None:
    lazy = Image.open(io.BytesIO(encoded("PNG")))
    with ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(lambda _: fetcher.fetch("image", lazy).item.digest, range(32)))
    assert digests == {fetcher.fetch("image", IMAGE).item.digest}


def test_what_the_caller_writes_later_changes_nothing(fetcher: Fetcher) -> None:
    frames, samples = np.stack([PIXELS, PIXELS]), np.zeros(160, np.float32)
    video, audio = fetcher.fetch("video", frames), fetcher.fetch("audio", (samples, 16000))
    frames[:], samples[:] = 7, 1
    assert np.array_equal(video.load().data, np.stack([PIXELS, PIXELS]))
    assert not audio.load().data.any()


def test_frames_encoded_one_by_one(fetcher: Fetcher) -> None:
    """As a list, and as a `data:video/jpeg` URL: the same frames, counted before any is decoded."""
    frames = [encoded("PNG"), encoded("BMP")]
    url = "data:video/jpeg;base64," + ",".join(base64.b64encode(frame).decode() for frame in frames)
    items = [fetcher.fetch("video", value).item for value in (frames, tuple(frames), url, [IMAGE, IMAGE])]
    assert len({item.digest for item in items}) == 1
    assert items[0].data.shape == (2, 12, 20, 3)
    timed = fetcher.fetch("video", {"frames": frames, "fps": 2.0}).item
    assert timed.info["times"] == (0.0, 0.5)
    with pytest.raises(MediaDecodeError) as caught:
        fetcher.fetch("video", [frames[0], frames[0][:50]])
    assert caught.value.code == "invalid_video"
    with pytest.raises(UnsupportedMediaError, match="all encoded"):
        fetcher.fetch("video", [frames[0], IMAGE])


def test_frames_are_counted_first(monkeypatch: pytest.MonkeyPatch) -> None:
    few = Fetcher(get_hasher("xxh3_128"), MediaLimits(max_video_frames=3, max_video_pixels=700))
    decoded: list[int] = []
    real = decoder.decode_image
    monkeypatch.setattr(decoder, "decode_image", lambda *a: decoded.append(1) or real(*a))
    with pytest.raises(MediaTooLargeError, match="1000000 frames"):
        few.fetch("video", "data:video/jpeg;base64," + "," * 999_999)
    assert decoded == []
    with pytest.raises(MediaTooLargeError, match="4 frames"):
        few.fetch("video", [encoded("PNG")] * 4)
    assert len(decoded) <= 1
    buffer = io.BytesIO()
    IMAGE.resize((30, 30)).save(buffer, "PNG")
    decoded.clear()
    with pytest.raises(MediaDecodeError, match="one size"):
        few.fetch("video", [encoded("PNG"), buffer.getvalue()])
    assert len(decoded) == 2
    with pytest.raises(MediaTooLargeError, match="pixels"):
        few.fetch("video", [encoded("PNG")] * 3)  # of 240 each
    assert len(decoded) == 3  # two of them above
