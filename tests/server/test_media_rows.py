"""Pictures and films that nobody should send, over HTTP: each gets its status and code, and nobody else notices.

Rows I and V of the catalogue of bad inputs. The server decodes them in workers, as it does by default.
"""

from __future__ import annotations

import base64
import io
import os
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from support.clips import film, picture
from support.openai_calls import Canary, check_error
from support.serving import Server

RNG = np.random.default_rng(0)


def url_of(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image(data: Any, kind: str = "image/png") -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url_of(data, kind) if isinstance(data, bytes) else data}}


def video(data: Any, kind: str = "video/mp4") -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": url_of(data, kind) if isinstance(data, bytes) else data}}


def ask(http: httpx.Client, model: str, *parts: dict[str, Any], **fields: Any) -> httpx.Response:
    content = [*parts, {"type": "text", "text": "What is it?"}]
    body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8}
    return http.post("/v1/chat/completions", json={**body, "return_token_ids": True, **fields})


def tokens(reply: httpx.Response) -> list[int]:
    assert reply.status_code == 200, reply.text
    found: list[int] = reply.json()["choices"][0]["token_ids"]
    return found


def saved(shown: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    shown.save(buffer, kind, **options)
    return buffer.getvalue()


def shot(seed: int = 1, width: int = 60, height: int = 40) -> Image.Image:
    return Image.open(io.BytesIO(picture("PNG", (width, height), seed)))


def png_header(width: int, height: int, body: bytes = b"") -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


JPEG, PNG = picture("JPEG"), picture("PNG")
INVALID, UNSUPPORTED, LARGE = (400, "invalid_image"), (400, "unsupported_media"), (413, "image_too_large")
BOMB = png_header(13300, 13300, zlib.compress(bytes(13300 * (1 + 13300 // 8 + 1)), 1))

BAD_IMAGES: dict[str, tuple[dict[str, Any], tuple[int, str]]] = {
    "I2 without its last 2 bytes": (image(JPEG[:-2]), INVALID),
    "I2 without its last 128 bytes": (image(JPEG[:-128]), INVALID),
    "I2 half a PNG": (image(PNG[: len(PNG) // 2]), INVALID),
    "I3 PNG magic": (image(PNG[:8] + b"\0" * 500), INVALID),
    "I3 PNG header": (image(PNG[:33] + b"\x55" * 500), INVALID),
    "I3 JPEG magic": (image(JPEG[:3] + b"\x55" * 500), INVALID),
    "I3 BMP magic": (image(b"BM" + bytes(500)), INVALID),
    "I4 HTML": (image(b"<!DOCTYPE html><html><body>404</body></html>"), UNSUPPORTED),
    "I4 SVG": (image(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), UNSUPPORTED),
    "I4 PDF": (image(b"%PDF-1.7\n" + bytes(200)), UNSUPPORTED),
    "I4 ZIP": (image(b"PK\x03\x04" + bytes(200)), UNSUPPORTED),
    "I6 TIFF": (image(saved(shot(), "TIFF")), UNSUPPORTED),
    "I6 EPS": (image(b"%!PS-Adobe-3.0 EPSF-3.0\n" + bytes(200)), UNSUPPORTED),
    "I6 PSD": (image(b"8BPS\0\1" + bytes(200)), UNSUPPORTED),
    "I6 JPEG 2000": (image(b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(200)), UNSUPPORTED),
    "I6 FITS": (image(b"SIMPLE  =                    T" + bytes(200)), UNSUPPORTED),
    "I6 MSP": (image(b"DanM" + bytes(200)), UNSUPPORTED),
    "I14 8192×1": (image(saved(shot(1, 8192, 1), "PNG")), (400, "image_aspect")),
    "I14 1×8192": (image(saved(shot(1, 1, 8192), "PNG")), (400, "image_aspect")),
    "I15 14000² header": (image(png_header(14000, 14000)), LARGE),
    "I16 4e9×4e9": (image(png_header(4_000_000_000, 4_000_000_000)), LARGE),
    "I19 padding": (image(url_of(PNG) + "="), INVALID),
    "I19 spaces": (image(url_of(PNG).replace("A", " A", 1)), INVALID),
    "I19 newlines": (image(url_of(PNG)[:80] + "\n" + url_of(PNG)[80:]), INVALID),
    "I19 url-safe": (image(url_of(b"\xff" * 60).replace("/" * 80, "_" * 80)), INVALID),
    "I20 no comma": (image("data:image/png;base64"), INVALID),
    "I20 not base64": (image("data:image/png," + "A" * 40), INVALID),
    "I20 and I1 empty": (image("data:image/png;base64,"), INVALID),
    "I20 wrong type": (image(url_of(PNG, "audio/wav")), INVALID),
    "I22 detail": ({"type": "image_url", "image_url": {"url": url_of(PNG), "detail": "0"}}, (400, "invalid_body")),
}  # fmt: skip


@pytest.mark.parametrize("row", BAD_IMAGES)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_images(http: httpx.Client, model: str, canary: Canary, row: str, stream: bool) -> None:
    part, (status, code) = BAD_IMAGES[row]
    check_error(ask(http, model, part, stream=stream), status, code)
    canary.check()


def odd_images() -> dict[str, tuple[bytes, Image.Image]]:
    """Rows that are answered as their golden picture is."""
    base = shot()
    wide = RNG.integers(0, 65536, (40, 60), dtype=np.uint16)
    grey = Image.fromarray((wide >> 8).astype(np.uint8)).convert("RGB")
    rgba = base.copy()
    rgba.putalpha(Image.fromarray(RNG.integers(0, 256, (40, 60), np.uint8)))
    white = Image.new("RGBA", rgba.size, "white")
    palette = base.convert("P")
    inked = base.convert("CMYK")
    odd = {
        "I5 and I18: BMP called PNG": (saved(base, "BMP"), base),
        "I7 GIF": (saved(palette, "GIF", save_all=True, append_images=[shot(3).convert("P")]), palette.convert("RGB")),
        "I7 APNG": (saved(base, "PNG", save_all=True, append_images=[shot(3)]), base),
        "I9 16 bits": (saved(Image.fromarray(wide), "PNG"), grey),
        "I10 grey": (saved(base.convert("L"), "PNG"), base.convert("L").convert("RGB")),
        "I10 1 bit": (saved(base.convert("1"), "PNG"), base.convert("1").convert("RGB")),
        "I11 RGBA": (saved(rgba, "PNG"), Image.alpha_composite(white, rgba).convert("RGB")),
        "I8 CMYK": (inked_jpeg := saved(inked, "JPEG"), Image.open(io.BytesIO(inked_jpeg)).convert("RGB")),
        "I13 corrupt EXIF": (saved(base, "PNG", exif=b"Exif\0\0" + b"\xff" * 40), base),
    }  # fmt: skip
    for turn, method in ((2, "FLIP_LEFT_RIGHT"), (3, "ROTATE_180"), (6, "ROTATE_270"), (8, "ROTATE_90")):
        exif = Image.Exif()
        exif[0x0112] = turn
        odd[f"I12 orientation {turn}"] = (saved(base, "PNG", exif=exif), base.transpose(Image.Transpose[method]))
    return odd


def test_odd_images_that_are_fine(http: httpx.Client, model: str, canary: Canary) -> None:
    """The golden picture's prompt is in the cache by then: hit means the same digest."""
    for row, (data, golden) in odd_images().items():
        wanted = tokens(ask(http, model, image(saved(golden, "PNG"))))
        reply = ask(http, model, image(data))
        assert tokens(reply) == wanted, row
        assert reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0, row
    canary.check()


def test_i17_twins_are_told_apart(http: httpx.Client, model: str) -> None:
    """Equal bytes in other shapes, equal indices into other palettes."""
    pixels = RNG.integers(0, 256, 30 * 60 * 3, np.uint8)
    shapes = [Image.fromarray(pixels.reshape(shape)) for shape in ((30, 60, 3), (60, 30, 3))]
    palettes = []
    for seed in (1, 2):
        twin = Image.fromarray(RNG.integers(0, 256, (40, 60), np.uint8) if not palettes else np.array(palettes[0]), "P")
        twin.putpalette(np.random.default_rng(seed).integers(0, 256, 768, np.uint8).tobytes())
        palettes.append(twin)
    for first, second in (shapes, palettes):
        assert first.tobytes() == second.tobytes()
        tokens(ask(http, model, image(saved(first, "PNG"))))
        cached = ask(http, model, image(saved(second, "PNG"))).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert cached < 16, "the twin was taken for the other"


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += _tree(int(child))
    return found


def _peak(pids: list[int]) -> int:
    """Bytes of memory that the processes had at most, all together."""
    total = 0
    for pid in pids:
        status = Path(f"/proc/{pid}/status").read_text()
        total += int(status.split("VmHWM:")[1].split()[0]) * 1024
    return total


def test_i15_a_bomb_takes_no_memory(server: Server, http: httpx.Client, model: str, canary: Canary) -> None:
    """13300² pixels in a few kB."""
    assert len(BOMB) < 200_000
    check_error(ask(http, model, image(BOMB)), 413, "image_too_large")  # whatever is loaded once is
    pids = _tree(server.pid)
    before = _peak(pids)
    for data in (BOMB, png_header(14000, 14000), png_header(4_000_000_000, 4_000_000_000)):
        check_error(ask(http, model, image(data)), 413, "image_too_large")
    assert _peak(pids) - before < 20 * 2**20
    canary.check()


def test_i21_too_many(http: httpx.Client, model: str, canary: Canary) -> None:
    start = time.monotonic()
    check_error(ask(http, model, *[image(b"not looked at")] * 65), 400, "too_many_media")
    assert time.monotonic() - start < 2
    canary.check()


@pytest.mark.parametrize("name", ["min_pixels", "max_pixels", "max_frames", "fps", "num_frames", "unknown"])
@pytest.mark.parametrize("value", [0, -1, 10**12, 1e9, "5", True, [1]], ids=str)
def test_i22_v5_what_is_asked_of_the_processor(http: httpx.Client, model: str, name: str, value: Any) -> None:
    start = time.monotonic()
    reply = ask(http, model, image(PNG), mm_processor_kwargs={name: value})
    assert check_error(reply, 400)["code"] in ("invalid_params", "invalid_body")
    assert time.monotonic() - start < 2


FILM = film(12, (84, 56))
HLS = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
BAD = (400, "invalid_video")
BAD_VIDEOS: dict[str, tuple[dict[str, Any], tuple[int, str]]] = {
    "V1 moov missing": (video(FILM[:600]), BAD),
    "V1 cut in the middle": (video(FILM[: len(FILM) // 2]), BAD),
    "V1 random body": (video(FILM[:48] + RNG.bytes(4000)), BAD),
    "V7 HLS": (video(HLS), UNSUPPORTED),
    "V7 HLS in an ftyp box": (video(b"\0\0\0\x08ftyp" + HLS), BAD),
    "V7 concat": (video(b"ffconcat version 1.0\nfile /etc/passwd\n"), UNSUPPORTED),
    "V7 DASH": (video(b"<?xml version='1.0'?><MPD><BaseURL>file:///etc/passwd</BaseURL></MPD>"), UNSUPPORTED),
    "V7 subfile": (video("subfile,,start,0,end,9,,:/etc/passwd"), (400, "url_blocked")),
    "V7 concat protocol": (video("concat:/etc/passwd|/etc/hosts"), (400, "url_blocked")),
    "V8 frames": (video("data:video/jpeg;base64," + "eHl6," * 99_999 + "eHl6"), (413, "media_too_large")),
    "V8 a frame is broken": (video("data:video/jpeg;base64," + base64.b64encode(JPEG[:-99]).decode()), BAD),
    "a picture": (video(PNG), UNSUPPORTED),
}  # fmt: skip


@pytest.mark.parametrize("row", BAD_VIDEOS)
def test_bad_videos(http: httpx.Client, model: str, canary: Canary, row: str) -> None:
    part, (status, code) = BAD_VIDEOS[row]
    check_error(ask(http, model, part), status, code)
    canary.check()


def test_v4_many_frames_are_sampled_in_time(http: httpx.Client, model: str, canary: Canary) -> None:
    """3000 frames in 80 kB; of them as many are kept as the ceilings allow, or as were asked for."""
    data = film(3000, (16, 16), rate=25)
    start = time.monotonic()
    tokens(ask(http, model, video(data), mm_processor_kwargs={"fps": 0.1}))
    check_error(ask(http, model, video(data), mm_processor_kwargs={"num_frames": 769}), 400, "invalid_params")
    assert time.monotonic() - start < 15
    canary.check()


def test_odd_videos_that_are_fine(http: httpx.Client, model: str, canary: Canary) -> None:
    frames = ",".join(base64.b64encode(picture("JPEG", (84, 56), seed)).decode() for seed in range(4))
    rows = {
        "a film": video(FILM), "V2 one frame": video(film(1, (84, 56))), "V3 fast": video(film(8, (84, 56), rate=1000)),
        "V9 three frames": video(film(3, (84, 56), rate=2)), "V8 few frames": video(f"data:video/jpeg;base64,{frames}"),
        "called AVI": video(FILM, "video/x-msvideo"), "WebM": video(film(12, (84, 56), kind="matroska")),
    }  # fmt: skip
    for row, part in rows.items():
        assert tokens(ask(http, model, part)) == tokens(ask(http, model, part)), row
    assert tokens(ask(http, model, rows["a film"])) == tokens(ask(http, model, rows["called AVI"]))
    canary.check()


def test_a_decode_worker_that_dies_is_replaced(server: Server, http: httpx.Client, model: str, canary: Canary) -> None:
    workers = [pid for pid in _tree(server.pid) if b"worker_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    for pid in workers:
        os.kill(pid, 9)
    replies = [ask(http, model, image(picture("JPEG", seed=100 + n))) for n in range(4)]
    assert {reply.status_code for reply in replies} <= {200, 400}
    assert [reply.status_code for reply in replies[2:]] == [200, 200]
    canary.check()
