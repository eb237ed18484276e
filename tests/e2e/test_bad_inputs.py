"""Pictures and films nobody should send: each gets its named error, and nobody else notices (rows I, V, U)."""

from __future__ import annotations

import base64
import io
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.e2e import GREEDY, IMAGE, Canary, ask, check_message, turn
from support.pictures import frames, picture

from mm_core import Engine, KvCacheConfig, TextPrompt
from mm_core.errors import MMError, TooManyMediaError
from mm_core.media import decoder
from mm_core.media import video as video_module

VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def engine(tiny_path: Path) -> Iterator[Engine]:
    kv, limits = KvCacheConfig(num_blocks=256), {"image": 8}
    with Engine.from_pretrained(tiny_path, kv_cache_config=kv, limit_mm_per_prompt=limits, show_progress=False) as made:
        yield made


@pytest.fixture(scope="module")
def canary(engine: Engine) -> Canary:
    return Canary(engine)


def refuse(engine: Engine, canary: Canary, prompt: Any, codes: str) -> MMError:
    """The request fails with one of `codes`, says so decently, and the next one is unaffected."""
    with pytest.raises(MMError) as caught:
        engine.generate(prompt, GREEDY)
    assert caught.value.code in codes.split("|"), f"{caught.value.code}: {caught.value}"
    check_message(caught.value)
    canary.check()
    return caught.value


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int, body: bytes = b"", depth: int = 1) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def zip_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", saved(picture(), "PNG"))
    return buffer.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def noise(count: int) -> bytes:
    return RNG.integers(0, 256, count, dtype=np.uint8).tobytes()


JPEG, PNG = saved(picture(1), "JPEG"), saved(picture(1), "PNG")
BAD_IMAGES: dict[str, tuple[Any, str]] = {
    "I1 no bytes": (b"", "invalid_image"),
    "I2 JPEG without its last 2 bytes": (JPEG[:-2], "invalid_image"),
    "I2 JPEG without its last 128 bytes": (JPEG[:-128], "invalid_image"),
    "I2 half a PNG": (PNG[: len(PNG) // 2], "invalid_image"),
    "I2 cut off in the header": (PNG[:20], "invalid_image"),
    "I3 PNG magic": (PNG[:8] + noise(500), "invalid_image|image_too_large"),
    "I3 PNG header": (PNG[:33] + noise(500), "invalid_image"),
    "I3 JPEG magic": (JPEG[:3] + noise(500), "invalid_image|image_too_large"),
    "I3 GIF magic": (b"GIF89a\x10\0\x10\0" + noise(500), "invalid_image|image_too_large"),
    "I3 WebP magic": (b"RIFF\0\2\0\0WEBPVP8 " + noise(500), "invalid_image|image_too_large"),
    "I3 BMP magic": (b"BM" + b"\0" * 500, "invalid_image"),
    "I4 SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "unsupported_media"),
    "I4 PDF": (b"%PDF-1.7\n" + noise(200), "unsupported_media"),
    "I4 ZIP": (zip_bytes(), "unsupported_media"),
    "I6 TIFF": (saved(picture(1), "TIFF"), "unsupported_media"),
    "I6 EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n" + noise(200), "unsupported_media"),
    "I6 PSD": (b"8BPS\0\1" + noise(200), "unsupported_media"),
    "I6 JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + noise(200), "unsupported_media"),
    "I6 FITS": (b"SIMPLE  =                    T" + noise(200), "unsupported_media"),
    "I6 MSP": (b"DanM" + noise(200), "unsupported_media"),
    "I14 8192×1": (picture(1, 8192, 1), "image_aspect"),
    "I14 1×8192 PNG": (saved(picture(1, 1, 8192), "PNG"), "image_aspect"),
    "I14 201:1": (picture(1, 402, 2), "image_aspect"),
    "I15 14000² header": (png_header(14000, 14000), "image_too_large"),
    "I16 4e9×4e9": (png_header(4_000_000_000, 4_000_000_000), "image_too_large"),
    "I16 4e9×1": (png_header(4_000_000_000, 1), "image_too_large"),
    "I16 0×0": (png_header(0, 0), "invalid_image"),
    "I19 padding": (data_url(PNG).rstrip("=") + "A", "invalid_image"),
    "I19 spaces": (data_url(PNG).replace("A", " A", 1), "invalid_image"),
    "I19 newlines": (data_url(PNG)[:80] + "\n" + data_url(PNG)[80:], "invalid_image"),
    "I19 url-safe alphabet": (data_url(b"\xff" * 60).replace("/" * 80, "_" * 80), "invalid_image"),
    "I19 not ASCII": (data_url(PNG) + "ä", "invalid_image"),
    "I20 no comma": ("data:image/png;base64", "invalid_image"),
    "I20 not base64": ("data:image/png," + "A" * 40, "invalid_image"),
    "I20 empty": ("data:image/png;base64,", "invalid_image"),
    "I20 wrong type": (data_url(PNG, "audio/wav"), "invalid_image"),
    "U6 no such file": ("/nowhere/picture.png", "invalid_media"),
    "U6 directory": ("/tmp", "invalid_media"),
    "U6 device": ("/dev/zero", "invalid_media"),
    "U6 NUL in the path": ("/tmp/a\0b.png", "invalid_media"),
    "U6 file: URL": ("file:///etc/passwd", "unsupported_media"),
    "U6 a text file": ("/etc/passwd", "unsupported_media"),
    "U7 http": ("http://127.0.0.1:9/x.png", "unsupported_media"),
    "U7 other schemes": ("gopher://127.0.0.1/x", "unsupported_media"),
    "int": (3, "unsupported_media"),
    "object": (object(), "unsupported_media"),
    "dict": ({"url": "x"}, "unsupported_media"),
    "list": ([picture(1)], "unsupported_media"),
    "array of NaN": (np.full((30, 30, 3), np.nan, np.float32), "unsupported_media"),
    "array of int64": (np.zeros((30, 30, 3), np.int64), "unsupported_media"),
    "array, channels first": (np.zeros((3, 30, 30), np.uint8), "unsupported_media"),
    "array without pixels": (np.zeros((0, 30, 3), np.uint8), "invalid_image"),
    "array of objects": (np.array([object()]), "unsupported_media"),
}


@pytest.mark.parametrize("row", BAD_IMAGES)
def test_bad_images(engine: Engine, canary: Canary, row: str) -> None:
    value, codes = BAD_IMAGES[row]
    refuse(engine, canary, ask(value), codes)


def test_i4_html_named_png(engine: Engine, canary: Canary, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    file.write_bytes(b"<!DOCTYPE html><html><body>404</body></html>")
    refuse(engine, canary, ask(file), "unsupported_media")
    os.mkfifo(tmp_path / "pipe.png")
    refuse(engine, canary, ask(str(tmp_path / "pipe.png")), "invalid_media")


def test_a_picture_whose_file_is_closed_or_cut_off(engine: Engine, canary: Canary) -> None:
    refuse(engine, canary, ask(Image.open(io.BytesIO(PNG[: len(PNG) // 2]))), "invalid_image")
    file = io.BytesIO(PNG)
    lazy = Image.open(file)
    file.close()
    refuse(engine, canary, ask(lazy), "invalid_image")
    refuse(engine, canary, ask(Image.new("RGB", (0, 5))), "invalid_image")


def good_images() -> dict[str, tuple[Any, Image.Image]]:
    """What must work → the picture it must count as."""
    base = picture(2, 120, 80)
    rgba = base.convert("RGBA")
    rgba.putalpha(Image.fromarray(RNG.integers(0, 256, (80, 120), np.uint8)))
    white = Image.new("RGBA", rgba.size, "white")
    exif = Image.Exif()
    exif[0x0112] = 6
    wide = RNG.integers(0, 65536, (80, 120), np.uint16)
    grey = Image.fromarray((wide >> 8).astype(np.uint8)).convert("RGB")
    return {
        "I5 BMP called PNG": (data_url(saved(base, "BMP")), base),
        "I7 animated GIF": (
            saved(base.convert("P"), "GIF", save_all=True, append_images=[picture(3, 120, 80).convert("P")]),
            base.convert("P").convert("RGB"),
        ),
        "I9 16-bit PNG": (saved(Image.fromarray(wide), "PNG"), grey),
        "I11 RGBA on white": (saved(rgba, "PNG"), Image.alpha_composite(white, rgba).convert("RGB")),
        "I12 EXIF orientation": (saved(base, "PNG", exif=exif), base.transpose(Image.Transpose.ROTATE_270)),
        "I14 1×1": (picture(1, 1, 1), picture(1, 1, 1)),
        "I14 200:1": (saved(picture(1, 400, 2), "PNG"), picture(1, 400, 2)),
    }


def test_odd_images_that_are_fine(engine: Engine, canary: Canary) -> None:
    answers = set()
    for row, (value, golden) in good_images().items():
        wanted = engine.generate(ask(golden), GREEDY)[0]
        given = engine.generate(ask(value), GREEDY)[0]
        assert given.token_ids == wanted.token_ids, row
        assert given.usage.cached_tokens > 0, f"{row}: not recognised as the same picture"
        answers.add(given.token_ids)
    assert len(answers) > 5
    canary.check()


def peak_rss(call: Callable[[], Any]) -> int:
    """Bytes that the process grew by at most while `call` ran."""
    Path("/proc/self/clear_refs").write_text("5")
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    call()
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024 - before


def test_i15_a_png_bomb_takes_no_memory(engine: Engine, canary: Canary) -> None:
    """13300² pixels in a few kB: Pillow alone only warns, and takes 177 MB."""
    bomb = png_header(13300, 13300, zlib.compress(bytes(13300 * (1 + 13300 // 8 + 1)), 1))
    assert len(bomb) < 200_000
    grown = peak_rss(lambda: refuse(engine, canary, ask(bomb), "image_too_large"))
    assert grown < 50 * 2**20
    assert peak_rss(lambda: np.ones(80 * 2**20, np.uint8).sum()) > 70 * 2**20, "the measurement sees nothing"


def test_i21_too_many_images_are_not_decoded(engine: Engine, canary: Canary, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    real = decoder.decode_image
    monkeypatch.setattr(decoder, "decode_image", lambda *a: decoded.append(1) or real(*a))
    many = [saved(picture(50 + i, 28, 28), "PNG") for i in range(64)]
    for count in (9, 64):
        prompt = TextPrompt(prompt=turn(IMAGE * count), multi_modal_data={"image": many[:count]})
        error = refuse(engine, canary, prompt, "too_many_media")
        assert isinstance(error, TooManyMediaError)
        assert str(count) in str(error)
        assert "limit is 8" in str(error)
    assert decoded == []
    eight = TextPrompt(prompt=turn(IMAGE * 8), multi_modal_data={"image": many[:8]})
    assert engine.generate(eight, GREEDY)[0].usage.media_tokens == 8 * 4
    assert len(decoded) == 8


@pytest.mark.parametrize("name", ["min_pixels", "max_pixels", "max_frames", "fps", "num_frames", "unknown"])
@pytest.mark.parametrize("value", [0, -1, 10**12, 1e9, float("nan"), "5", True, [1]], ids=str)
def test_i22_v5_processor_kwargs(engine: Engine, canary: Canary, name: str, value: Any) -> None:
    started = time.perf_counter()
    with pytest.raises(MMError) as caught:
        engine.generate(ask(picture(1), mm_processor_kwargs={name: value}), GREEDY)
    assert time.perf_counter() - started < 1
    assert caught.value.code == "invalid_params"
    assert name in str(caught.value)
    check_message(caught.value)


def film(count: int, rate: int = 10, codec: str = "mpeg4") -> bytes:
    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 84, 56, "yuv420p"
        for frame in frames(5, count):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def watch(value: Any, text: str = "Describe", **more: Any) -> TextPrompt:
    return TextPrompt(prompt=turn(VIDEO + text), multi_modal_data={"video": [value]}, **more)


FILM = film(12)
HLS = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
BAD_VIDEOS: dict[str, tuple[Any, str]] = {
    "V1 no bytes": (b"", "invalid_video"),
    "V1 moov missing": (FILM[:600], "invalid_video"),
    "V1 cut in the middle": (FILM[: len(FILM) // 2], "invalid_video"),
    "V1 random body": (FILM[:48] + noise(4000), "invalid_video"),
    "V1 no frames": (np.zeros((0, 56, 84, 3), np.uint8), "invalid_video"),
    "V3 fps 0": ((frames(1, 4), 0), "invalid_video"),
    "V3 fps -1": ((frames(1, 4), -1.0), "invalid_video"),
    "V3 fps NaN": ({"frames": frames(1, 4), "fps": float("nan")}, "invalid_video"),
    "V3 fps inf": ((frames(1, 4), float("inf")), "invalid_video"),
    "V6 sizes change": ([picture(1, 56, 56), picture(2, 56, 84)], "invalid_video"),
    "V7 HLS": (HLS, "unsupported_media"),
    "V7 HLS in an ftyp box": (b"\0\0\0\x08ftyp" + HLS, "invalid_video"),
    "V7 concat": (b"ffconcat version 1.0\nfile /etc/passwd\n", "unsupported_media"),
    "V7 DASH": (b"<?xml version='1.0'?><MPD><BaseURL>file:///etc/passwd</BaseURL></MPD>", "unsupported_media"),
    "V7 subfile": ("subfile,,start,0,end,9,,:/etc/passwd", "unsupported_media|invalid_media"),
    "V7 concat protocol": ("concat:/etc/passwd|/etc/hosts", "unsupported_media"),
    "V8 too many frames": (np.zeros((769, 28, 28, 3), np.uint8), "media_too_large"),
    "a picture": (PNG, "unsupported_media"),
    "channels first": (np.zeros((4, 3, 28, 28), np.uint8), "unsupported_media"),
    "dict with other keys": ({"frames": frames(1, 4), "rate": 2}, "unsupported_media"),
    "int": (7, "unsupported_media"),
}


@pytest.mark.parametrize("row", BAD_VIDEOS)
def test_bad_videos(engine: Engine, canary: Canary, row: str) -> None:
    value, codes = BAD_VIDEOS[row]
    refuse(engine, canary, watch(value), codes)


def test_v7_what_a_playlist_names_is_not_opened(
    engine: Engine, canary: Canary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the sniffer let it pass, the one demuxer that is chosen would open nothing else."""
    secret = tmp_path / "secret.mp4"
    secret.write_bytes(FILM)
    playlist = f"#EXTM3U\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n".encode()
    monkeypatch.setattr(video_module, "video_demuxer", lambda _: "mov")
    refuse(engine, canary, watch(playlist), "invalid_video")


def test_odd_videos_that_are_fine(engine: Engine, canary: Canary) -> None:
    tokens = {
        "file": watch(FILM), "V2 one frame": watch((frames(6, 1), 2.0)), "V9 three frames": watch((frames(6, 3), 2.0)),
        "V3 fast": watch((frames(6, 4), 60_000.0)), "no rate": watch(frames(6, 4)), "V2 file of one": watch(film(1)),
        "V3 fast file": watch(film(8, rate=1000)), "max_frames": watch(FILM, mm_processor_kwargs={"max_frames": 4}),
    }  # fmt: skip
    for row, prompt in tokens.items():
        output = engine.generate(prompt, GREEDY)[0]
        assert output.usage.media_tokens >= 6, row
        assert engine.generate(prompt, GREEDY)[0].token_ids == output.token_ids, row
    canary.check()


def test_audio_is_not_for_this_family(engine: Engine, canary: Canary) -> None:
    for value in ((np.zeros(16000, np.float32), 16000), b"RIFF", None):
        prompt = TextPrompt(prompt="What is said?", multi_modal_data={"audio": value})
        error = refuse(engine, canary, prompt, "unsupported_media")
        assert "image and video" in str(error)
    refuse(engine, canary, TextPrompt(prompt="x", multi_modal_data={"smell": 1}), "unsupported_media")
